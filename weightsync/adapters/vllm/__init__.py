"""vLLM: `control.py` in the daemon; in its workers `backend.py` or `extension.py`, or nothing of ours (`ipc`)."""
