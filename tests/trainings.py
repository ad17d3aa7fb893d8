"""Recipes of trainings that end in seconds, and tables with one thing changed."""
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cion_nb.core.runs import Run
from cion_nb.core.samples import read_samples, write_samples
from cion_nb.core.settings import recipe
from cion_nb.models.architectures import InputSpec
from cion_nb.training import engine
from cion_nb.training.engine import adamw, fit, last_checkpoint, Task

QUICK = dict(epochs=2, images_per_epoch=32, batch_size=16, warmup_epochs=1, precision="fp32", channels_last=False)


def quick(people, **changes): return recipe("finetune", "tiny", data=str(people), **QUICK | changes)


def what_is_erased(task, r):
    "(pixels, 3) that a network sees inside the erased boxes of a task's own batch."
    class Seen(Exception): pass
    def network(x, *more): raise Seen(x)
    task.transform.size, task.transform.pad = (64, 32), 0
    batch = task.load(np.arange(48), 48)
    task.modules = (dict(model=SimpleNamespace(input=InputSpec(64, 32, mean=r["mean"], std=r["std"])))
                    | ({} if "pid" in batch else dict(memory=SimpleNamespace(labels=torch.zeros(64)))))
    with pytest.raises(Seen) as seen: task.loss(network, batch, None)
    return torch.cat([x[:, t:t + h, l:l + w].flatten(1).T
                      for x, (t, l, h, w) in zip(seen.value.args[0], batch["boxes"].tolist())])


def changed(people, tmp_path, change):
    "A copy of the data set with its table changed."
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "changed")
    write_samples(change(read_samples(people), root), root / "samples.parquet")
    return root / "samples.parquet"


class Net(engine.Task):
    "Two linear maps, fitted in bf16 where that is sound."
    n_images = 64
    def __init__(self, **changes):
        self.recipe = dict(epochs=2, images_per_epoch=64, batch_size=16, workers=0, precision="auto", seed=0,
                           checkpoint_minutes=0.) | changes
    broken = ()               # images seen at which the loss is NaN in bf16
    def build(self, device):
        self.modules = dict(model=nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(),
                                                nn.Linear(16, 4)).to(device))
        self.optimizer = torch.optim.SGD(self.modules["model"].parameters(), lr=.05)
    def sampler(self, phase, n_pass, advance, rank, world_size):
        return np.random.default_rng(n_pass).permutation(64).reshape(-1, 16)[advance:]
    def load(self, rows, seen):
        self.seen = seen
        return torch.randn(64, 8, generator=torch.Generator().manual_seed(0))[rows], torch.from_numpy(rows % 4)
    def loss(self, model, batch, accelerator):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return loss * (float("nan") if self.seen in self.broken and (accelerator.mixed_precision != "no" or self.always)
                       else 1), {}
    seen, always = 0, False


def ended(task): return {k: v.clone() for k, v in task.modules["model"].state_dict().items()}


def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


def trained(folder, **changes):
    task = Net(**changes)
    run = Run(dict(stage="net", profile="test"), folder)
    return task, run, fit(task, run, log_every=1)


class Cut(Exception): pass


def cut(folder, at=64, **changes):
    "A run that dies after its checkpoint at this image."
    class Cutting(Net):
        def loss(self, *args):
            if last_checkpoint(run) and last_checkpoint(run).name.endswith(f"{at:012d}"): raise Cut
            return super().loss(*args)
    run = Run(dict(stage="net", profile="test"), folder)
    with pytest.raises(Cut): fit(Cutting(**changes), run)
    return run


SMALL = dict(epochs=2, images_per_epoch=48, batch_size=24, n_id_epochs=[0, 1], n_id=[2, 4], n_local=1, out_dim=32,
             head_hidden=32, head_bottleneck=16, queue=48, precision="fp32", channels_last=False)


def asked(people, method="tracklet", **changes):
    return recipe("pretrain", "tiny", method=method,
                  **dict(data=str(people),
                         identities=dict(tracklet="tracklet", cion_true="true_pid").get(method, "image")) | SMALL
                  | (dict(n_id=[1], n_id_epochs=[0]) if method in ("dino", "lup") else {})
                  | (dict(n_local=0) if method == "lup" else {}) | changes)


class Toy(Task):
    "Fitted in this process: a linear map of 60 points, optionally from images on disk."
    n_images, kept = 60, None
    def __init__(self, **changes):
        self.recipe = dict(epochs=2, images_per_epoch=48, batch_size=12, workers=0, precision="fp32", seed=0,
                           checkpoint_minutes=60) | changes
    def build(self, device):
        self.modules = dict(model=nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1)).to(device))
        self.modules["teacher"] = deepcopy(self.modules["model"]).requires_grad_(False)
        self.optimizer = adamw(self.modules["model"].parameters(), 1e-2)
    def sampler(self, phase, n_pass, advance, rank, world_size):
        size = self.recipe["batch_size"] // self.recipe.get("accumulate", 1)
        order = np.random.default_rng(n_pass).permutation(60)
        for i in range(advance * size, 60, size): yield order[i:i + size]
    def load(self, rows, seen):
        if self.images is not None: return torch.stack([i.float().mean((1, 2)) for i in self.images[rows]]) / 255
        return torch.randn(60, 3, generator=torch.Generator().manual_seed(0))[rows]
    def loss(self, model, batch, accelerator):
        with torch.no_grad(): target = self.modules["teacher"](batch)
        return (model(batch) - batch.sum(1, keepdim=True) - 0 * target).square().mean(), dict(mean=batch.mean())


def toy(folder, **changes):
    task = Toy(**changes)
    run = Run(dict(stage="toy", profile="test"), folder)
    return task, run, fit(task, run, log_every=1)
