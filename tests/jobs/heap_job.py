"""Short trainings of every stage and an extraction in this process's heap, for test_precision.py: `python heap_job.py
SAMPLES STAGE|all auto|unprobed`; prints what each ended with.

The heap is poisoned from outside, by glibc's MALLOC_PERTURB_. `unprobed` takes bf16 without asking.
"""
import hashlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from cion_nb.core.runs import Run
from cion_nb.core.samples import read_samples
from cion_nb.core.settings import recipe
from cion_nb.models import precision
from cion_nb.models.backbones import create_backbone
from cion_nb.models.features import embed
from cion_nb.training import cluster_contrast, engine, finetune, pretrain

VIEWS = dict(epochs=1, images_per_epoch=48, batch_size=24, n_id_epochs=[0], n_id=[2], n_local=1, out_dim=32,
             head_hidden=32, head_bottleneck=16, queue=48, warmup_epochs=0, warmup_teacher_temp_epochs=0)
STEPS = dict(epochs=2, images_per_epoch=16, batch_size=16, warmup_epochs=0)
CLUSTERS = dict(epochs=1, images_per_epoch=16, batch_size=16, k=4, k1=6, k2=2, min_samples=2, eps=.7, weights=None,
                test_every=0)


def tasks(table):
    # DINO is CION with one image an identity: the same kernels
    one, common = dict(n_id=[1], n_id_epochs=[0], identities="image"), dict(data=table)
    def views(method, **changes):
        return recipe("pretrain", "tiny", method=method, **common | VIEWS | dict(identities="tracklet") | changes)
    yield "cion", pretrain.Distillation, views("tracklet")
    # a stage strides over one column: where oneDNN 3.12 reads what nobody wrote
    yield "small views", pretrain.Distillation, views("tracklet", local_size=[32, 8])
    yield "lup", pretrain.MomentumContrast, views("lup", n_local=0, **one)
    for method in ("bnneck", "mgn", "transreid"):
        yield method, finetune.FineTuning, recipe("finetune", "tiny", method=method, **common | STEPS)
    for stage in ("usl", "uda"):
        yield stage, cluster_contrast.ClusterContrast, recipe(
            stage, "tiny", **common | CLUSTERS | (dict(seed=1) if stage == "uda" else {}))


def summary(arrays, **more):
    h, finite = hashlib.sha256(), True
    for a in arrays:
        a = np.ascontiguousarray(a)
        h.update(a.tobytes())
        finite &= bool(np.isfinite(a).all())
    return dict(bits=h.hexdigest(), finite=finite) | more


def main(table, stage, kind):
    if kind == "unprobed": engine.probe = lambda *args: precision.Verdict(True, None, 0, 0., 0.)
    found = {}
    for name, make, r in tasks(table):
        if stage not in ("all", name): continue
        task = make(r)
        report = engine.fit(task, Run(r, Path(Run(r).folder).with_name(f"heap-{name.replace(' ', '-')}")))
        found[name] = summary([v.detach().numpy() for m in task.modules.values() for v in m.state_dict().values()],
                              precision=report["precision"], loss=repr(report["loss"]))
    if stage in ("all", "extract"):
        torch.manual_seed(0)
        samples = read_samples(table)
        x = embed(create_backbone("resnet10_tiny_ibn", (64, 32)), [Path(table).parent / p for p in samples.path[:40]],
                  batch_size=16, compute="bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None)
        found["extract"] = summary([x])
    print(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
