"""A trainer rank shows engines its own memory: where its weights lie already, and a copy of what cannot be read there.

host.py    a file without a name, for weights in host memory
device.py  allocations of a GPU

Each makes an `Exposed`, which is kept between pushes, and from that for one push an `Exposing`: `advance` is called
until the weights may be read (`ready`) and their fingerprints are there (`measured`).
"""
