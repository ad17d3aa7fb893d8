"""Pre-training on a made-up data set of coloured people: methods, settings of paper and released code, its loop,
identities, kills."""
import json
import os
import signal
import subprocess
import sys
import time

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from trainings import asked

from cion_nb.core.runs import MissingRun, Run
from cion_nb.core.settings import recipe, table5
from cion_nb.models.architectures import InputSpec
from cion_nb.models.backbones import create_backbone, load_backbone
from cion_nb.models.features import embed
from cion_nb.training import pretrain as pretrain_room
from cion_nb.training.distill import ProjectionHead
from cion_nb.training.engine import fit, warmup_cosine
from cion_nb.training.pretrain import Distillation, equal_budget, pretrain


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("method", ["lup", "dino", "tracklet", "cion_true"])
def test_every_method_gives_a_backbone(people, runs, method):
    run = pretrain(asked(people, method))
    model = load_backbone(run.folder / "backbone.safetensors")
    assert embed(model, [people.parent / "1_1_0.png"]).shape == (1, model.embed_dim)
    assert run.result["images"] == 96 and run.result["train_images"] == 96 and np.isfinite(run.result["loss"])
    fresh = create_backbone("resnet10_tiny_ibn", (64, 32))
    assert model.card["recipe"] == run.recipe
    assert not torch.equal(dict(model.named_parameters())["conv1.weight"],
                           dict(fresh.named_parameters())["conv1.weight"])
    stamp = (run.folder / "result.json").stat().st_mtime_ns
    assert (pretrain(run.recipe).folder / "result.json").stat().st_mtime_ns == stamp, (
        "the same request was computed twice")


@pytest.mark.slow("trains networks")
def test_released_variant_epoch_teacher_and_batch_centre_run(people, runs):
    assert np.isfinite(pretrain(asked(people, variant="released", teacher="epoch", centre="batch")).result["loss"])
    with pytest.raises(ValueError, match="variant"): pretrain(asked(people, variant="relased"))


@pytest.mark.slow("trains networks")
def test_epoch_teacher_is_frozen_inside_an_epoch(people, runs):
    task = Distillation(asked(people, teacher="epoch", epochs=4, images_per_epoch=48))
    crossed = [bool(task._crosses_epoch(seen / 192)) for seen in range(24, 216, 24)]
    assert crossed == [False, True] * 4


@pytest.mark.slow("trains networks")
def test_last_layer_is_frozen_in_the_first_epoch(people, runs):
    task = Distillation(asked(people, freeze_last_layer_epochs=2, weight_decay=[0., 0.]))
    torch.manual_seed(0)
    task.build(torch.device("cpu"))
    fit(task, Run(task.recipe))
    torch.manual_seed(task.recipe["seed"])
    reference = Distillation(task.recipe)
    reference.build(torch.device("cpu"))
    assert torch.equal(task.modules["model"].head.last_layer.weight_v,
                       reference.modules["model"].head.last_layer.weight_v)
    assert not torch.equal(task.modules["model"].head.mlp[0].weight, reference.modules["model"].head.mlp[0].weight)
    for share, is_frozen in ((0., True), (.99, True), (1., False)):                # 2 of 2 epochs, at their end
        for p in reference.modules["model"].parameters(): p.grad = torch.zeros_like(p)
        reference.before_step(share)
        assert (reference.modules["model"].head.last_layer.weight_v.grad is None) == is_frozen
        assert reference.modules["model"].head.mlp[0].weight.grad is not None


PAPER = dict(   # the list; the paper's Sec. 4.1 where it says, else DINO's main_dino.py
    backbone="resnet50_ibn", image_size=[256, 128], local_size=[128, 64], epochs=100, n_id=[2, 4, 6, 8],
    n_id_epochs=[0, 40, 60, 80],
    head_hidden=2048, head_bottleneck=256, head_bn=False, out_dim=65536, student_temp=0.1, teacher_temp=0.04,
    warmup_teacher_temp_epochs=0,
    centre_momentum=0.9, ema=[0.996, 1.0], optimizer="adamw", lr=5e-4, lr_per=256, lr_end=1e-6, warmup_epochs=10,
    weight_decay=[0.04, 0.4],
    clip=3.0, freeze_last_layer_epochs=1, global_scale=[0.4, 1.0], local_scale=[0.05, 0.4], aspect=[0.375, 0.667],
    variant="paper", teacher="step", centre="ema")
