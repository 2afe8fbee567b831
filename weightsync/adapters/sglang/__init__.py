"""SGLang: pushes into its servers over the HTTP endpoints it has for reinforcement learning.

`control.py` is the daemon's hand. It asks `server.py` who answers, lets `profiles.py` choose what that version is
spoken to in, and sends the bytes one of four ways: `path_plugin.py` (our plugin, `plugin.py`, in the scheduler), or
stock `path_tensor.py` (`/update_weights_from_tensor`), `path_ipc.py` (`/update_weights_from_ipc`) or `path_group.py`
(`/update_weights_from_distributed`).
"""
