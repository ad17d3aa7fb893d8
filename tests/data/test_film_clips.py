"""Clips and twins of the embedded world: tables, crops, mistakes; and worlds without them keep every byte."""
import hashlib
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cion_nb.core.runs import Run
from cion_nb.core.settings import recipe
from cion_nb.data import film as P
from cion_nb.data.cameras import stream
from cion_nb.data.datasets import read_data
from cion_nb.data.film import make_world, read_truth, render
from cion_nb.data.people import random_person, twins_of
from cion_nb.retrieval.protocols import sides, tracklet_rows

ALONE = dict(cameras=3, cameras_per_person=3, pretrain_people=0, images_per_camera=0, train_images_per_camera=0,
             distractors=0, crop=(64, 32))
CLIPS = dict(ALONE, train_people=6, test_people=10, clip_frames=8)


@pytest.fixture(scope="module")
def world(): return make_world("tiny", 3, **CLIPS, switch=.1, background=.1, drift=.05)


def digest(t: pd.DataFrame) -> str:
    "Of everything but the score, whose last bits are the processor's."
    return hashlib.sha256(t.drop(columns="score").to_csv(index=False).encode()).hexdigest()[:12]


def test_worlds_that_were_there_are_the_same():
    "Tables, and the fingerprint by which a folder knows its world; of before there were clips."
    smoke = recipe("world", "smoke")
    w = make_world(smoke["size"], smoke["seed"], bank="B", **smoke["values"])
    assert (digest(w.tracklets), digest(w.reid)) == ("5902f9b4faec", "d1e111afcf76")
    told = P._describe(w)
    assert told["fingerprint"] == "cb1665172238" and not set(P._LATER) & {*told["values"], *told["changes"]}
    assert w.clips is None and list(w.tables) == ["tracklets", "reid"]
    said = P._LATER | dict(clip_frames=0, clip_stride=2, twins="")
    assert json.dumps(P._describe(P._cast("tiny", 0, {**w.values, **said}))) == json.dumps(told)


def test_clips_leave_the_pre_training_videos_as_they_are():
    few = dict(cameras=2, cameras_per_person=2, pretrain_people=4, appearances=2, walks_per_video=4, train_people=2,
               test_people=2)
    plain, more = make_world("tiny", 0, **few), make_world("tiny", 0, **few, clip_frames=6)
    pd.testing.assert_frame_equal(plain.tracklets, more.tracklets)
    assert more.clips.tracklet.min() == more.tracklets.tracklet.max() + 1
    later = more.clips.groupby("video").path.first().str[-9:-4].astype(int)
    assert (later == more.reid.video.value_counts().reindex(later.index)).all(), "crops are numbered after the images"


def test_a_clip_is_a_tracklet_of_consecutive_frames(world):
    t, walks = world.clips, sum(len(v.walks) for v in world.videos)
    real = t[t.pid > 0]
    assert real.tracklet.nunique() == walks == 16 * 3 and t.groupby("tracklet").size().eq(8).all()
    for column in ("pid", "camid", "video", "split"): assert t.groupby("tracklet")[column].nunique().eq(1).all()
    step = t.groupby("tracklet").frame.diff().dropna()
    assert (step > 0).all() and (step % 2 == 0).all() and (step == 2).mean() > .9
    assert real.drop_duplicates("tracklet").groupby(["pid", "camid"]).size().eq(1).all()
    slow = make_world("tiny", 3, **dict(CLIPS, clip_frames=4, clip_stride=5)).clips
    assert (slow.frame % 5 == 0).all() and slow.groupby("tracklet").frame.diff().median() == 5


def test_the_same_seed_gives_the_same_clips(world):
    again = make_world("tiny", 3, **CLIPS, switch=.1, background=.1, drift=.05)
    pd.testing.assert_frame_equal(again.clips, world.clips)


def test_mistakes_say_what_is_in_the_box(world):
    t = world.clips
    is_other = (t.true_pid > 0) & (t.true_pid != t.pid)
    assert (is_other == (t.mistake == "switch")).all() and ((t.true_pid == -1) == (t.mistake == "background")).all()
    assert t[is_other].groupby("tracklet").size().max() <= 4, "half of a clip at most"
    nobody = t[t.pid == 0]
    assert len(nobody) and set(nobody.mistake) == {"background"} and set(nobody.split) == {"gallery"}
    tail = t[is_other].groupby("tracklet").frame.max()
    assert (tail == t.groupby("tracklet").frame.max().reindex(tail.index)).mean() > .7, "a switch lasts to the end"


