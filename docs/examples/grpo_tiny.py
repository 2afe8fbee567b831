"""GRPO on a tiny model, all of it real: FSDP2 ranks train, an engine generates, weightsync carries the weights across.

    python docs/examples/grpo_tiny.py --engine vllm --steps 40 --out grpo
    python docs/examples/grpo_tiny.py --engine vllm --steps 40 --out grpo --no-push  # the control

The model is rewarded for writing digits. Every step each rank has the engine continue its prompts, several times each
(a group); what did better than the mean of its group becomes likelier; and the new weights are pushed into the engine.

The trainer computes the logprobs of the sampled tokens anyway, and the engine has sent those that it sampled with. With
the same weights on both sides they differ by rounding. Each step records by how much: the gap. A push that were late,
torn or incomplete, or a cache computed by old weights, would show in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import Progress
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from grpo_plot import plot
from grpo_rollouts import Rollouts, Sampler
from grpo_servers import KINDS, VOCABULARY, Servers, free_port, make_checkpoint, running
from weightsync import push_weights
from weightsync.adapters.reference.model import CausalLM, load_checkpoint

RANKS = 2
PROMPTS = 8  # of all ranks together
PROMPT_TOKENS = 64  # two blocks of vLLM's prefix cache: the prompts stay the same, so that it is used
GROUP = 8  # continuations of one prompt
TOKENS = 16  # of one continuation
EPOCHS = 2  # optimiser steps on the same rollouts
CLIP = 0.2
LEARNING_RATE = 1e-3
DIGITS = torch.tensor([ord(digit) for digit in "0123456789"])
PUSH_SECONDS = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=KINDS, default="vllm", help="reference needs nothing installed")
    parser.add_argument("--url", default="", help="a server that you start yourself, on OUT/checkpoint")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--push-every", type=int, default=1, metavar="K", help="push after each K-th step only")
    parser.add_argument("--no-push", dest="push_every", action="store_const", const=0, help="never push")
    parser.add_argument("--out", type=Path, default=Path("grpo"), help="gets a JSON of each run, and the plot of all")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the servers then, as after Ctrl-C

    console = Console()
    checkpoint: Path = arguments.out.resolve() / "checkpoint"
    make_checkpoint(checkpoint)
    started = time.monotonic()
    console.print(f"{arguments.engine} and weightsyncd start; the engine serves {checkpoint}")
    with running(arguments.engine, checkpoint, arguments.url) as servers:
        console.print(f"up after {time.monotonic() - started:.0f} s; {RANKS} FSDP2 ranks train")
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # as torchrun would
        mp.spawn(train, (arguments, checkpoint, servers), RANKS, daemon=True)  # type: ignore[attr-defined, no-untyped-call]
    console.print(f"wrote {run_file(arguments)} and {plot(arguments.out)}")


def train(rank: int, arguments: argparse.Namespace, checkpoint: Path, servers: Servers) -> None:
    """One trainer rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    model = load_checkpoint(checkpoint)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    whole = torch.randint(VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    prompts = whole[rank::RANKS]  # a group stays on one rank
    log = Log(arguments) if rank == 0 else None
    with contextlib.closing(Sampler(arguments.engine, servers.engine)) as sampler:
        for step in range(1, arguments.steps + 1):
            clock = Clock()
            seed = (step * RANKS + rank) * PROMPTS * GROUP
            rollouts = sampler.sample(prompts, group=GROUP, count=TOKENS, seed=seed)
            generating = clock.lap()

            reward = torch.isin(rollouts.continuations, DIGITS).float().mean(dim=1)
            advantage = group_advantage(reward)
            gap = torch.zeros(0)
            for epoch in range(EPOCHS):
                logprobs = trainer_logprobs(model, rollouts)
                if epoch == 0:  # the weights are still those that the last push sent
                    gap = (logprobs.detach() - rollouts.logprobs).abs()
                torch.autograd.backward(policy_loss(logprobs, rollouts.logprobs, advantage))
                optimiser.step()
                optimiser.zero_grad()
            training = clock.lap()

            pushing = blocked = 0.0
            if arguments.push_every and step % arguments.push_every == 0:
                report = push_weights(model, version=step, daemon=servers.daemon, timeout=PUSH_SECONDS)
                if not report.complete:
                    raise SystemExit(str(report))  # says which engine did not take it, and why
                pushing, blocked = clock.lap(), report.blocked_seconds

            mean = over_ranks(dist.ReduceOp.SUM, reward=reward.mean() / RANKS, gap_mean=gap.mean() / RANKS)
            worst = over_ranks(
                dist.ReduceOp.MAX,
                gap_max=gap.max(),
                generating=generating,
                training=training,
                pushing=pushing,
                blocked=blocked,
            )
            if log is not None:
                log.add(step, mean | worst, rollouts.continuations[0])
    if log is not None:
        log.close()
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch 2.13's gloo threads now and then abort a process that ends the ordinary way


def group_advantage(reward: torch.Tensor) -> torch.Tensor:
    """reward[sequences] → by how much each beats the mean of its group, in standard deviations; [sequences, 1]."""
    groups = reward.view(-1, GROUP)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).view(-1, 1)


