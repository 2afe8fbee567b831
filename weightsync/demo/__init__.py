"""`weightsync demo`: the main job, shown on this machine with real processes. `show.py` runs it, `trainer.py` is a
rank.
"""
