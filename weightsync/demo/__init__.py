"""`weightsync demo`: an end-to-end demo on this machine with real processes.

`show.py` runs it; `trainer.py` is one trainer rank.
"""
