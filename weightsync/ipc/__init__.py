"""Memory shared by the processes of one node: arenas of slots, fences that guard them, a ledger of who has what."""
