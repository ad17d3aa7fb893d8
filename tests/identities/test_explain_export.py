"""Identities leave as lists and trees and come back: names, links, moves, kills."""
import json
import os
import signal
import threading
import time

import forked
import numpy as np
import pytest
from hypothesis import given, HealthCheck, settings, strategies as st

from cion_nb.core.samples import make_samples, read_csv, read_folder, read_tracklets
from cion_nb.data.datasets import read_cion_al
from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities import explain as module
from cion_nb.identities.denoise import denoise
from cion_nb.identities.explain import export, TREE


@pytest.fixture(scope="module")
def world():
    x, samples = feature_world(300, seed=4)
    return x, samples, denoise(x, samples, measure=False)


# ---------------------------------------------------------------- exports

names = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\\"), min_size=1, max_size=12)
odd = st.sampled_from(["a b", "ü/ñ", 'say "hi", you', "x,y;z", "-1", "NA", "null", ".hidden", "..", "a/../b", " lead",
                       "trail ", "50%", "new\nline", "tab\t", "#", "'", "人", "a\rb", ""])


@st.composite
def tables(draw):
    "Samples of several videos with odd names; paths that could be files."
    n = draw(st.integers(1, 25))
    videos = draw(st.lists(odd | names, min_size=1, max_size=4, unique=True))
    tracklet = np.array(draw(st.lists(st.integers(0, 7), min_size=n, max_size=n)))
    path = [f"{draw(odd | names)}{i}.jpg" for i in range(n)]
    labels = np.array(draw(st.lists(st.integers(-1, 5), min_size=n, max_size=n)))
    frame = draw(st.lists(st.integers(-1, 99), min_size=n, max_size=n))
    return labels, make_samples(path, video=[videos[t % len(videos)] for t in tracklet], tracklet=tracklet, frame=frame)


@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(table=tables(), discarded=st.sampled_from(["leave out", "keep"]))
def test_lists_come_back(table, discarded, tmp_path_factory):
    labels, samples = table
    there = labels >= 0 if discarded == "leave out" else np.ones(len(labels), bool)
    out = tmp_path_factory.mktemp("lists")
    told = export(labels, samples, out / "a.json", discarded=discarded)
    back = read_cion_al(told.path)
    assert back.pid.tolist() == labels[there].tolist() and back.path.tolist() == samples.path[there].tolist()
    assert (told.images, told.left_out) == (there.sum(), (~there).sum())
    back = read_csv(export(labels, samples, out / "a.csv", "csv", discarded=discarded).path)
    assert back.pid.tolist() == labels[there].tolist() and back.path.tolist() == samples.path[there].tolist()
    for c in ("tracklet", "frame"): assert back[c].tolist() == samples[c][there].tolist()
    assert back.video.tolist() == samples.video[there].tolist()


@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(table=tables(), discarded=st.sampled_from(["leave out", "keep"]),
       link=st.sampled_from(["copy", "hard", "symlink"]))
def test_trees_come_back(table, discarded, link, tmp_path_factory):
    labels, samples = table
    there = labels >= 0 if discarded == "leave out" else np.ones(len(labels), bool)
    folder = tmp_path_factory.mktemp("tree")
    # once in a tracklet
    samples = samples.assign(path=[f"crop {i},ü.JPG" for i in range(len(samples))],
                             frame=np.where(samples.frame < 0, -1, np.arange(len(samples))))
    for i, p in enumerate(samples.path): (folder / p).write_bytes(b"%d" % i)
    out = export(labels, samples, folder / "made" / "tree", "tracklets", root=folder, link=link,
                 discarded=discarded).path
    back = read_csv(out / "samples.csv", root=out)
    assert back.pid.tolist() == labels[there].tolist()
    assert [(out / p).read_bytes() for p in back.path] == [b"%d" % i for i in np.flatnonzero(there)]
    assert (folder / "made").resolve() in (out / "x").resolve().parents
    assert sorted(os.listdir(folder / "made")) == ["tree"]
    if not there.any(): return
    tree = read_folder(out, TREE).set_index("path")
    assert len(tree) == there.sum() and tree.pid.reindex(back.path).tolist() == labels[there].tolist()
    assert tree.tracklet.reindex(back.path).tolist() == samples.tracklet[there].tolist()
    assert tree.frame.reindex(back.path).tolist() == samples.frame[there].tolist()
    folders = read_tracklets(out)
    assert sorted(folders.path) == sorted(back.path)
    assert folders.tracklet.nunique() == len(set(zip(labels[there], samples.tracklet[there])))


def test_video_names_stay_inside_and_apart():
    given_ = ["a", "a/b", "..", "../..", "/etc", "a//b", "a/", ".a", "%2Ea", "a.", "a ", "c:d", "x" * 300,
              "x" * 299 + "y", "ü" * 150, "."]
    made = [module._folder_name(v) for v in given_]
    assert len(set(made)) == len(made)
    for m in made:
        parts = m.split("/")
        assert all(p and p not in (".", "..") and not p.startswith(".") and len(p.encode()) <= 255 for p in parts)


