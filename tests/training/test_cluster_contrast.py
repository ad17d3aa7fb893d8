"""USL and UDA: they cluster, learn, are tested and come back; kills and processes change no bit; what cannot work is
named."""
import json
import os
import signal
import time

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from oracles import BOX, boxes_plainly, same_distribution
from trainings import what_is_erased

from cion_nb.companion.score import load_model, score
from cion_nb.core.runs import Run
from cion_nb.core.samples import read_samples, write_samples
from cion_nb.core.settings import recipe
from cion_nb.core.store import Features
from cion_nb.identities.neighbours import cluster
from cion_nb.models.features import embed
from cion_nb.training.cluster_contrast import ClusterContrast, ClusterNet, load_clusternet, uda, UPDATES, usl
from cion_nb.training.finetune import finetune

QUICK = dict(epochs=3, images_per_epoch=32, batch_size=16, k=4, k1=6, k2=2, min_samples=2, eps=.7, weights=None,
             precision="fp32", channels_last=False, test_every=0)


def quick(people, stage="usl", **changes): return recipe(stage, "tiny", data=str(people), **QUICK | changes)


# Runs

@pytest.mark.slow("trains networks")
def test_usl_clusters_learns_tests_and_comes_back(people, runs):
    run = usl(quick(people, test_every=1))
    result, log = run.result, pd.DataFrame(run.read_log())
    epochs = log.dropna(subset=["clusters"])
    assert epochs.epoch.tolist() == [0, 1, 2] and (epochs.clusters >= 4).all()
    assert {"precision", "recall", "adjusted_rand"} <= set(epochs)
    assert 0 < result["mAP"] <= 1 and result["images"] == 96 and result["bn_batch"] == 16
    tested = dict(zip(epochs.epoch, epochs.test_mAP))
    best = result["best_on_test_never_used"]
    assert np.isnan(tested[0]) and best["mAP"] == pytest.approx(max(tested[1], tested[2], result["mAP"]))
    model, stored = load_clusternet(run.folder), Features.open(run.folder / "test-features")
    np.testing.assert_allclose(embed(model, [people.parent / p for p in stored.samples.path]), stored.x, atol=2e-3)
    assert score(load_model(run.folder), str(people)).mAP == pytest.approx(result["mAP"], abs=2e-3)
    assert usl(quick(people, test_every=1)).result == result


@pytest.mark.slow("trains networks")
def test_clusters_of_an_epoch_are_those_of_its_features(people, runs):
    "The first epoch's clusters, from a network that has not learned: the same by hand."
    from cion_nb.training.engine import make_accelerator
    torch.manual_seed(0)
    r = quick(people)
    task = ClusterContrast(r)
    task.build(torch.device("cpu"))
    features = task.features(make_accelerator(r))
    assert features.shape == (64, task.modules["model"].embed_dim)
    rows, near = task.neighbours(features, make_accelerator(r))
    assert (rows == np.arange(64)).all()
    assert (task.labels(features, near) == cluster(features, 6, 2, .7, 2)).all()


@pytest.mark.slow("trains networks")
def test_approximate_search_that_looks_everywhere_is_the_exact_one(people, runs):
    exact, everywhere, little = (usl(quick(people, probes=p)) for p in (None, 1000, 1))
    assert (exact.folder / "backbone.safetensors").read_bytes() == (
        everywhere.folder / "backbone.safetensors").read_bytes()
    assert np.isfinite(little.result["loss"])


@pytest.mark.slow("trains networks")
def test_truth_decides_nothing(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "other")
    t = read_samples(people)
    rng = np.random.default_rng(0)
    train = t.split == "train"
    t.loc[train, "pid"] = rng.permutation(t.pid[train])
    write_samples(t, root / "samples.parquet")
    a, b = usl(quick(people)), usl(quick(root / "samples.parquet"))
    assert (a.folder / "backbone.safetensors").read_bytes() == (b.folder / "backbone.safetensors").read_bytes()
    assert a.result["last_clusters"]["f1"] != b.result["last_clusters"]["f1"]


