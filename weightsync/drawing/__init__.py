"""An engine's worker reads its weights where the trainer has them: no slot, no bucket, one pass.

drawer.py  what is drawn out of what, worked out once for a layout
host.py    copies in host memory
device.py  one launch over a table that stays on the GPU
"""
