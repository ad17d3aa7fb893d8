"""What stands around the loss of Eq. 8-9: head, multi-view model, teacher, schedules, clipping, queue, processes."""
import os
import subprocess
import sys
import textwrap
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from places import ROOT
from torch import nn

from cion_nb.training.distill import (
    clip_gradients_,
    ContrastHead,
    freeze_last_layer,
    IdentityGuidedLoss,
    InfoNCELoss,
    momentum_schedule,
    MomentumQueue,
    MultiViewModel,
    param_groups,
    ProjectionHead,
    update_teacher,
    weight_decay_schedule,
)

torch.set_num_threads(1)


def test_head_is_dinos():
    torch.manual_seed(0)
    head, x = ProjectionHead(6, 10, 8, 4), torch.randn(3, 6)
    z = x
    for k in (0, 2, 4):
        z = z @ head.mlp[k].weight.T + head.mlp[k].bias
        if k < 4: z = .5 * z * (1 + torch.erf(z / 2**.5))
    z = z / z.norm(dim=1, keepdim=True)
    # torch's own weight normalisation
    old = nn.utils.parametrizations.weight_norm(nn.Linear(4, 10, bias=False))
    old.parametrizations.weight.original0.data.fill_(1.)
    old.parametrizations.weight.original1.data.copy_(head.last_layer.weight_v)
    assert torch.allclose(head(x), old(z), atol=1e-6)
    head(x).pow(2).sum().backward()
    old(z.detach()).pow(2).sum().backward()
    assert torch.allclose(head.last_layer.weight_v.grad, old.parametrizations.weight.original1.grad, atol=1e-5)
    assert head.last_layer.weight_g.grad is None
    assert abs(head.mlp[0].weight.std().item() - .02) < .005 and not head.mlp[0].bias.any()
    assert ProjectionHead(6, 10, 8, 4, norm_last_layer=False).last_layer.weight_g.requires_grad
    assert len(ProjectionHead(6, 10, 8, 4, n_layers=1).mlp) == 1


def test_multi_view_model_runs_once_a_resolution():
    calls = []
    class Backbone(nn.Module):
        def forward(self, x):
            calls.append(tuple(x.shape))
            return x.mean((2, 3))
    model = MultiViewModel(Backbone(), nn.Identity())
    views = [torch.rand(2, 3, 8, 4) for _ in range(2)] + [torch.rand(2, 3, 4, 2) for _ in range(3)]
    assert torch.allclose(model(views), torch.cat([v.mean((2, 3)) for v in views]))
    assert calls == [(4, 3, 8, 4), (6, 3, 4, 2)]
    assert torch.allclose(model(views[:2]), torch.cat([v.mean((2, 3)) for v in views[:2]]))


def test_teacher_update_moves_parameters_only():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
    student(torch.randn(4, 3, 6, 6))
    teacher = deepcopy(student).requires_grad_(False)
    for p in student.parameters(): p.data.add_(torch.randn_like(p))
    student(torch.randn(4, 3, 6, 6))
    before = deepcopy(teacher)
    expected = [.996 * t + .004 * s for s, t in zip(student.parameters(), teacher.parameters())]
    update_teacher(student, teacher, .996)
    assert all(torch.allclose(p, e, rtol=0, atol=1e-7) for p, e in zip(teacher.parameters(), expected))
    assert all(map(torch.equal, teacher.buffers(), before.buffers()))
    kept = deepcopy(teacher)
    update_teacher(student, teacher, 1.)
    assert all(map(torch.equal, teacher.parameters(), kept.parameters()))
    update_teacher(student, teacher, 0.)
    assert all(map(torch.equal, teacher.parameters(), student.parameters()))
    with pytest.raises(ValueError, match="shapes"): update_teacher(student, nn.Linear(2, 2), .9)


def test_schedules_equal_dinos():
    import numpy as np
    n = 1000
    for schedule, start, end in ((momentum_schedule, .996, 1.), (weight_decay_schedule, .04, .4)):
        theirs = end + .5 * (start - end) * (1 + np.cos(np.pi * np.arange(n) / n))
        assert np.allclose([schedule(k / n) for k in range(n)], theirs, rtol=0, atol=1e-12)


