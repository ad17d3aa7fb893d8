"""The embedded world: same seed same bytes, truth that agrees with itself and the pictures."""
import os
import signal
import time
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cion_nb.data import film as P
from cion_nb.data.film import (
    make_world,
    mistake_rates,
    read_truth,
    render,
    render_frame,
    truth_boxes,
    write_detections,
    write_truth,
    write_video,
)
from cion_nb.data.people import PARTS

SMALL = dict(cameras=3, pretrain_people=8, appearances=2, walks_per_video=4, train_people=3, test_people=4,
             cameras_per_person=3, images_per_camera=2,
             train_images_per_camera=2, distractors=6, crop=(64, 32), lookalikes=.5)


def files(root: Path) -> dict:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
            and p.name != ".lock"}


def same(a: Path, b: Path) -> bool:
    "All crops and tables byte for byte; an npz (a zip, which keeps the time) by its arrays."
    x, y = files(a), files(b)
    if x.keys() != y.keys(): return False
    for name in x:
        if name.endswith(".npz"):
            with np.load(a / name) as p, np.load(b / name) as q:
                if any(not np.array_equal(p[k], q[k], equal_nan=p[k].dtype.kind == "f") for k in p): return False
        elif x[name] != y[name]: return False
    return True


@pytest.fixture(scope="module")
def world(): return make_world("tiny", 3, **SMALL)


