"""What trainer ranks and daemons say to each other.

`messages` (structs), `codec` (bytes), `trainer_link` and `daemon_links` (sockets), and the `keys` that links between
machines need.
"""
