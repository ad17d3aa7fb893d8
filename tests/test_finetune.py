"""Fine-tuning beyond the baseline: MGN, TransReID, parts of the data, held-out people, other test sets, several processes."""
import json, os, random, signal, subprocess, sys, time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from cion_nb.models.architectures import InputSpec
from cion_nb.models.checkpoints import load_backbone_weights
from cion_nb.models.backbones import create_backbone, load_backbone, save_backbone
from cion_nb.models.leaving import export_onnx, export_torchscript
from cion_nb.core.weights import read_checkpoint
from cion_nb.training.cluster_contrast import ClusterNet, load_clusternet, save_clusternet
from cion_nb.retrieval.evaluate import evaluate
from cion_nb.core.store import Features
from cion_nb.models.features import embed, extract
from cion_nb.training.finetune import (
    batch_hard_triplet, BestSoFar, BNNeck, finetune, FineTuning, held_out_score, load_finetuned, make_backbone,
    make_model, part_of, released_finetuning, save_finetuned)
from cion_nb.training.mgn import MGN, mgn_loss, PARTS, STRIPES, TRIPLETS
from cion_nb.companion.claims import paper
from cion_nb.core.settings import recipe
from cion_nb.core.runs import licence, made_from, Run
from cion_nb.core.samples import read_samples, write_samples
from cion_nb.companion.score import load_model, score
from cion_nb.training.transreid import jigsaw_groups, TransReID
from test_training_stages import asked, people, runs      # noqa: F401  (fixtures)
from test_views import BOX, boxes_plainly, same_distribution

QUICK = dict(epochs=2, images_per_epoch=32, batch_size=16, warmup_epochs=1, precision="fp32", channels_last=False)
def quick(people, **changes): return recipe("finetune", "tiny", data=str(people), **QUICK | changes)


@pytest.mark.parametrize("changes", [dict(method="mgn"), dict(method="transreid"), dict(method="transreid", jpm=False), dict(method="transreid", sie=False, overlap=False, drop_path=None), dict(drop_path=None)],
                         ids=["MGN", "TransReID", "SIE alone", "JPM alone", "BNNeck"])
def test_every_method_trains_is_scored_and_comes_back(people, runs, changes):
    run = finetune(quick(people, **changes))
    assert 0 < run.result["mAP"] <= 1 and np.isfinite(run.result["loss"])
    model, stored = load_finetuned(run.folder), Features.open(run.folder / "test-features")
    again = embed(model, [people.parent / p for p in stored.samples.path], columns=dict(camid=stored.samples.camid) if getattr(model, "columns", ()) else None)
    np.testing.assert_allclose(again, stored.x, atol=2e-3)                # stored in half precision
    q, g = (stored.samples.split == s for s in ("query", "gallery"))
    assert run.result["mAP"] == pytest.approx(evaluate(stored.x[q], stored.x[g], stored.samples[q], stored.samples[g]).mAP)
    log = pd.DataFrame(run.read_log()); assert {"cross_entropy", "triplet", "accuracy"} <= set(log)


@pytest.mark.parametrize("changes", [dict(method="mgn"), dict(method="transreid"), dict(method="transreid", sie=False), dict(feature="after_neck")], ids=["MGN", "TransReID", "no SIE", "BNNeck"])
def test_every_method_leaves_as_one_file_that_scores_the_same(people, runs, tmp_path, changes):
    run = finetune(quick(people, **changes))
    model = load_finetuned(run.folder)
    report = export_onnx(model, tmp_path / "m.onnx")
    assert report.relative < 1e-3
    mine, theirs = score(load_model(run.folder), str(people)), score(load_model(tmp_path / "m.onnx"), str(people))
    assert theirs.mAP == pytest.approx(mine.mAP, abs=2e-3) and mine.mAP == pytest.approx(run.result["mAP"], abs=2e-3)
    if changes == dict(method="transreid"):                               # knows cameras 0, 1 and 2: what else comes in is named
        with pytest.raises(ValueError, match="knows camid 0 to 2, not 3"): embed(load_model(tmp_path / "m.onnx"), [people.parent / "1_1_0.png"], columns=dict(camid=[3]))
        with pytest.raises(ValueError, match="also takes camid"): embed(load_model(tmp_path / "m.onnx"), [people.parent / "1_1_0.png"])
        export_torchscript(model, tmp_path / "m.pt")


