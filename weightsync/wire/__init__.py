"""What trainer ranks and daemons say to each other: `messages` (structs), `codec` (bytes), `control` (sockets)."""
