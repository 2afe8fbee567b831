"""A rank of transformers' Trainer that pushes with the callback: integrations_trainer.py CHECKPOINT DAEMON KIND OUT.

KIND is "ddp" or "fsdp2"; rank 0 writes what was pushed last, whole, and the versions of all pushes. accelerate knows no
FSDP on a CPU: "fsdp2" is a plain loop on a model that is sharded as accelerate does it, and calls what Trainer calls.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen3ForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments

from weightsync.integrations.trl import PushCallback


class Note(TrainerCallback):  # type: ignore[misc]
    def __init__(self, pushed: Any) -> None:
        self.pushed, self.sharded = pushed, 0
        self.steps: list[int] = []
        self.versions: list[int] = []

    def on_train_begin(self, args, state, control, model, **_) -> None:
        self.note(state, model)

    def on_step_end(self, args, state, control, model, **_) -> None:
        self.note(state, model)

    def note(self, state, model) -> None:
        self.steps.append(state.global_step)
        self.versions.append(self.pushed.report.version)
        self.sharded = sum(isinstance(p, DTensor) for p in model.parameters())


EXAMPLES = [{"input_ids": [i, 5, 6, 7], "labels": [i, 5, 6, 7]} for i in range(8)]


def ddp_trainer(model, callbacks, out: str):
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            out, use_cpu=True, max_steps=2, per_device_train_batch_size=1, learning_rate=0.1, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, ddp_backend="gloo",
        ),
        train_dataset=Dataset.from_list(EXAMPLES),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return trainer.model


def fsdp2_loop(model, callbacks):
    torch.distributed.init_process_group("gloo")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer, state = torch.optim.AdamW(model.parameters(), lr=0.1), TrainerState()
    for callback in callbacks:
        callback.on_train_begin(None, state, None, model=model)
    for example in EXAMPLES[:2]:
        model(**{name: torch.tensor([ids]) for name, ids in example.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        for callback in callbacks:
            callback.on_step_end(None, state, None, model=model)
    return model


def main() -> None:
    checkpoint, daemon, kind, out = sys.argv[1:]
    torch.set_num_threads(1)
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    pushed = PushCallback(daemon=daemon, timeout=60)
    note = Note(pushed)
    trained = fsdp2_loop(model, [pushed, note]) if kind == "fsdp2" else ddp_trainer(model, [pushed, note], out)
    assert (note.sharded > 0) == (kind == "fsdp2"), note.sharded
    whole = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().contiguous()
        for name, p in trained.named_parameters()
    }
    if torch.distributed.get_rank() == 0:
        save_file(whole, Path(out, "after.safetensors"))
        Path(out, "told.json").write_text(json.dumps({"steps": note.steps, "versions": note.versions}))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
