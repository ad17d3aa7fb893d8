"""The memory against a plain loop, ghost groups, batches of clusters."""
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cion_nb.models.backbones import create_backbone
from cion_nb.training.cluster_contrast import ClusterMemory, ClusterNet, ClusterSampler, ghost_batchnorm, UPDATES

# The memory

def follow_plainly(c, x, y, momentum, update):
    "The released rules (models/cm.py), one cluster after another."
    c, old = c.clone(), c.clone()
    if update == "each":
        for row, k in zip(x, y.tolist()):
            c[k] = momentum * c[k] + (1 - momentum) * row
            c[k] /= c[k].norm()
        return c
    for k in sorted(set(y.tolist())):
        rows = [x[i] for i in range(len(y)) if y[i] == k]
        chosen = sum(rows) / len(rows) if update == "mean" else rows[int(np.argmin([float(r @ old[k]) for r in rows]))]
        c[k] = momentum * c[k] + (1 - momentum) * chosen
        c[k] /= c[k].norm()
    return c


@pytest.mark.parametrize("update", [u for u in UPDATES if u != "random"])
@pytest.mark.parametrize("momentum", [0., .2, .9])
def test_memory_follows_as_a_loop_does(update, momentum):
    for seed in range(5):
        torch.manual_seed(seed)
        n, d, k = 40, 7, 6
        x, labels = F.normalize(torch.randn(n, d), dim=1), torch.randint(-1, k, (n,))
        labels[:k] = torch.arange(k)
        memory = ClusterMemory(d, n, momentum, update=update)
        memory.start(x, labels, 3)
        want = torch.stack([F.normalize(x[labels == j].mean(0), dim=0) for j in range(k)])
        torch.testing.assert_close(memory.centroids, want)
        for _ in range(3):
            rows = torch.randint(0, n, (16,))
            rows = rows[labels[rows] >= 0]
            z = F.normalize(x[rows] + .3 * torch.randn(len(rows), d), dim=1)
            want = follow_plainly(want, z, labels[rows], momentum, update)
            memory.follow(z, labels[rows])
            torch.testing.assert_close(memory.centroids, want)


def test_random_update_takes_one_image_and_is_the_same_after_a_resume():
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(12, 4), dim=1), torch.arange(12) // 4
    memory = ClusterMemory(4, 12, 0., update="random", seed=3)
    memory.start(x, y, 0)
    again = ClusterMemory(4, 12, 0., update="random", seed=3)
    again.load_state_dict(memory.state_dict())
    picks = []
    for _ in range(40):
        memory.follow(x, y)
        again.follow(x, y)
        assert torch.equal(memory.centroids, again.centroids)
        picks.append([int((x[4 * k:4 * k + 4] @ c).argmax()) for k, c in enumerate(memory.centroids)])
        torch.testing.assert_close(memory.centroids, x[[4 * k + p for k, p in enumerate(picks[-1])]])
    assert all(len(set(p)) == 4 for p in zip(*picks)), "every image gets its turn"


def test_loss_and_gradient_are_the_formulas():
    torch.manual_seed(0)
    x = F.normalize(torch.randn(9, 5, dtype=torch.float32), dim=1).requires_grad_()
    y = torch.arange(9) % 3
    memory = ClusterMemory(5, 9, temperature=.05)
    memory.start(x.detach(), y, 0)
    memory(x, y).backward()
    z = torch.stack([torch.stack([(a @ c) / .05 for c in memory.centroids]) for a in x.detach()])
    p = z.exp() / z.exp().sum(1, keepdim=True)
    assert memory(x, y).item() == pytest.approx(float(-p[range(9), y].log().mean()), rel=1e-4)
    p[range(9), y] -= 1
    torch.testing.assert_close(x.grad, p @ memory.centroids / .05 / 9, rtol=1e-4, atol=1e-6)


# BatchNorm

@pytest.mark.parametrize("n", [8, 12, 3])
def test_ghost_groups_are_the_gpus_of_dataparallel(n):
    "Every part by a copy of its own, as nn.DataParallel's replicas; the first copy's statistics stay."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(n, 3, 9, 9)
    copies = [deepcopy(net) for _ in range(0, n, 4)]
    ghost = ghost_batchnorm(deepcopy(net), 4)
    want = torch.cat([c(p) for c, p in zip(copies, x.split(4))])
    torch.testing.assert_close(ghost(x), want)
    for key, value in copies[0].state_dict().items(): torch.testing.assert_close(ghost.state_dict()[key], value)
    want.square().sum().backward()
    ghost(x).square().sum().backward()
    torch.testing.assert_close(ghost[0].weight.grad, sum(c[0].weight.grad for c in copies), rtol=1e-4, atol=1e-5)
    ghost.eval()
    net.load_state_dict(ghost.state_dict())
    torch.testing.assert_close(ghost(x), net.eval()(x))


def test_ghosts_again_without_statistics_and_with_a_last_single_row():
    net = ghost_batchnorm(ghost_batchnorm(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), 8), 4)
    x = torch.randn(9, 3)
    torch.testing.assert_close(net(x), torch.cat([nn.BatchNorm1d(3)(p) for p in (x[:4], x[4:])]))


def test_ghosts_in_timms_own_batchnorm():
    model = ghost_batchnorm(ClusterNet(create_backbone("repvit_m0_9", (64, 32))), 4)
    assert torch.isfinite(model(torch.randn(8, 3, 64, 32))).all()
    assert sum(hasattr(m, "ghost") for m in model.modules()) > 20


# Batches

@pytest.mark.parametrize("seed", range(5))
def test_batches_hold_k_of_each_cluster_from_other_cameras(seed):
    rng = np.random.default_rng(seed)
    labels, cams = rng.integers(-1, 30, 400), rng.integers(-1, 4, 400)
    s = ClusterSampler(labels, cams, 32, 4, seed=seed)
    plan = s.plan(2)
    assert plan.shape == (np.unique(labels[labels >= 0]).size // 8, 32) and (s.plan(2) == plan).all()
    assert not (s.plan(3) == plan).all()
    seen = []
    for group in plan.reshape(-1, 4):
        k = labels[group[0]]
        assert k >= 0 and (labels[group] == k).all()
        seen.append(k)
        others = np.flatnonzero((labels == k) & ((cams != cams[group[0]]) | (cams < 0)) & (np.arange(400) != group[0]))
        if len(others): assert set(group[1:]) <= set(others)
        if len(others) >= 3: assert len(set(group)) == 4
    assert len(seen) == len(set(seen)), "a cluster once a pass"
    halves = [list(ClusterSampler(labels, cams, 32, 4, seed=seed, rank=r, world_size=2).batches(2)) for r in (0, 1)]
    assert (np.concatenate([np.stack(h) for h in halves], 1) == plan).all()
    assert all((a == b).all() for a, b in zip(s.batches(2, 1), plan[1:]))
