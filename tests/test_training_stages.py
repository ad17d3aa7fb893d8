"""pretrain, finetune and reproduce on a made-up data set of coloured people, small enough for a test."""
import json, os, random, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from cion_nb.models.architectures import InputSpec
from cion_nb.models.backbones import create_backbone, load_backbone
from cion_nb.models.leaving import export_onnx
from cion_nb.retrieval.evaluate import evaluate
from cion_nb.core.store import Features
from cion_nb.data.datasets import read_data
from cion_nb.models.features import embed, OnnxModel
from cion_nb.training.finetune import finetune, FineTuning, load_finetuned
from cion_nb.companion import reproduce as reproduce_room
from cion_nb.training import pretrain as pretrain_room
from cion_nb.training.distill import CollapseWatch, ProjectionHead
from cion_nb.training.engine import _trim_log, fit, Position, warmup_cosine
from cion_nb.training.pretrain import Distillation, equal_budget, identity_labels, pretrain, WatchedRun
from cion_nb.companion.reproduce import make_run, make_runs, plan, STAGES
from cion_nb.core.settings import recipe, table5
from cion_nb.core.runs import MissingRun, Run
from cion_nb.core.samples import make_samples, read_samples, write_samples
from cion_nb.training.views import normalise
from test_backbones import rounding

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(epochs=2, images_per_epoch=48, batch_size=24, n_id_epochs=[0, 1], n_id=[2, 4], n_local=1, out_dim=32, head_hidden=32, head_bottleneck=16, queue=48, precision="fp32", channels_last=False)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    "12 people of two colours each, 2 cameras, 4 images a camera; the parquet file of their table."
    root, rng, rows = tmp_path_factory.mktemp("people"), np.random.default_rng(0), []
    for pid in range(1, 13):
        top, bottom = rng.integers(0, 255, (2, 3))
        for cam in (1, 2):
            for k in range(4):
                x = np.empty((64, 32, 3)); x[:32], x[32:] = top, bottom
                x = np.clip(x * (1 if cam == 1 else .7) + rng.normal(0, 12, x.shape), 0, 255).astype(np.uint8)
                path = f"{pid}_{cam}_{k}.png"; Image.fromarray(x).save(root / path)
                split = "train" if pid <= 8 else "query" if k == 0 else "gallery"
                rows.append(dict(path=path, pid=pid, camid=cam, tracklet=10 * pid + cam, frame=k, split=split, video=f"v{cam}"))
    samples = make_samples(**{k: [r[k] for r in rows] for k in rows[0]}).assign(true_pid=[r["pid"] for r in rows])
    write_samples(samples, root / "samples.parquet")
    return root / "samples.parquet"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs")); monkeypatch.setenv("CION_NB_PROGRESS", "0")
    return tmp_path / "runs"


def asked(people, method="tracklet", **changes): return recipe("pretrain", "tiny", method=method, **dict(data=str(people), identities=dict(tracklet="tracklet", cion_true="true_pid").get(method, "image")) | SMALL | (dict(n_id=[1], n_id_epochs=[0]) if method in ("dino", "lup") else {}) | (dict(n_local=0) if method == "lup" else {}) | changes)


@pytest.mark.parametrize("method", ["lup", "dino", "tracklet", "cion_true"])
def test_every_method_gives_a_backbone(people, runs, method):
    run = pretrain(asked(people, method))
    model = load_backbone(run.folder / "backbone.safetensors")
    assert embed(model, [people.parent / "1_1_0.png"]).shape == (1, model.embed_dim)
    assert run.result["images"] == 96 and run.result["train_images"] == 96 and np.isfinite(run.result["loss"])
    fresh = create_backbone("resnet10_tiny_ibn", (64, 32))
    assert model.card["recipe"] == run.recipe and not torch.equal(dict(model.named_parameters())["conv1.weight"], dict(fresh.named_parameters())["conv1.weight"])
    stamp = (run.folder / "result.json").stat().st_mtime_ns
    assert (pretrain(run.recipe).folder / "result.json").stat().st_mtime_ns == stamp, "the same request was computed twice"


def test_released_variant_epoch_teacher_and_batch_centre_run(people, runs):
    assert np.isfinite(pretrain(asked(people, variant="released", teacher="epoch", centre="batch")).result["loss"])
    with pytest.raises(ValueError, match="variant"): pretrain(asked(people, variant="relased"))


def test_epoch_teacher_is_frozen_inside_an_epoch(people, runs):
    task = Distillation(asked(people, teacher="epoch", epochs=4, images_per_epoch=48))
    crossed = [bool(task._crosses_epoch(seen / 192)) for seen in range(24, 216, 24)]
    assert crossed == [False, True] * 4


def test_last_layer_is_frozen_in_the_first_epoch(people, runs):
    task = Distillation(asked(people, freeze_last_layer_epochs=2, weight_decay=[0., 0.]))
    torch.manual_seed(0); task.build(torch.device("cpu"))
    fit(task, Run(task.recipe))
    torch.manual_seed(task.recipe["seed"]); reference = Distillation(task.recipe); reference.build(torch.device("cpu"))
    assert torch.equal(task.modules["model"].head.last_layer.weight_v, reference.modules["model"].head.last_layer.weight_v)
    assert not torch.equal(task.modules["model"].head.mlp[0].weight, reference.modules["model"].head.mlp[0].weight)
    for share, is_frozen in ((0., True), (.99, True), (1., False)):                # 2 of 2 epochs, at their end
        for p in reference.modules["model"].parameters(): p.grad = torch.zeros_like(p)
        reference.before_step(share)
        assert (reference.modules["model"].head.last_layer.weight_v.grad is None) == is_frozen and reference.modules["model"].head.mlp[0].weight.grad is not None