def test_clipping_is_per_tensor_and_freezing_drops_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), ProjectionHead(5, 7, 6, 4))
    (1e3 * model(torch.randn(3, 5)).sum()).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norms = clip_gradients_(model, .5)
    assert torch.allclose(norms, torch.stack([g.norm() for g in before.values()]))
    for name, p in model.named_parameters():
        if p.grad is None: continue
        scale = min(1., .5 / (before[name].norm().item() + 1e-6))
        assert torch.allclose(p.grad, before[name] * scale, rtol=1e-5, atol=0)
    freeze_last_layer(model)
    assert model[1].last_layer.weight_v.grad is None and model[1].mlp[0].weight.grad is not None
    with pytest.raises(ValueError, match="last_layer"): freeze_last_layer(nn.Linear(2, 2))
    assert clip_gradients_(nn.Linear(2, 2)).shape == (0,)
    # NaN is seen, not hidden
    bad = nn.Linear(2, 1)
    bad.weight.grad = torch.tensor([[float("nan"), 1.]])
    assert clip_gradients_(bad).isnan().any()


def test_param_groups_cover_every_trainable_parameter_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(4), ProjectionHead(4, 8, 8, 4))
    weights, plain = param_groups(model)
    every = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in (weights, plain) for p in g["params"]} == every
    assert len(weights["params"]) + len(plain["params"]) == len(every)
    assert all(p.ndim > 1 for p in weights["params"]) and plain["weight_decay"] == 0
    assert all(p.ndim == 1 for p in plain["params"])


def test_queue_wraps_and_loss_uses_what_was_there_before():
    torch.manual_seed(0)
    queue = MomentumQueue(3, 7)
    expected = queue.keys.clone()
    at = 0
    for n in (3, 3, 3, 10, 1):
        new = F.normalize(torch.randn(n, 3), dim=1)
        queue.push(new)
        for row in new[-7:]:
            expected[at % 7] = row
            at += 1
        assert torch.equal(queue.keys, expected) and queue.at == at % 7
    loss = InfoNCELoss(3, 5, .1)
    keys = loss.queue.keys.clone()
    q, k = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    value = loss(q, k)
    cos = torch.cat([F.cosine_similarity(q, k)[:, None], F.normalize(q, dim=1) @ keys.T], 1)
    slow = (torch.logsumexp(cos / .1, 1) - cos[:, 0] / .1).mean()
    assert value.item() == pytest.approx(slow.item(), rel=1e-5)
    value.backward()
    assert k.grad is None and q.grad.abs().sum() > 0  # the queue changed before backward
    before = loss.queue.keys.clone()
    loss.eval()(q, k)
    assert torch.equal(loss.queue.keys, before)
    loss.train()(q, q)
    assert loss.last["top1"] == 1.
    with pytest.raises(ValueError, match="one shape"): loss(q, k[:2])
    assert ContrastHead(6, 4)(torch.randn(2, 6)).shape == (2, 4)


@pytest.mark.slow("starts processes")
def test_two_processes_share_centre_and_queue(tmp_path):
    "Two ranks of torchrun against one process that sees both halves."
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent("""
        import sys, torch, torch.distributed as dist
        from cion_nb.training.distill import IdentityGuidedLoss, MomentumQueue
        dist.init_process_group("gloo"); rank = dist.get_rank(); assert dist.get_world_size() == 2
        torch.manual_seed(0)
        student, teacher = torch.randn(4, 4, 9, dtype=torch.float64), torch.randn(2, 4, 9, dtype=torch.float64)
        mine, identity = slice(2 * rank, 2 * rank + 2), torch.tensor([0, 0, 1, 1])
        out = {}
        for kind in ("ema", "batch"):
            loss = IdentityGuidedLoss(9, 4, centre=kind).double()
            value = loss(student[:, mine].flatten(0, 1), teacher[:, mine].flatten(0, 1), identity[mine])
            dist.all_reduce(value); out[kind] = (value / 2, loss.centre)
        torch.manual_seed(1)
        queue = MomentumQueue(3, 8)
        queue.push(torch.full((2, 3), float(rank + 1)))
        out["keys"] = queue.keys
        if rank == 0: torch.save(out, sys.argv[1])
        dist.destroy_process_group()
    """))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(script), str(tmp_path / "out.pt")],
                          capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    out = torch.load(tmp_path / "out.pt")
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 4, 9, dtype=torch.float64), torch.randn(2, 4, 9, dtype=torch.float64)
    for kind in ("ema", "batch"):
        loss = IdentityGuidedLoss(9, 4, centre=kind).double()
        value = loss(student.flatten(0, 1), teacher.flatten(0, 1), torch.tensor([0, 0, 1, 1]))
        assert value.item() == pytest.approx(out[kind][0].item(), rel=1e-12)
        assert torch.allclose(loss.centre, out[kind][1], rtol=0, atol=1e-12)
    assert out["keys"][:4].tolist() == [[1.] * 3] * 2 + [[2.] * 3] * 2
