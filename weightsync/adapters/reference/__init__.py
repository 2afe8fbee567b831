"""The reference engine: a small Qwen3-style server, tensor-parallel for real, and the model for other adapters.

    python -m weightsync.adapters.reference --model DIR --tp 2 --port 0 --port-file PATH

A request passes these files in order:

    server.py     HTTP in, JSON out; no tensor, no torch
    engine.py     what the engine may do now; turns.py: one thing at a time; gate.py: whether requests go on;
                  admission.py: whether a manifest can be taken
    group.py      one command to every worker, one answer from each (commands.py)
    worker.py     one process per tensor-parallel rank: owns the parameters, runs commands in order
    plugin.py     the reading side: slices out of slots into parameters, fingerprints of the parameters
    parallel.py   the decoder over this rank's slice, all-reduce among the workers
    sharding.py   which box of which checkpoint tensor lies where in which rank (pure)

`model.py` is the same decoder whole, with the checkpoint's names, as a trainer trains it. `config.py` reads and writes
Hugging Face's `config.json`, `checkpoint.py` their safetensors directories. `control.py` is the adapter in the daemon;
it speaks over `connection.py`.
"""
