"""What one load of a layout copied where, proved, and done again without the engine's loader.

    engine's load_weights ──recorder──▶ load plan ──proof──▶ replay, bucket by bucket

Rules for what lives here: nothing of an engine (its plugin hands in tensors and a loader), and nothing that is not safe
to leave out: whatever is not understood or not proved goes on through the engine's own loader.
"""
