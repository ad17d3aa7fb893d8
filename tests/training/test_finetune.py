"""Fine-tuning: methods train, are scored and come back, released settings, processes, data that cannot work."""
import json
import os
import random

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from oracles import BOX, boxes_plainly, same_distribution
from safetensors.torch import save_file
from trainings import asked, quick, what_is_erased

from cion_nb.companion.claims import paper
from cion_nb.core.runs import licence, made_from, Run
from cion_nb.core.settings import recipe
from cion_nb.core.store import Features
from cion_nb.core.weights import read_checkpoint
from cion_nb.models.backbones import create_backbone, load_backbone, save_backbone
from cion_nb.models.checkpoints import load_backbone_weights
from cion_nb.models.features import embed
from cion_nb.retrieval.evaluate import evaluate
from cion_nb.training.cluster_contrast import ClusterNet, load_clusternet, save_clusternet
from cion_nb.training.finetune import (
    BNNeck,
    finetune,
    FineTuning,
    load_finetuned,
    make_backbone,
    rate_groups,
    released_finetuning,
    save_finetuned,
)
from cion_nb.training.mgn import MGN
from cion_nb.training.pretrain import pretrain


@pytest.mark.slow("trains networks")
def test_fine_tuning_starts_from_the_named_backbone(people, runs):
    pre = pretrain(asked(people, "dino"))
    r = recipe("finetune", "tiny", data=str(people), weights=pre.recipe, epochs=1, images_per_epoch=32, batch_size=16,
               lr=0., erasing=0., precision="fp32")
    run = finetune(r)
    a, b = (dict(load_backbone(f.folder / "backbone.safetensors").named_parameters()) for f in (pre, run))
    assert all(torch.equal(a[k], b[k]) for k in a), "with a learning rate of 0 the weights are the pre-trained ones"
    counted = [k for k in load_backbone(pre.folder / "backbone.safetensors").state_dict()
               if not k.endswith("num_batches_tracked")]
    assert run.result["matched"] == len(counted)


@pytest.mark.slow("trains networks")
def test_fine_tuning_learns_and_its_score_is_evaluates(people, runs):
    run = finetune(recipe("finetune", "tiny", data=str(people), epochs=6, images_per_epoch=96, batch_size=32,
                          warmup_epochs=1, pad=2, precision="fp32"))
    f = Features.open(run.folder / "test-features")
    split = f.samples.split.to_numpy()
    q, g = split == "query", split == "gallery"
    score = evaluate(f.x[q], f.x[g], f.samples[q], f.samples[g])
    assert run.result["mAP"] == pytest.approx(score.mAP) and run.result["rank1"] == pytest.approx(float(score.cmc[0]))
    log = pd.DataFrame(run.read_log())
    assert log.loss.iloc[-1] < log.loss.iloc[0] or len(log) == 1
    assert load_backbone(run.folder / "backbone.safetensors").input.mean == (.5, .5, .5)


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("changes", [dict(method="mgn"), dict(method="transreid"), dict(method="transreid", jpm=False),
                                     dict(method="transreid", sie=False, overlap=False, drop_path=None),
                                     dict(drop_path=None)],
                         ids=["MGN", "TransReID", "SIE alone", "JPM alone", "BNNeck"])
def test_every_method_trains_is_scored_and_comes_back(people, runs, changes):
    run = finetune(quick(people, **changes))
    assert 0 < run.result["mAP"] <= 1 and np.isfinite(run.result["loss"])
    model, stored = load_finetuned(run.folder), Features.open(run.folder / "test-features")
    again = embed(model, [people.parent / p for p in stored.samples.path],
                  columns=dict(camid=stored.samples.camid) if getattr(model, "columns", ()) else None)
    np.testing.assert_allclose(again, stored.x, atol=2e-3)                # stored in half precision
    q, g = (stored.samples.split == s for s in ("query", "gallery"))
    assert run.result["mAP"] == pytest.approx(evaluate(stored.x[q], stored.x[g], stored.samples[q],
                                                       stored.samples[g]).mAP)
    log = pd.DataFrame(run.read_log())
    assert {"cross_entropy", "triplet", "accuracy"} <= set(log)


@pytest.mark.parametrize("method, file", [("bnneck", "neck.safetensors"), ("bnneck", "backbone.safetensors"),
                                          ("mgn", "model.safetensors"), ("usl", "clusternet.safetensors")])
