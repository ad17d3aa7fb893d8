"""The network and its terms: tokens, gradients of each weight, sums of pairs, DINO where there is nothing else."""
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vills_examples
from vills_examples import Alone, asked, only

from cion_nb.core.settings import recipe
from cion_nb.models.backbones import create_backbone
from cion_nb.models.checkpoints import load_backbone_weights
from cion_nb.semantics.vills import add_part_tokens, modules_of, PARTS, TERMS, Vills, VillsNet
from cion_nb.training.distill import update_teacher
from cion_nb.training.pretrain import Distillation
from cion_nb.video.resampler import Resampler


@pytest.fixture(scope="module")
def data(tmp_path_factory): return vills_examples.make(tmp_path_factory.mktemp("strollers"))


def net_of(feature=None, frames=0, size=None, parts=True):
    torch.manual_seed(0)
    backbone = create_backbone("vit_trial", (64, 32))
    if parts: add_part_tokens(backbone)
    resampler = Resampler(96, latents=4, depth=1, heads=2, dim_head=16, frames=4)
    return VillsNet(backbone, resampler, feature, frames, size).eval()


# ---- tokens

def test_part_tokens_of_a_pass_checkpoint_are_ours():
    source = create_backbone("vit_trial", (64, 32)).state_dict()
    tokens, places = torch.randn(2, 3, 1, 1, 96)
    theirs = OrderedDict(source, cls_pos=source["pos_embed"][:, :1], pos_embed=source["pos_embed"][:, 1:])
    for a in range(3): theirs |= {f"part_token{a + 1}": tokens[a], f"part{a + 1}_pos": places[a]}
    backbone = create_backbone("vit_trial", (64, 32))
    load_backbone_weights(backbone, theirs)
    net = VillsNet(add_part_tokens(backbone))
    assert net.n_parts == 3 and torch.equal(backbone.reg_token[0], (tokens + places)[:, 0, 0])
    plain = create_backbone("vit_trial", (64, 32))
    load_backbone_weights(plain, source)                                       # as DINO's and CION's are
    assert plain.reg_token is None and VillsNet(add_part_tokens(plain)).n_parts == 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_crop_sees_its_own_part_token_alone(checkpointing):
    net, x = net_of(), torch.randn(3, 3, 32, 16)
    net.backbone.set_grad_checkpointing(checkpointing)
    mine = net.read(x, torch.tensor([2, 0, 1]))
    with torch.no_grad(): net.backbone.reg_token[0, [0, 2]] += torch.randn(2, 96)    # another head, another lower body
    other = net.read(x, torch.tensor([2, 0, 1]))
    same = [torch.equal(a, b) for i in range(3) for a, b in [(mine[1][i], other[1][i])]]
    assert same == [False, False, True] and [m.shape[1] for m in mine[1:]] == [1, 8]
    assert torch.equal(mine[0][2], other[0][2]) and torch.equal(mine[2][2], other[2][2])


def test_features_by_name():
    x = torch.randn(2, 3, 64, 32)
    clip = torch.randn(2, 4, 3, 32, 24)
    with torch.no_grad():
        images, clips = net_of(), net_of(frames=4, size=(32, 24))
        assert images.names == ["coarse", "semantic"] and clips.names == ["coarse", "semantic", "temporal"]
        y, z = images(x), clips(clip)
        assert y.shape == (2, 4 * 96) and z.shape == (2, 5 * 96) and images.embed_dim == 384 and clips.embed_dim == 480
        assert torch.allclose(y.unflatten(1, (4, 96)).norm(dim=2), torch.ones(2, 4), atol=1e-5)
        assert torch.equal(net_of("coarse")(x), F.normalize(images.backbone(x), dim=1))
        assert torch.allclose(net_of("semantic")(x), y[:, 96:])
        frames = torch.stack([clips.backbone(frame) for frame in clip.unbind(1)]).mean(0)
        assert torch.allclose(z[:, :96], F.normalize(frames, dim=1), atol=1e-5)
        still = net_of("temporal", size=(32, 24))                              # an image in the clips' space
        assert torch.allclose(still(clip[:, 0]), F.normalize(clips.temporal(clip[:, :1]), dim=1), atol=1e-5)


