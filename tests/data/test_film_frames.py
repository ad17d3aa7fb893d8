"""Whole frames of the embedded world with their boxes: the table, its pixels, and worlds without them as they were."""
import hashlib
import io
import json
import os
import shutil
import signal
import time

import forked
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cion_nb.core.runs import Run
from cion_nb.core.settings import recipe
from cion_nb.data import film as P
from cion_nb.data.datasets import read_data
from cion_nb.data.film import make_world, render, render_frame, truth_boxes

FEW = dict(cameras=2, cameras_per_person=2, images_per_camera=0, train_images_per_camera=0, distractors=0,
           crop=(64, 32))
SEARCH = dict(FEW, pretrain_people=0, train_people=3, test_people=4)            # no crop of any kind
TRAIN = dict(FEW, pretrain_people=6, appearances=2, walks_per_video=3, train_people=0, test_people=0)
ALL = dict(FEW, pretrain_people=6, appearances=2, walks_per_video=3, train_people=3, test_people=4)
BOX = ["x", "y", "w", "h"]


@pytest.fixture(scope="module")
def world(): return make_world("tiny", 3, **ALL, frames=30, turns=.7)


@pytest.fixture(scope="module")
def searched(): return make_world("tiny", 3, **SEARCH, frames=6, turns=.5)


@pytest.fixture(scope="module")
def root(searched, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    render(searched, root, workers=1)
    return root


def files(root) -> dict:
    "Everything but the truth of crops: an npz is a zip, which keeps the time."
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*"))
            if p.is_file() and p.name != ".lock" and p.suffix != ".npz"}


# --- worlds that were there

def rounded(x): return (np.round(np.asarray(x, float), 6) + 0.).tolist()       # no negative zero


@pytest.mark.parametrize("bank, company, walks, ways", [("A", .18, "67e49b512a20", "2ac9664a0d81"),
                                                        ("B", .6, "41258bca3c2b", "94a388e66ecd")])
def test_walks_that_were_there_are_the_same(bank, company, walks, ways):
    "Of before there were turns: the numbers of every walk, and where it leads, to a millionth (sines differ by CPU)."
    people = dict(pretrain_people=24, train_people=12, test_people=12)
    w = P._cast("tiny", 5, P.PROFILES["tiny"] | people | dict(bank=bank, company=company))
    told = [(v.name, v.frames, [(q.person, q.start, rounded(q.path), rounded(q.speed), rounded(q.phase))
                                for q in v.walks]) for v in w.videos]
    assert hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12] == walks
    led = [part for v in w.videos for q in v.walks for part in (*q.where(np.arange(0, 12, 1 / 12)), q.length)]
    assert hashlib.sha256(json.dumps(list(map(rounded, led))).encode()).hexdigest()[:12] == ways


def test_worlds_that_were_there_say_nothing_of_frames_and_turns():
    w = make_world("tiny", 0, **TRAIN)
    told = P._describe(w)
    assert w.frames is None and "frames" not in w.tables and "frames" not in repr(w)
    assert not {"frames", "turns"} & {*told["values"], *told["changes"]}
    said = P._describe(P._cast("tiny", 0, {**w.values, "frames": 0, "turns": 0.}))
    assert json.dumps(said) == json.dumps(told)
    more = [P._describe(P._cast("tiny", 0, {**w.values, **change})) for change in (dict(frames=4), dict(turns=.5))]
    assert len({told["fingerprint"], *(m["fingerprint"] for m in more)}) == 3


def test_frames_leave_everything_else_as_it_is():
    plain, more = make_world("tiny", 3, **TRAIN), make_world("tiny", 3, **TRAIN, frames=9)
    assert plain.people == more.people and plain.videos == more.videos
    pd.testing.assert_frame_equal(plain.tracklets, more.tracklets)
    turned = make_world("tiny", 3, **TRAIN, turns=1.)
    assert turned.people == plain.people and turned.videos != plain.videos


@pytest.mark.slow("draws worlds")
def test_crops_are_the_same_beside_frames(tmp_path):
    people = dict(TRAIN, pretrain_people=2, walks_per_video=1)
    for name, more in (("plain", {}), ("more", dict(frames=2))):
        render(make_world("tiny", 3, **people, **more), tmp_path / name, workers=1)
    plain, more = files(tmp_path / "plain"), files(tmp_path / "more")
    new = {name for name in more if name.startswith("frames")}
    assert set(more) - new == set(plain) and len(new) == 4 * 2 + 1
    told = {"world.json", "finished.json"}
    assert all(more[name] == plain[name] for name in set(plain) - told) and len(plain) > 20
    assert list(json.loads(plain["finished.json"])) == ["crops", "fingerprint"]
    assert json.loads(more["finished.json"])["frames"] == 8


# --- the table

