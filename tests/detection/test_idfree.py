"""The stage that trains PointID: what a batch says, who is whom, what must not reach it, losses, resume, refusals."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cion_nb.core.runs import Run
from cion_nb.core.samples import read_samples, write_samples
from cion_nb.core.settings import recipe
from cion_nb.core.store import Features
from cion_nb.data.scenes import boxes_in, frames_of
from cion_nb.detection.find import find
from cion_nb.detection.idfree import (
    average_precision,
    FrameSampler,
    IdFree,
    idfree,
    labelled_boxes,
    METHODS,
    partners,
    spread,
)
from cion_nb.detection.pointid import load_pointid
from cion_nb.identities.pseudo_labels import pseudo_labels
from cion_nb.training.engine import fit

QUICK = dict(image_size=[64, 96], channels=8, dim=8, epochs=2, images_per_epoch=12, batch_size=4, lr_per=4, drops=[1.],
             precision="fp32", channels_last=False)


def quick(street, **changes): return recipe("idfree", "tiny", **dict(data=str(street)) | QUICK | changes)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def image_run(street, tmp_path_factory):
    "A finished run of method image, and its folder of runs."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CION_NB_RUNS", str(tmp_path_factory.mktemp("runs")))
        asked = quick(street)
        return asked, idfree(asked).folder.parent


@pytest.fixture
def first(image_run, monkeypatch):
    monkeypatch.setenv("CION_NB_RUNS", str(image_run[1]))
    return image_run[0]


def changed(street, tmp_path, change):
    "The data set with another table."
    import shutil
    root = tmp_path / "changed"
    shutil.copytree(street.parent, root)
    write_samples(change(read_samples(street)), root / street.name)
    return root / street.name


def test_what_a_batch_says(street, runs):
    "Boxes of the table under the pair's own views, by frame; nobody of the test; labels that two views share."
    task = IdFree(quick(street))
    scenes = read_samples(street)
    scenes = scenes[scenes.split == "train"].reset_index(drop=True)
    frames, boxes = frames_of(scenes), boxes_in(scenes)
    assert task.samples.path.tolist() == frames.path.tolist() and task.n_images == 24
    rows, seen = np.array([0, 6, 13, 20]), 8
    batch = task.load(rows, seen)
    for k, row in enumerate(rows):
        picture = np.asarray(Image.open(street.parent / frames.path[row]))
        pair = task.pairs(picture, boxes[row].box, row, seen)
        for view in range(2):
            assert (batch["pixels"][2 * k + view].permute(1, 2, 0).numpy() == pair.images[view]).all()
            own = batch["image"] == 2 * k + view
            for cell, sides, label in zip(batch["cell"][own], batch["sides"][own], batch["label"][own]):
                corner, size = np.split(pair.boxes[view], 2, 1)
                x, y = ((corner + size / 2) // 4).T
                found = np.flatnonzero((y * 24 + x == int(cell)) & ~boxes[row].ignored)
                at = found[np.abs(size[found] / 8 - sides[:2].numpy()).sum(1).argmin()]
                assert np.allclose(sides.numpy(), np.tile(size[at] / 8, 2), atol=1e-4)
                number = int(np.flatnonzero(boxes.row == boxes[row].row[at])[0])
                assert int(label) == (number if pair.is_asked[at] else -1)
    empty = task.load(np.array([6]), 0)                                # its first frame has nobody
    assert frames.boxes[6] == 0 and len(empty["cell"]) == 0 and empty["heat"].max() == 0


def test_the_same_pair_whoever_makes_it(street, runs):
    one, two = (IdFree(quick(street)) for _ in range(2))
    two.load(np.array([3]), 4)
    a, b, c = one.load(np.array([5, 7]), 8), two.load(np.array([7, 5]), 8), two.load(np.array([5, 7]), 12)
    assert torch.equal(a["pixels"][:2], b["pixels"][2:]) and torch.equal(a["heat"][2:], b["heat"][:2])
    assert not torch.equal(a["pixels"], c["pixels"])


@pytest.mark.parametrize("n, groups, size", [(60, 12, 4), (61, 5, 5), (30, 2, 4), (20, 20, 3), (7, 1, 3)])
def test_batches_hold_different_videos_while_there_are_enough(n, groups, size):
    rng = np.random.default_rng(n)
    group = rng.integers(0, groups, n)
    found = list(spread(rng.permutation(n), group, size))
    assert len(found) == n // size and len(set(np.concatenate(found))) == n // size * size
    left = np.ones(n, bool)
    for batch in found:
        possible = len(set(group[left]))
        assert len(set(group[batch])) >= min(size, possible) - (possible < size)
        left[batch] = False
    passes = [list(FrameSampler(group, size, 0, p)) for p in (0, 1)]
    assert n < 8 or not np.array_equal(passes[0][0], passes[1][0])


def saved(run): return (run.folder / "pointid.safetensors").read_bytes()


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("method", ["image", "video"])
def test_no_identity_reaches_a_training(street, first, tmp_path, method):
    "With pid and tracklet permuted, or absent, the network is equal to the bit."
    def mixed(ids): return np.where(ids < 0, -1, (ids * 7 + 3) % 12)
    def permuted(t): return t.assign(pid=mixed(t.pid), tracklet=mixed(t.tracklet))
    def absent(t): return t.assign(pid=-1, tracklet=-1)
    found = []
    for name, change in (("as it is", lambda t: t), ("permuted", permuted), ("absent", absent)):
        data = changed(street, tmp_path / name, change)
        if method == "image": asked = quick(data)
        else:
            start = Run(first).folder
            common = dict(data=str(data), model=str(start), min_score=0., most=2)
            asked = quick(data, method="video", weights=str(start), found=recipe("find", "tiny", **common), eps=1.9,
                          min_samples=2, min_score=0.)
            find(asked["found"])
        found.append(saved(idfree(asked)))
    assert found[0] == found[1] == found[2]


def test_balance_0_leaves_the_embedding_alone(street, runs):
    task = IdFree(quick(street, balance=0))
    torch.manual_seed(0)
    task.build("cpu")
    class Alone: num_processes = 1
    loss, told = task.loss(task.modules["model"], task.load(np.arange(4), 0), Alone)
    loss.backward()
    net = task.modules["model"].net
    assert all(p.grad is None for p in net.heads["embedding"].parameters()) and told["identity"] == 0
    assert all(p.grad is not None for p in net.heads["box"].parameters())


@pytest.mark.parametrize("changes", [dict(), dict(balance=None), dict(method="memory"), dict(method="cross_entropy"),
                                     dict(method="supervised"), dict(box=2)],
                         ids=["image", "learned balance", "memory", "cross-entropy", "supervised", "two numbers"])
def test_each_method_has_its_loss_and_its_gradient(street, runs, changes):
    "Of a batch: the formula of its loss over its features, and gradients in all that is trained."
    task = IdFree(quick(street, queue=6, **changes))
    torch.manual_seed(0)
    task.build("cpu")
    class Alone: num_processes = 1
    model, batch = task.modules["model"].eval(), task.load(np.arange(6, 10), 0)
    task.loss(model, batch, Alone)
    task.after_step(0.)
    loss, told = task.loss(model, batch, Alone)
    loss.backward()
    told = {k: float(v) for k, v in told.items()}
    lost = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost and torch.isfinite(loss)
    out = model(batch)
    x, labels = torch.nn.functional.normalize(out["features"], dim=1), batch["label"]
    if task.recipe["loss"] == "cross_entropy":
        known = labels >= 0
        logits = model.classifier.classes(model.classifier.scale * x[known])
        want = torch.nn.functional.cross_entropy(logits, labels[known])
    elif task.recipe["loss"] == "memory":
        memory, terms = task.modules["memory"], []
        for f, i in zip(x, labels):
            if i < 0: continue
            near = torch.exp(f @ memory.rows[i] / .1)
            rows = [m for j, m in enumerate(memory.rows) if memory.has_row[j] and j != i] + list(memory.waiting)
            terms.append(-torch.log(near / (near + sum(torch.exp(f @ m / .1) for m in rows))))
        want = torch.stack(terms).mean()
    else:
        terms = []
        for i in range(len(x)):
            P = [j for j in range(len(x)) if j != i and labels[j] == labels[i] >= 0]
            far = sum(torch.exp(x[i] @ x[j] / .1) for j in range(len(x)) if labels[j] >= 0 and labels[j] != labels[i])
            near = [torch.exp(x[i] @ x[j] / .1) for j in P]
            if P: terms.append(-sum(torch.log(e / (e + far)) for e in near) / len(P))
        want = torch.stack(terms).mean()
    assert float(told["identity"]) == pytest.approx(float(want.detach()), rel=1e-4)
    detection = told["heat"] + task.recipe["box_weight"] * told["box"] + told["offset"]
    if task.recipe["balance"] is None:
        w = torch.tensor([-1.85, -1.05])
        whole = (torch.exp(-w[0]) * detection + torch.exp(-w[1]) * want) / 2 + w.sum()
    else: whole = detection + .4 * want
    assert float(loss) == pytest.approx(float(whole), rel=1e-4)


def test_people_of_the_table_are_named_from_zero(street, runs):
    data = labelled_boxes(quick(street, method="supervised"))
    scenes = read_samples(street)
    scenes = scenes[scenes.split == "train"].reset_index(drop=True)
    pid = boxes_in(scenes).pid
    assert sorted(set(data.labels[data.labels >= 0])) == list(range(len(set(pid[pid >= 0]))))
    assert (data.labels[pid < 0] == -1).all() and len(set(zip(data.labels, pid))) == len(set(pid))


@pytest.mark.slow("trains networks")
def test_a_run_that_is_killed_ends_in_the_same_bits(street, runs):
    class Killed(Exception): pass
    for changes in (dict(method="memory", queue=5), dict()):
        asked = quick(street, checkpoint_minutes=0, seed=3, **changes)
        through = IdFree(asked)
        fit(through, Run(asked, runs / "through"))
        steps = []
        class Dies(IdFree):
            def loss(self, *args):
                steps.append(1)
                if len(steps) == 4: raise Killed
                return super().loss(*args)
        with pytest.raises(Killed): fit(Dies(asked), Run(asked))
        again = IdFree(asked)
        assert fit(again, Run(asked))["resumed"] == 1
        for module in through.modules:
            a, b = (task.modules[module].state_dict() for task in (through, again))
            for name in a: assert torch.equal(a[name], b[name]), name
        import shutil
        shutil.rmtree(runs)


@pytest.mark.slow("trains networks")
def test_video_learns_from_pseudo_labels_inside_videos(street, first, tmp_path):
    "Its partners share a label; who has none is neither trained on nor taken for background; the network goes on."
    found = recipe("find", "tiny", data=str(street), model=first, min_score=0., most=3)
    store = Features.open(find(found).folder)
    asked = quick(street, method="video", weights=first, found=found, eps=.6, min_samples=2, min_score=0., min_span=.3)
    data = labelled_boxes(asked)
    frames = frames_of(read_samples(street))
    frames = frames[frames.split == "train"].reset_index(drop=True)
    lengths = (frames.groupby("video").frame.max() + 1).to_dict()
    plain = pseudo_labels(store.x, store.samples, .6, 2, .3, 0., lengths)
    assert len(frames) == 24 and data.frames["count"].sum() == len(store) and (plain.labels >= 0).any()
    for i, frame in data.frames.iterrows():
        rows = np.flatnonzero(store.samples.path == frame.path)
        own = slice(frame["first"], frame["first"] + frame["count"])
        assert data.labels[own].tolist() == plain.labels[rows].tolist()
        np.testing.assert_allclose(data.boxes[own], store.samples[["x", "y", "w", "h"]].to_numpy()[rows])
    task = IdFree(asked)
    for row in range(len(task.samples)):
        for other in task.partners[row]:
            a, b = (set(task._boxes(i)[1]) - {-1} for i in (row, other))
            assert other != row and a & b and task.samples.video[row] == task.samples.video[other]
    (one, two), = [task.views(0, 0)]
    assert set(one[2]) | set(two[2]) <= set(range(task.data.n_labels))        # -1 asks for no middle
    run = idfree(asked)
    assert run.result["pseudo_people"] == plain.counts["people"] and "held_out_AP" not in run.result
    a, b = (load_pointid(Run(r).folder).state_dict() for r in (first, asked))
    assert any(not torch.equal(a[k], b[k]) for k in a)
    key = "trunk.net.conv1.weight"
    assert torch.nn.functional.cosine_similarity(a[key].flatten(), b[key].flatten(), dim=0) > .9


def test_partners_by_loops():
    import pandas as pd
    rng = np.random.default_rng(0)
    count = rng.integers(0, 4, 12)
    frames = pd.DataFrame(dict(first=np.cumsum(count) - count, count=count))
    labels = rng.integers(-1, 6, count.sum())
    own = [set(labels[f:f + n]) - {-1} for f, n in zip(frames["first"], count)]
    for i, found in enumerate(partners(frames, labels)):
        assert found.tolist() == [j for j in range(12) if j != i and own[i] & own[j]]


@pytest.mark.slow("trains networks")
def test_held_out_videos_are_for_the_score_alone(street, runs):
    asked = quick(street, held_out=.5)
    task = IdFree(asked)
    kept = task.data.frames.video[task.held_out].unique()
    assert len(kept) == 2 and not set(kept) & set(task.samples.video)
    assert 0 <= idfree(asked).result["held_out_AP"] <= 1


def ap_by_hand(found, truth):
    "Every threshold: precision and recall by counting; the best precision at each recall or beyond, summed."
    rows = sorted((s, f, i) for f, (_, scores) in enumerate(found) for i, s in enumerate(scores))[::-1]
    n, right, seen, points, taken = sum(len(t) for t, _ in truth), 0, 0, [], set()
    for _, f, i in rows:
        best, at = -1, None
        for k, true in enumerate(truth[f][0]):
            (l, t, r, b), (l2, t2, r2, b2) = found[f][0][i], true
            both = max(0, min(r, r2) - max(l, l2)) * max(0, min(b, b2) - max(t, t2))
            iou = both / ((r - l) * (b - t) + (r2 - l2) * (b2 - t2) - both)
            if iou > best and (f, k) not in taken: best, at = iou, k
        seen += 1
        if best >= .5:
            right += 1
            taken.add((f, at))
        points.append((right / n, right / seen))
    total, before = 0, 0
    for k, (recall, _) in enumerate(points):
        if recall > before: total += (recall - before) * max(p for _, p in points[k:])
        before = recall
    return total


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_by_counting(seed):
    rng, found, truth = np.random.default_rng(seed), [], []
    for f in range(4):
        true = np.hstack([c := rng.uniform(0, 60, (5, 2)), c + rng.uniform(8, 30, (5, 2))])
        noise = np.repeat(true, 2, 0) + rng.normal(0, 3, (10, 4))
        found.append((noise[rng.random(10) < .7], None))
        found[-1] = found[-1][0], (rng.permutation(1000)[:len(found[-1][0])] + f / 4) / 1000
        truth.append((true, np.zeros(5, bool)))
    assert average_precision(found, truth)["AP"] == pytest.approx(ap_by_hand(found, truth))
    assert np.isnan(average_precision([(np.zeros((0, 4)), np.zeros(0))], [(np.zeros((0, 4)), np.zeros(0, bool))])["AP"])


def test_a_frame_that_cannot_be_read_is_replaced_and_counted(street, runs, tmp_path):
    data = changed(street, tmp_path, lambda t: t)
    (data.parent / "v0_2.png").write_bytes(b"\x89PNG cut off")
    Image.open(data.parent / "v0_4.png").convert("L").save(data.parent / "v0_4.png")        # grey is read as it is
    task = IdFree(quick(data))
    with pytest.warns(UserWarning, match="v0_2.png"): batch = task.load(np.array([2, 4]), 0)
    other = task.load(np.array([3]), 0)
    assert list(task.images.reasons) == [2] and torch.equal(batch["pixels"][:2], other["pixels"])


@pytest.mark.parametrize("changes, said", [
    (dict(transforms=["spin"]), "spin"), (dict(method="video"), "name that run of idfree in weights"),
    (dict(method="video", weights="imagenet"), "name that run"), (dict(image_size=[16, 96]), "32 or more"),
    (dict(momentum=1.), "momentum"), (dict(backbone="resnet99"), "resnet99"), (dict(batch_size=100), "batch_size=100")])
def test_what_is_refused(street, runs, changes, said):
    with pytest.raises(ValueError, match=said): idfree(quick(street, **changes))
    assert not list(runs.glob("*/result.json"))


def test_data_that_cannot_be_trained_on(street, runs, tmp_path):
    nobody = changed(street, tmp_path / "a", lambda t: t.assign(pid=-1))
    with pytest.raises(ValueError, match="nobody in .* has an identity"): idfree(quick(nobody, method="supervised"))
    tested = changed(street, tmp_path / "b", lambda t: t.assign(split="gallery"))
    with pytest.raises(ValueError, match="all are of the test"): idfree(quick(tested))
    empty = changed(street, tmp_path / "c", lambda t: t.assign(ignored=True))
    with pytest.raises(ValueError, match="no box to learn from"): idfree(quick(empty))
    with pytest.raises(ValueError, match="nothing of 4 videos is left"): idfree(quick(street, held_out=1.))


def test_no_trajectory_in_any_video(street, first):
    found = recipe("find", "tiny", data=str(street), model=first, min_score=0., most=2)
    find(found)
    asked = quick(street, method="video", weights=first, found=found, eps=1e-9, min_samples=4)
    with pytest.raises(ValueError, match="no trajectory was kept in any of 4 videos"): idfree(asked)


def test_a_run_of_another_network_is_refused(street, first):
    with pytest.raises(ValueError, match="channels=4, but the network in weights has 8"):
        idfree(quick(street, weights=first, channels=4))


def test_methods_and_settings_say_what_the_paper_says():
    r = recipe("idfree", "paper")
    assert (r["image_size"], r["batch_size"], r["epochs"], r["drops"], r["balance"]) == ([608, 1088], 12, 30, [20.], .4)
    assert (r["backbone"], r["dim"], r["queue"], r["momentum"]) == ("dla34", 256, 50_000, .5)
    assert set(METHODS) == {"image", "video", "memory", "cross_entropy", "supervised"}
    made = recipe("idfree", "paper", method="video", weights=r, data="mot", data_root="/data")
    assert made["found"]["model"] == r and made["found"]["data_root"] == "/data"
    assert json.dumps(made) and recipe("idfree", "tiny")["data"]["values"]["frames"] == 42
