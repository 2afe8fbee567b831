"""vLLM: `control.py` in the daemon; in vLLM's workers `backend.py` or `extension.py`, or nothing of ours (stock)."""