def test_frames_are_padded_to_whole_patches():
    net = net_of(frames=4, size=(64, 44))
    x = torch.randn(1, 4, 3, 64, 44)
    wide = F.pad(x, (2, 2))
    assert net.made()["padded"] == [64, 48] and net.input.shape == (4, 3, 64, 44)
    with torch.no_grad(): assert torch.equal(net(x), net_of(frames=4, size=(64, 48))(wide))
    assert net_of(frames=4, size=(64, 48)).made()["padded"] is None


@pytest.mark.parametrize("make, word", [
    (lambda: VillsNet(create_backbone("vit_trial", (64, 32)), Resampler(64)), "width 64, vit_trial has 96"),
    (lambda: net_of(frames=5), "clips of 5 frames, and the resampler has vectors for 4"),
    (lambda: net_of("semantic", parts=False), "no part tokens"),
    (lambda: VillsNet(create_backbone("vit_trial", (64, 32)), feature="temporal"), "no resampler"),
    (lambda: net_of("coarze"), "did you mean 'coarse'"),
    (lambda: add_part_tokens(create_backbone("resnet10_tiny_ibn", (64, 32))), "no ViT.*lambda_lse=0"),
    (lambda: add_part_tokens(add_part_tokens(create_backbone("vit_trial", (64, 32)), 4)), "4 registers"),
    (lambda: VillsNet(create_backbone("ghostnet_trial", (64, 32)), Resampler(1280)), "no map as wide as its feature")])
def test_what_cannot_be_one_network_is_refused(make, word):
    with pytest.raises(ValueError, match=word): make()


# ---- terms

def ready(r):
    "A task with modules, and a batch of its own."
    task = Vills(r)
    torch.manual_seed(r["seed"])
    task.build("cpu")
    task.schedule(0.)
    rows = next(iter(task.sampler(1, 0, 0, 0, 1)))
    return task, task.load(rows, r["batch_size"])


REACHED = dict(coarse={"encoder", "coarse_head"}, lse={"encoder", "part_tokens", "part_heads"},
               temp={"encoder", "resampler", "temporal_head"}, adapt={"encoder", "resampler", "temporal_head"})


@pytest.mark.parametrize("term", TERMS)
def test_each_weight_alone_reaches_its_modules_and_no_other(data, term):
    task, batch = ready(asked(data, **only(term)))
    value, told = task.loss(task.modules["model"], batch, Alone)
    value.backward()
    found = {name: parameters for name, parameters in modules_of(task.modules["model"]).items() if parameters}
    lost = {name: sum(p.grad is None for p in parameters) for name, parameters in found.items()}
    assert set(found) == REACHED[term] and not any(lost.values()), lost
    assert all(max(float(p.grad.abs().max()) for p in parameters) > 0 for parameters in found.values())
    assert all(p.grad is None and not p.requires_grad for p in task.modules["teacher"].parameters())
    assert value.item() == pytest.approx(task.recipe[f"lambda_{term}"] * float(told[f"loss_{term}"]))


def test_a_weight_of_0_removes_its_term_and_nothing_else(data):
    "Bit-exactly: the other terms, of the same images and clips, and their sum."
    def values(*terms):
        task, batch = ready(asked(data, **only(*terms)))
        value, told = task.loss(task.modules["model"], batch, Alone)
        return {name.removeprefix("loss_"): x for name, x in told.items() if name.startswith("loss_")}, value, task
    every, total, task = values(*TERMS)
    weights = [task.recipe[f"lambda_{term}"] for term in TERMS]
    assert weights == [1, 1, 3, 2] and list(every) == list(TERMS)
    assert torch.equal(total.detach(), sum(w * every[term] for w, term in zip(weights, TERMS)))
    for left in (("coarse", "lse"), ("lse", "temp", "adapt"), ("coarse", "lse", "adapt"), ("coarse", "lse", "temp")):
        found, value, task = values(*left)
        assert set(found) == set(left) and all(torch.equal(found[term], every[term]) for term in left), left
        assert torch.equal(value.detach(), sum(task.recipe[f"lambda_{term}"] * every[term] for term in found))
    without = values("coarse", "temp", "adapt")[0]                             # no part token stands beside the others
    alone = values("coarse")[0] | values("temp")[0] | values("adapt")[0]
    assert all(torch.equal(without[term], alone[term]) for term in without)


def pair(target, logits, loss):
    "Cross-entropy of one pair."
    p = ((target - loss.centre) / loss.teacher_temp).softmax(-1)
    return -(p * (logits / loss.student_temp).log_softmax(-1)).sum()