@pytest.mark.parametrize("method, file", [("bnneck", "neck.safetensors"), ("bnneck", "backbone.safetensors"), ("mgn", "model.safetensors"), ("usl", "clusternet.safetensors")])
def test_what_we_save_is_loaded_entry_for_entry_or_refused_by_name(tmp_path, method, file):
    "Every format of ours comes back bit for bit; cut off, of another program, of another model, or without its metadata, the error names the file."
    torch.manual_seed(0); backbone = create_backbone("resnet10_tiny", (96, 48))
    for x in backbone.state_dict().values(): x.add_(1) if not x.is_floating_point() else x.add_(.01 * torch.rand_like(x))
    model = dict(bnneck=lambda: BNNeck(backbone, 5), mgn=lambda: MGN(backbone, 5, 16), usl=lambda: ClusterNet(backbone, "gem"))[method]()
    save, load = (save_clusternet, load_clusternet) if method == "usl" else (save_finetuned, load_finetuned)
    save(model, tmp_path)
    back = load(tmp_path)
    assert back.state_dict().keys() == model.state_dict().keys() and all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))
    path = tmp_path / file; whole = path.read_bytes(); other = torch.nn.Linear(3, 2)
    def bare(): save_file(read_checkpoint(path), path, metadata=None)
    def foreign(): save_file(other.state_dict(), path, metadata=dict(feature="before_neck", pooling="gem"))
    damages = dict(cut=lambda: path.write_bytes(whole[:200]), page=lambda: path.write_text("<html>"), gone=path.unlink, foreign=foreign)
    if file in ("neck.safetensors", "clusternet.safetensors"): damages["bare"] = bare
    for damage in damages.values():
        path.write_bytes(whole); damage()
        with pytest.raises((ValueError, FileNotFoundError), match=file.replace(".", r"\.") if file != "backbone.safetensors" else "backbone|does not hold a resnet10_tiny"): load(tmp_path)
    path.write_bytes(whole)
    card = tmp_path / ("model.json" if method == "mgn" else "backbone.json"); card.write_text("{}")
    with pytest.raises(ValueError, match=f"{card.name} is no card that .* wrote: it lacks"): load(tmp_path)


def test_a_recipe_takes_a_part_of_a_file_by_way_of_a_saved_backbone(tmp_path, capsys):
    "`weights=` names a file and no part of it; the way that the error names is the way."
    a, b = (create_backbone("resnet10_tiny", (64, 32)) for _ in range(2))
    torch.save(dict(net_1=a.state_dict(), net_2=b.state_dict()), tmp_path / "two.pth")
    r = recipe("finetune", "tiny", backbone="resnet10_tiny", image_size=[64, 32], weights=str(tmp_path / "two.pth"), data=str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match="several networks.*load_backbone_weights takes it; for weights= of create_backbone or of a recipe, load so in Python, save_backbone, and name the saved file"): make_backbone(r)
    load_backbone_weights(model := create_backbone("resnet10_tiny", (64, 32)), tmp_path / "two.pth", part="net_2")
    backbone, report = make_backbone(r | dict(weights=str(save_backbone(model, tmp_path / "saved.safetensors"))))
    assert report.share == 1 and torch.equal(backbone.conv1.weight, b.conv1.weight)


def test_the_card_says_what_a_model_is_and_where_it_comes_from(people, runs):
    run = finetune(quick(people)); card = json.loads((run.folder / "backbone.json").read_text())
    assert card["licence"] == f"bound by the terms of what it was made from: {people}" and card["recipe"] == run.recipe and card["run"] == run.name
    assert card["scores"]["mAP"] == run.result["mAP"] and card["scores"]["protocol"] == "market" and card["data"] == dict(train_images=64, train_ids=8)
    assert card["name"] == "resnet10_tiny_ibn" and card["input"]["height"] == 64
    whole = finetune(quick(people, method="mgn")); card = json.loads((whole.folder / "model.json").read_text())
    assert card["scores"]["mAP"] == whole.result["mAP"] and card["licence"].startswith("bound by")
    embedded = recipe("finetune", "tiny", weights=recipe("pretrain", "tiny"))
    assert licence(embedded).startswith("Apache-2.0") and made_from(recipe("finetune", "tiny", weights="imagenet")) == ["imagenet"]
    assert made_from(recipe("finetune", "paper", data_root="/d", weights=recipe("pretrain", "paper", data_root="/c", annotation="/c/a.json"))) == ["/c/a.json", "cion_al", "market1501"]


