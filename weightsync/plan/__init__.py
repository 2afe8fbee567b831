"""Plans a push: the manifest, its buckets, and the parts that each rank writes. Pure: numpy, no torch, no I/O."""
