"""What `grpo_tiny.py` asks its engine for: sampled continuations of prompts, and their logprobs, over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import torch

__all__ = ["Rollouts", "Sampler"]

SECONDS = 120.0  # for one request
AT_ONCE = 8  # requests under way from one rank


class Rollouts(NamedTuple):
    """Sequences of a prompt and a continuation; those of one prompt, its group, come one after the other."""

    tokens: torch.Tensor  # int64[sequences, prompt + continuation]
    logprobs: torch.Tensor  # float32[sequences, continuation], as the engine sampled them

    @property
    def continuations(self) -> torch.Tensor:
        """int64[sequences, continuation]."""
        return self.tokens[:, -self.logprobs.shape[1] :]


class Sampler:
    """A rank's connections to the engine."""

    def __init__(self, kind: str, url: str) -> None:
        self._kind = kind
        self._http = httpx.Client(base_url=url, timeout=SECONDS, trust_env=False)
        self._threads = ThreadPoolExecutor(AT_ONCE)

    def close(self) -> None:
        """Hang up; nothing may be under way."""
        self._threads.shutdown()
        self._http.close()

    def sample(self, prompts: torch.Tensor, *, group: int, count: int, seed: int) -> Rollouts:
        """`group` continuations of `count` tokens for each of prompts[P, T], at temperature 1.

        Only the reference engine takes the seed.
        """
        seeds = range(seed, seed + group * len(prompts), group)
        groups = self._threads.map(lambda ids, s: self._ask(ids, group, count, s), prompts.tolist(), seeds)
        answers = [answer for answers in groups for answer in answers]
        tokens = torch.tensor([tokens for tokens, _ in answers])
        whole = torch.cat((prompts.repeat_interleave(group, dim=0), tokens), dim=1)
        return Rollouts(whole, torch.tensor([logprobs for _, logprobs in answers]))

    def _ask(self, prompt: list[int], group: int, count: int, seed: int) -> list[tuple[list[int], list[float]]]:
        """The continuations of one prompt, in the words of this kind of engine."""
        if self._kind == "vllm":  # without a seed: one ends vLLM 0.32 on a CPU ("CPU Generator does not use offset")
            body = {"model": "policy", "prompt": prompt, "n": group, "max_tokens": count, "temperature": 1.0}
            body |= {"logprobs": 0, "return_token_ids": True, "ignore_eos": True}
            choices = self._post("/v1/completions", body)["choices"]
            return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]
        if self._kind == "sglang":  # takes a seed only with --enable-deterministic-inference
            sampling = {"n": group, "max_new_tokens": count, "temperature": 1.0, "ignore_eos": True}
            body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
            pairs = [answer["meta_info"]["output_token_logprobs"] for answer in self._post("/generate", body)]
            return [([token for _, token, *_ in each], [logprob for logprob, *_ in each]) for each in pairs]
        bodies = [
            {"prompt_ids": prompt, "max_tokens": count, "logprobs": True, "seed": s} for s in range(seed, seed + group)
        ]
        answers = [self._post("/generate", body) for body in bodies]
        return [(answer["token_ids"], answer["logprobs"]) for answer in answers]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._http.post(path, json=body)
        if not answer.is_success:
            raise RuntimeError(f"{answer.url} answers {answer.status_code}: {answer.text[:1000]}")
        return answer.json()
