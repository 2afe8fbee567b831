"""make_block_fp8.py FROM TO: a bfloat16 checkpoint with its linear layers in float8, a scale for 128 x 128 elements.

Run by vLLM's interpreter: vLLM's own `per_block_cast_to_fp8` quantises, so that weightsync's is compared with something
other than itself. Embeddings, norms, routers and the head stay as they are. It runs on the CPU, where it divides as it
says. With a GPU, it prints how many scales and elements it makes otherwise there, compiled as vLLM runs it.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm.utils.deep_gemm import per_block_cast_to_fp8

KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.")


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
    made = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if any(part in name for part in KEPT):
            made[name] = weight
        else:
            with torch.compiler.set_stance("force_eager"):
                made[name], made[f"{name}_scale_inv"] = per_block_cast_to_fp8(weight)
    save_file(made, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (target / "config.json").write_text(json.dumps(config, indent=1))
    if torch.cuda.is_available():
        compare(source, made)


def compare(source: Path, made: dict[str, torch.Tensor]) -> None:
    """Print what the GPU makes otherwise."""
    counts = {"scales": [0, 0], "elements": [0, 0]}
    for name, weight in load_file(source / "model.safetensors", device="cuda").items():
        if f"{name}_scale_inv" not in made:
            continue
        elements, scales = (tensor.cpu() for tensor in per_block_cast_to_fp8(weight))
        for what, here, there in (
            ("scales", scales.view(torch.int32), made[f"{name}_scale_inv"].view(torch.int32)),
            ("elements", elements.view(torch.uint8), made[name].view(torch.uint8)),
        ):
            counts[what][0] += int((here != there).sum())
            counts[what][1] += here.numel()
    for what, (other, all_of_them) in counts.items():
        print(f"{what} that the GPU makes otherwise: {other} of {all_of_them}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
