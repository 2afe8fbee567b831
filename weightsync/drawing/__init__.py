"""An engine's worker draws its weights out of the trainer's memory, or shows places for them: one pass, no slots.

direct.py    both ways, for one update
drawer.py    draws, by copies that are worked out once for a layout
host.py      copies in host memory
device.py    copies on a GPU, by one launch over a table that stays there
conveyor.py  a bridge's: packs or unpacks parcels while others travel
places.py    shows a worker's places to the bridges that write there
landing.py   places for parameters in host memory
"""