@pytest.mark.slow("trains networks")
def test_uda_starts_from_a_fine_tuned_network(people, runs):
    import shutil
    source = shutil.copytree(people.parent, runs / "source") / people.name
    tuned = recipe("finetune", "tiny", data=str(source), epochs=2, images_per_epoch=32, batch_size=16, warmup_epochs=1,
                   precision="fp32", channels_last=False)
    finetune(tuned)
    run = uda(quick(people, "uda", weights=tuned))
    assert run.result["matched"] and 0 < run.result["mAP"] <= 1
    for wrong in (quick(people, "uda"), quick(people, "uda", weights=recipe("pretrain", "tiny"))):
        with pytest.raises(ValueError, match="fine-tuned on the source"): uda(wrong)
    with pytest.raises(ValueError, match="target's own labels"):
        uda(quick(people, "uda", weights=recipe("finetune", "tiny", data=str(people))))
    with pytest.raises(ValueError, match="a recipe of usl"): usl(quick(people, "uda"))


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("update", UPDATES)
def test_every_update_and_a_vit(people, runs, update):
    assert np.isfinite(
        usl(quick(people, memory_update=update, backbone="vit_tiny" if update == "mean" else "resnet10_tiny_ibn",
                  epochs=1)).result["loss"])


def at_kill(command, env, folder, where):
    "Start, kill without warning once the run is `where` (a checkpoint count), and say how far it was."
    p = forked.start(command, env=env)
    deadline = time.time() + 120
    while len(list((folder / "checkpoints").glob("seen-*"))) < 1 or int(
        max((folder / "checkpoints").glob("seen-*")).name[5:]) < where:
        assert p.poll() is None and time.time() < deadline, p.stderr.read()[-2000:]
        time.sleep(.005)
    p.send_signal(signal.SIGKILL)
    p.wait()


@pytest.mark.slow("starts processes")
def test_killed_between_and_inside_epochs_ends_with_the_same_bits(people, runs, tmp_path):
    r = quick(people, checkpoint_minutes=0., epochs=12, keep_checkpoints=50)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(r))
    env = os.environ | dict(OMP_NUM_THREADS="1")
    command = ["-m", "cion_nb", "usl", "--recipe", str(file)]
    whole = tmp_path / "whole" / Run(r).name
    assert forked.run(command, env=env | dict(CION_NB_RUNS=str(tmp_path / "whole"))).returncode == 0
    # two steps an epoch: 64 ends one, 80 is half of the next
    for name, seen in (("between", 64), ("inside", 80)):
        folder = tmp_path / name / Run(r).name
        there = env | dict(CION_NB_RUNS=str(tmp_path / name))
        at_kill(command, there, folder, seen)
        for later in sorted((folder / "checkpoints").glob("seen-*")):
            if int(later.name[5:]) > seen:
                import shutil
                shutil.rmtree(later)
        (folder / "result.json").unlink(missing_ok=True)
        done = forked.run(command, env=there)
        assert done.returncode == 0, done.stderr[-2000:]
        a, b = (json.loads((f / "result.json").read_text()) for f in (folder, whole))
        assert (a["resumed"] == 1 and a["loss"] == b["loss"] and a["mAP"] == b["mAP"]
                and (folder / "backbone.safetensors").read_bytes() == (
                    whole / "backbone.safetensors").read_bytes()), name
        logs = [[(row["seen"], row.get("clusters"), row.get("adjusted_rand"))
                 for row in map(json.loads, (f / "log.jsonl").read_text().splitlines())] for f in (folder, whole)]
        assert logs[0] == logs[1], f"{name}: the log tells every epoch once"


