"""The trainer's side of a push.

client         `push_weights`, `push_weights_async`
lora           `push_lora`
arguments      checks of the arguments that users give
place          which rank of which trainer this process is
rank           one push on one rank: its messages to the daemon, and its work
rank_filling   fills slots with the rank's weights, as leases come
rank_exposing  exposes the rank's weights where they lie
rank_memory    what the process keeps between pushes
"""
