"""Who sends what, in which order: manifests, buckets and the parts each rank writes. Pure: numpy, no torch, no I/O."""