def by_hand(world, video, frames):
    "(frame, walk) -> what the table should say, by a loop over the true boxes."
    width, height = world.camera(video).size
    out = {}
    for r in truth_boxes(world, video).itertuples():
        if r.frame not in frames: continue
        x0, y0 = max(r.x, 0), max(r.y, 0)
        x1, y1 = min(r.x + r.w, width), min(r.y + r.h, height)
        walk = video.walks[r.walk]
        metres = (r.frame - walk.start) / world.values["fps"] * walk.speed
        turned = bool(walk.turn) and metres > walk.turn[0] + walk.speed / 4
        out[r.frame, r.walk] = dict(box=(x0, y0, x1 - x0, y1 - y0), true_pid=r.true_pid, turned=int(turned),
                                    visibility=r.inside * r.clear, ignored=r.inside < .25 or r.clear < .25)
    return out


def test_boxes_are_the_true_boxes_cut_at_the_frame(world):
    t, first, seen = world.frames, 0, 0
    assert (t.turned == 1).any() and t.ignored.any() and (t.pid == -1).any()
    for video in world.videos:
        rows = t[t.video == video.name]
        frames = [k * (video.frames - 1) / 29 for k in range(30)]
        truth = by_hand(world, video, sorted(set(rows.frame)))
        assert len(truth) == (rows.tracklet >= 0).sum() and set(rows.frame) <= set(range(video.frames))
        assert np.abs(np.array(sorted(set(rows.frame))) - frames).max() < 1
        for r in rows[rows.tracklet >= 0].itertuples():
            said = truth[r.frame, r.tracklet - first]
            assert np.allclose([r.x, r.y, r.w, r.h], said["box"], atol=1e-3)
            assert (r.true_pid, r.turned, r.ignored) == (said["true_pid"], said["turned"], said["ignored"])
            assert np.isclose(r.visibility, said["visibility"], atol=1e-5)
            assert r.pid == (-1 if video.role == "pretrain" else r.true_pid) and r.camid == video.camid
            assert r.split == dict(pretrain="", train="train", test="gallery")[video.role]
            assert r.path == f"frames/{video.name}/{r.frame:05d}.jpg"
        first += len(video.walks)
        seen += len(truth)
    assert seen > 100 and t.tracklet.max() < first


def test_a_frame_without_anybody_has_one_row(world):
    t = world.frames
    size = t.groupby("path").size()
    empty = t[t.tracklet == -1]
    assert len(empty) and (size[empty.path] == 1).all()
    assert (empty[["pid", "true_pid"]] == -1).all(axis=None)
    assert (empty[[*BOX, "visibility", "turned"]] == 0).all(axis=None) and empty.ignored.all()
    real = t[t.tracklet >= 0]
    assert (real.true_pid > 0).all() and (real[BOX] >= 0).all(axis=None) and (real.w * real.h > 0).all()
    size = t.groupby("video").path.nunique()
    assert (size == 30).all() and set(size.index) == {v.name for v in world.videos}


def test_columns_and_their_kinds(world):
    t = world.frames
    assert list(t) == ["path", "pid", "camid", "video", "tracklet", "frame", "split", *BOX, "score", "true_pid",
                       "turned", "visibility", "ignored"]
    assert {str(t[c].dtype) for c in (*BOX, "score", "visibility")} == {"float32"} and (t.score == 1).all()
    assert t.ignored.dtype == bool and t.turned.dtype.kind == "i" and t.true_pid.dtype == t.pid.dtype == np.int64
    assert f"{t.path.nunique()} frames" in repr(world)
    pd.testing.assert_frame_equal(make_world("tiny", 3, **ALL, frames=30, turns=.7).frames, t)


@pytest.mark.parametrize("n", [1, 2, 7, 10 ** 6])
def test_frames_go_from_the_first_to_the_last(n):
    w = make_world("tiny", 3, **SEARCH, frames=n)
    for video in w.videos:
        got = np.sort(w.frames.frame[w.frames.video == video.name].unique())
        assert len(got) == min(n, video.frames) and got[0] == 0 and (n == 1 or got[-1] == video.frames - 1)
        assert np.ptp(np.diff(got)) <= 1 if n > 1 else True, "evenly"


def test_everybody_who_turns_is_seen_before_and_after():
    w = make_world("tiny", 0, **dict(SEARCH, test_people=12, company=0), frames=10 ** 6, turns=1.)
    t = w.frames[~w.frames.ignored]
    span = t.groupby(["tracklet", "turned"]).size().unstack(fill_value=0)
    assert len(span) == 15 * 2 and (span >= 4).all(axis=None), "a third of a second of either"
    assert t.groupby("tracklet").turned.apply(lambda q: q.is_monotonic_increasing).all()


# --- its pixels