RELEASED = dict(out_dim=65336, variant="released", global_scale=[0.8, 1.0], local_scale=[0.05, 0.8], aspect=[0.4, 0.6],
                augmentation="released", clip=3 / 65536, method="released")


def test_paper_settings_are_the_papers_and_dinos():
    r = recipe("pretrain", "paper")
    assert {k: r[k] for k in PAPER} == PAPER
    # DINO's range times the output's w/h
    assert r["aspect"] == [round(x * 128 / 256, 3) for x in (3/4, 4/3)]
    known = table5().set_index("arch").loc["resnet50_ibn"]
    assert r["batch_size"] == 8 * known.batch_size_per_gpu and r["n_local"] == known.local_crops
    assert r["epochs"] == known.epochs
    assert all(r["batch_size"] // 8 % n == 0 for n in r["n_id"]), "an identity would be cut on eight GPUs"
    released = recipe("pretrain", "paper", method="released")
    assert {k: v for k, v in released.items() if r[k] != v} == RELEASED
    head = ProjectionHead(2048, r["out_dim"] // 64, r["head_hidden"], r["head_bottleneck"], batch_norm=r["head_bn"])
    assert [tuple(p.shape) for p in head.parameters()][::2] == [(2048, 2048), (2048, 2048), (256, 2048), (1024, 256)]
    assert not head.last_layer.weight_g.requires_grad


def test_released_settings_and_views_agree_where_both_state_them():
    from cion_nb.training.views import VIEW_RECIPES
    for method, name in (("cion", "paper"), ("released", "released")):
        r = recipe("pretrain", "paper", method=method)
        views = VIEW_RECIPES[name]
        assert (r["global_scale"], r["local_scale"], r["aspect"]) == tuple(
            list(views[k]) for k in ("global_scale", "local_scale", "ratio"))
        assert r["augmentation"] == name


def test_lup_style_is_its_released_scripts():
    from cion_nb.training.views import VIEW_RECIPES
    r, views = recipe("pretrain", "paper", method="lup"), VIEW_RECIPES["lup"]
    assert (r["optimizer"], r["lr"] * 2560 / r["lr_per"], r["moco_temp"], r["queue"], r["moco_momentum"], r["moco_dim"],
            r["weight_decay"], r["n_local"], r["identities"]) == \
           ("sgd", pytest.approx(0.3), 0.1, 65536, 0.999, 128, [1e-4, 1e-4], 0, "image")
    assert (views["jitter"], views["erase"], views["grey"], views["blur"], views["global_scale"], views["n_local"]) == (
        0., .5, .2, (.5, .5, .5), (.2, 1.), 0)
    # stored results of ours were made with timm's
    assert [recipe("pretrain", p, method="lup")["erasing_rule"] for p in ("paper", "small", "tiny")] == [
        "zhong", "timm", "timm"]


@pytest.mark.slow("trains networks")
def test_a_recipes_erasing_reaches_the_views(people, runs):
    for rule in ("zhong", "timm"):
        assert (pretrain_room.MomentumContrast(asked(people, "lup", erasing_rule=rule)).views.recipe["erase_rule"]
                == rule)
    with pytest.raises(ValueError, match="erasing_rule='tim': choose 'zhong' or 'timm'"):
        pretrain(asked(people, "lup", erasing_rule="tim"))


@pytest.mark.slow("trains networks")
def test_fit_is_dinos_loop(people, runs):
    """Six steps of the loop on one image an identity, against DINO's training loop written out on the same batches:
    frozen prototypes,
    clipping, decay, momentum, temperature, centre. SGD, since AdamW turns a last bit of a vanishing gradient into a
    step of full length."""
    r = asked(people, "dino", epochs=3, images_per_epoch=48, freeze_last_layer_epochs=1, weight_decay=[.04, .4],
              clip=.05, ema=[.9, 1.], warmup_epochs=1, lr=.5, optimizer="sgd",
              warmup_teacher_temp=.06, warmup_teacher_temp_epochs=2, teacher_temp=.04, head_bn=False)
    task = Distillation(r)
    fit(task, Run(r), log_every=1)
    torch.manual_seed(r["seed"])
    plain = Distillation(r)
    plain.build(torch.device("cpu"))
    losses = []
    student, teacher, centre = plain.modules["model"], plain.modules["teacher"], torch.zeros(32)
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    decays = lambda n, p: p.ndim > 1 and not n.endswith(".bias")
    optimizer = torch.optim.SGD([dict(params=[p for n, p in named if decays(n, p)]),
                                 dict(params=[p for n, p in named if not decays(n, p)], weight_decay=0.)],
                                lr=1., momentum=.9)
    rows = [b for n_pass in range(2) for b in plain.sampler(1, n_pass, 0, 0, 1)][:6]
    cosine = lambda a, b, k, n: b + .5 * (a - b) * (1 + np.cos(np.pi * k / n))
    for step in range(6):
        for g in optimizer.param_groups:
            g["lr"] = .5 * 24 / 256 * step / 2 if step < 2 else cosine(.5 * 24 / 256, 1e-6, step - 2, 4)
        optimizer.param_groups[0]["weight_decay"] = cosine(.04, .4, step, 6)
        tau = .06 + (.04 - .06) * step / 4 if step < 4 else .04
        views = [(v.float() / 255 - torch.tensor(student.backbone.input.mean).view(3, 1, 1))
                 / torch.tensor(student.backbone.input.std).view(3, 1, 1)
                 for v in plain.load(rows[step], 24 * (step + 1))["views"]]
        with torch.no_grad(): t = teacher(views[:2]).unflatten(0, (2, 24))
        s, q, pairs = (student(views).unflatten(0, (3, 24)), ((t - centre) / tau).softmax(-1),
                       [(a, b) for a in range(2) for b in range(3) if a != b])
        loss = sum((-q[a] * (s[b] / .1).log_softmax(-1)).sum(-1).mean() for a, b in pairs) / len(pairs)
        losses.append(loss.item())
        loss.backward()
        for n, p in named: p.grad.mul_(min(1., .05 / (p.grad.norm().item() + 1e-6)))
        if step < 2: student.head.last_layer.weight_v.grad = None
        optimizer.step()
        optimizer.zero_grad()
        m = cosine(.9, 1., step, 6)
        with torch.no_grad():
            for a, b in zip(teacher.parameters(), student.parameters()): a.mul_(m).add_(b, alpha=1 - m)
        centre = .9 * centre + .1 * t.flatten(0, 1).mean(0)
    log = pd.DataFrame(Run(r).read_log())
    assert log.loss.tolist() == pytest.approx(losses, rel=1e-3)
    assert torch.allclose(task.modules["loss"].centre, centre, atol=1e-4)
    for ours, theirs in ((task.modules["model"], student), (task.modules["teacher"], teacher)):
        moved = max((p - q).abs().max().item()
                    for p, q in zip(theirs.parameters(), Distillation_at_start(r).modules["model"].parameters()))
        worst = max((p - q).abs().max().item() for p, q in zip(ours.parameters(), theirs.parameters()))
        assert worst < .02 * moved, f"weights differ by {worst:.1e}, training moved them by {moved:.1e}"


class Plain(torch.nn.Module):
    "A backbone without BatchNorm."
    def __init__(self, size):
        super().__init__()
        self.embed_dim, self.input, self.name = 32, InputSpec(*size), "plain"
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.GroupNorm(2, 8), torch.nn.GELU(),
                                       torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    def forward(self, x): return self.net(x)


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("method", ["tracklet", "lup"])
def test_a_run_in_pieces_is_the_whole_run(people, runs, monkeypatch, method):
    """Without BatchNorm: losses, weights, teacher, centre or queue, momentum of the optimizer; the curriculum's change
    falls inside a step.
    """
    monkeypatch.setattr(pretrain_room, "create_backbone", lambda name, size: Plain(size))
    found = []
    for accumulate in (1, 2):
        r = asked(people, method, epochs=2, images_per_epoch=36, accumulate=accumulate, optimizer="sgd", lr=.5,
                  queue=100, warmup_epochs=0, clip=None, head_bn=False)
        task = pretrain_room.TASKS[r["loss"]](r)
        fit(task, Run(r), log_every=1)
        found.append((task, [(row["seen"], row["loss"]) for row in Run(r).read_log()]))
    (whole, a), (parts, b) = found
    assert [seen for seen, _ in a] == [seen for seen, _ in b] == [24, 48, 72]
    assert [loss for _, loss in b] == pytest.approx([loss for _, loss in a], rel=1e-4)
    for name in whole.modules:
        torch.testing.assert_close(parts.modules[name].state_dict(), whole.modules[name].state_dict(), rtol=1e-4,
                                   atol=2e-5)
    momentum = lambda task: [s["momentum_buffer"] for s in task.optimizer.state_dict()["state"].values()]
    torch.testing.assert_close(momentum(parts), momentum(whole), rtol=1e-3, atol=1e-4)
    start = pretrain_room.TASKS[r["loss"]](r)
    torch.manual_seed(r["seed"])
    start.build(torch.device("cpu"))
    assert max((p - q).abs().max() for p, q in zip(
        start.modules["model"].parameters(), whole.modules["model"].parameters())) > .01, (
        "it learned something to compare")


@pytest.mark.slow("trains networks")
def test_a_batch_centre_in_pieces_is_refused(people, runs):
    with pytest.raises(ValueError, match="use accumulate=1, or centre='ema'"):
        pretrain(asked(people, centre="batch", accumulate=2))


def Distillation_at_start(r):
    torch.manual_seed(r["seed"])
    task = Distillation(r)
    task.build(torch.device("cpu"))
    return task


@pytest.mark.slow("trains networks")
def test_schedules_follow_images_so_the_curriculum_does_not_make_them_jump(people, runs):
    log, changes = {}, dict(epochs=4, images_per_epoch=48, warmup_epochs=1, weight_decay=[.04, .4], lr=.01,
                            ema=[.9, 1.], freeze_last_layer_epochs=0)
    for name, curriculum in dict(rising=dict(n_id=[2, 4], n_id_epochs=[0, 2]),
                                 flat=dict(n_id=[2], n_id_epochs=[0])).items():
        r = asked(people, **changes, **curriculum)
        fit(Distillation(r), Run(r), log_every=1)
        log[name] = pd.DataFrame(Run(r).read_log())
    assert log["rising"].n_pass.nunique() > 1 and log["rising"].seen.tolist() == list(range(24, 193, 24))
    for key in ("lr", "weight_decay", "ema", "teacher_temp"):
        assert log["rising"][key].tolist() == log["flat"][key].tolist()
    # a step's values are those of its first image
    at = (log["rising"].seen - 24) / 192
    assert np.allclose(log["rising"].weight_decay, [warmup_cosine(x, .04, .4) for x in at])
    assert np.allclose(log["rising"].ema, [warmup_cosine(x, .9, 1.) for x in at])
    assert np.allclose(log["rising"].lr, [warmup_cosine(x, .01 * 24 / 256, 1e-6, .25) for x in at])


@pytest.mark.slow("trains networks")
def test_gradients_are_unscaled_then_clipped_then_stepped(people, runs, monkeypatch):
    import accelerate
    order, task = [], Distillation(asked(people, images_per_epoch=24, epochs=1, n_id=[2], n_id_epochs=[0]))
    unscale, before, step = accelerate.Accelerator.unscale_gradients, Distillation.before_step, torch.optim.AdamW.step
    monkeypatch.setattr(
        accelerate.Accelerator, "unscale_gradients", lambda self, *a: (order.append("unscale"), unscale(self, *a))[1])
    monkeypatch.setattr(Distillation, "before_step", lambda self, share: (order.append("clip"), before(self, share))[1])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (order.append("step"), step(self, *a, **k))[1])
    fit(task, Run(task.recipe))
    assert order == ["unscale", "clip", "step"]


@pytest.mark.slow("trains networks")
def test_the_exported_backbone_is_the_last_teacher(people, runs):
    run = pretrain(asked(people))
    last = torch.load(max((run.folder / "checkpoints").glob("seen-*")) / "state.pt", weights_only=True)["modules"]
    exported = load_backbone(run.folder / "backbone.safetensors").state_dict()
    of = lambda net: {k.removeprefix("backbone."): v for k, v in last[net].items() if k.startswith("backbone.")}
    assert exported.keys() == of("teacher").keys()
    assert all(torch.equal(v, of("teacher")[k]) for k, v in exported.items())
    assert any(not torch.equal(v, of("model")[k]) for k, v in exported.items())


@pytest.mark.slow("trains networks")
def test_a_batch_that_a_later_phase_would_cut_is_refused_at_the_start(people, runs):
    with pytest.raises(ValueError, match="not a multiple of n_id=5"): pretrain(asked(people, n_id=[2, 5]))
    with pytest.raises(ValueError, match="choose 'step'"): pretrain(asked(people, teacher="steps"))
    with pytest.raises(ValueError, match="n_id 4 would never come"): pretrain(asked(people, n_id_epochs=[0, 2]))
    with pytest.raises(ValueError, match="would never reach lr"): pretrain(asked(people, warmup_epochs=3))
    for at in ([0, 0], [1, 2], [0]):
        with pytest.raises(ValueError, match="one rising epoch a value"): pretrain(asked(people, n_id_epochs=at))
    with pytest.raises(ValueError, match="batch_size=144 is more than the 96 presentations"):
        pretrain(asked(people, batch_size=144))


@pytest.mark.slow("trains networks")
def test_equal_budget_is_asserted(people, runs):
    done = [pretrain(asked(people, m)) for m in ("lup", "tracklet")]
    table = equal_budget(done)
    assert table.images.tolist() == [96, 96] and table.presentations.tolist() == [96, 96]
    assert table.batch.tolist() == [24, 24]
    assert table.views.tolist() == [2, 3] and table.view_passes.tolist() == [192, 288] and (table.seconds > 0).all()
    with pytest.raises(ValueError, match="dino.*has epochs=1"):
        equal_budget([*done, pretrain(asked(people, "dino", epochs=1))])
    with pytest.raises(MissingRun): equal_budget([Run(asked(people, "dino"))])
    with pytest.raises(ValueError, match="at least one run"): equal_budget([])
    with pytest.raises(TypeError, match="make_runs"): equal_budget([asked(people, "dino")])


@pytest.mark.slow("starts processes")
def test_killed_pretraining_resumes_to_the_same_bits(people, runs, tmp_path):
    r = asked(people, epochs=5, checkpoint_minutes=0.)
    through = Run(r)
    other = tmp_path / "other"
    env = os.environ | dict(CION_NB_RUNS=str(other), OMP_NUM_THREADS="1")
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(r))
    p = subprocess.Popen([sys.executable, "-m", "cion_nb", "pretrain", "--recipe", str(file)], env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder, deadline = other / through.name, time.time() + 120
    while not list((folder / "checkpoints").glob("seen-*")) and p.poll() is None and time.time() < deadline:
        time.sleep(.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert list((folder / "checkpoints").glob("seen-*")) and not (folder / "result.json").exists()
    done = subprocess.run([sys.executable, "-m", "cion_nb", "pretrain", "--recipe", str(file)], env=env,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    own = forked.run(["-m", "cion_nb", "pretrain", "--recipe", file],
                     env=env | dict(CION_NB_RUNS=str(tmp_path / "third")))
    assert own.returncode == 0, own.stderr[-2000:]
    assert (folder / "backbone.safetensors").read_bytes() == (
        tmp_path / "third" / through.name / "backbone.safetensors").read_bytes()


@pytest.mark.slow("starts processes")
def test_two_processes(people, runs, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(asked(people)))
    env = os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    p = forked.run_ranks(2, ["-m", "cion_nb", "pretrain", "--recipe", file], env=env)
    assert p.returncode == 0, p.stderr[-3000:]
    assert Run(asked(people)).result["processes"] == 2
