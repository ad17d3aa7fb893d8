"""MGN: its branches, what its warm-up holds, its loss as a sum, its stripes."""
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from trainings import quick

from cion_nb.models.backbones import create_backbone
from cion_nb.training.finetune import batch_hard_triplet, FineTuning, part_of
from cion_nb.training.mgn import MGN, mgn_loss, PARTS


def test_mgn_parameters_a_branch_and_what_the_warm_up_holds():
    """A branch is the rest of layer3, layer4 and one BatchNorm; the stem is the rest; nothing is shared between
    branches.
    """
    backbone = create_backbone("resnet50_ibn", (384, 128))
    count = lambda m: sum(p.numel() for p in m.parameters())
    stem = sum(count(m) for m in (backbone.conv1, backbone.bn1, backbone.layer1, backbone.layer2, backbone.layer3[0]))
    branch = count(backbone) - stem + 2 * 2048
    model = MGN(backbone, n_ids=751)
    assert count(model.stem) == stem and [count(b) for b in model.branches.values()] == [branch] * 3
    assert {n: count(p) for n, p in model.parts.items()} == {n: 1 + 2048 * 256 + 2 * 256 + 751 * 256 for n in PARTS}
    assert len(PARTS) == 8
    ids = [id(p) for b in model.branches.values() for p in b.parameters()]
    assert len(ids) == len(set(ids))
    frozen = {id(p) for m in model.frozen_part() for p in m.parameters()}
    moving = [n for n, p in model.named_parameters() if id(p) not in frozen]
    assert all(n.startswith("parts.") or n.split(".")[0] == "branches" and n.split(".")[2] == "2" for n in moving)
    assert len(moving) == 3 * 2 + 8 * 5


@pytest.mark.slow("trains networks")
def test_mgn_warm_up_moves_nothing_below_the_parts(people, runs):
    task = FineTuning(quick(people, method="mgn", freeze_epochs=2))
    task.build(torch.device("cpu"))
    model = task.modules["model"].train()
    before = deepcopy(model.state_dict())
    class Plain: num_processes = 1
    rows = next(iter(task.sampler(None, 0, 0, 0, 1)))
    for share, moves in ((0., False), (.99, False)):
        task.schedule(share)
        loss, _ = task.loss(model, task.load(rows, 16), Plain)
        loss.backward()
        task.before_step(share)
        task.optimizer.step()
        task.optimizer.zero_grad()
    same = {n: torch.equal(before[n], v) for n, v in model.state_dict().items() if v.is_floating_point()}
    held = [n for n in same if n.startswith("stem.") or n.startswith("branches.") and n.split(".")[2] in "01"]
    assert held and all(same[n] for n in held), "parameters and running statistics"
    assert not any(same[f"parts.{p}.reduction.weight"] for p in PARTS) and not same["branches.b1.2.weight"]
    task.recipe["freeze_epochs"] = 1
    task.schedule(.6)
    loss, _ = task.loss(model, task.load(rows, 16), Plain)
    loss.backward()
    task.before_step(.6)
    task.optimizer.step()
    assert not torch.equal(before["stem.0.weight"], model.stem[0].weight) and model.stem[1].training


def test_mgn_loss_is_its_sums():
    torch.manual_seed(0)
    out = {n: (torch.randn(6, 4, requires_grad=True), torch.rand(6, 5) * 2 - 1) for n in PARTS}
    pid = torch.tensor([0, 0, 1, 1, 2, 2])
    loss, told = mgn_loss(out, pid, lambda f, y: batch_hard_triplet(f, y), smoothing=0., scale=3., margin=.2,
                          triplet_weight=2.)
    ce = []
    for _, s in out.values():
        z = torch.stack([
            torch.stack([3 * max(1.2 - float(v), 0) * (v - .8) if j == y else 3 * max(float(v) + .2, 0) * (v - .2)
                         for j, v in enumerate(row)])
            for row, y in zip(s, pid)])
        ce.append(nn.functional.cross_entropy(z, pid))
    f = lambda *names: torch.cat([out[n][0] for n in names], 1)
    triplets = [batch_hard_triplet(x, pid)
                for x in (f("b1"), f("b2"), f("b3"), f("b21", "b22"), f("b31", "b32", "b33"))]
    assert loss.item() == pytest.approx((sum(ce) / 8 + 2 * sum(triplets) / 5).item(), rel=1e-5)


def test_parts_lie_in_one_another_and_are_whole_people():
    rng = np.random.default_rng(0)
    t = pd.DataFrame(dict(pid=rng.integers(0, 60, 900), path=[f"{i}.jpg" for i in range(900)]))
    for seed in range(3):
        last = set()
        for share in (.1, .3, .7, 1.):
            now = part_of(t, few_ids=share, seed=seed)
            assert set(now.pid) >= last and now.index.is_monotonic_increasing
            last = set(now.pid)
            assert (now.groupby("pid").size() == t[t.pid.isin(last)].groupby("pid").size()).all()
            assert len(last) == max(2, round(share * 60))
        last = set()
        for share in (.1, .5, .9, 1.):
            now = part_of(t, few_images=share, seed=seed)
            assert set(now.path) >= last
            last = set(now.path)
            assert (now.groupby("pid").size() == np.ceil(share * t.groupby("pid").size() - 1e-9)).all()
    assert part_of(t).equals(t) and not part_of(t, few_ids=.3, seed=0).equals(part_of(t, few_ids=.3, seed=1))
