"""A rank's part of a push: its weights into leased slots, and their fingerprints.

program.py  what this rank writes where, worked out once for a plan
host.py     into slots in host memory
local.py    where a rank's weights lie, and when they may be read
device.py   into slots on GPUs
"""
