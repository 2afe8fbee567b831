"""What an engine's own functions make of weights: digests of float8 elements and of scales, as JSON on stdout.

    .engines/vllm/bin/python tests/engines/fp8_oracle.py vllm      (or sglang)

Run by the engine's interpreter, without weightsync. tests/fixtures/engines/fp8.json holds what it said.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAPES = {
    "one": (1, 1),
    "odd": (129, 127),
    "ragged": (300, 520),
    "flat": (128, 384),
    "wide": (64, 1000),
    "many": (1536, 2048),
}
DTYPES = ("bfloat16", "float16", "float32")


def weights() -> dict[str, torch.Tensor]:
    """Made from integers, so that they are the same wherever numpy is."""
    made = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        rng = np.random.default_rng(seed)
        numbers = rng.integers(-(1 << 22), 1 << 22, shape).astype(np.float32)
        rows = np.exp2(rng.integers(-34, -20, (shape[0], 1)).astype(np.float32))
        x = torch.from_numpy(numbers * rows)
        if name == "ragged":
            x[:128, :128] = 0  # a block of zeros
            x[:128, 128:256] *= 1e-6  # one whose amax counts for nothing
            x[130, 300] = 30000.0
            x[256:] = -0.0
        for dtype in DTYPES:
            made[f"{name}-{dtype}"] = x.to(getattr(torch, dtype))
    return made


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's bytes."""
    return hashlib.blake2b(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def vllm() -> dict[str, Any]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.online.fp8 import _fp8_scale
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, weight_amax
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    def per_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = _fp8_scale(weight_amax(x).reshape(1))
        made: tuple[torch.Tensor, torch.Tensor] = static.forward_native(x, scale)
        return made

    as_written = per_block_cast_to_fp8._torchdynamo_orig_callable

    def per_block(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        compiled = name in ("ragged-bfloat16", "many-float32")  # as vLLM runs it; each takes seconds
        made: tuple[torch.Tensor, torch.Tensor] = (per_block_cast_to_fp8 if compiled else as_written)(x)
        return made

    with set_current_vllm_config(VllmConfig()):
        static = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR)
        return {
            "block": {name: list(map(digest, per_block(name, x))) for name, x in weights().items()},
            "block ue8m0": {name: list(map(digest, as_written(x, use_ue8m0=True))) for name, x in weights().items()},
            "tensor": {name: list(map(digest, per_tensor(x))) for name, x in weights().items()},
        }


def sglang() -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).parents[2] / "engines"))
    import serve_sglang  # type: ignore[import-not-found]  # noqa: F401 - or it is not imported on a CPU
    from sglang.srt.layers.quantization.fp8_utils import input_to_float8, per_block_cast_to_fp8

    scales = {name: input_to_float8(x)[1].reshape(1) for name, x in weights().items()}
    return {
        "block ue8m0": {name: list(map(digest, per_block_cast_to_fp8(x))) for name, x in weights().items()},
        "tensor scales": {name: scale.view(torch.int32).item() for name, scale in scales.items()},
    }


if __name__ == "__main__":
    json.dump({"vllm": vllm, "sglang": sglang}[sys.argv[1]](), sys.stdout, indent=1)
