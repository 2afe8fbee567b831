"""make_block_fp8.py FROM TO: a bfloat16 checkpoint with its linear layers in float8, a scale for 128 x 128 elements.

Run by vLLM's interpreter, on a GPU: vLLM's own `per_block_cast_to_fp8` quantises, so that weightsync's is compared with
something other than itself. Embeddings, norms, routers and the head stay as they are.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from vllm.utils.deep_gemm import per_block_cast_to_fp8

KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.")


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
    made = {}
    for name, weight in load_file(source / "model.safetensors", device="cuda").items():
        if any(part in name for part in KEPT):
            made[name] = weight
        else:
            made[name], made[f"{name}_scale_inv"] = per_block_cast_to_fp8(weight)
    save_file({name: tensor.cpu() for name, tensor in made.items()}, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (target / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