def trainer_logprobs(model: CausalLM, rollouts: Rollouts) -> torch.Tensor:
    """The trainer's own logprobs of the continuations; float32[sequences, continuation]."""
    count = rollouts.logprobs.shape[1]
    scores: torch.Tensor = model(rollouts.tokens)[:, -count - 1 : -1].log_softmax(dim=-1)
    return scores.gather(-1, rollouts.continuations[..., None])[..., 0]


def policy_loss(logprobs: torch.Tensor, sampled: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """PPO's clipped objective. The ratio is to the policy that sampled, so to the engine's own logprobs."""
    ratio = (logprobs - sampled).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


def over_ranks(operation: Any, **values: float | torch.Tensor) -> dict[str, float]:
    """Each value reduced over the ranks; a collective."""
    reduced = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    dist.all_reduce(reduced, op=operation)
    return dict(zip(values, reduced.tolist(), strict=True))


class Clock:
    """Seconds of one phase after the other, each until the slowest rank is through it."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def lap(self) -> float:
        dist.barrier()
        before, self._since = self._since, time.monotonic()
        return self._since - before


class Log:
    """A line for each step, a progress bar under them, and in the end the JSON."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._rows: list[dict[str, Any]] = []
        self._progress = Progress(console=Console(width=None if sys.stdout.isatty() else 120, highlight=False))
        self._task = self._progress.add_task("training", total=arguments.steps)
        self._progress.start()
        self._print("step  reward  gap mean   gap max  generate   train    push  blocked  one continuation")

    def add(self, step: int, row: dict[str, float], continuation: torch.Tensor) -> None:
        self._rows.append({"step": step, **{name: float(f"{value:.4g}") for name, value in row.items()}})
        text = "".join(chr(token) if 32 <= token < 127 else "·" for token in continuation.tolist())
        seconds = " ".join(f"{row[phase]:6.3f}s" for phase in ("generating", "training", "pushing", "blocked"))
        self._print(
            f"{step:4d}  {row['reward']:6.3f}  {row['gap_mean']:8.1e}  {row['gap_max']:8.1e}  {seconds}  {text}"
        )
        self._progress.advance(self._task)

    def close(self) -> None:
        """Write the run. Medians leave out the first step, in which all is done for the first time, and steps without a
        push.
        """
        self._progress.stop()
        rewards = [row["reward"] for row in self._rows]
        run = {
            "name": run_name(self._arguments),
            "command": " ".join(["python", *sys.argv]),
            "machine": f"{os.cpu_count()} cores, Linux {platform.release()}, torch {torch.__version__}",
            "load_average": os.getloadavg()[1],  # of the last 5 minutes
            "dtype": "float32",  # of the trainer and of the engine
            "reward_first_5": statistics.mean(rewards[:5]),
            "reward_last_5": statistics.mean(rewards[-5:]),
            "gap_mean": statistics.mean(row["gap_mean"] for row in self._rows),
            "gap_max": max(row["gap_max"] for row in self._rows),
            "median_seconds": {
                phase: statistics.median([row[phase] for row in self._rows[1:] if row[phase]] or [0.0])
                for phase in ("generating", "training", "pushing", "blocked")
            },
            "steps": self._rows,
        }
        run_file(self._arguments).write_text(json.dumps(run, indent=1) + "\n")

    def _print(self, line: str) -> None:
        self._progress.console.print(line, markup=False)


def run_name(arguments: argparse.Namespace) -> str:
    pushes = {0: "never pushed", 1: "pushed every step"}
    return f"{arguments.engine}, {pushes.get(arguments.push_every, f'pushed every {arguments.push_every} steps')}"


def run_file(arguments: argparse.Namespace) -> Path:
    folder: Path = arguments.out
    return folder / f"{run_name(arguments).replace(',', '').replace(' ', '-')}.json"


if __name__ == "__main__":
    main()