@pytest.mark.slow("describes worlds of many walks")
@pytest.mark.parametrize("switch, background", [(0, 0), (.06, .03), (.12, .1)])
def test_mistakes_come_at_the_rates_asked_for(switch, background):
    people = dict(train_people=40, test_people=40)
    t = make_world("tiny", 0, **CLIPS | people, switch=switch, background=background, drift=.05).clips
    rates = {k: (t.mistake == k).mean() for k in ("switch", "background", "drift")}
    assert abs(rates["switch"] - switch) < .02 and abs(rates["background"] - background) < .02
    assert abs(rates["drift"] - .05) < .01


def test_every_query_has_its_matches(world):
    t = world.clips.drop(columns="walk")
    t.attrs = dict(dataset="world_clips")
    table = tracklet_rows(t[t.split != "train"])[0]
    table.attrs = t.attrs
    query, gallery = sides(table)
    assert set(gallery) == set(range(len(table))), "queries are searched too"
    found = table[(table.split == "gallery") & (table.pid > 0)]
    assert found.groupby("pid").size().eq(1).all() and set(found.pid) == set(table.pid) - {0}
    assert len(query) == 10 * 2 and not set(table.pid) & set(t.pid[t.split == "train"])


@pytest.mark.slow("draws a world")
def test_render_and_read(world, runs, tmp_path):
    people = dict(train_people=2, test_people=2, train_images_per_camera=1)
    asked = recipe("world", "tiny", seed=3, values=CLIPS | people)
    run = Run(asked)
    with run.computing():
        w = make_world("tiny", 3, bank="A", **asked["values"])
        tables = render(w, run.folder, workers=2)
        run.finish({})
    clips, root = tables["clips"], run.folder
    assert clips.path.is_unique and not set(clips.path) & set(tables["reid"].path)
    assert clips.attrs["dataset"] == "world_clips"
    assert all(Image.open(root / p).size == (32, 64) for p in clips.path)
    assert np.allclose(read_truth(root, clips).visibility, clips.visibility)
    assert "walk" not in clips and clips.visibility[clips.true_pid > 0].mean() > .8
    train, test = (read_data(dict(data=asked), f"clips_{k}")[0] for k in ("train", "test"))
    assert set(train.split) == {"train"} and set(test.split) == {"query", "gallery"}
    assert len(train) + len(test) == len(clips)
    assert len(read_data(dict(data=asked), "train")[0]) == 6, "the single images stay what they are"
    row = w.clips[w.clips.true_pid > 0].iloc[5]
    crop = P._cut(P._Stage(w, w.video(row.video), [row.frame]), row.frame, row.walk, row.x, row.y, row.w, row.h)
    small = np.asarray(Image.fromarray(crop.image).resize((32, 64), Image.BICUBIC), int)
    assert np.abs(small - np.asarray(Image.open(root / row.path), int)).mean() < 5
    assert len(render(w, root)["clips"]) == len(clips), "read, not drawn"


def test_a_world_without_clips_is_told(runs):
    asked = recipe("world", "tiny", values=dict(ALONE, train_people=0, test_people=0))
    run = Run(asked)
    with run.computing():
        render(make_world("tiny", **asked["values"]), run.folder, workers=1)
        run.finish({})
    with pytest.raises(ValueError, match=r"without clips.*clip_frames=12"): read_data(dict(data=asked), "clips_train")


@pytest.mark.parametrize("changes, says", [
    (dict(clip_frames=1), "clip_frames=1: 0 for no clips"), (dict(clip_frames=2.5), "clip_frames=2.5"),
    (dict(clip_frames=-3), "clip_frames=-3"), (dict(clip_stride=0), "clip_stride=0: a whole number from 1 on"),
    (dict(clip_stride=True), "clip_stride=True"), (dict(twins="face"), "twins='face': choose '', 'mark', 'gait'"),
    (dict(twins="mark", train_people=5), "train_people=5 must be even"),
    (dict(clip_frames=60, clip_stride=4), "a clip needs a walk of 40.2 m, and none in 200 of .* lower clip_frames")])
