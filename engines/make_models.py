"""make_models.py FOLDER: tiny checkpoints with seeded random weights, and the tokens that they must generate.

dense (Qwen3, fp32), moe (Qwen3-MoE of 8 experts, fp32) and tied (Qwen3 with tied embeddings, bf16), each as NAME_base
and NAME_pert. NAME_pert is base with noise on every tensor, so that every prompt goes on differently. The tokenizer
knows bytes and needs no download. `oracle.json` in each folder holds greedy tokens and their logprobs of the
transformers model itself, computed in fp32. This oracle shares no code with the engines' models and needs no server.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB = 1024
NOISE = 0.05
LONG = [37 * i % 251 for i in range(300)]  # longer than a block of any engine's prefix cache
PROMPTS = ([5, 17, 211, 3, 42], [66], LONG)
TOKENS = 16
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,  # long enough for a request that outlives a push
    "eos_token_id": 256,
    "pad_token_id": 256,
    "bos_token_id": None,
}
EXPERTS = {
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
MODELS = {
    "dense": (Qwen3ForCausalLM, Qwen3Config(**SMALL, tie_word_embeddings=False), torch.float32),
    "moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SMALL, **EXPERTS, tie_word_embeddings=False), torch.float32),
    "tied": (Qwen3ForCausalLM, Qwen3Config(**SMALL, tie_word_embeddings=True), torch.bfloat16),
}


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for word in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocab[word] = len(vocab)
    while len(vocab) < VOCAB:
        vocab[f"<|fill_{len(vocab)}|>"] = len(vocab)
    bytewise = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def greedy(model: torch.nn.Module, prompt: list[int]) -> dict[str, list[float]]:
    """Return `TOKENS` greedy tokens after the prompt, and their logprobs. No token ends the text early."""
    ids, logprobs = list(prompt), []
    for _ in range(TOKENS):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return {"prompt": list(prompt), "tokens": ids[len(prompt) :], "logprobs": logprobs}


def main(out: Path) -> None:
    words = tokenizer()
    for name, (kind, config, dtype) in MODELS.items():
        torch.manual_seed(0)
        config.initializer_range = 0.2  # wide enough that greedy decoding is far from ties
        model = kind(config).to(dtype)
        noise = torch.Generator().manual_seed(1)
        for tag in ("base", "pert"):
            if tag == "pert":
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_((torch.randn(parameter.shape, generator=noise) * NOISE).to(parameter.dtype))
            folder = out / f"{name}_{tag}"
            model.save_pretrained(folder)
            words.save_pretrained(folder)
            exact = kind.from_pretrained(folder, dtype=torch.float32).eval()
            (folder / "oracle.json").write_text(json.dumps([greedy(exact, prompt) for prompt in PROMPTS]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