def test_a_tree_of_moved_images(world, tmp_path):
    x, samples, result = world
    for path in samples.path:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    out = export(result, samples, tmp_path / "tree", "tracklets", root=tmp_path, link="symlink").path
    tree = read_csv(out / "samples.csv")
    there = result.labels >= 0
    assert tree.tracklet.tolist() == result.provenance.to_tracklet[there].tolist()
    assert tree.source.tolist() == samples.path[there].tolist()
    assert read_tracklets(out).tracklet.nunique() == samples.tracklet.nunique()


def test_export_refuses(world, tmp_path):
    x, samples, result = world
    (tmp_path / "there").mkdir()
    for format in ("cion_al", "csv", "tracklets"):
        with pytest.raises(FileExistsError, match="nothing is overwritten"):
            export(result, samples, tmp_path / "there", format, root=tmp_path)
    with pytest.raises(FileNotFoundError, match="are not under"):
        export(result, samples, tmp_path / "tree", "tracklets", root=tmp_path)
    with pytest.raises(ValueError, match="say root="): export(result, samples, tmp_path / "tree", "tracklets")
    with pytest.raises(ValueError, match="row 0: 'a.mp4'"):
        export([0], make_samples(["a.mp4"]), tmp_path / "tree", "tracklets", root=tmp_path)
    with pytest.raises(ValueError, match="2 labels but"): export([0, 1], samples, tmp_path / "x")
    for bad in (dict(format="xml"), dict(link="move"), dict(discarded="hide")):
        with pytest.raises(ValueError, match="choose from"): export(result, samples, tmp_path / "x", **bad)
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.slow("a hundred thousand images")
def test_a_hundred_thousand_rows_come_back(tmp_path):
    n = 100_000
    samples = make_samples([f"v{i // 1000}/{i}.jpg" for i in range(n)], video=[f"v{i // 1000}" for i in range(n)],
                           tracklet=np.arange(n) // 10, frame=np.arange(n) % 10)
    labels = np.arange(n) // 30
    assert (read_cion_al(export(labels, samples, tmp_path / "a.json").path).pid.to_numpy() == labels).all()
    assert (read_csv(export(labels, samples, tmp_path / "a.csv", "csv").path).pid.to_numpy() == labels).all()
    # CION-AL's two keys and no other
    assert set(json.loads((tmp_path / "a.json").read_text())[0]) == {"id", "file_path"}


KILLED = """
import sys, os, time
import numpy as np
from cion_nb.core.samples import make_samples
from cion_nb.identities import explain as e
slow = e.shutil.copyfile
e.shutil.copyfile = lambda a, b: (time.sleep(.01), slow(a, b))
n = 200
samples = make_samples([f"{i}.jpg" for i in range(n)], tracklet=np.arange(n) // 5, video="v")
e.export(np.arange(n) // 10, samples, sys.argv[1] + "/tree", "tracklets", root=sys.argv[1])
"""


@pytest.mark.slow("starts processes")
def test_killed_while_exporting(tmp_path, monkeypatch):
    "Never half a tree; the same call goes on, another call clears the remains."
    n = 200
    for i in range(n): (tmp_path / f"{i}.jpg").write_bytes(b"x" * (i + 1))
    process = forked.start(["-c", KILLED, tmp_path], env=dict(os.environ, CION_NB_PROGRESS="0", OMP_NUM_THREADS="1"))
    while not (made := list(tmp_path.glob(".tree.*.half/v/*/*.jpg"))) or len(made) < 20:
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "tree").exists()
    half = next(tmp_path.glob(".tree.*.half"))
    torn = sorted(half.rglob("*.jpg"))[0]
    torn.write_bytes(b"")  # a copy that was cut off
    samples, labels = make_samples([f"{i}.jpg" for i in range(n)], tracklet=np.arange(n) // 5,
                                   video="v"), np.arange(n) // 10
    copied, copy = [], module.shutil.copyfile
    monkeypatch.setattr(module.shutil, "copyfile", lambda a, b: (copied.append(a), copy(a, b)))
    export(labels, samples, tmp_path / "tree", "tracklets", root=tmp_path)
    assert 0 < len(copied) < n                                                                              # went on
    back = read_csv(tmp_path / "tree" / "samples.csv", root=tmp_path / "tree")
    assert [(tmp_path / "tree" / p).stat().st_size for p in back.path] == list(range(1, n + 1))
    assert back.pid.tolist() == labels.tolist()
    half.mkdir()
    (tmp_path / ".tree2.x.half").mkdir()
    export(labels, samples, tmp_path / "tree2", "tracklets", root=tmp_path, link="hard")
    # its own remains, not those of another tree
    assert not (tmp_path / ".tree2.x.half").exists() and half.exists()


def test_two_at_once(tmp_path):
    (tmp_path / "0.jpg").touch()
    with module.FileLock(tmp_path / ".tree.lock"):
        caught = []
        def other():
            try: export([0], make_samples(["0.jpg"]), tmp_path / "tree", "tracklets", root=tmp_path)
            except RuntimeError as e: caught.append(str(e))
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert caught and "another process" in caught[0] and (tmp_path / ".tree.lock").exists()