def test_seeds_on_a_command_line(people, runs):
    settings = [f"{k}={json.dumps(v)}" for k, v in dict(data=str(people), backbone="resnet10_tiny_ibn", **QUICK).items()]
    done = subprocess.run([sys.executable, "-m", "cion_nb.training.finetune", "--seeds", "2", "--set", *settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *folders, said = done.stdout.strip().splitlines()
    results = [json.loads(Path(f, "result.json").read_text()) for f in folders]; scores = [r["mAP"] for r in results]
    assert len({r["loss"] for r in results}) == 2 and said.startswith("seeds 0, 1") and f"mAP {100 * np.mean(scores):.1f} ± {100 * np.std(scores, ddof=1):.1f}" in said
    assert subprocess.run([sys.executable, "-m", "cion_nb.training.finetune", "--seeds", "0"], capture_output=True, text=True).returncode == 2


def test_a_backbone_with_overlapping_patches_comes_back(tmp_path):
    model = create_backbone("vit_tiny", (256, 128), overlap=True)
    assert tuple(model.patch_embed.grid_size) == (21, 10) and model.pos_embed.shape[1] == 211
    with torch.no_grad():
        patches = model.patch_embed(torch.rand(1, 3, 256, 128)); assert patches.shape[1:3] == (21, 10), "the grid is what the convolution makes"
    save_backbone(model, tmp_path / "b.safetensors"); back = load_backbone(tmp_path / "b.safetensors")
    x = torch.rand(2, 3, 256, 128)
    with torch.no_grad(): assert torch.equal(back(x), model.eval()(x))
    whole = create_backbone("vit_tiny", (256, 128)); save_backbone(whole, tmp_path / "w.safetensors")
    other = create_backbone("vit_tiny", (256, 128), weights=tmp_path / "w.safetensors", overlap=True)      # position embeddings are resized
    assert torch.equal(other.blocks[3].attn.qkv.weight, whole.blocks[3].attn.qkv.weight)
    for name in ("resnet18", "swin_tiny", "standard_vit_tiny"):
        with pytest.raises(ValueError, match="no convolutional patch stem"): create_backbone(name, overlap=True)


def test_jigsaw_keeps_every_patch_once():
    for n, groups, shuffle in ((128, 4, 2), (210, 4, 2), (36, 3, 3), (9, 4, 2)):
        got = torch.cat(jigsaw_groups(torch.arange(n)[None, :, None].float(), groups, 5, shuffle), 1).flatten().int().tolist()
        kept = set(got); missing = set(range(n)) - kept
        assert len(missing) < groups + shuffle and len(got) == len(jigsaw_groups(torch.zeros(1, n, 1), groups, 5, shuffle)[0][0]) * groups
        assert len(got) - len(kept) <= shuffle, "only repeats of the last patch occur twice"


def test_mgn_parameters_a_branch_and_what_the_warm_up_holds():
    "A branch is the rest of layer3, layer4 and one BatchNorm; the stem is the rest; nothing is shared between branches."
    backbone = create_backbone("resnet50_ibn", (384, 128)); count = lambda m: sum(p.numel() for p in m.parameters())
    stem = sum(count(m) for m in (backbone.conv1, backbone.bn1, backbone.layer1, backbone.layer2, backbone.layer3[0]))
    branch = count(backbone) - stem + 2 * 2048
    model = MGN(backbone, n_ids=751)
    assert count(model.stem) == stem and [count(b) for b in model.branches.values()] == [branch] * 3
    assert {n: count(p) for n, p in model.parts.items()} == {n: 1 + 2048 * 256 + 2 * 256 + 751 * 256 for n in PARTS} and len(PARTS) == 8
    ids = [id(p) for b in model.branches.values() for p in b.parameters()]; assert len(ids) == len(set(ids))
    frozen = {id(p) for m in model.frozen_part() for p in m.parameters()}
    moving = [n for n, p in model.named_parameters() if id(p) not in frozen]
    assert all(n.startswith("parts.") or n.split(".")[0] == "branches" and n.split(".")[2] == "2" for n in moving) and len(moving) == 3 * 2 + 8 * 5


def test_mgn_warm_up_moves_nothing_below_the_parts(people, runs):
    task = FineTuning(quick(people, method="mgn", freeze_epochs=2)); task.build(torch.device("cpu")); model = task.modules["model"].train()
    before = deepcopy(model.state_dict())
    class Plain: num_processes = 1
    rows = next(iter(task.sampler(None, 0, 0, 0, 1)))
    for share, moves in ((0., False), (.99, False)):
        task.schedule(share); loss, _ = task.loss(model, task.load(rows, 16), Plain); loss.backward(); task.before_step(share); task.optimizer.step(); task.optimizer.zero_grad()
    same = {n: torch.equal(before[n], v) for n, v in model.state_dict().items() if v.is_floating_point()}
    held = [n for n in same if n.startswith("stem.") or n.startswith("branches.") and n.split(".")[2] in "01"]
    assert held and all(same[n] for n in held), "parameters and running statistics"
    assert not any(same[f"parts.{p}.reduction.weight"] for p in PARTS) and not same["branches.b1.2.weight"]
    task.recipe["freeze_epochs"] = 1; task.schedule(.6); loss, _ = task.loss(model, task.load(rows, 16), Plain); loss.backward(); task.before_step(.6); task.optimizer.step()
    assert not torch.equal(before["stem.0.weight"], model.stem[0].weight) and model.stem[1].training


def test_mgn_loss_is_its_sums():
    torch.manual_seed(0)
    out = {n: (torch.randn(6, 4, requires_grad=True), torch.rand(6, 5) * 2 - 1) for n in PARTS}; pid = torch.tensor([0, 0, 1, 1, 2, 2])
    loss, told = mgn_loss(out, pid, lambda f, y: batch_hard_triplet(f, y), smoothing=0., scale=3., margin=.2, triplet_weight=2.)
    ce = []
    for _, s in out.values():
        z = torch.stack([torch.stack([3 * max(1.2 - float(v), 0) * (v - .8) if j == y else 3 * max(float(v) + .2, 0) * (v - .2) for j, v in enumerate(row)]) for row, y in zip(s, pid)])
        ce.append(nn.functional.cross_entropy(z, pid))
    f = lambda *names: torch.cat([out[n][0] for n in names], 1)
    triplets = [batch_hard_triplet(x, pid) for x in (f("b1"), f("b2"), f("b3"), f("b21", "b22"), f("b31", "b32", "b33"))]
    assert loss.item() == pytest.approx((sum(ce) / 8 + 2 * sum(triplets) / 5).item(), rel=1e-5)


def test_the_released_configurations_are_ours():
    "All 64 of them, from the table of the paper's facts."
    for row in paper("transreid_configs").itertuples():
        r = recipe("finetune", "paper", backbone=row.arch, data=dict(market="market1501").get(row.dataset, row.dataset))
        assert (r["batch_size"], r["warmup_epochs"], r["epochs"], r["k"]) == (row.ims_per_batch, row.warmup_epochs, row.max_epochs, row.num_instance), row.config
        assert r["lr"] * r["batch_size"] / r["lr_per"] == pytest.approx(row.base_lr), row.config
    assert recipe("finetune", "paper", backbone="vit_base", batch_size=64)["batch_size"] == 64, "what is asked for counts"
    assert released_finetuning("vit_base", "mydata.parquet") == {} and recipe("finetune", "tiny")["batch_size"] == 32


def test_parts_lie_in_one_another_and_are_whole_people():
    rng = np.random.default_rng(0); t = pd.DataFrame(dict(pid=rng.integers(0, 60, 900), path=[f"{i}.jpg" for i in range(900)]))
    for seed in range(3):
        last = set()
        for share in (.1, .3, .7, 1.):
            now = part_of(t, few_ids=share, seed=seed); assert set(now.pid) >= last and now.index.is_monotonic_increasing; last = set(now.pid)
            assert (now.groupby("pid").size() == t[t.pid.isin(last)].groupby("pid").size()).all() and len(last) == max(2, round(share * 60))
        last = set()
        for share in (.1, .5, .9, 1.):
            now = part_of(t, few_images=share, seed=seed); assert set(now.path) >= last; last = set(now.path)
            assert (now.groupby("pid").size() == np.ceil(share * t.groupby("pid").size() - 1e-9)).all()
    assert part_of(t).equals(t) and not part_of(t, few_ids=.3, seed=0).equals(part_of(t, few_ids=.3, seed=1))


def test_a_list_of_ones_own(people, runs, tmp_path, capsys):
    t = read_samples(people); t = t[t.split == "train"]
    (tmp_path / "pids.txt").write_text("3\n5\n\n"); (tmp_path / "paths.txt").write_text("\n".join(t.path[:10])); (tmp_path / "bad.txt").write_text("1_1_0.png\nnobody.png\n"); (tmp_path / "empty.txt").write_text("\n")
    assert set(part_of(t, keep_list=tmp_path / "pids.txt").pid) == {3, 5} and part_of(t, keep_list=tmp_path / "paths.txt").path.tolist() == t.path[:10].tolist()
    with pytest.raises(ValueError, match="1 of 2 lines.*nobody.png"): part_of(t, keep_list=tmp_path / "bad.txt")
    with pytest.raises(ValueError, match="is empty"): part_of(t, keep_list=tmp_path / "empty.txt")
    for name, raw in dict(marked="\ufeff3\r\n5\r\n".encode(), zeros=b"0003 \n0005 \n").items():                       # Notepad's; LUPerson's used_ids
        (tmp_path / name).write_bytes(raw); assert set(part_of(t, keep_list=tmp_path / name).pid) == {3, 5}
    deep = t.assign(path="train/" + t.path)
    for name, text in dict(windows="train\\1_1_0.png\ntrain\\2_1_3.png\n", names="1_1_0.png; 0; 0 \n2_1_3.png; 1; 0 \n").items():     # the second as LUPerson's used_ims
        (tmp_path / name).write_text(text); assert part_of(deep, keep_list=tmp_path / name).path.tolist() == ["train/1_1_0.png", "train/2_1_3.png"]
    twice = pd.concat([deep, t.assign(path="more/" + t.path)])
    with pytest.raises(ValueError, match="2 of 2 lines name neither a path nor a pid"): part_of(twice, keep_list=tmp_path / "names")      # a name in two folders
    (tmp_path / "gbk.txt").write_bytes("人.png\n".encode("gbk"))
    with pytest.raises(ValueError, match="gbk.txt is no UTF-8.*iconv"): part_of(t, keep_list=tmp_path / "gbk.txt")
    capsys.readouterr(); part_of(t, keep_list=tmp_path / "pids.txt"); assert "pids.txt: 16 of 64 training images are listed, 2 of 8 people; the others sit out" in capsys.readouterr().err
    r = quick(people, keep_list=str(tmp_path / "pids.txt"), epochs=1, batch_size=8, images_per_epoch=8)
    run = finetune(r); assert run.result["train_ids"] == 2 and run.result["train_images"] == 16 and run.result["left_out_images"] == 48
    time.sleep(.02); (tmp_path / "pids.txt").write_text("3\n5\n7\n"); from cion_nb.core import runs as room; room._seen_inputs.clear()
    assert Run(r).name != run.name, "the list is an input: its content is in the name"


def test_direct_transfer_names_another_test_set(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "target"); t = read_samples(people); write_samples(t[t.pid.isin([9, 10]) | (t.split == "train")], root / "samples.parquet")
    run = finetune(quick(people, test_data=str(root / "samples.parquet"), flip_test=True, protocol="no_camera"))
    f = Features.open(run.folder / "test-features")
    assert set(f.samples.pid) == {9, 10} and run.result["train_ids"] == 8 and (run.result["flip_test"], run.result["protocol"]) == (True, "no_camera")


# Chosen by held-out people

def test_held_out_people_choose_and_are_not_trained_on(people, runs):
    r = quick(people, held_out=.25, epochs=10)
    task = FineTuning(r)
    out = set(task.samples.pid.iloc[task.held_out]); assert len(out) == 2 and task.n_ids == 6
    used = {int(i) for rows in task.sampler(None, 0, 0, 0, 1) for i in rows}; assert not used & set(task.held_out.tolist()) and not (task.labels[task.held_out] >= 0).any()
    run = finetune(r)
    assert 0 < run.result["held_out_mAP"] <= 1 and 1 <= run.result["chosen_epoch"] <= 10 and run.result["held_out_images"] == 16 and run.result["train_images"] == 48
    model = load_finetuned(run.folder); t = task.samples.iloc[task.held_out]
    x = embed(model, [people.parent / p for p in t.path])
    assert held_out_score(x, t) == pytest.approx(run.result["held_out_mAP"], abs=.02), "the saved model is the chosen one"


def test_held_out_score_by_hand():
    x = np.array([[1, 0], [1, .1], [0, 1], [.1, 1]], np.float32); t = pd.DataFrame(dict(pid=[1, 1, 2, 2], camid=[1, 2, 1, 2], path=list("abcd")))
    assert held_out_score(x, t) == 1. and held_out_score(x, t.assign(camid=-1)) == 1.
    assert held_out_score(x, t.assign(pid=[1, 2, 1, 2], camid=-1)) == pytest.approx(np.mean([1 / 3, 1 / 2, 1 / 3, 1 / 2]))      # of a: b, d, then c
    with pytest.raises(ValueError): held_out_score(x, t.assign(pid=[1, 2, 3, 4]))


def score_plainly(x, t):
    "Every image asks all others; its own camera's images of the person do not count, as far as cameras are known."
    x, AP = x / np.linalg.norm(x, axis=1, keepdims=True), []
    for i in range(len(x)):
        kept = [j for j in range(len(x)) if j != i and not (t.pid[i] == t.pid[j] and t.camid[i] == t.camid[j] >= 0)]
        ranked = sorted(kept, key=lambda j: (-float(x[i] @ x[j]), j)); right = [n for n, j in enumerate(ranked, 1) if t.pid[j] == t.pid[i]]
        if right: AP.append(np.mean([(k + 1) / n for k, n in enumerate(right)]))
    return np.mean(AP)

@pytest.mark.parametrize("unknown", [0, .3, .8, 1.])
def test_held_out_images_never_find_themselves(unknown):
    rng = np.random.default_rng(3); pid = np.repeat(np.arange(12), 4); n = len(pid)
    x = (rng.normal(size=(12, 8))[pid] + 1.5 * rng.normal(size=(n, 8))).astype(np.float32)
    t = pd.DataFrame(dict(path="same.png", pid=pid, camid=np.where(rng.random(n) < unknown, -1, rng.integers(0, 3, n))))
    assert held_out_score(x, t) == held_out_score(x, t.drop(columns="path")) == pytest.approx(score_plainly(x, t), abs=1e-6)


def what_is_erased(task, r):
    "(pixels, 3) that a network sees inside the erased boxes of a task's own batch."
    class Seen(Exception): pass
    def network(x, *more): raise Seen(x)
    task.transform.size, task.transform.pad = (64, 32), 0; batch = task.load(np.arange(48), 48)
    task.modules = dict(model=SimpleNamespace(input=InputSpec(64, 32, mean=r["mean"], std=r["std"]))) | ({} if "pid" in batch else dict(memory=SimpleNamespace(labels=torch.zeros(64))))
    with pytest.raises(Seen) as seen: task.loss(network, batch, None)
    return torch.cat([x[:, t:t + h, l:l + w].flatten(1).T for x, (t, l, h, w) in zip(seen.value.args[0], batch["boxes"].tolist())])


@pytest.mark.parametrize("method, changes", [("bnneck", {}), ("transreid", dict(backbone="vit_tiny", overlap=False, drop_path=None)), ("mgn", {})])
def test_erasing_and_rates_of_a_method_are_the_released_ones(people, runs, method, changes):
    "Boxes and learning rate of the paper's recipe, against what the released code draws and sets, written out."
    r = recipe("finetune", "paper", method=method, data=str(people), batch_size=16, k=4, **changes); task = FineTuning(r)
    assert (task.transform.erase, task.transform.flip, task.transform.pad, task.transform.interpolation) == (.5, .5, 10, "bicubic") and task.transform.size == ((384, 128) if method == "mgn" else (256, 128))
    n = 4000; task.transform.size = (64, 32); boxes = task.transform(torch.zeros(n, 3, 64, 32, dtype=torch.uint8), np.arange(n))[1].numpy()
    boxes = boxes[boxes[:, 2] > 0]
    if method == "mgn": same_distribution(boxes, boxes_plainly(len(boxes), 64, 32, (.02, .4), (.3, 1 / .3)), *BOX)
    else: assert (boxes[:, 2] * boxes[:, 3]).max() <= 1.1 * 64 * 32 / 3                                  # timm's, compared with it in test_views
    assert (r["interpolation"], r["erasing_fill"]) == (("bicubic", "black") if method == "mgn" else ("bilinear", "pixel"))
    inside = what_is_erased(task, r)
    if method == "mgn": assert torch.allclose(inside, (-torch.tensor([.485, .456, .406]) / torch.tensor([.229, .224, .225])).expand(len(inside), 3), atol=1e-6)      # black, before normalisation
    else: assert abs(inside.mean()) < .05 and abs(inside.std() - 1) < .05 and len(inside.unique()) > .9 * inside.numel()      # N(0, 1) a value, after it
    steps, rates = r["epochs"] * 5, []                                                                 # five steps an epoch
    task.optimizer, task._frozen = type("Optimizer", (), dict(param_groups=[dict(scale=1.)])), lambda: []
    for step in range(steps): rates.append(task.schedule(step / steps)["lr"])
    top, warm, end, floor = r["lr"] * 16 / r["lr_per"], r["warmup_epochs"], r["epochs"], r["lr_end"]
    def fastreid(i):                                                                                   # warm-up, delay and length in iterations: moves at each
        if i <= 30 * 5: return top * min(.01 + .99 * i / (10 * 5), 1.)
        return floor * top + (1 - floor) * top * (1 + np.cos(np.pi * (i - 30 * 5) / (30 * 5))) / 2
    def cosine(epoch): return top * (.01 + .99 * epoch / warm) if epoch < warm else top * (floor + (1 - floor) * (1 + np.cos(np.pi * epoch / end)) / 2)
    assert rates == pytest.approx([fastreid(i) if method == "mgn" else cosine(i // 5) for i in range(steps)], rel=1e-6)
    with pytest.raises(ValueError, match="choose epoch or step"): FineTuning(r | dict(lr_by="iteration"))


def test_best_so_far_keeps_the_best():
    model = nn.Linear(2, 2); best = BestSoFar(model)
    for score, epoch in ((.3, 1.), (.2, 2.), (.5, 3.), (.5, 4.)):
        with torch.no_grad(): model.weight.fill_(epoch)
        best.offer(model, score, epoch)
    assert (float(best.score), float(best.epoch), float(best.model.weight[0, 0])) == (.5, 3., 3.), "the first of equals"


def test_killed_fine_tuning_with_held_out_people_resumes_to_the_same_bits(people, runs, tmp_path):
    r = quick(people, held_out=.25, epochs=10, checkpoint_minutes=0.)
    file = tmp_path / "recipe.json"; file.write_text(json.dumps(r))
    env = os.environ | dict(CION_NB_RUNS=str(tmp_path / "other"), OMP_NUM_THREADS="1"); command = [sys.executable, "-m", "cion_nb.training.finetune", "--recipe", str(file)]
    p = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder, deadline = tmp_path / "other" / Run(r).name, time.time() + 120
    def seen(): return max((int(f.name[5:]) for f in (folder / "checkpoints").glob("seen-*")), default=0)
    while seen() < 64 and p.poll() is None and time.time() < deadline: time.sleep(.01)         # two epochs of ten: the warm-up is over
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (folder / "result.json").exists()
    for where in (tmp_path / "other", tmp_path / "third"):
        done = subprocess.run(command, env=env | dict(CION_NB_RUNS=str(where)), capture_output=True, text=True, timeout=240); assert done.returncode == 0, done.stderr[-2000:]
    a, b = (json.loads((tmp_path / w / Run(r).name / "result.json").read_text()) for w in ("other", "third"))
    assert a["resumed"] == 1 and b["resumed"] == 0 and all(a[k] == b[k] for k in ("held_out_mAP", "chosen_epoch", "mAP", "loss"))
    assert (folder / "backbone.safetensors").read_bytes() == (tmp_path / "third" / Run(r).name / "backbone.safetensors").read_bytes()


# Several processes

GATHER = """
import json, sys, torch, numpy as np
from accelerate import Accelerator
from cion_nb.training.finetune import batch_hard_triplet, of_all_ranks
a = Accelerator(cpu=True); torch.manual_seed(0)
net = a.prepare(torch.nn.Linear(5, 3)); x, pid = torch.randn(16, 5), torch.arange(16) // 4
mine = slice(a.process_index * 8, a.process_index * 8 + 8) if a.num_processes == 2 else slice(None)
loss = batch_hard_triplet(of_all_ranks(net(x[mine]), a), of_all_ranks(pid[mine], a)); a.backward(loss)
if a.is_main_process: print(json.dumps([loss.item(), *a.unwrap_model(net).weight.grad.flatten().tolist()]))
"""

def test_triplets_over_all_ranks_have_the_whole_batchs_gradient(tmp_path):
    file = tmp_path / "gather.py"; file.write_text(GATHER); env = os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"); found = []
    for launch in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(random.randint(20000, 40000))]):
        p = subprocess.run([*launch, str(file)], env=env, capture_output=True, text=True, timeout=240); assert p.returncode == 0, p.stderr[-2000:]
        found.append(json.loads([l for l in p.stdout.splitlines() if l.startswith("[")][-1]))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


def test_two_processes_fine_tune(people, runs, tmp_path):
    r = quick(people, gather_triplets=True); file = tmp_path / "recipe.json"; file.write_text(json.dumps(r))
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(random.randint(20000, 40000)), "-m", "cion_nb.training.finetune", "--recipe", str(file)],
                       env=os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stderr[-3000:]
    assert Run(r).result["processes"] == 2 and 0 < Run(r).result["mAP"] <= 1


# Bad input

@pytest.mark.parametrize("changes,word", [(dict(method="mgnn"), "did you mean 'mgn'"), (dict(jpm=True), "belong to method='transreid'"), (dict(few_ids=1.5), "at most 1"), (dict(held_out=1.), "below 1"),
                                          (dict(erasing_fill="white"), "choose 'pixel'"), (dict(method="mgn", image_size=[64, 32]), "multiple of 96"), (dict(method="mgn", backbone="vit_tiny"), "ResNet"),
                                          (dict(method="transreid", backbone="resnet18", overlap=False, drop_path=None), "class token"), (dict(overlap=True), "no convolutional patch stem"), (dict(drop_path=.1, backbone="ghostnet_0_5"), "no drop path"), (dict(protocol="markt"), "is none of"),
                                          (dict(keep_list="/nowhere.txt"), "nowhere.txt")])
def test_what_cannot_work_is_named(people, runs, changes, word):
    with pytest.raises((ValueError, FileNotFoundError), match=word): finetune(quick(people, **changes))


def changed(people, tmp_path, change):
    "A copy of the data set with its table changed."
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "changed"); write_samples(change(read_samples(people), root), root / "samples.parquet"); return root / "samples.parquet"


def test_one_image_a_person_is_repeated(people, runs, tmp_path):
    "K = 4 of one image: the same image under other crops; a documented result, not an error."
    data = changed(people, tmp_path, lambda t, root: t[(t.split != "train") | ((t.frame == 0) & (t.camid == 1))].reset_index(drop=True))
    run = finetune(quick(data)); assert run.result["train_images"] == run.result["train_ids"] == 8 and 0 < run.result["mAP"] <= 1


def test_cameras_unknown_everywhere_remove_nothing(people, runs, tmp_path):
    data = changed(people, tmp_path, lambda t, root: t.assign(camid=-1))
    run = finetune(quick(data)); f = Features.open(run.folder / "test-features"); q = (f.samples.split == "query").to_numpy()
    assert run.result["mAP"] == pytest.approx(evaluate(f.x[q], f.x[~q], f.samples[q], f.samples[~q], protocol="no_camera").mAP)


def test_people_in_train_and_test_are_told(people, runs, tmp_path):
    data = changed(people, tmp_path, lambda t, root: t.assign(pid=t.pid.where(t.pid < 11, t.pid - 10)))      # 11 and 12 become 1 and 2
    with pytest.warns(UserWarning, match="2 people are in the train split and among the queries .1, 2."): run = finetune(quick(data))
    assert run.result["people_in_both"] == 2 and finetune(quick(people)).result["people_in_both"] == 0


def test_images_of_every_mode_and_a_truncated_one(people, runs, tmp_path):
    from PIL import Image
    def change(t, root):
        for name, mode in (("1_1_0.png", "L"), ("1_1_2.png", "RGBA"), ("1_2_0.png", "1")): Image.open(root / name).convert(mode).save(root / name)
        Image.fromarray(np.asarray(Image.open(root / "1_1_1.png").convert("L")).astype(np.uint16) * 257).save(root / "1_1_1.png")
        Image.open(root / "1_2_1.png").convert("CMYK").save(root / "cmyk.jpg"); t.loc[t.path == "1_2_1.png", "path"] = "cmyk.jpg"
        broken = root / "2_1_0.png"; broken.write_bytes(broken.read_bytes()[:60]); return t
    data = changed(people, tmp_path, change)
    with pytest.warns(UserWarning, match="2_1_0.png"): run = finetune(quick(data))
    assert run.result["unreadable"] == 1 and "2_1_0.png" in json.loads((run.folder / "unreadable.json").read_text())


def test_weights_of_another_network_are_refused(people, runs, tmp_path):
    save_backbone(create_backbone("resnet18", (64, 32)), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold a resnet10_tiny_ibn"): finetune(quick(people, weights=str(tmp_path / "other.safetensors")))


def test_cameras_unknown_to_sie_are_named(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "nowhere"); t = read_samples(people); t.loc[3, "camid"] = -1; write_samples(t, root / "samples.parquet")
    with pytest.raises(ValueError, match=f"1 have camid -1, the first: {t.path[3]}"): finetune(quick(root / "samples.parquet", method="transreid"))
    model = TransReID(create_backbone("vit_tiny", (64, 32)), 5, n_cameras=2).eval()
    with pytest.raises(ValueError, match="also takes camid"): embed(model, [people.parent / t.path[0]])


def test_what_cannot_be_tested_is_known_before_training(people, runs, tmp_path):
    for change, word in ((dict(protocol="clothes_changing"), "no column clothes"), (dict(test_data="market1501"), "needs data_root")):
        with pytest.raises(ValueError, match=word): finetune(quick(people, **change))
    for name, keep, word in (("q", lambda t: t[t.split != "query"], "none of split query"), ("m", lambda t: t[(t.split != "gallery") | (t.pid == 11)][lambda t: (t.split != "query") | (t.pid == 12)], "none of the 2 queries has a match")):
        (tmp_path / name).mkdir(); data = changed(people, tmp_path / name, lambda t, root: keep(t).reset_index(drop=True))
        with pytest.raises(ValueError, match=word): finetune(quick(data))
    assert not list(runs.glob("*/checkpoints/seen-*"))


def test_images_of_nobody_are_not_a_person(people, runs, tmp_path):
    data = changed(people, tmp_path, lambda t, root: t.assign(pid=t.pid.where(t.pid > 3, -1)))
    with pytest.warns(UserWarning, match="24 of 64 training images have no person"): run = finetune(quick(data))
    assert run.result["train_ids"] == 5 and run.result["train_images"] == 40


def test_too_few_people_left_says_what_left_them(people, runs):
    with pytest.raises(ValueError, match="few_ids=0.1, .* leave 2 images of 2 people"): finetune(quick(people, few_ids=.1, few_images=.1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_score_is_the_saved_models(people, runs, precision):
    "Trained in bf16, tested as anybody who loads it will."
    run = finetune(quick(people, precision=precision)); stored = Features.open(run.folder / "test-features")
    np.testing.assert_allclose(embed(load_finetuned(run.folder), [people.parent / p for p in stored.samples.path]), stored.x, atol=3e-4)      # stored in half precision


def test_a_test_image_that_cannot_be_read_is_counted(people, runs, tmp_path):
    def change(t, root): (root / "9_1_0.png").write_bytes(b"no image"); return t
    run = finetune(quick(changed(people, tmp_path, change))); assert run.result["test_unreadable"] == 1
    found = score(load_model(run.folder), str(tmp_path / "changed/samples.parquet")); assert found.unreadable == ["9_1_0.png"] and "1 images could not be read" in str(found)


def test_scoring_changed_images_extracts_them_again(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "copy"); save_backbone(create_backbone("resnet10_tiny_ibn", (64, 32)), tmp_path / "b.safetensors"); model = load_model(tmp_path / "b.safetensors")
    before = score(model, str(root / "samples.parquet")); again = score(model, str(root / "samples.parquet")); assert before.mAP == again.mAP and len(list(runs.glob("score-*"))) == 1
    from PIL import Image
    rng = np.random.default_rng(0)
    for p in root.glob("*.png"): Image.fromarray(rng.integers(0, 255, (64, 32, 3), dtype=np.uint8)).save(p)
    assert score(model, str(root / "samples.parquet")).mAP < before.mAP and len(list(runs.glob("score-*"))) == 2


def test_whole_tracklets_are_scored(people, runs, tmp_path):
    t = read_samples(people); save_backbone(create_backbone("resnet10_tiny_ibn", (64, 32)), tmp_path / "b.safetensors")
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "copy"); t["split"] = t.split.where(t.split == "train", np.where(t.camid == 1, "query", "gallery")); write_samples(t, root / "samples.parquet")
    one, whole = (score(load_model(tmp_path / "b.safetensors"), str(root / "samples.parquet"), tracklets=k) for k in (False, True))
    assert (len(one.per_query), one.n_gallery) == (16, 16) and (len(whole.per_query), whole.n_gallery) == (4, 4)
