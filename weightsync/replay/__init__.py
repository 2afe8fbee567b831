"""Replay: records the copies that an engine's loader makes, proves them, and makes them again without the loader.

    engine's load_weights ──recorder──▶ load plan ──proof──▶ replay, bucket by bucket

This package knows no engine: the engine's plugin hands in tensors and a loader. Replay can always be left out: weights
whose loading is not understood, or not proved, go on through the engine's own loader.
"""
