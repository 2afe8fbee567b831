"""What runs on a GPU: one kernel that copies boxes of tensors and sums their fingerprints.

table.py     boxes as the kernel's items; pure
boxes.cu     the kernel
launch.py    tables on a device, and launches
buckets.py   copies and checksums of whole buckets
reading.py   buckets for a reader on a GPU
fetching.py  buckets for a reader that keeps them in host memory
leases.py    leases that end when a GPU is past their readers
waiting.py   waits with a deadline

Importing this loads neither cupy nor torch.
"""
