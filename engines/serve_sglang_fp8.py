"""serve_sglang_fp8.py [flags]: `serve_sglang.py`, for `--quantization fp8` on a CPU without AMX.

SGLang has no kernel for such layers there. They quantise as on a GPU, and multiply with the dequantised weights.
"""

import runpy

import serve_sglang  # noqa: F401  (lets SGLang be imported)
import torch


def _apply(_method, layer, x, bias=None):
    weight = (layer.weight.t().float() * layer.weight_scale).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


if __name__ == "__main__":
    from sglang.srt.layers.quantization import fp8

    fp8._is_cpu = False
    fp8.Fp8LinearMethod.apply = _apply
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