@pytest.mark.slow("draws a world")
def test_a_frame_is_what_render_frame_draws(searched, root):
    t = render(searched, root)["frames"]
    pd.testing.assert_frame_equal(t, searched.frames)
    assert t.attrs == dict(dataset="world")
    for path, r in t.groupby("path").first().iloc[::7].iterrows():
        image = render_frame(searched, r.video, r.frame)[0]
        stored = io.BytesIO()
        Image.fromarray(image).save(stored, "JPEG", quality=95)
        assert stored.getvalue() == (root / path).read_bytes()
        assert np.abs(np.asarray(Image.open(root / path), int) - image).mean() < 3
    assert set(t.path) == {name for name in files(root) if name.startswith("frames/")}
    assert not [name for name in files(root) if "/." in name or name.startswith(".")]


@pytest.mark.slow("draws worlds")
def test_one_process_and_two_draw_the_same(searched, root, tmp_path):
    render(make_world("tiny", 3, **SEARCH, frames=6, turns=.5), tmp_path, workers=2)
    assert files(tmp_path) == files(root)


@pytest.mark.slow("starts processes")
def test_frames_go_on_after_a_kill(searched, root, tmp_path):
    code = (f"from cion_nb.data.film import make_world, render; render(make_world('tiny', 3, **{SEARCH!r}, frames=6, "
            f"turns=.5), {str(tmp_path)!r}, workers=1)")
    p = forked.start(["-c", code], env=dict(os.environ, CION_NB_PROGRESS="0", OMP_NUM_THREADS="1"))
    end = time.time() + 60
    while not list(tmp_path.glob("frames/[!.]*")) and time.time() < end and p.poll() is None: time.sleep(.01)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    done = {q: q.stat().st_mtime_ns for q in tmp_path.glob("frames/[!.]*/*.jpg")}
    assert done and not (tmp_path / "finished.json").exists()
    assert len(list(tmp_path.glob("frames/[!.]*"))) < len(searched.videos)
    render(searched, tmp_path, workers=1)
    assert files(tmp_path) == files(root)
    assert all(q.stat().st_mtime_ns == then for q, then in done.items()), "what was done is not drawn again"


@pytest.mark.slow("draws a world")
@pytest.mark.parametrize("lost", ["crops", "frames"])
def test_a_folder_that_is_lost_is_drawn_alone(searched, root, tmp_path, lost):
    shutil.copytree(root, tmp_path / "w")
    video = searched.videos[0].name
    shutil.rmtree(tmp_path / "w" / lost / video)
    (tmp_path / "w/finished.json").unlink()
    assert P._missing(searched, searched.videos[0], tmp_path / "w") == [lost]
    ticks = []
    P._render_video(searched, searched.videos[0], tmp_path / "w", ticks.append)
    assert sum(ticks) == P._pictures(searched).loc[video, lost]
    render(searched, tmp_path / "w", workers=1)
    assert files(tmp_path / "w") == files(root)


@pytest.mark.slow("draws a world")
def test_a_world_of_training_videos_is_read_as_frames(runs):
    asked = recipe("world", "tiny", seed=2, values=dict(TRAIN, pretrain_people=2, walks_per_video=1, frames=3))
    run = Run(asked)
    with run.computing():
        tables = render(make_world("tiny", 2, bank="A", **asked["values"]), run.folder, workers=1)
        run.finish({})
    assert list(tables) == ["tracklets", "reid", "frames"] and not len(tables["reid"])
    t, root = read_data(dict(data=asked), "frames")
    pd.testing.assert_frame_equal(t, tables["frames"])
    assert root == run.folder and set(t.split) == {""} and (t.pid == -1).all() and (t.true_pid > 0).any()
    assert all(Image.open(root / path).size == (768, 432) for path in t.path.unique()) and t.path.nunique() == 2 * 2 * 3
    assert len(read_data(dict(data=asked), "tracklets")[0]) == len(tables["tracklets"]), "tracklets stay what they are"


def test_a_world_without_frames_is_told(runs):
    asked = recipe("world", "tiny", values=dict(SEARCH, train_people=0, test_people=0))
    run = Run(asked)
    with run.computing():
        render(make_world("tiny", **asked["values"]), run.folder, workers=1)
        run.finish({})
    with pytest.raises(ValueError, match=r"without frames.*values=dict\(frames=40\)"):
        read_data(dict(data=asked), "frames")


def test_a_world_of_nobody_has_no_frames(tmp_path):
    w = make_world("tiny", 0, **dict(SEARCH, train_people=0, test_people=0), frames=3)
    assert not len(w.frames) and list(w.frames) == list(make_world("tiny", 0, **SEARCH, frames=1).frames)
    assert not len(render(w, tmp_path, workers=2)["frames"])


@pytest.mark.parametrize("frames", [-1, 2.5, True, "40"])
def test_a_number_of_frames_that_is_none_is_named(frames):
    with pytest.raises(ValueError, match="frames=.*0 for none, or how many"): make_world("tiny", 0, frames=frames)