def test_what_we_save_is_loaded_entry_for_entry_or_refused_by_name(tmp_path, method, file):
    """Every format of ours comes back bit for bit; cut off, of another program, of another model, or without its
    metadata, the error names the file.
    """
    torch.manual_seed(0)
    backbone = create_backbone("resnet10_tiny", (96, 48))
    for x in backbone.state_dict().values():
        x.add_(1) if not x.is_floating_point() else x.add_(.01 * torch.rand_like(x))
    model = dict(bnneck=lambda: BNNeck(backbone, 5), mgn=lambda: MGN(backbone, 5, 16),
                 usl=lambda: ClusterNet(backbone, "gem"))[method]()
    save, load = (save_clusternet, load_clusternet) if method == "usl" else (save_finetuned, load_finetuned)
    save(model, tmp_path)
    back = load(tmp_path)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))
    path = tmp_path / file
    whole = path.read_bytes()
    other = torch.nn.Linear(3, 2)
    def bare(): save_file(read_checkpoint(path), path, metadata=None)
    def foreign(): save_file(other.state_dict(), path, metadata=dict(feature="before_neck", pooling="gem"))
    damages = dict(cut=lambda: path.write_bytes(whole[:200]), page=lambda: path.write_text("<html>"), gone=path.unlink,
                   foreign=foreign)
    if file in ("neck.safetensors", "clusternet.safetensors"): damages["bare"] = bare
    for damage in damages.values():
        path.write_bytes(whole)
        damage()
        with pytest.raises((ValueError, FileNotFoundError),
                           match=file.replace(".", r"\.") if file != "backbone.safetensors"
                           else "backbone|does not hold a resnet10_tiny"):
            load(tmp_path)
    path.write_bytes(whole)
    card = tmp_path / ("model.json" if method == "mgn" else "backbone.json")
    card.write_text("{}")
    with pytest.raises(ValueError, match=f"{card.name} is no card that .* wrote: it lacks"): load(tmp_path)


def test_a_recipe_takes_a_part_of_a_file_by_way_of_a_saved_backbone(tmp_path, capsys):
    "`weights=` names a file and no part of it; the way that the error names is the way."
    a, b = (create_backbone("resnet10_tiny", (64, 32)) for _ in range(2))
    torch.save(dict(net_1=a.state_dict(), net_2=b.state_dict()), tmp_path / "two.pth")
    r = recipe("finetune", "tiny", backbone="resnet10_tiny", image_size=[64, 32], weights=str(tmp_path / "two.pth"),
               data=str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError,
                       match="several networks.*load_backbone_weights takes it; for weights= of create_backbone or of "
                             "a recipe, load so in Python, save_backbone, and name the saved file"):
        make_backbone(r)
    load_backbone_weights(model := create_backbone("resnet10_tiny", (64, 32)), tmp_path / "two.pth", part="net_2")
    backbone, report = make_backbone(r | dict(weights=str(save_backbone(model, tmp_path / "saved.safetensors"))))
    assert report.share == 1 and torch.equal(backbone.conv1.weight, b.conv1.weight)


@pytest.mark.slow("trains networks")
def test_the_card_says_what_a_model_is_and_where_it_comes_from(people, runs):
    run = finetune(quick(people))
    card = json.loads((run.folder / "backbone.json").read_text())
    assert card["licence"] == f"bound by the terms of what it was made from: {people}"
    assert card["recipe"] == run.recipe and card["run"] == run.name
    assert card["scores"]["mAP"] == run.result["mAP"] and card["scores"]["protocol"] == "market"
    assert card["data"] == dict(train_images=64, train_ids=8)
    assert card["name"] == "resnet10_tiny_ibn" and card["input"]["height"] == 64
    whole = finetune(quick(people, method="mgn"))
    card = json.loads((whole.folder / "model.json").read_text())
    assert card["scores"]["mAP"] == whole.result["mAP"] and card["licence"].startswith("bound by")
    embedded = recipe("finetune", "tiny", weights=recipe("pretrain", "tiny"))
    assert licence(embedded).startswith("Apache-2.0")
    assert made_from(recipe("finetune", "tiny", weights="imagenet")) == ["imagenet"]
    assert (
        made_from(recipe("finetune", "paper", data_root="/d",
                         weights=recipe("pretrain", "paper", data_root="/c", annotation="/c/a.json")))
        == ["/c/a.json", "cion_al", "market1501"])


def test_the_released_configurations_are_ours():
    "All 64 of them, from the table of the paper's facts."
    for row in paper("transreid_configs").itertuples():
        r = recipe("finetune", "paper", backbone=row.arch, data=dict(market="market1501").get(row.dataset, row.dataset))
        assert (r["batch_size"], r["warmup_epochs"], r["epochs"], r["k"]) == (
            row.ims_per_batch, row.warmup_epochs, row.max_epochs, row.num_instance), row.config
        assert r["lr"] * r["batch_size"] / r["lr_per"] == pytest.approx(row.base_lr), row.config
    assert recipe("finetune", "paper", backbone="vit_base", batch_size=64)["batch_size"] == 64, (
        "what is asked for counts")
    assert released_finetuning("vit_base", "mydata.parquet") == {} and recipe("finetune", "tiny")["batch_size"] == 32


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("method, changes",
                         [("bnneck", {}), ("transreid", dict(backbone="vit_tiny", overlap=False, drop_path=None)),
                          ("mgn", {})])
