"""SGLang: pushes into its servers over the HTTP endpoints it has for reinforcement learning.

`control.py` is the daemon's hand. It asks `server.py` who answers, lets `profiles.py` choose what that version is
spoken to in, and sends the bytes one of three ways: `tensor.py` (stock `/update_weights_from_tensor`),
`checkpoint_engine.py` (stock `/update_weights_from_ipc`) or `ordered.py` (our plugin, `plugin.py`, in the scheduler).
"""
