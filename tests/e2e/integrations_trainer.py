"""A rank of transformers' Trainer that pushes with the callback: integrations_trainer.py CHECKPOINT DAEMON KIND OUT.

KIND is "ddp" or "fsdp2"; rank 0 writes what was pushed last, whole, and the versions of all pushes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from weightsync.integrations.trl import PushCallback


class Note(TrainerCallback):
    def __init__(self, pushed: PushCallback) -> None:
        self.pushed, self.steps, self.versions, self.sharded = pushed, [], [], 0

    def on_train_begin(self, args, state, control, model, **_) -> None:
        self.note(state, model)

    def on_step_end(self, args, state, control, model, **_) -> None:
        self.note(state, model)

    def note(self, state, model) -> None:
        self.steps.append(state.global_step)
        self.versions.append(self.pushed.report.version)
        self.sharded = sum(isinstance(p, DTensor) for p in model.parameters())


def main() -> None:
    checkpoint, daemon, kind, out = sys.argv[1:]
    torch.set_num_threads(1)
    fsdp = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}} if kind == "fsdp2" else {}
    if kind == "fsdp2":
        fsdp["fsdp_config"]["transformer_layer_cls_to_wrap"] = ["Qwen3DecoderLayer"]
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    pushed = PushCallback(daemon=daemon, timeout=60)
    note = Note(pushed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            out, use_cpu=True, max_steps=2, per_device_train_batch_size=1, learning_rate=0.1, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, ddp_backend="gloo", **fsdp,
        ),
        train_dataset=Dataset.from_list([{"input_ids": [i, 5, 6, 7], "labels": [i, 5, 6, 7]} for i in range(8)]),
        callbacks=[pushed, note],
    )  # fmt: skip
    trainer.train()
    assert (note.sharded > 0) == (kind == "fsdp2"), note.sharded
    whole = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().contiguous()
        for name, p in trainer.model.named_parameters()
    }
    if torch.distributed.get_rank() == 0:
        save_file(whole, Path(out, "after.safetensors"))
        Path(out, "told.json").write_text(json.dumps({"steps": note.steps, "versions": note.versions}))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
