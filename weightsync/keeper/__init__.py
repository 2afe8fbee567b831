"""The keeper: a process that keeps the last push in host memory, and repeats it to engines that are late.

During a push it is a reader like any engine's worker; when it repeats one, it is a trainer of one rank. If
`node.retain = "host"`, weightsyncd starts one for each model; see docs/faults.md.
"""