def test_bad_values_are_named(changes, says):
    with pytest.raises(ValueError, match=says): make_world("tiny", 0, **CLIPS | changes)


# --- twins

def small(world, person, start, frame, turn):
    "(64, 32, 3) of somebody who is at one place, turned, at a phase, at `frame` of a walk."
    step = np.array([np.cos(turn), np.sin(turn)])
    cam = world.cameras[0]
    path = tuple(tuple(float(q) for q in np.array([0, cam.near + 2]) + s * step) for s in (0, 1, 2))
    video = P.Video("", cam.camid, "", 10 ** 6, (P.Walk(0, start, path, person.speed, .7),))
    stage = P._Stage(replace(world, people=(person,)), video, [frame])
    x0, y0, x1, y1 = stage.at[frame][0].box
    w, h = max(x1 - x0, .42 * (y1 - y0)), y1 - y0                                # as a detector's boxes are
    image = P._cut(stage, frame, 0, *(round(q) for q in ((x0 + x1 - w) / 2, y0, w, h))).image
    return np.asarray(Image.fromarray(image).resize((32, 64), Image.BICUBIC), int)


@pytest.mark.parametrize("turn", [-1.57, -.4, 1.57, 2.6])
def test_twins_by_their_mark_differ_in_a_few_pixels(world, turn):
    for k in range(4):
        pair = twins_of(stream("pair", k), random_person(stream("one", k), 1), 2, "mark")
        one, other = (small(world, p, 0, 3, turn) for p in pair)
        far = np.abs(one - other).max(-1)
        rows, columns = np.nonzero(far > far.max() / 4)
        assert 2 <= len(rows) <= 9 and np.ptp(rows) < 3 and np.ptp(columns) < 3, "a spot within 3x3 pixels"
        assert far.max() > 80 and (far > 20).sum() <= 12 and np.median(far) == 0
        assert replace(pair[0], pid=0, mark=()) == replace(pair[1], pid=0, mark=())


def test_twins_by_their_gait_differ_in_time_alone(world):
    for k, turn in enumerate((.1, -1., 2.2)):
        pair = twins_of(stream("pair", k), random_person(stream("one", k), 1), 2, "gait")
        still = [small(world, p, 5, 5, turn) for p in pair]
        later = [small(world, p, 5, 9, turn) for p in pair]
        assert (still[0] == still[1]).all() and np.abs(later[0] - later[1]).max() > 40
        assert replace(pair[0], pid=0, speed=1, pace=1) == replace(pair[1], pid=0, speed=1, pace=1)


def test_a_world_of_twins_is_in_pairs():
    for by in ("mark", "gait"):
        people = dict(train_people=20, test_people=20, company=0, twins=by)
        w = P._cast("tiny", 1, P.PROFILES["tiny"] | CLIPS | people)              # without its tables
        for a, b in zip(w.people[::2], w.people[1::2]):
            assert a.group == b.group and (a.height, a.upper, a.lower, a.hair) == (b.height, b.upper, b.lower, b.hair)
            assert b.pid == a.pid + 1 and ((a.mark != b.mark) if by == "mark" else (a.pace != b.pace))
        assert len({p.group for p in w.people}) == 20
        if by == "gait": paces_are_apart(w)


def paces_are_apart(w):
    "Of a pair, the slowest walk of the quick one has more steps a second than the quickest of the slow one."
    steps = {}
    for walk in (q for v in w.videos for q in v.walks):
        p, fps = w.people[walk.person], w.values["fps"]
        phase = P._pose(p, walk, walk.start + np.arange(12), fps)[2]              # what is drawn
        steps.setdefault((p.group, p.pace), []).append((phase[6] - phase[0]) * fps / 6 / (2 * np.pi))
    slow, quick = sorted({pace for _, pace in steps})
    assert all(min(steps[g, quick]) > 1.2 * max(steps[g, slow]) for g in range(20))
    assert np.mean([max(steps[g, quick]) for g in range(20)]) * 2 * w.values["clip_stride"] / w.values["fps"] < 1, \
        "a step lasts longer than the time between two frames of a clip"
