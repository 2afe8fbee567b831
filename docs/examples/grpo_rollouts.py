"""What `grpo_tiny.py` asks its engine for: sampled continuations of prompts, and their logprobs, over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import httpx
import torch

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Rollouts", "Sampler"]

SECONDS = 120.0  # for one request
AT_ONCE = 32  # requests under way from one rank


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._http.close()

    def sample(self, prompts: torch.Tensor, *, group: int, count: int, seed: int) -> Rollouts:
        """`group` continuations of `count` tokens for each of prompts[P, T], at temperature 1."""
        whole = prompts.repeat_interleave(group, dim=0)
        seeds = range(seed, seed + len(whole))
        answers = list(self._threads.map(lambda ids, s: self._ask(ids, count, s), whole.tolist(), seeds))
        tokens = torch.tensor([tokens for tokens, _ in answers])
        return Rollouts(torch.cat((whole, tokens), dim=1), torch.tensor([logprobs for _, logprobs in answers]))

    def _ask(self, prompt: list[int], count: int, seed: int) -> tuple[list[int], list[float]]:
        """One continuation, in the words of this kind of engine."""
        if self._kind == "vllm":
            body = {"model": "policy", "prompt": prompt, "max_tokens": count, "temperature": 1.0, "seed": seed}
            body |= {"logprobs": 0, "return_token_ids": True, "ignore_eos": True}
            choice = self._post("/v1/completions", body)["choices"][0]
            return choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if self._kind == "sglang":  # takes a seed only with --enable-deterministic-inference
            sampling = {"max_new_tokens": count, "temperature": 1.0, "ignore_eos": True}
            body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
            pairs = self._post("/generate", body)["meta_info"]["output_token_logprobs"]
            return [token for _, token, *_ in pairs], [logprob for logprob, *_ in pairs]
        body = {"prompt_ids": prompt, "max_tokens": count, "logprobs": True, "seed": seed}
        answer = self._post("/generate", body)
        return answer["token_ids"], answer["logprobs"]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._http.post(path, json=body).raise_for_status().json()
