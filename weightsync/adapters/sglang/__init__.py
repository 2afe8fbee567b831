"""SGLang: pushes into its servers over the HTTP endpoints it has for reinforcement learning.

`control.py` is the adapter. It learns through `server.py` which server answers, lets `profiles.py` choose the dialect
of that version, and loads buckets over one of four paths: `path_plugin.py` (our plugin, `plugin.py`, in the scheduler),
or stock `path_tensor.py` (`/update_weights_from_tensor`), `path_ipc.py` (`/update_weights_from_ipc`) or `path_group.py`
(`/update_weights_from_distributed`).
"""