def test_terms_are_means_over_their_pairs(data):
    task, batch = ready(asked(data))
    for loss in task.losses: loss.centre.normal_()
    model, names = task.modules["model"], ("views", "crops", "clips", "stills")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.backbone.input.mean, model.backbone.input.std))
    def floats(x): return [floats(v) for v in x] if isinstance(x, list) else (x / 255 - mean) / std
    given = [floats(batch[name]) for name in names]
    with torch.no_grad():
        found, wanted = model(*given), task.modules["teacher"](given[0][:2], None, *given[2:])
        for loss in task.losses: loss.eval()
        terms = task.terms(found, wanted, batch)
        B, of = 4, task.modules["loss"]
        temp = [pair(wanted["temporal"][g, i], found["temporal"][1 - g, i], of["temporal"])
                for i in range(B) for g in (0, 1)]
        adapt = [pair(wanted["temporal"][g, i], found["temporal"][s, i], of["temporal"])
                 for i in range(B) for g, s in ((0, 2), (1, 2), (2, 0), (2, 1))]
        lse = []
        for a, name in enumerate(PARTS):
            there = np.flatnonzero(batch["presence"][a])
            each = [pair(wanted[name][g, i], found[name][s, i], of[name])
                    for i in there for g, s in ((0, 1), (1, 0), (0, 2), (1, 2))]
            lse.append(torch.stack(each).mean())
    for term, parts in dict(temp=temp, adapt=adapt, lse=lse).items():
        assert float(terms[term]) == pytest.approx(float(torch.stack(parts).mean()), rel=1e-4), term
    assert 0 < float(batch["presence"].mean()) < 1


def test_a_part_that_nobody_shows_asks_nothing(data):
    task, batch = ready(asked(data, **only("lse")))
    batch["presence"] = torch.zeros_like(batch["presence"])
    value, told = task.loss(task.modules["model"], batch, Alone)
    value.backward()
    assert value.item() == 0 and all(loss.centre.eq(0).all() for loss in task.losses)
    assert all(p.grad.eq(0).all() for p in task.modules["model"].parameters() if p.requires_grad)
    batch["presence"][1] = 1                                                   # upper bodies alone
    value, _ = task.loss(task.modules["model"], batch, Alone)
    moved = {name: bool(task.modules["loss"][name].centre.ne(0).any()) for name in PARTS}
    assert torch.isfinite(value) and moved == dict(head=False, upper=True, lower=False)


def test_coarse_alone_is_a_step_of_dino(data):
    "The same views, loss, gradients and weights as of `pretrain` with method dino, to the bit."
    mine = asked(data, **only("coarse"))
    shared = {name: value for name, value in mine.items() if name not in ("stage", "profile", "method", "identities")}
    known = recipe("pretrain", "tiny", method="dino")
    theirs = recipe("pretrain", "tiny", method="dino", **{k: v for k, v in shared.items() if k in known})
    ended = []
    for r, kind in ((mine, Vills), (theirs, Distillation)):
        task = kind(r)
        torch.manual_seed(0)
        task.build("cpu")
        for step in range(2):
            task.schedule(step / 6)
            rows = list(task.sampler(1, 0, 0, 0, 1))[step]
            value, told = task.loss(task.modules["model"], task.load(rows, 8 * (step + 1)), Alone)
            value.backward()
            task.before_step(step / 6)
            task.optimizer.step()
            task.optimizer.zero_grad(set_to_none=True)
            task.after_step((step + 1) / 6)
        ended.append((value.detach(), *[p.detach() for name in ("model", "teacher")
                                        for p in task.modules[name].parameters()]))
        centre = task.losses[0].centre
        ended[-1] += (centre,)
    assert len(ended[0]) == len(ended[1]) and all(torch.equal(a, b) for a, b in zip(*ended))


def test_the_teacher_follows_by_its_momentum(data):
    task, batch = ready(asked(data))
    student, teacher = task.modules["model"], task.modules["teacher"]
    with torch.no_grad(): [p.add_(torch.randn_like(p)) for p in student.parameters()]
    before = [p.clone() for p in teacher.parameters()]
    task.momentum = .9
    task.after_step(.1)
    moved = [(.9 * b + .1 * p - t).abs().max() for b, p, t in zip(before, student.parameters(), teacher.parameters())]
    assert torch.stack(moved).max().item() < 1e-6 and not any(p.requires_grad for p in teacher.parameters())
    update_teacher(student, teacher, 0.)
    assert all(torch.equal(p, t) for p, t in zip(student.parameters(), teacher.parameters()))
