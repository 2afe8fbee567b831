"""An engine's worker reads its weights where the trainer has them: no slot, no bucket, one pass.

drawer.py  what is drawn out of what, worked out once for a layout
host.py    copies in host memory
device.py  one launch over a table that stays on the GPU

and, for engines of other nodes, bridges pack pieces and take them out again:

conveyor.py  side by side with the pieces' travel
"""
