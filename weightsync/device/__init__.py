"""What runs on a GPU: one kernel that copies boxes of tensors and sums their fingerprints.

table.py   boxes as the kernel's items; pure
boxes.cu   the kernel
launch.py  tables on a device, and launches

Importing this loads neither cupy nor torch.
"""
