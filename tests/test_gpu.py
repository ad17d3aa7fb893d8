"""Every path that a GPU takes, against its CPU twin. `make test-gpu` runs them all; without a GPU the twin is the CPU
itself, so that what is written here at least runs.

What only CUDA has (fp16, GradScaler, NCCL, the fused kernels) is marked `gpu` and skipped here.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import cut, ended, same, trained

from cion_nb.core.runs import Run
from cion_nb.core.settings import recipe
from cion_nb.identities.neighbours import knn
from cion_nb.identities.noise import noise
from cion_nb.models.backbones import create_backbone
from cion_nb.models.features import embed
from cion_nb.training.distill import IdentityGuidedLoss
from cion_nb.training.engine import adamw, fit, to_channels_last

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no GPU here")]


def crowd(n=240, people_=20, dim=64):
    rng = np.random.default_rng(0)
    pid = np.arange(n) % people_
    x = rng.normal(size=(people_, dim))[pid] + .7 * rng.normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), pid


def test_noise_and_neighbours_are_the_cpus():
    x, pid = crowd()
    a, b = noise(x, pid, .6, .9, device="cpu"), noise(x, pid, .6, .9, device=DEVICE)
    assert (a.n_S, a.consistency, a.discrimination) == (b.n_S, b.consistency, b.discrimination)
    a, b = knn(x, 10, device="cpu"), knn(x, 10, device=DEVICE)
    np.testing.assert_allclose(a.distance, b.distance, atol=1e-5)
    assert (a.index == b.index).mean() > .99


def test_rounded_extraction_points_the_same_way():
    torch.manual_seed(0)
    model = create_backbone("resnet10_tiny_ibn", (64, 32))
    images = [np.random.default_rng(i).integers(0, 255, (64, 32, 3), dtype=np.uint8) for i in range(6)]
    want = embed(model, images, device="cpu")
    got = embed(model, images, device=DEVICE)
    model.cpu()
    assert (want * got).sum(1).min() > .999, "float16 on a GPU"


def test_the_distillation_loss_and_its_gradient():
    torch.manual_seed(0)
    student, teacher, identity = torch.randn(4 * 12, 256), torch.randn(2 * 12, 256), torch.arange(12) // 3
    def on(device):
        z = student.to(device).requires_grad_()
        value = IdentityGuidedLoss(256, 4).to(device)(z, teacher.to(device), identity.to(device))
        value.backward()
        return value.detach().cpu(), z.grad.cpu()
    for a, b in zip(on("cpu"), on(DEVICE)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_of_channels_last_and_fused_adamw():
    def on(device):
        torch.manual_seed(0)
        model = to_channels_last(create_backbone("resnet10_tiny_ibn", (64, 32)).train()).to(device)
        optimizer = adamw(model.parameters(), 1e-3)
        model(torch.randn(8, 3, 64, 32).to(device)).square().mean().backward()
        grads = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        return grads, all(p.isfinite().all() for p in model.parameters())
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try: (a, ok), (b, fine) = on("cpu"), on(DEVICE)
    finally: torch.backends.cudnn.allow_tf32 = allowed
    assert ok and fine and all(float((p - q).norm() / p.norm().clamp_min(1e-12)) < .05 for p, q in zip(a, b))


FORMATS = ["fp32", *(pytest.param(p, marks=gpu) for p in ("bf16", "fp16"))]
STAGES = dict(pretrain=dict(epochs=1, images_per_epoch=24, batch_size=24, n_id=[2], n_id_epochs=[0], n_local=1,
                            out_dim=32, head_hidden=32, head_bottleneck=16, identities="tracklet", method="tracklet",
                            warmup_epochs=0),
              finetune=dict(epochs=1, images_per_epoch=16, batch_size=16, warmup_epochs=0),
              usl=dict(epochs=1, images_per_epoch=16, batch_size=16, k=4, k1=6, k2=2, min_samples=2, eps=.7,
                       weights=None, test_every=0))


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_training_of_every_stage(people, runs, stage, precision):
    """In float32 it runs on any device, in 16 bits on a GPU, where fp16 goes through a GradScaler; throughput and
    memory are written down.
    """
    from cion_nb.training.cluster_contrast import ClusterContrast
    from cion_nb.training.finetune import FineTuning
    from cion_nb.training.pretrain import Distillation
    r = recipe(stage, "tiny", data=str(people), precision=precision, **STAGES[stage])
    task = dict(pretrain=Distillation, finetune=FineTuning, usl=ClusterContrast)[stage](r)
    if CUDA: torch.cuda.reset_peak_memory_stats()
    report = fit(task, Run(r))
    assert np.isfinite(report["loss"]) and report["device"] == DEVICE
    assert report["precision"] == precision.replace("fp32", "no")
    if CUDA:
        note(f"{stage}_{precision}", images_per_second=report["images_per_second"],
             peak_MB=round(torch.cuda.max_memory_allocated() / 1e6, 1), loss=report["loss"])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no GPU here: compiling for a CPU takes a minute")
def test_a_compiled_training(people, runs):
    from cion_nb.training.pretrain import Distillation
    r = recipe("pretrain", "tiny", data=str(people), precision="fp32", compile=True, **STAGES["pretrain"])
    assert np.isfinite(fit(Distillation(r), Run(r))["loss"])


def test_a_killed_run_ends_in_the_same_bits(tmp_path, runs):
    whole, _, _ = trained(tmp_path / "whole", precision="fp32")
    cut(tmp_path / "cut", precision="fp32")
    again, _, report = trained(tmp_path / "cut", precision="fp32")
    assert report["resumed"] == 1 and report["device"] == DEVICE and same(ended(whole), ended(again))


def note(name, **values):
    "Measured on the card: into a file that `make test-gpu` names, if it does."
    if not (file := os.environ.get("CION_NB_GPU_NOTES")): return
    path = Path(file)
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | {name: values}, indent=1))