@pytest.mark.slow("starts processes")
def test_two_processes_with_ghost_groups_are_one_process(people, runs, tmp_path):
    """Groups of BatchNorm are the recipe's, whatever the number of processes: the first group's statistics, kept by the
    first process, describe all
    images. Sums over two processes are rounded otherwise, so values agree to that."""
    r = quick(people, ghost_bn=8, images_per_epoch=16, optimizer="sgd", lr=1e-4, test_every=2)
    one = usl(r)
    first = [row for row in one.read_log() if "clusters" in row]
    mAP = one.result["mAP"]
    import shutil
    shutil.rmtree(one.folder)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(r))
    p = forked.run_ranks(2, ["-m", "cion_nb", "usl", "--recipe", str(file)],
                         env=os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"))
    assert p.returncode == 0, p.stderr[-3000:]
    assert "BatchNorm over 8 images, batches of 16, 2 processes" in p.stderr
    again = [row for row in Run(r).read_log() if "clusters" in row]
    assert Run(r).result["bn_batch"] == 8 and Run(r).result["processes"] == 2 and len(again) == 3
    assert again[0]["search"] == "torch cpu, 2 parts"
    for a, b in zip(first, again):
        assert {k: a[k] for k in ("epoch", "clusters", "outliers", "adjusted_rand")} == {
            k: b[k] for k in ("epoch", "clusters", "outliers", "adjusted_rand")}
    assert Run(r).result["mAP"] == pytest.approx(mAP, abs=5e-3)
    assert [("test_mAP" in a, "test_mAP" in b) for a, b in zip(first, again)] == [(False, False)] * 2 + [(True, True)]
    assert again[2]["test_mAP"] == pytest.approx(first[2]["test_mAP"], abs=5e-3)
    assert not list(Run(r).folder.glob("test-[0-9]*")), "the test's features stay no longer than it"


SEARCH = """
import numpy as np, sys, torch
from types import SimpleNamespace
from cion_nb.training.cluster_contrast import ClusterContrast
from cion_nb.identities.neighbours import knn, knn_approximate
from accelerate import Accelerator
a = Accelerator(cpu=True); rng = np.random.default_rng(0)
x = rng.normal(size=(3000, 24)).astype(np.float32); x[40:80] = x[7]
for probes in (None, 3):
    readable = np.ones(3000, bool)
    readable[[5 + a.process_index, 900 * (1 + a.process_index)]] = False      # each rank met other broken files
    task = SimpleNamespace(recipe=dict(k1=12, probes=probes), images=SimpleNamespace(readable=readable))
    rows, near = ClusterContrast.neighbours(task, x, a)
    assert rows.tolist() == [i for i in range(3000) if i not in (5, 6, 7, 900, 1800, 2700)], len(rows)
    one = knn(x[rows], 12, device="cpu") if probes is None else knn_approximate(x[rows], 12, probes)
    assert (near.index == one.index).all() and (near.distance == one.distance).all(), probes
    assert a.num_processes == 3
from cion_nb.models.backbones import create_backbone
from cion_nb.training.finetune import test_model, test_set
from cion_nb.core.settings import recipe
# every rank the same network, as after `features`
model, seen = create_backbone("resnet10_tiny", (64, 32)).eval(), []
r = recipe("usl", "tiny", data=sys.argv[1])
for p in model.parameters(): torch.nn.init.trunc_normal_(p, std=.1, generator=torch.Generator().manual_seed(len(seen)))
model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
score = test_model(model, r, sys.argv[2] + "/shared", a); n = len(test_set(r)[0])
assert sum(seen) in (n // 3, n // 3 + 1) and (score is None) == (a.process_index > 0), (seen, n)      # none alone
if score:
    alone = test_model(model, r, sys.argv[2] + "/alone")
    assert alone.mAP == score.mAP and (alone.AP == score.AP).all()
    assert alone.per_query.path.tolist() == score.per_query.path.tolist()
print("agreed")
"""


@pytest.mark.slow("starts processes")
def test_three_processes_find_the_neighbours_and_the_score_of_one(people, tmp_path):
    (tmp_path / "search.py").write_text(SEARCH)
    p = forked.run_ranks(3, [tmp_path / "search.py", people, tmp_path],
                         env=os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"))
    assert p.returncode == 0 and p.stdout.count("agreed") == 3, p.stderr[-3000:]


@pytest.mark.slow("trains networks")
def test_hdbscan_by_name(people, runs):
    run = usl(quick(people, clusterer="hdbscan", eps=.01))
    rows = [row for row in run.read_log() if "clusters" in row]  # at this eps DBSCAN finds nothing
    assert all(row["clusters"] >= 4 for row in rows) and 0 < run.result["mAP"] <= 1


@pytest.mark.slow("trains networks")
def test_workers_change_nothing(people, runs):
    "Batches are not drawn ahead of the labels that they need."
    a = usl(quick(people))
    files = (a.folder / "backbone.safetensors").read_bytes()
    import shutil
    shutil.rmtree(a.folder)
    b = usl(quick(people, workers=2))
    assert a.name == b.name and (b.folder / "backbone.safetensors").read_bytes() == files


# Recipes and bad input

@pytest.mark.slow("trains networks")
def test_erasing_is_the_released_scripts(people, runs):
    """2 to 40 % of the image, aspect uniform, ImageNet's means after normalisation by .5; views and clustered images by
    bicubic interpolation.
    """
    r = recipe("usl", "paper", data=str(people), batch_size=16, images_per_epoch=32, k=4)
    task = ClusterContrast(r)
    n = 4000
    task.transform.size = (64, 32)
    boxes = task.transform(torch.zeros(n, 3, 64, 32, dtype=torch.uint8), np.arange(n))[1].numpy()
    assert abs((boxes[:, 2] > 0).mean() - .5) < .04
    boxes = boxes[boxes[:, 2] > 0]
    same_distribution(boxes, boxes_plainly(len(boxes), 64, 32, (.02, .4), (.3, 1 / .3)), *BOX)
    assert task.transform.interpolation == r["interpolation"] == "bicubic"
    inside = what_is_erased(task, r)
    assert len(inside) and torch.allclose(inside, torch.tensor([.485, .456, .406]).expand(len(inside), 3))


def test_recipes_are_the_released_scripts():
    market, msmt = recipe("usl", "paper"), recipe("usl", "paper", data="msmt17", backbone="vit_small")
    assert (market["eps"], market["ghost_bn"], market["drop_path"], market["images_per_epoch"] / market["batch_size"],
            market["k"]) == (.6, 64, None, 200, 8)
    assert (msmt["eps"], msmt["ghost_bn"], msmt["drop_path"], msmt["test_every"]) == (.7, 128, .3, 50)
    assert recipe("uda", "tiny")["weights"]["data"]["bank"] == "B" != recipe("uda", "tiny")["data"]["bank"]


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("changes,word",
                         [(dict(k1=65), "the data set has 64 images"), (dict(eps=0.), "must be positive"),
                          (dict(memory_update="hardest"), "choose 'hard'"),
                          (dict(pooling="gem", backbone="vit_tiny"), "ResNet"),
                          (dict(images_per_epoch=40), "multiple of batch_size"), (dict(ghost_bn=6), "cannot be cut"),
                          (dict(ghost_bn=1), "at least 2"),
                          (dict(batch_size=64, images_per_epoch=64), "a batch needs 16 clusters"),
                          (dict(eps=.01, min_samples=5), "gave 0 clusters"),
                          (dict(clusterer="infomap"), "choose 'dbscan' or 'hdbscan'"),
                          (dict(optimizer="sdg"), "choose 'sgd' or 'adam'"),
                          (dict(k=3, batch_size=16), "multiple of k=3"),
                          (dict(epochs=2.5), "whole number"), (dict(erasing_fill=[0., 0.]), "three numbers"),
                          (dict(eps=1.), "between 0 and 1"),
                          (dict(k1=64), "the data set has 64 images"), (dict(iters=200), "not known")])
def test_what_cannot_work_is_named(people, runs, changes, word):
    with pytest.raises(ValueError, match=word): usl(quick(people, **changes))


@pytest.mark.slow("trains networks")
def test_later_epochs_keep_their_clusters_where_new_ones_fail(people, runs, monkeypatch):
    from cion_nb.training import cluster_contrast as room
    calls = []
    def failing(x, *a, **k):
        calls.append(1)
        return cluster(x, *a, **k) if len(calls) == 1 else np.full(len(x), -1)
    monkeypatch.setattr(room, "cluster", failing)
    run = usl(quick(people))
    rows = [row for row in run.read_log() if "clusters" in row]
    assert len(calls) == 3 and [row["clusters"] for row in rows][1:] == [0, 0]
    assert [row.get("kept_the_clusters_before") for row in rows] == [None, True, True]
    assert np.isfinite(run.result["loss"])


@pytest.mark.slow("trains networks")
def test_nan_features_stop_the_run(people, runs, monkeypatch):
    monkeypatch.setattr(
        ClusterNet, "forward", lambda self, x: torch.full((len(x), self.embed_dim), float("nan"), requires_grad=True))
    with pytest.raises(FloatingPointError, match="64 images are not finite"): usl(quick(people))


@pytest.mark.slow("trains networks")
def test_unreadable_images_sit_out(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "torn")
    file = root / "1_1_0.png"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.warns(UserWarning, match="1_1_0.png"): run = usl(quick(root / "samples.parquet"))
    assert run.result["unreadable"] == 1


@pytest.mark.slow("trains networks")
def test_hardly_any_readable_image_is_named(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "torn")
    for path in read_samples(people).query("split == 'train'").path[4:]: (root / path).write_bytes(b"torn")
    with pytest.warns(UserWarning), pytest.raises(
            ValueError, match="60 of 64 images could not be read, and k1=6 needs more than 4"):
        usl(quick(root / "samples.parquet"))
