"""An engine's worker reads its weights where the trainer has them, or shows where they may be written: no slot, no
bucket, one pass.

direct.py    both, for one update
drawer.py    what is drawn out of what, worked out once for a layout
host.py      copies in host memory
device.py    one launch over a table that stays on the GPU
conveyor.py  launches side by side with the travel of what they pack, or take out: a bridge's
places.py    what is shown to whoever writes
landing.py   where they write for parameters in host memory
"""
