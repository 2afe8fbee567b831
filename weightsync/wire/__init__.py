"""What trainer ranks, operators' commands and daemons say to each other.

`messages` (structs), `codec` (bytes), `trainer_link` and `daemon_links` (sockets), and the `keys` of links between
machines.
"""
