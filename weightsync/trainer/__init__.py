"""What runs in a trainer's process when it pushes.

client         `push_weights`, `push_weights_async`
lora           `push_lora`
arguments      what users give these, checked
place          which rank of which trainer this process is
rank           one push on one rank: what it says to its daemon, and what it does for it
rank_filling   its weights into slots, as leases come
rank_exposing  its weights shown where they lie
rank_memory    what the process keeps between pushes
"""
