"""Memory shared by the processes of one node: arenas of slots, fences that guard them, books of who has what."""
