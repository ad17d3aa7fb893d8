"""A small distillation-like training in a process of its own, for test_engine.py: `python training_job.py FOLDER
[kill_at_image] [nan_at_image]`.

BatchNorm, dropout, AdamW, an EMA teacher, a centre and a curriculum: everything whose state a checkpoint must carry.
The environment's JOB_RECIPE (JSON) changes the recipe, JOB_SIGNAL is sent instead of SIGKILL (to the whole process
group with JOB_GROUP=1), JOB_NAN says where the NaN starts: "loss" or "weights", JOB_NAN_RANK on which rank (with
JOB_NAN_SHORT only where it does not compute in float32).
JOB_BF16 claims a CPU that multiplies bf16 fast, JOB_SICK_RANK is the rank whose probe finds a fault.
"""
import json
import os
import signal
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cion_nb.core.runs import Run
from cion_nb.training.engine import adamw, fit, Task, warmup_cosine


class Centre(nn.Module):
    "A moving average of the teacher's outputs, as a buffer."
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
    def forward(self, x):
        self.mean.lerp_(x.mean(0), .1)
        return x - self.mean


class Job(Task):
    n_images = 200
    recipe = dict(epochs=6, images_per_epoch=160, batch_size=16, workers=0, precision="fp32", seed=3,
                  checkpoint_minutes=0.0, accumulate=1) | json.loads(os.environ.get("JOB_RECIPE", "{}"))
    kill_at = nan_at = None

    def build(self, device):
        model = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2),
                              nn.Linear(32, 4)).to(device)
        self.modules = dict(model=model, teacher=deepcopy(model).requires_grad_(False), centre=Centre())
        self.optimizer = adamw(model.parameters(), lr=1e-2)

    def phase(self, seen): return 2 if seen < 480 else 4
    def sampler(self, phase, n_pass, advance, rank, world_size):
        size = self.recipe["batch_size"] // self.recipe["accumulate"]
        order = np.random.default_rng([n_pass, phase]).permutation(200)
        for i in range(size * advance, 200 - size + 1, size):
            yield np.sort(order[i:i + size].reshape(world_size, -1)[rank])

    def load(self, rows, seen):
        noise = torch.Generator().manual_seed(int(rows[0]) + 1000 * seen)
        x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))[rows]
        return x + .1 * torch.randn(x.shape, generator=noise), torch.from_numpy(rows % 4)

    def schedule(self, share):
        for g in self.optimizer.param_groups: g["lr"] = warmup_cosine(share, 1e-2, 0., .1)
        return dict(lr=self.optimizer.param_groups[0]["lr"])

    def loss(self, model, batch, accelerator):
        with torch.no_grad(): target = self.modules["centre"](self.modules["teacher"](batch[0]))
        out = model(batch[0])
        loss = nn.functional.cross_entropy(out, batch[1]) + .1 * (out - target).square().mean()
        if self.nan_at is not None and self.seen >= self.nan_at and os.environ.get(
            "JOB_NAN", "loss") == "loss" and os.environ.get("JOB_NAN_RANK") in (None, os.environ.get("RANK")) and not (
            os.environ.get("JOB_NAN_SHORT") and accelerator.mixed_precision == "no"):
            loss = loss * float("nan")
        return loss, dict(teacher=target.abs().mean())

    def before_step(self, share):
        "A gradient that is not finite although its loss is: the next loss is NaN."
        if self.nan_at is not None and self.seen >= self.nan_at and os.environ.get("JOB_NAN") == "weights":
            self.modules["model"][0].weight.grad[0] = float("inf")

    seen = 0
    def after_step(self, share):
        self.seen = round(share * 960)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.modules["teacher"].parameters()), list(self.modules["model"].parameters()),
                                 .05)
        if self.kill_at is not None and self.seen >= self.kill_at and int(os.environ.get("RANK", 0)) == 0:
            (os.killpg if os.environ.get("JOB_GROUP") else os.kill)(
                os.getpid(), int(os.environ.get("JOB_SIGNAL", signal.SIGKILL)))


def pretend():
    "The CPU that the environment asks for."
    from cion_nb.models import precision
    from cion_nb.training import engine
    if os.environ.get("JOB_BF16"): precision.has_fast_bf16 = lambda cpu: True
    if os.environ.get("JOB_SICK_RANK") == os.environ.get("RANK", "0"):
        engine.probe = lambda *args: precision.Verdict(False, "model.0 (linear): the result is not finite", 2, None, .1)


if __name__ == "__main__":
    pretend()
    folder = Path(sys.argv[1])
    job = Job()
    job.kill_at = int(sys.argv[2]) if len(sys.argv) > 2 and sys.argv[2] != "-" else None
    job.nan_at = int(sys.argv[3]) if len(sys.argv) > 3 else None
    report = fit(job, Run(dict(stage="job", profile="test"), folder), log_every=1)
    rank = int(os.environ.get("RANK", 0))
    torch.save({k: m.state_dict() for k, m in job.modules.items()}, folder / f"end-{rank}.pt")
    print(json.dumps(report))
