"""A process that keeps what was pushed last in host memory, and pushes it again to engines that come late.

It is a reader like any engine's worker while a push is under way, and a trainer of one rank when it pushes. Started by
weightsyncd where `node.retain = "host"`, one for each model; see docs/faults.md.
"""
