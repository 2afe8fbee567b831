"""Filling: a rank writes its parts into leased slots, and fingerprints them.

program.py  what a rank writes where, worked out once for a plan
host.py     fills slots in host memory
local.py    where a rank's weights lie, and when they may be read
device.py   fills slots on GPUs
"""