@pytest.fixture(scope="module")
def root(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    render(world, root, workers=1)
    return root


@pytest.mark.slow("draws worlds")
def test_same_seed_same_bytes_in_one_process_and_in_two(world, root, tmp_path):
    render(make_world("tiny", 3, **SMALL), tmp_path, workers=2)
    assert same(root, tmp_path)


def test_other_seed_and_other_bank_are_other_people(world):
    again, seed, bank = (make_world("tiny", 3, **SMALL), make_world("tiny", 4, **SMALL),
                         make_world("tiny", 3, **dict(SMALL, bank="B")))
    assert again.people == world.people and again.videos == world.videos
    pd.testing.assert_frame_equal(again.tracklets, world.tracklets)
    assert seed.people != world.people != bank.people
    assert {c.name for c in bank.cameras}.isdisjoint(c.name for c in world.cameras)


@pytest.mark.slow("draws worlds")
@pytest.mark.parametrize("profile", ["tiny", "small"])
def test_splits_are_disjoint_and_queries_answerable(profile):
    w = make_world(profile, 0, **({} if profile == "tiny" else dict(pretrain_people=16)))
    r, v = w.reid, w.values
    train, query, gallery = (r[r.split == s] for s in ("train", "query", "gallery"))
    assert train.pid.nunique() == v["train_people"] and query.pid.nunique() == v["test_people"]
    assert set(query.pid) == set(gallery.pid) - {0} and set(train.pid).isdisjoint(gallery.pid)
    assert set(w.tracklets.true_pid).isdisjoint(set(r.pid) - {0}) and (w.tracklets.pid == -1).all()
    assert (r.pid >= 0).all()
    assert (query.groupby(["pid", "camid"]).size() == 1).all()
    assert (query.groupby("pid").camid.nunique() >= 3).all()
    assert (gallery.pid == 0).sum() == v["distractors"]
    assert w.tracklets.groupby("tracklet").video.nunique().eq(1).all()
    assert w.tracklets[w.tracklets.true_pid > 0].groupby("true_pid").camid.nunique().ge(2).all()


def test_look_alikes_share_clothes_and_little_else():
    people = make_world("tiny", 0, **dict(SMALL, lookalikes=.8)).people
    groups = {g: [p for p in people if p.group == g] for g in {p.group for p in people} - {-1}}
    assert groups and all(len(g) == 3 for g in groups.values())
    for a, b, c in groups.values():
        assert a.upper.kind == b.upper.kind == c.upper.kind and a.lower.texture == b.lower.texture
        assert np.abs(np.array(a.upper.colour) - b.upper.colour).max() < .25
        assert len({a.height, b.height, c.height}) == 3


@pytest.mark.slow("draws worlds")
@pytest.mark.parametrize("switch, fragments, background",
                         [(0, 1, 0), (.05, 2.5, .03), (.2, 1, .1), (.2, 2.5, .05), (.1, 6, .1), (.2, 6, 0)])
def test_mistakes_come_at_the_rates_asked_for(switch, fragments, background):
    w = make_world("tiny", 1, switch=switch, fragments=fragments, background=background, drift=.05, pretrain_people=32,
                   train_people=2, test_people=2)
    got = mistake_rates(w)
    assert abs(got["switch"] - switch) < .02 and abs(got["background"] - background) < .012
    assert abs(got["drift"] - .05) < .01
    assert abs(got["fragments"] - fragments) < .35 + .05 * fragments
    t = w.tracklets
    assert ((t.true_pid == -1) == (t.mistake == "background")).all()
    real = t[t.true_pid > 0]
    owner = real.groupby("tracklet").true_pid.agg(lambda p: p.value_counts().max())
    clean = t.groupby("tracklet").mistake.agg(lambda m: not (m == "switch").any())
    assert (real[real.tracklet.isin(clean.index[clean])].groupby("tracklet").true_pid.nunique() == 1).all()
    switched = clean.index[~clean].intersection(owner.index)
    assert (t[t.mistake == "switch"].groupby("tracklet").size().reindex(switched)
            <= real.groupby("tracklet").size().reindex(switched) / 2).all()


def test_boxes_of_nobody_hold_nobody_and_drifted_boxes_slipped(world, root):
    t = make_world("tiny", 5, background=.1, drift=.1, pretrain_people=24, train_people=2, test_people=2)
    for video in t.videos[:2]:
        truth, rows = truth_boxes(t, video), t.tracklets[t.tracklets.video == video.name]
        for r in rows.itertuples():
            here = truth[(truth.frame == r.frame)]
            boxes = here[["x", "y", "w", "h"]].to_numpy()
            overlap = P.iou(np.array([[r.x, r.y, r.w, r.h]], float), boxes)[0] if len(boxes) else np.zeros(0)
            if r.mistake == "background": assert not len(overlap) or overlap.max() < .2
            elif r.mistake == "drift": assert overlap[(here.true_pid == r.true_pid).to_numpy()].max() < .62
            elif r.w < .8 * r.h: assert overlap[(here.true_pid == r.true_pid).to_numpy()].max() > .25


def test_a_crop_is_the_window_of_its_frame(world):
    t = world.tracklets
    rows = t.iloc[np.linspace(0, len(t) - 1, 14).astype(int)]
    for r in rows.itertuples():
        stage = P._Stage(world, world.video(r.video), [r.frame])
        crop = P._cut(stage, r.frame, r.walk, r.x, r.y, r.w, r.h)
        image, truth = render_frame(world, r.video, r.frame)
        at = (slice(r.y, r.y + r.h), slice(r.x, r.x + r.w))
        assert (crop.image == image[at]).all()
        mine = (crop.parts > 0) & (crop.parts < PARTS.index("other person"))
        assert (mine == (truth["owner"][at] == r.true_pid)).all() if r.true_pid > 0 else not mine.any()
        assert (crop.parts[mine] == truth["parts"][at][mine]).all()
        if r.true_pid > 0:
            k = list(truth["pid"]).index(r.true_pid)
            assert np.allclose(crop.joints + [r.x, r.y], truth["joints"][k], atol=1e-3)
            assert crop.visibility <= truth["visibility"][k] + 1e-6


def test_truth_agrees_with_itself(root, world):
    t = render(world, root)["tracklets"]
    truth = read_truth(root, t)
    parts = truth.parts
    mine = (parts > 0) & (parts < PARTS.index("other person"))
    area = mine.mean((1, 2))
    assert np.allclose(truth.visibility, t.visibility)
    nobody = (t.true_pid == -1).to_numpy()
    assert np.isnan(truth.joints[nobody]).all() and not truth.seen[nobody].any() and not mine[nobody].any()
    assert (truth.visibility[nobody] == 0).all()
    i, k = np.nonzero(truth.seen)
    x, y = np.clip(np.floor(truth.joints[i, k]).astype(int), 0, [31, 63]).T
    near = np.array([mine[a, max(v - 1, 0):v + 2, max(u - 1, 0):u + 2].any() for a, u, v in zip(i, x, y)])
    assert near.mean() > .99                                               # a joint that is seen lies on its person
    good = ~nobody & (t.mistake != "drift").to_numpy()
    assert ((truth.joints[good][truth.seen[good]] >= 0) & (truth.joints[good][truth.seen[good]] <= [32, 64])).all()
    full = good & (truth.visibility > .95)
    hidden = good & (truth.visibility < .8)
    assert hidden.any() and area[full].min() > .1 and area[full].mean() > area[hidden].mean()
    assert np.corrcoef(truth.seen[good].mean(1), truth.visibility[good])[0, 1] > .6
    swapped = read_truth(root, t.iloc[[9, 2]])
    assert (swapped.parts == parts[[9, 2]]).all()


def test_crops_are_what_the_tables_say(root, world):
    for t in render(world, root).values():
        assert t.path.is_unique and all(Image.open(root / p).size == (32, 64) for p in t.path.iloc[::7])
    assert not [p for p in files(root) if p.startswith(".") or "/." in p]


@pytest.mark.slow("starts processes")
def test_goes_on_after_a_kill(world, root, tmp_path):
    code = (f"from cion_nb.data.film import make_world, render; render(make_world('tiny', 3, **{SMALL!r}), "
            f"{str(tmp_path)!r}, workers=1)")
    p = forked.start(["-c", code], env=dict(os.environ, CION_NB_PROGRESS="0", OMP_NUM_THREADS="1"))
    end = time.time() + 60
    while not [q for q in tmp_path.glob("crops/[!.]*")] and time.time() < end and p.poll() is None: time.sleep(.02)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    done = {q.parent.name: q.stat().st_mtime_ns for q in tmp_path.glob("crops/[!.]*/00000.jpg")}
    assert done and not (tmp_path / "finished.json").exists()
    render(world, tmp_path, workers=1)
    assert same(root, tmp_path)
    assert all(q.stat().st_mtime_ns == done[q.parent.name] for q in tmp_path.glob("crops/[!.]*/00000.jpg")
               if q.parent.name in done)


def test_a_folder_holds_one_world(world, root):
    with pytest.raises(ValueError, match="holds another world"): render(make_world("tiny", 4, **SMALL), root)


def test_a_failing_worker_is_reported(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match="call `render` again"): render(world, tmp_path / "w", workers=2)


@pytest.mark.parametrize("changes, says",
                         [(dict(bank="C"), "bank"), (dict(cameras=9), "cameras"), (dict(switch=.5), "switch"),
                          (dict(fragments=0), "fragments"),
                          (dict(swich=.1), "swich"), (dict(cameras_per_person=7), "cameras_per_person")])
def test_bad_values_are_named(changes, says):
    with pytest.raises(ValueError, match=says): make_world("tiny", 0, **changes)


def test_other_bad_input(world, root, tmp_path):
    with pytest.raises(ValueError, match="no profile 'huge'"): make_world("huge")
    with pytest.raises(KeyError, match="no video 'x'"): world.video("x")
    with pytest.raises(ValueError, match="has frames 0 to"): render_frame(world, world.videos[0], 10 ** 6)
    with pytest.raises(ValueError, match="no crop of an embedded world"):
        read_truth(root, pd.DataFrame(dict(path=["a/b.jpg"])))
    pytest.importorskip("cv2")
    with pytest.raises(ValueError, match=".mkv"): write_video(world, world.videos[0], tmp_path / "a.mkv", 0, 2)
    with pytest.raises(ValueError, match="is no part"): write_video(world, world.videos[0], tmp_path / "a.avi", 5, 2)


def test_a_world_without_a_side(tmp_path):
    empty = dict(SMALL, train_people=0, test_people=0, distractors=0)
    w = make_world("tiny", 0, **empty)
    assert len(w.reid) == 0 and len(w.tracklets)
    w = make_world("tiny", 0, **dict(SMALL, pretrain_people=0))
    assert len(w.tracklets) == 0 and len(w.reid)
    assert len(render(w, tmp_path, workers=1)["tracklets"]) == 0


def test_frame_truth(world):
    v = max(world.videos, key=lambda v: len(v.walks))
    t = truth_boxes(world, v)
    f = int(t.groupby("frame").size().idxmax())
    image, truth = render_frame(world, v, f)
    here = t[t.frame == f].set_index("true_pid")
    assert image.shape == (*world.camera(v).size[::-1], 3) and image.dtype == np.uint8 and len(truth["pid"]) > 1
    for pid, box, seen in zip(truth["pid"], truth["box"], truth["visibility"]):
        assert np.allclose(box, here.loc[pid, ["x", "y", "w", "h"]].to_numpy(float)) and 0 <= seen <= 1
        y, x = np.nonzero(truth["owner"] == pid)
        if len(y) > 80:
            assert x.min() > box[0] - .3 * box[3] and x.max() < box[0] + box[2] + .3 * box[3]
            assert y.max() < box[1] + box[3] + 6


def test_video_and_mot_files(world, tmp_path):
    cv2 = pytest.importorskip("cv2")
    v = world.videos[0]
    t = truth_boxes(world, v)
    f0 = int(t.frame.iloc[len(t) // 2])
    for name in ("a.avi", "a.mp4"):
        film = cv2.VideoCapture(str(write_video(world, v, tmp_path / name, f0, f0 + 6)))
        frames = []
        while (got := film.read())[0]: frames.append(got[1][..., ::-1])
        assert len(frames) == 6
        assert np.abs(frames[2].astype(int) - render_frame(world, v, f0 + 2)[0]).mean() < 6
    gt = pd.read_csv(write_truth(world, v, tmp_path / "gt.txt"), header=None)
    det = pd.read_csv(write_detections(world, v, tmp_path / "det.txt"), header=None)
    assert gt.shape[1] == 9 and det.shape[1] == 10 and gt[0].min() >= 1 and gt[0].max() <= v.frames
    assert gt.groupby([0, 1]).size().max() == 1
    best = np.concatenate(
        [P.iou(det[det[0] == f][[2, 3, 4, 5]].to_numpy(float), gt[gt[0] == f][[2, 3, 4, 5]].to_numpy(float)).max(1)
         for f in sorted(set(det[0]) & set(gt[0]))])
    assert .5 < len(det) / len(gt) < 1.1 and (best > .6).mean() > .75 and (best < .2).any()
    assert len(pd.read_csv(write_detections(world, v, tmp_path / "all.txt", miss=0, jitter=0, ghosts=0),
                           header=None)) >= .6 * len(gt)
