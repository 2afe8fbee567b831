"""Exposing: a trainer rank shows engines its weights where they lie, and copies of those that cannot be read there.

base.py    the protocol of both
host.py    copies weights in host memory into a file without a name
device.py  shows allocations of a GPU

Each has a class for the exposed memory, kept between pushes, and an `Exposing` for one push. `advance` is called until
the weights may be read (`ready`) and their fingerprints are known (`measured`).
"""