PAPER = dict(   # the list; the paper's Sec. 4.1 where it says, else DINO's main_dino.py
    backbone="resnet50_ibn", image_size=[256, 128], local_size=[128, 64], epochs=100, n_id=[2, 4, 6, 8], n_id_epochs=[0, 40, 60, 80],
    head_hidden=2048, head_bottleneck=256, head_bn=False, out_dim=65536, student_temp=0.1, teacher_temp=0.04, warmup_teacher_temp_epochs=0,
    centre_momentum=0.9, ema=[0.996, 1.0], optimizer="adamw", lr=5e-4, lr_per=256, lr_end=1e-6, warmup_epochs=10, weight_decay=[0.04, 0.4],
    clip=3.0, freeze_last_layer_epochs=1, global_scale=[0.4, 1.0], local_scale=[0.05, 0.4], aspect=[0.375, 0.667],
    variant="paper", teacher="step", centre="ema")
RELEASED = dict(out_dim=65336, variant="released", global_scale=[0.8, 1.0], local_scale=[0.05, 0.8], aspect=[0.4, 0.6], augmentation="released", clip=3 / 65536, method="released")


def test_paper_settings_are_the_papers_and_dinos():
    r = recipe("pretrain", "paper")
    assert {k: r[k] for k in PAPER} == PAPER
    assert r["aspect"] == [round(x * 128 / 256, 3) for x in (3/4, 4/3)]                          # DINO's range times the output's w/h
    known = table5().set_index("arch").loc["resnet50_ibn"]
    assert r["batch_size"] == 8 * known.batch_size_per_gpu and r["n_local"] == known.local_crops and r["epochs"] == known.epochs
    assert all(r["batch_size"] // 8 % n == 0 for n in r["n_id"]), "an identity would be cut on eight GPUs"
    released = recipe("pretrain", "paper", method="released")
    assert {k: v for k, v in released.items() if r[k] != v} == RELEASED
    head = ProjectionHead(2048, r["out_dim"] // 64, r["head_hidden"], r["head_bottleneck"], batch_norm=r["head_bn"])
    assert [tuple(p.shape) for p in head.parameters()][::2] == [(2048, 2048), (2048, 2048), (256, 2048), (1024, 256)] and not head.last_layer.weight_g.requires_grad


def test_released_settings_and_views_agree_where_both_state_them():
    from cion_nb.training.views import VIEW_RECIPES
    for method, name in (("cion", "paper"), ("released", "released")):
        r = recipe("pretrain", "paper", method=method)
        views = VIEW_RECIPES[name]
        assert (r["global_scale"], r["local_scale"], r["aspect"]) == tuple(list(views[k]) for k in ("global_scale", "local_scale", "ratio")) and r["augmentation"] == name


def test_lup_style_is_its_released_scripts():
    from cion_nb.training.views import VIEW_RECIPES
    r, views = recipe("pretrain", "paper", method="lup"), VIEW_RECIPES["lup"]
    assert (r["optimizer"], r["lr"] * 2560 / r["lr_per"], r["moco_temp"], r["queue"], r["moco_momentum"], r["moco_dim"], r["weight_decay"], r["n_local"], r["identities"]) == \
           ("sgd", pytest.approx(0.3), 0.1, 65536, 0.999, 128, [1e-4, 1e-4], 0, "image")
    assert (views["jitter"], views["erase"], views["grey"], views["blur"], views["global_scale"], views["n_local"]) == (0., .5, .2, (.5, .5, .5), (.2, 1.), 0)
    assert [recipe("pretrain", p, method="lup")["erasing_rule"] for p in ("paper", "small", "tiny")] == ["zhong", "timm", "timm"]      # stored results of ours were made with timm's


def test_a_recipes_erasing_reaches_the_views(people, runs):
    for rule in ("zhong", "timm"): assert pretrain_room.MomentumContrast(asked(people, "lup", erasing_rule=rule)).views.recipe["erase_rule"] == rule
    with pytest.raises(ValueError, match="erasing_rule='tim': choose 'zhong' or 'timm'"): pretrain(asked(people, "lup", erasing_rule="tim"))


def test_fit_is_dinos_loop(people, runs):
    """Six steps of the loop on one image an identity, against DINO's training loop written out on the same batches: frozen prototypes,
    clipping, decay, momentum, temperature, centre. SGD, since AdamW turns a last bit of a vanishing gradient into a step of full length."""
    r = asked(people, "dino", epochs=3, images_per_epoch=48, freeze_last_layer_epochs=1, weight_decay=[.04, .4], clip=.05, ema=[.9, 1.], warmup_epochs=1, lr=.5, optimizer="sgd",
              warmup_teacher_temp=.06, warmup_teacher_temp_epochs=2, teacher_temp=.04, head_bn=False)
    task = Distillation(r)
    fit(task, Run(r), log_every=1)
    torch.manual_seed(r["seed"]); plain = Distillation(r); plain.build(torch.device("cpu"))
    losses = []; student, teacher, centre = plain.modules["model"], plain.modules["teacher"], torch.zeros(32)
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    decays = lambda n, p: p.ndim > 1 and not n.endswith(".bias")
    optimizer = torch.optim.SGD([dict(params=[p for n, p in named if decays(n, p)]), dict(params=[p for n, p in named if not decays(n, p)], weight_decay=0.)], lr=1., momentum=.9)
    rows = [b for n_pass in range(2) for b in plain.sampler(1, n_pass, 0, 0, 1)][:6]
    cosine = lambda a, b, k, n: b + .5 * (a - b) * (1 + np.cos(np.pi * k / n))
    for step in range(6):
        for g in optimizer.param_groups: g["lr"] = .5 * 24 / 256 * step / 2 if step < 2 else cosine(.5 * 24 / 256, 1e-6, step - 2, 4)
        optimizer.param_groups[0]["weight_decay"] = cosine(.04, .4, step, 6)
        tau = .06 + (.04 - .06) * step / 4 if step < 4 else .04
        views = [(v.float() / 255 - torch.tensor(student.backbone.input.mean).view(3, 1, 1)) / torch.tensor(student.backbone.input.std).view(3, 1, 1)
                 for v in plain.load(rows[step], 24 * (step + 1))["views"]]
        with torch.no_grad(): t = teacher(views[:2]).unflatten(0, (2, 24))
        s, q, pairs = student(views).unflatten(0, (3, 24)), ((t - centre) / tau).softmax(-1), [(a, b) for a in range(2) for b in range(3) if a != b]
        loss = sum((-q[a] * (s[b] / .1).log_softmax(-1)).sum(-1).mean() for a, b in pairs) / len(pairs)
        losses.append(loss.item()); loss.backward()
        for n, p in named: p.grad.mul_(min(1., .05 / (p.grad.norm().item() + 1e-6)))
        if step < 2: student.head.last_layer.weight_v.grad = None
        optimizer.step(); optimizer.zero_grad()
        m = cosine(.9, 1., step, 6)
        with torch.no_grad():
            for a, b in zip(teacher.parameters(), student.parameters()): a.mul_(m).add_(b, alpha=1 - m)
        centre = .9 * centre + .1 * t.flatten(0, 1).mean(0)
    log = pd.DataFrame(Run(r).read_log())
    assert log.loss.tolist() == pytest.approx(losses, rel=1e-3) and torch.allclose(task.modules["loss"].centre, centre, atol=1e-4)
    for ours, theirs in ((task.modules["model"], student), (task.modules["teacher"], teacher)):
        moved = max((p - q).abs().max().item() for p, q in zip(theirs.parameters(), Distillation_at_start(r).modules["model"].parameters()))
        worst = max((p - q).abs().max().item() for p, q in zip(ours.parameters(), theirs.parameters()))
        assert worst < .02 * moved, f"weights differ by {worst:.1e}, training moved them by {moved:.1e}"


class Plain(torch.nn.Module):
    "A backbone without BatchNorm."
    def __init__(self, size):
        super().__init__(); self.embed_dim, self.input, self.name = 32, InputSpec(*size), "plain"
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.GroupNorm(2, 8), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    def forward(self, x): return self.net(x)

@pytest.mark.parametrize("method", ["tracklet", "lup"])
def test_a_run_in_pieces_is_the_whole_run(people, runs, monkeypatch, method):
    "Without BatchNorm: losses, weights, teacher, centre or queue, momentum of the optimizer; the curriculum's change falls inside a step."
    monkeypatch.setattr(pretrain_room, "create_backbone", lambda name, size: Plain(size))
    found = []
    for accumulate in (1, 2):
        r = asked(people, method, epochs=2, images_per_epoch=36, accumulate=accumulate, optimizer="sgd", lr=.5, queue=100, warmup_epochs=0, clip=None, head_bn=False)
        task = pretrain_room.TASKS[r["loss"]](r); fit(task, Run(r), log_every=1); found.append((task, [(row["seen"], row["loss"]) for row in Run(r).read_log()]))
    (whole, a), (parts, b) = found
    assert [seen for seen, _ in a] == [seen for seen, _ in b] == [24, 48, 72]
    assert [loss for _, loss in b] == pytest.approx([loss for _, loss in a], rel=1e-4)
    for name in whole.modules: torch.testing.assert_close(parts.modules[name].state_dict(), whole.modules[name].state_dict(), rtol=1e-4, atol=2e-5)
    momentum = lambda task: [s["momentum_buffer"] for s in task.optimizer.state_dict()["state"].values()]
    torch.testing.assert_close(momentum(parts), momentum(whole), rtol=1e-3, atol=1e-4)
    start = pretrain_room.TASKS[r["loss"]](r); torch.manual_seed(r["seed"]); start.build(torch.device("cpu"))
    assert max((p - q).abs().max() for p, q in zip(start.modules["model"].parameters(), whole.modules["model"].parameters())) > .01, "it learned something to compare"


def test_a_batch_centre_in_pieces_is_refused(people, runs):
    with pytest.raises(ValueError, match="use accumulate=1, or centre='ema'"): pretrain(asked(people, centre="batch", accumulate=2))


def Distillation_at_start(r):
    torch.manual_seed(r["seed"]); task = Distillation(r); task.build(torch.device("cpu"))
    return task


def test_schedules_follow_images_so_the_curriculum_does_not_make_them_jump(people, runs):
    log, changes = {}, dict(epochs=4, images_per_epoch=48, warmup_epochs=1, weight_decay=[.04, .4], lr=.01, ema=[.9, 1.], freeze_last_layer_epochs=0)
    for name, curriculum in dict(rising=dict(n_id=[2, 4], n_id_epochs=[0, 2]), flat=dict(n_id=[2], n_id_epochs=[0])).items():
        r = asked(people, **changes, **curriculum)
        fit(Distillation(r), Run(r), log_every=1); log[name] = pd.DataFrame(Run(r).read_log())
    assert log["rising"].n_pass.nunique() > 1 and log["rising"].seen.tolist() == list(range(24, 193, 24))
    for key in ("lr", "weight_decay", "ema", "teacher_temp"): assert log["rising"][key].tolist() == log["flat"][key].tolist()
    at = (log["rising"].seen - 24) / 192                                                        # a step's values are those of its first image
    assert np.allclose(log["rising"].weight_decay, [warmup_cosine(x, .04, .4) for x in at]) and np.allclose(log["rising"].ema, [warmup_cosine(x, .9, 1.) for x in at])
    assert np.allclose(log["rising"].lr, [warmup_cosine(x, .01 * 24 / 256, 1e-6, .25) for x in at])


def test_gradients_are_unscaled_then_clipped_then_stepped(people, runs, monkeypatch):
    import accelerate
    order, task = [], Distillation(asked(people, images_per_epoch=24, epochs=1, n_id=[2], n_id_epochs=[0]))
    unscale, before, step = accelerate.Accelerator.unscale_gradients, Distillation.before_step, torch.optim.AdamW.step
    monkeypatch.setattr(accelerate.Accelerator, "unscale_gradients", lambda self, *a: (order.append("unscale"), unscale(self, *a))[1])
    monkeypatch.setattr(Distillation, "before_step", lambda self, share: (order.append("clip"), before(self, share))[1])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (order.append("step"), step(self, *a, **k))[1])
    fit(task, Run(task.recipe))
    assert order == ["unscale", "clip", "step"]


def test_the_exported_backbone_is_the_last_teacher(people, runs):
    run = pretrain(asked(people))
    last = torch.load(max((run.folder / "checkpoints").glob("seen-*")) / "state.pt", weights_only=True)["modules"]
    exported = load_backbone(run.folder / "backbone.safetensors").state_dict()
    of = lambda net: {k.removeprefix("backbone."): v for k, v in last[net].items() if k.startswith("backbone.")}
    assert exported.keys() == of("teacher").keys() and all(torch.equal(v, of("teacher")[k]) for k, v in exported.items())
    assert any(not torch.equal(v, of("model")[k]) for k, v in exported.items())


def test_a_batch_that_a_later_phase_would_cut_is_refused_at_the_start(people, runs):
    with pytest.raises(ValueError, match="not a multiple of n_id=5"): pretrain(asked(people, n_id=[2, 5]))
    with pytest.raises(ValueError, match="choose 'step'"): pretrain(asked(people, teacher="steps"))
    with pytest.raises(ValueError, match="n_id 4 would never come"): pretrain(asked(people, n_id_epochs=[0, 2]))
    with pytest.raises(ValueError, match="would never reach lr"): pretrain(asked(people, warmup_epochs=3))
    for at in ([0, 0], [1, 2], [0]):
        with pytest.raises(ValueError, match="one rising epoch a value"): pretrain(asked(people, n_id_epochs=at))
    with pytest.raises(ValueError, match="batch_size=144 is more than the 96 presentations"): pretrain(asked(people, batch_size=144))


@pytest.mark.parametrize("changes,word", [(dict(ema=[1.5, 2.]), "at most 1"), (dict(moco_momentum=-.1), "not be negative"), (dict(centre_momentum=9.), "at most 1"), (dict(ema=[.9]), "two numbers"), (dict(ema=["a", 1]), "'a' is not a number"),
    (dict(keep_checkpoints=-1), "be positive"), (dict(keep_checkpoints=0), "be positive"), (dict(lr_per=-1), "be positive"), (dict(clip=-1), "be positive"), (dict(weight_decay=[-1, -1]), "not be negative"), (dict(weight_decay=[.1]), "two numbers"),
    (dict(warmup_teacher_temp=0), "be positive"), (dict(head_bottleneck=0), "be positive"), (dict(out_dim=1), "at least 2"), (dict(moco_dim=0), "be positive"), (dict(warmup_epochs=-1), "not be negative"), (dict(freeze_last_layer_epochs=-1), "not be negative"),
    (dict(checkpoint_minutes=float("nan")), "finite"), (dict(seed=1.5), "whole"), (dict(seed=-1), "not be negative"), (dict(n_local=2.5), "whole"), (dict(n_id=[2.5], n_id_epochs=[0]), "whole"), (dict(n_id=["2"], n_id_epochs=[0]), "not a number"),
    (dict(workers=-1), "not be negative"), (dict(accumulate=1.5), "whole"), (dict(epochs=None), "a value is needed"), (dict(batch_size=None), "a value is needed"), (dict(image_size=["a", "b"]), "not a number"), (dict(batch_size=48.5), "whole"), (dict(queue=0), "be positive")])
def test_settings_out_of_range_are_named(changes, word):
    with pytest.raises(ValueError, match=f"pretrain setting {next(iter(changes))}=.*{word}"): recipe("pretrain", "tiny", **changes)


def test_what_some_profile_leaves_out_may_be_left_out():
    for name in ("images_per_epoch", "clip", "aspect", "global_scale", "data_root", "annotation"): assert recipe("pretrain", "tiny", **{name: None})[name] is None
    for name in ("weights", "margin", "keep_list", "drop_path"): assert recipe("finetune", "tiny", **{name: None})[name] is None


def test_images_beside_their_table_are_part_of_a_runs_name(people, runs, tmp_path):
    from cion_nb.core import runs as room
    root = shutil.copytree(people.parent, tmp_path / "own"); r = asked(root / "samples.parquet"); first = Run(r).name
    (root / "3_1_2.png").write_bytes(b"other"); room._seen_inputs.clear(); second = Run(r).name
    (root / "notes.txt").write_text("nothing to do with it"); room._seen_inputs.clear()
    assert first != second == Run(r).name


def test_a_wrong_root_is_one_error(people, runs):
    with pytest.raises(FileNotFoundError, match="none of the first 96 images can be read under .*nowhere.*Is that the root"): pretrain(asked(people, data_root="/nowhere"))


def test_equal_budget_is_asserted(people, runs):
    done = [pretrain(asked(people, m)) for m in ("lup", "tracklet")]
    table = equal_budget(done)
    assert table.images.tolist() == [96, 96] and table.presentations.tolist() == [96, 96] and table.batch.tolist() == [24, 24]
    assert table.views.tolist() == [2, 3] and table.view_passes.tolist() == [192, 288] and (table.seconds > 0).all()
    with pytest.raises(ValueError, match="dino.*has epochs=1"): equal_budget([*done, pretrain(asked(people, "dino", epochs=1))])
    with pytest.raises(MissingRun): equal_budget([Run(asked(people, "dino"))])
    with pytest.raises(ValueError, match="at least one run"): equal_budget([])
    with pytest.raises(TypeError, match="make_runs"): equal_budget([asked(people, "dino")])


SHORT = dict(epochs=10, images_per_epoch=24, batch_size=8, n_id=[2], n_id_epochs=[0], warmup_epochs=0)     # 30 steps, 3 log rows


def test_a_healthy_run_rings_no_alarm(people, runs):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run = pretrain(asked(people, **SHORT))
    log = pd.DataFrame(run.read_log())
    assert run.result["alarms"] == {} and log.alarms.tolist() == [[]] * 3
    assert (log.kl_to_uniform > .5).all() and (log.kl_to_mean > .5).all() and (log.centre_share < .9).all() and (log[["feature_rank", "student_rank"]] > 2).all(axis=None)


@pytest.mark.parametrize("changes, rings, silent", [
    (dict(teacher_temp=10.), {"uniform", "constant"}, {"rank", "student_rank", "centre"}),                                  # centring without sharpening
    (dict(centre_momentum=1., ema=[0., 0.], lr=.1, lr_per=8, head_bn=False), {"constant"}, {"uniform", "centre"})])                       # sharpening without centring
def test_a_collapse_of_the_outputs_rings(people, runs, changes, rings, silent):
    with pytest.warns(RuntimeWarning, match="alarm 'constant' at image 240: kl_to_mean"): run = pretrain(asked(people, **SHORT, **changes))
    assert rings <= run.result["alarms"].keys() and not silent & run.result["alarms"].keys()
    assert set(run.result["alarms"].values()) == {240} and rings <= set(run.read_log()[-1]["alarms"])


def test_a_dead_camera_rings_centre_and_ranks(people, runs, tmp_path):
    root = Path(shutil.copytree(people.parent, tmp_path / "dead"))
    for f in root.glob("*.png"): Image.fromarray(np.full((64, 32, 3), 90, np.uint8)).save(f)
    with pytest.warns(RuntimeWarning, match="alarm 'centre'"): run = pretrain(asked(root / "samples.parquet", **SHORT, centre_momentum=.5, view_changes=dict(jitter=0., solarise=[0., 0., 0.])))
    assert run.result["alarms"].keys() == {"constant", "centre", "rank", "student_rank"}


def test_features_on_a_line_ring(people, runs, monkeypatch):
    class Line(torch.nn.Module):
        "A backbone whose features are multiples of one vector, beside a constant."
        def __init__(self, *args): super().__init__(); self.inner = create_backbone(*args); self.input, self.embed_dim = self.inner.input, self.inner.embed_dim
        def forward(self, x): return self.inner(x)[:, :1] * torch.linspace(-1, 1, self.embed_dim) + 1
    monkeypatch.setattr(pretrain_room, "create_backbone", Line); monkeypatch.setattr(pretrain_room, "save_backbone", lambda *a, **k: None)
    with pytest.warns(RuntimeWarning, match="lie on a line"): run = pretrain(asked(people, **SHORT))
    assert {"rank", "student_rank"} <= run.result["alarms"].keys()


def test_alarms_survive_a_kill(runs):
    run = WatchedRun(recipe("pretrain", "tiny", method="tracklet"), runs / "a"); run.watch = CollapseWatch()
    for seen in range(10, 60, 10):
        with warnings.catch_warnings(): warnings.simplefilter("ignore"); run.log(seen=seen, feature_rank=1.)
    again = WatchedRun(run.recipe, runs / "a"); again.watch = CollapseWatch()
    with pytest.warns(RuntimeWarning, match="'rank' at image 30"): _trim_log(again, Position(40))
    assert again.watch.rang == run.watch.rang == dict(rank=30) and [r["seen"] for r in again.read_log()] == [10, 20, 30, 40]


def test_killed_pretraining_resumes_to_the_same_bits(people, runs, tmp_path):
    r = asked(people, epochs=5, checkpoint_minutes=0.)
    through = Run(r)
    other = tmp_path / "other"
    env = os.environ | dict(CION_NB_RUNS=str(other), OMP_NUM_THREADS="1")
    file = tmp_path / "recipe.json"; file.write_text(json.dumps(r))
    p = subprocess.Popen([sys.executable, "-m", "cion_nb.training.pretrain", "--recipe", str(file)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder, deadline = other / through.name, time.time() + 120
    while not list((folder / "checkpoints").glob("seen-*")) and p.poll() is None and time.time() < deadline: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    assert list((folder / "checkpoints").glob("seen-*")) and not (folder / "result.json").exists()
    done = subprocess.run([sys.executable, "-m", "cion_nb.training.pretrain", "--recipe", str(file)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    own = subprocess.run([sys.executable, "-m", "cion_nb.training.pretrain", "--recipe", str(file)], env=env | dict(CION_NB_RUNS=str(tmp_path / "third")), capture_output=True, text=True, timeout=240)
    assert own.returncode == 0, own.stderr[-2000:]
    assert (folder / "backbone.safetensors").read_bytes() == (tmp_path / "third" / through.name / "backbone.safetensors").read_bytes()


def command(tmp_path, r, **env):
    file = tmp_path / "recipe.json"; file.write_text(json.dumps(r))
    return subprocess.run([sys.executable, "-m", "cion_nb.training.pretrain", "--recipe", str(file)], env=os.environ | env, capture_output=True, text=True, timeout=240)


def test_what_is_wrong_is_told_in_one_line(people, runs, tmp_path):
    "A busy run, a folder that cannot be written to, and a mistyped network before missing data."
    def last_line(p): assert p.returncode == 2 and "Traceback" not in p.stderr, p.stderr; return p.stderr.strip().splitlines()[-1]
    r = asked(people, seed=17)
    with Run(r).computing(): assert "is being computed by another process" in last_line(command(tmp_path, r))
    (tmp_path / "file").write_text("not a folder")
    assert "CION_NB_RUNS=" in last_line(command(tmp_path, r, CION_NB_RUNS=str(tmp_path / "file")))
    (tmp_path / "other").mkdir(); (tmp_path / "other" / Run(r).name).write_text("a file")
    assert f"{Run(r).name} is a file where the folder of this run belongs" in last_line(command(tmp_path, r, CION_NB_RUNS=str(tmp_path / "other")))
    assert "resnet50_ibn" in last_line(command(tmp_path, recipe("pretrain", "tiny", backbone="resnet50_ibm")))


def test_two_processes(people, runs, tmp_path):
    file = tmp_path / "recipe.json"; file.write_text(json.dumps(asked(people)))
    env = os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(random.randint(20000, 40000)), "-m", "cion_nb.training.pretrain", "--recipe", str(file)],
                       env=env, capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stderr[-3000:]
    assert Run(asked(people)).result["processes"] == 2


def test_a_broken_image_is_replaced_and_counted(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "broken")
    (root / "3_1_2.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="3_1_2.png"): run = pretrain(asked(root / "samples.parquet"))
    assert run.result["unreadable"] == 1


def test_identities_of_a_denoising_run_join_by_path(people, runs):
    from cion_nb.identities.denoise import denoise
    samples = read_samples(people)
    kept = samples.drop(index=[0, 5]).reset_index(drop=True)            # extraction skipped two images
    x = np.random.default_rng(0).normal(size=(len(kept), 8)); x /= np.linalg.norm(x, axis=1, keepdims=True)
    run = Run(recipe("denoise", "tiny"))
    with run.computing() as todo:
        found = denoise(x, kept, sigma_cst=2, sigma_drm=0); found.save(run.folder); write_samples(kept, run.folder / "samples.parquet"); run.finish({})
    labels = identity_labels(samples, run.recipe)
    assert labels[0] == labels[5] == -1 and (np.delete(labels, [0, 5]) == found.labels).all()


def test_fine_tuning_starts_from_the_named_backbone(people, runs):
    pre = pretrain(asked(people, "dino"))
    r = recipe("finetune", "tiny", data=str(people), weights=pre.recipe, epochs=1, images_per_epoch=32, batch_size=16, lr=0., erasing=0., precision="fp32")
    run = finetune(r)
    a, b = (dict(load_backbone(f.folder / "backbone.safetensors").named_parameters()) for f in (pre, run))
    assert all(torch.equal(a[k], b[k]) for k in a), "with a learning rate of 0 the weights are the pre-trained ones"
    counted = [k for k in load_backbone(pre.folder / "backbone.safetensors").state_dict() if not k.endswith("num_batches_tracked")]
    assert run.result["matched"] == len(counted)


def test_fine_tuning_learns_and_its_score_is_evaluates(people, runs):
    run = finetune(recipe("finetune", "tiny", data=str(people), epochs=6, images_per_epoch=96, batch_size=32, warmup_epochs=1, pad=2, precision="fp32"))
    f = Features.open(run.folder / "test-features"); split = f.samples.split.to_numpy()
    q, g = split == "query", split == "gallery"
    score = evaluate(f.x[q], f.x[g], f.samples[q], f.samples[g])
    assert run.result["mAP"] == pytest.approx(score.mAP) and run.result["rank1"] == pytest.approx(float(score.cmc[0]))
    log = pd.DataFrame(run.read_log())
    assert log.loss.iloc[-1] < log.loss.iloc[0] or len(log) == 1
    assert load_backbone(run.folder / "backbone.safetensors").input.mean == (.5, .5, .5)


def test_one_person_is_an_error(people, runs, tmp_path):
    t = read_samples(people); t.loc[t.split == "train", "pid"] = 1
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "one"); write_samples(t, root / "samples.parquet")
    with pytest.raises(ValueError, match="two people"): finetune(recipe("finetune", "tiny", data=str(root / "samples.parquet")))


def test_a_changed_input_is_another_run(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "copy")
    first = Run(asked(root / "samples.parquet")).name
    time.sleep(.01); t = read_samples(root / "samples.parquet"); write_samples(t.iloc[:-1], root / "samples.parquet")
    assert Run(asked(root / "samples.parquet")).name != first


def test_make_run_computes_dependencies_first(runs, monkeypatch):
    order = []
    def fake(stage):
        def run_it(r):
            run = Run(r)
            for needed in (v for v in r.values() if isinstance(v, dict) and "stage" in v): Run(needed).require()
            with run.computing(): order.append((stage, r.get("method"))); run.finish({})
            return run
        return run_it
    for stage in STAGES: monkeypatch.setitem(STAGES, stage, fake(stage))
    asked = [recipe("finetune", "tiny", weights=recipe("pretrain", "tiny", method=m)) for m in ("dino", "cion")]
    listed = plan(asked)
    make_runs(asked, jobs=1)
    assert len(order) == len(listed) == len(set(listed.run))
    assert [s for s, _ in order] == listed.stage.tolist(), "runs are computed in the order of the plan"
    make_runs(asked, jobs=1); assert len(order) == len(listed), "nothing is computed twice"


def test_paper_profile_prints_commands_instead_of_running(runs, capsys):
    r = recipe("pretrain", "paper", data_root="/nowhere", annotation="/nowhere.json")
    done = make_runs([r])
    said = capsys.readouterr().out
    assert not done[0].is_done and "accelerate launch -m cion_nb.pretrain --recipe" in said and "was not named" not in said
    assert json.loads(Path(said.split("--recipe ")[1].strip()).read_text()) == r
    with pytest.raises(MissingRun): Run(r).require()
    make_runs([recipe("finetune", "paper", weights=recipe("pretrain", "paper"))])
    said = capsys.readouterr().out
    assert "was not named" in said and said.index("cion_nb.pretrain") < said.index("cion_nb.finetune"), "what is needed first is printed first"


def test_an_identity_without_a_readable_image_sits_out(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "gone")
    (root / "3_1_2.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="3_1_2.png"): run = pretrain(asked(root / "samples.parquet", "dino"))
    assert run.result["train_images"] == 95 and run.result["unreadable"] == 1


def test_identities_of_other_data_are_refused(people, runs):
    run = Run(recipe("denoise", "tiny"))
    from cion_nb.identities.denoise import denoise
    other = read_samples(people).assign(path=lambda t: "elsewhere/" + t.path)
    x = np.random.default_rng(0).normal(size=(len(other), 8))
    with run.computing(): denoise(x, other, sigma_cst=2, sigma_drm=0).save(run.folder); write_samples(other, run.folder / "samples.parquet"); run.finish({})
    with pytest.raises(ValueError, match="other data"): identity_labels(read_samples(people), run.recipe)


@pytest.mark.parametrize("changes,word", [(dict(optimizer="adamm"), "choose 'sgd' or 'adam'"), (dict(epochs=0), "must be positive"), (dict(batch_size=0), "must be positive")])
def test_settings_that_cannot_work_are_refused(people, runs, changes, word):
    with pytest.raises(ValueError, match=word): finetune(recipe("finetune", "tiny", data=str(people), **changes))


@pytest.mark.parametrize("args,word", [(["-p", "sedes", "3"], "did you mean 'seeds'"), (["--only", "table9"], "table4"), (["--profile", "huge"], "invalid choice")])
def test_reproduce_refuses_before_running(args, word, tmp_path):
    p = subprocess.run([sys.executable, "-m", "cion_nb.companion.reproduce", "--only", "table4", *args] if "--only" not in args else [sys.executable, "-m", "cion_nb.companion.reproduce", *args],
                       cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert p.returncode == 2 and word in p.stderr


@pytest.mark.parametrize("name,value,word", [("profil", "tiny", "did you mean 'profile'"), ("seeds", "five", "of type int"), ("seeds", "0", "at least one"), ("profile", "huge", "smoke, tiny, small, paper")])
def test_a_mistyped_parameter_fails_the_notebook(name, value, word, tmp_path):
    out = tmp_path / "out.ipynb"
    p = subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs/reproduce/table4.ipynb"), str(out), "-k", "python3", "--no-progress-bar", "-p", name, value],
                       capture_output=True, text=True, timeout=240, env=os.environ | dict(CION_NB_RUNS=str(tmp_path / "other")))
    assert p.returncode != 0
    assert word in p.stderr + out.read_text()


# Trainings beside one another

def beside(people, **changes): return [asked(people, "tracklet", seed=s, **changes) for s in range(3)]


def test_trainings_beside_one_another_end_as_alone(people, runs, monkeypatch):
    monkeypatch.setattr(reproduce_room, "WORTH_A_PROCESS", 1)
    before = torch.get_num_threads()
    together = make_runs([*beside(people), recipe("finetune", "tiny", data=str(people), epochs=1, images_per_epoch=32, batch_size=16, weights=beside(people)[0], channels_last=False)], jobs=2)
    assert all(r.is_done for r in together) and all((r.folder / "process.log").exists() for r in together)
    threads = together[0].result["threads"]
    assert threads == max(1, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else threads >= 1
    monkeypatch.setenv("CION_NB_RUNS", str(runs.parent / "alone"))
    torch.set_num_threads(threads)
    try: alone = make_runs(beside(people), jobs=1)
    finally: torch.set_num_threads(before)
    assert not (alone[0].folder / "process.log").exists()
    for a, b in zip(together, alone):
        assert a.folder != b.folder and a.name == b.name and a.result["loss"] == b.result["loss"]
        assert (a.folder / "backbone.safetensors").read_bytes() == (b.folder / "backbone.safetensors").read_bytes()


def test_a_training_that_fails_beside_others_is_named(people, runs, monkeypatch):
    monkeypatch.setattr(reproduce_room, "WORTH_A_PROCESS", 1)
    wrong = asked(people, batch_size=20, n_id=[3], n_id_epochs=[0], seed=5)
    with pytest.raises(RuntimeError, match=f"run {Run(wrong).name} failed .exit code [12].*process.log"): make_runs([wrong, *beside(people, images_per_epoch=2400)], jobs=2)
    assert not Run(wrong).is_done
    time.sleep(.5); assert not subprocess.run(["pgrep", "-f", str(runs)], capture_output=True, text=True).stdout, "a child was left behind"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_goes_on_without_what_failed(people, runs, monkeypatch, jobs):
    monkeypatch.setattr(reproduce_room, "WORTH_A_PROCESS", 1)
    wrong = asked(people, batch_size=20, n_id=[3], n_id_epochs=[0], seed=5)
    needs_it = recipe("finetune", "tiny", data=str(people), epochs=1, images_per_epoch=32, batch_size=16, weights=wrong)
    page = reproduce_room.Page("table4", "tiny")
    done = page.runs({("needs it", 0): needs_it} | {("beside", s): r for s, r in enumerate(beside(people))}, jobs=jobs)
    assert list(done) == [("beside", s) for s in range(3)]
    assert page.failed["needs it", 0].startswith(f"it needs {Run(wrong).name}, which failed: ") and len(page.failed) == 1


def test_children_leave_with_their_parent(people, runs, tmp_path):
    "The parent is killed, the children checkpoint and go, and the next call goes on from there."
    long = beside(people, images_per_epoch=4800)[:2]
    script = tmp_path / "parent.py"
    script.write_text(f"from cion_nb.companion import reproduce as room\nroom.make_runs({long!r}, jobs=2)\n")
    parent = subprocess.Popen([sys.executable, str(script)], env=os.environ | dict(CION_NB_RUNS=str(runs)))
    until = time.time() + 90
    while time.time() < until and not all(Run(r).read_log() for r in long): time.sleep(.2)
    parent.kill(); parent.wait()
    while time.time() < until and subprocess.run(["pgrep", "-f", str(runs)], capture_output=True).stdout: time.sleep(.2)
    for r in long:
        assert not Run(r).is_done and list((Run(r).folder / "checkpoints").glob("seen-*")), (Run(r).folder / "process.log").read_text()
        assert "stopped at image" in (Run(r).folder / "process.log").read_text()


@pytest.mark.parametrize("said", ["0", "two", -1, 1.5])
def test_how_many_at_once_is_checked(said, monkeypatch):
    with pytest.raises(ValueError, match="at least 1"): reproduce_room.at_once(said)
    monkeypatch.setenv("CION_NB_JOBS", str(said))
    with pytest.raises(ValueError, match="CION_NB_JOBS"): reproduce_room.at_once()
    assert reproduce_room.at_once(3) == 3


# From nothing to a file that leaves, for every backbone

ROAD = table5().arch.tolist() if os.environ.get("CION_NB_ROAD_ALL") else ["ghostnet_0_5", "edgenext_x_small"]

@pytest.mark.parametrize("arch", ROAD)
def test_a_backbone_goes_the_whole_road(people, runs, arch, tmp_path):
    "Pre-train a step, load, fine-tune a step, export to ONNX and read it back. CION_NB_ROAD_ALL=1: all 32, at 256x128 (slow)."
    pytest.importorskip("onnxruntime"); pytest.importorskip("onnxscript")
    size, local = ([256, 128], [128, 64]) if os.environ.get("CION_NB_ROAD_ALL") else ([128, 64], [64, 32])
    pre = pretrain(asked(people, "cion_true", backbone=arch, image_size=size, local_size=local, epochs=1, images_per_epoch=4, batch_size=4, n_id=[2], n_id_epochs=[0], channels_last=True))
    load_backbone(pre.folder / "backbone.safetensors")
    run = finetune(recipe("finetune", "tiny", data=str(people), weights=pre.recipe, backbone=arch, image_size=size, epochs=1, images_per_epoch=8, batch_size=8, k=2, warmup_epochs=0, precision="fp32"))
    assert run.result["matched"] == sum("num_batches" not in k for k in load_backbone(pre.folder / "backbone.safetensors").state_dict()) and np.isfinite(run.result["mAP"])
    tuned = load_finetuned(run.folder)
    report = export_onnx(tuned, tmp_path / "m.onnx", tolerance=max(1e-3, 20 * rounding(tuned, size)))      # after a step features hardly differ between images, least of all RepViT's
    x = torch.randint(0, 256, (3, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.inference_mode(): want = tuned(normalise(x, tuned.input))
    torch.testing.assert_close(F.normalize(OnnxModel(tmp_path / "m.onnx", report.input)(x.float())), F.normalize(want), atol=1e-4, rtol=0)
    print(f"| {arch} | {report.relative:.1e} | {report.megabytes:.1f} |")