def test_erasing_and_rates_of_a_method_are_the_released_ones(people, runs, method, changes):
    "Boxes and learning rate of the paper's recipe, against what the released code draws and sets, written out."
    r = recipe("finetune", "paper", method=method, data=str(people), batch_size=16, k=4, **changes)
    task = FineTuning(r)
    assert (task.transform.erase, task.transform.flip, task.transform.pad, task.transform.interpolation) == (
        .5, .5, 10, "bicubic")
    assert task.transform.size == ((384, 128) if method == "mgn" else (256, 128))
    n = 4000
    task.transform.size = (64, 32)
    boxes = task.transform(torch.zeros(n, 3, 64, 32, dtype=torch.uint8), np.arange(n))[1].numpy()
    boxes = boxes[boxes[:, 2] > 0]
    if method == "mgn": same_distribution(boxes, boxes_plainly(len(boxes), 64, 32, (.02, .4), (.3, 1 / .3)), *BOX)
    # timm's, compared with it in test_views
    else: assert (boxes[:, 2] * boxes[:, 3]).max() <= 1.1 * 64 * 32 / 3
    assert (r["interpolation"], r["erasing_fill"]) == (("bicubic", "black") if method == "mgn"
                                                       else ("bilinear", "pixel"))
    inside = what_is_erased(task, r)
    # black, before normalisation
    if method == "mgn":
        assert torch.allclose(inside, (-torch.tensor([.485, .456, .406]) / torch.tensor([.229, .224, .225])).expand(
            len(inside), 3), atol=1e-6)
    # N(0, 1) a value, after it
    else: assert abs(inside.mean()) < .05 and abs(inside.std() - 1) < .05 and len(inside.unique()) > .9 * inside.numel()
    # five steps an epoch
    steps, rates = r["epochs"] * 5, []
    task.optimizer, task._frozen = type("Optimizer", (), dict(param_groups=[dict(scale=1.)])), lambda: []
    for step in range(steps): rates.append(task.schedule(step / steps)["lr"])
    top, warm, end, floor = r["lr"] * 16 / r["lr_per"], r["warmup_epochs"], r["epochs"], r["lr_end"]
    # warm-up, delay and length in iterations: moves at each
    def fastreid(i):
        if i <= 30 * 5: return top * min(.01 + .99 * i / (10 * 5), 1.)
        return floor * top + (1 - floor) * top * (1 + np.cos(np.pi * (i - 30 * 5) / (30 * 5))) / 2
    def cosine(epoch):
        return top * (.01 + .99 * epoch / warm) if epoch < warm else top * (
            floor + (1 - floor) * (1 + np.cos(np.pi * epoch / end)) / 2)
    assert rates == pytest.approx([fastreid(i) if method == "mgn" else cosine(i // 5) for i in range(steps)], rel=1e-6)
    with pytest.raises(ValueError, match="choose epoch or step"): FineTuning(r | dict(lr_by="iteration"))


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


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize("trunk", [1., .1, 0.])
def test_a_parameters_rate_is_the_product_of_its_factors(trunk):
    model = BNNeck(create_backbone("resnet10_tiny_ibn", (64, 32)), 5)
    model.classifier.weight.requires_grad_(False)
    groups = rate_groups(model, 2., trunk)
    found = {id(p): group["scale"] for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(trained)
    for name, p in trained.items():
        wanted = (2. if name.endswith("bias") else 1.) * (trunk if name.startswith("backbone.") else 1.)
        assert found[id(p)] == wanted, name
    assert (len(groups) == 2) == (trunk == 1)                            # as checkpoints before it had them


def test_a_trunk_that_no_method_names_is_refused(people):
    for method in ("mgn", "transreid"):
        with pytest.raises(ValueError, match="trunk_lr"): FineTuning(quick(people, method=method, trunk_lr=.1))


def test_triplets_over_all_ranks_have_the_whole_batchs_gradient(tmp_path):
    file = tmp_path / "gather.py"
    file.write_text(GATHER)
    env = os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    found = []
    for p in (forked.run([file], env=env), forked.run_ranks(2, [file], env=env)):
        assert p.returncode == 0, p.stderr[-2000:]
        found.append(json.loads([l for l in p.stdout.splitlines() if l.startswith("[")][-1]))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.slow("starts processes")
def test_two_processes_fine_tune(people, runs, tmp_path):
    r = quick(people, gather_triplets=True)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(r))
    p = forked.run(["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                    str(random.randint(20000, 40000)), "-m", "cion_nb", "finetune", "--recipe", str(file)],
                   env=os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1",
                                         PYTHON_EXEC=forked.executable()))
    assert p.returncode == 0, p.stderr[-3000:]
    assert Run(r).result["processes"] == 2 and 0 < Run(r).result["mAP"] <= 1
