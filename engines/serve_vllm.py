"""serve_vllm.py MODEL [flags]: `vllm serve`, with an engine core and workers that fork from it.

On CPU vLLM spawns them, and each imports vLLM anew, which takes half of the start. Nothing else is changed.
"""

import multiprocessing
import sys

import vllm.utils.system_utils

vllm.utils.system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv[:1] = ["vllm", "serve"]
    main()
