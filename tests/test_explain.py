"""Room `explain`: links and bridges against brute force, the watch on chaining on planted chains and clean worlds, exports read back, the interactive view without a front end."""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from cion_nb.identities import explain as module
from cion_nb.identities.denoise import denoise
from cion_nb.identities.explain import counts, explain, explore, export, identity_sheet, links_of, suspects, sweep, TREE
from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities.pairs import group_sums, unit_centroids, unit_rows
from cion_nb.core.samples import make_samples, read_csv, read_folder, read_tracklets
from cion_nb.data.datasets import read_cion_al


@pytest.fixture(autouse=True)
def quiet(monkeypatch): monkeypatch.setenv("CION_NB_PROGRESS", "0")


@pytest.fixture(scope="module")
def world():
    x, samples = feature_world(300, seed=4)
    return x, samples, denoise(x, samples, measure=False)


# ---------------------------------------------------------------- links

def pieces(nodes, links):
    "Connected pieces, the slow way."
    left, found = set(nodes), []
    while left:
        piece, grow = set(), {left.pop()}
        while grow:
            piece |= grow
            grow = {b for a, b in links + [(b, a) for a, b in links] if a in piece and b in nodes} - piece
        left -= piece
        found.append(piece)
    return found

@settings(max_examples=300, deadline=None)
@given(n=st.integers(1, 9), seed=st.integers(0, 2**32 - 1), density=st.floats(0, 1))
def test_bridges_and_joints(n, seed, density):
    rng = np.random.default_rng(seed)
    links = [(a, b) for a in range(n) for b in range(a + 1, n) if rng.random() < density * .6]
    weight = rng.integers(1, 20, n)
    a, b = np.array(links, int).reshape(-1, 2).T
    is_bridge, cuts_off, hangs = module._bridges(a, b, weight)
    whole = pieces(set(range(n)), links)
    for e, (p, q) in enumerate(links):
        after = pieces(set(range(n)), links[:e] + links[e + 1:])
        assert is_bridge[e] == (len(after) > len(whole))
        side = next(s for s in after if p in s)
        assert cuts_off[e] == (0 if q in side else min(weight[list(side)].sum(), weight[list(next(s for s in after if q in s))].sum()))
    for v in range(n):
        own = next(s for s in whole if v in s)
        after = [weight[list(s)].sum() for s in pieces(own - {v}, [l for l in links if v not in l])]
        assert hangs[v] == sum(after) - max(after, default=0)


def test_links_of_an_identity(world):
    x, samples, result = world
    k = result.tracklets.identity.value_counts().index[0]
    table = links_of(result, k)
    assert (table.identity == k).all() and table.distance.is_monotonic_decreasing and len(table) == (result.links.identity == k).sum()
    with pytest.raises(ValueError, match="no identity 99999"): links_of(result, 99999)


def test_a_refused_link_holds_nothing(world):
    x, samples, result = world
    k = result.tracklets.identity.value_counts().index[0]
    links = result.links.assign(rule="threshold", refused=False)
    links.loc[links.index[links.identity == k][0], "refused"] = True
    refused = type(result)(**{**vars(result), "links": links})
    assert len(links_of(refused, k)) == len(links_of(result, k)) - 1


# ---------------------------------------------------------------- histories

def test_every_image_has_a_history(world):
    x, samples, result = world
    for state in ("kept", "reallocated", "discarded"):
        row = int(np.flatnonzero(result.provenance.state == state)[0])
        story = explain(result, row=row, samples=samples)
        p = result.provenance.iloc[row]
        assert samples.path[row] in story.words and f"tracklet {p.from_tracklet}" in story.words
        assert ("no identity (-1)" in story.words) == (state == "discarded")
        if state == "reallocated": assert f"moved to tracklet {p.to_tracklet} at {p.distance:.2f}" in story.words and f"removed from tracklet {p.from_tracklet} in round {p['round']} at {p.deviation:.2f}" in story.words
        assert story._repr_html_().startswith("<p>Image ") and str(story).startswith(story.words)


@pytest.mark.parametrize("levels", [(), ("tracklet",), ("video",), ("cross",), ("tracklet", "cross"), ("tracklet", "video")])
def test_any_levels(world, levels, tmp_path):
    x, samples, _ = world
    result = denoise(x, samples, levels=levels, measure=False)
    for row in (0, 100, len(samples) - 1): assert explain(result, row=row).words
    for k in result.tracklets.identity.unique()[:20]: assert explain(result, identity=int(k)).words
    assert isinstance(suspects(result, x), pd.DataFrame)
    identity_sheet(result, samples, tmp_path, rows=1, columns=3)
    if levels == ("tracklet",): assert "removed" in set(module._crops_of(result.labels, samples, result.provenance).state)


def test_what_explain_refuses(world):
    _, _, result = world
    for bad in ({}, dict(row=0, identity=0)):
        with pytest.raises(ValueError, match="say row=… for an image or identity"): explain(result, **bad)
    with pytest.raises(ValueError, match="no row -1"): explain(result, row=-1)
    with pytest.raises(ValueError, match="no identity 99999"): explain(result, identity=99999)


# ---------------------------------------------------------------- sheets

def test_crops_of_a_sheet_account_for_every_image(world):
    x, samples, result = world
    crops = module._crops_of(result.labels, samples, result.provenance)
    once = crops[crops.state != "moved away"]
    assert sorted(once.row) == list(range(len(samples)))
    lost = once.state == "discarded"
    assert (once[~lost].identity.to_numpy() == result.labels[once[~lost].row]).all() and (result.labels[once[lost].row] == -1).all()
    away = crops[crops.state == "moved away"]
    assert (result.labels[away.row] != away.identity).all() and (result.provenance.state[away.row] == "reallocated").all()


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), places=st.integers(0, 60), odd=st.floats(0, 1), seed=st.integers(0, 999))
def test_selection(sizes, places, odd, seed):
    share = module._share(sizes, places)
    assert share.sum() == min(places, sum(sizes)) and (share <= sizes).all()
    if places >= len(sizes): assert (share >= 1).all()
    n = sum(sizes)
    crops = pd.DataFrame(dict(tracklet=np.repeat(np.arange(len(sizes)), sizes), state=np.where(np.random.default_rng(seed).random(n) < odd, "discarded", "kept")))
    some = module._select(crops, places)
    assert len(some) <= max(places, 0) and some.index.is_unique and some.index.is_monotonic_increasing


def test_sheets_draw(world, tmp_path):
    x, samples, result = world
    for path in samples.path[:2000]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 20), "red").save(tmp_path / path)
    texts = lambda figure: [t.get_text() for t in figure.axes[0].texts]
    big = int(np.bincount(result.labels[result.labels >= 0]).argmax())
    drawn = texts(identity_sheet(result, samples, tmp_path, identities=big, columns=9))
    n = len(module._crops_of(result.labels, samples, result.provenance).query("identity == @big"))
    assert f"and {n - 9:,} more" in drawn
    missing = texts(identity_sheet(result.labels, samples, tmp_path / "nowhere", identities=[big], columns=5))
    assert missing.count("no\nsuch\nfile") == 5
    truth = identity_sheet(samples.pid, samples.assign(tracklet=-1, video=""), tmp_path, rows=2, columns=4)          # no tracklets, no videos
    assert len([t for t in texts(truth) if t.startswith("identity")]) == 2
    for bad, words in ((dict(identities=[10**6]), "no images of identities 1000000"), (dict(identities=[]), "identities is empty"), (dict(rows=0), "rows=0"), (dict(columns=0), "columns=0")):
        with pytest.raises(ValueError, match=words): identity_sheet(result, samples, tmp_path, **bad)
    with pytest.raises(ValueError, match="3 labels"): identity_sheet(np.zeros(3, int), samples, tmp_path)
    with pytest.raises(ValueError, match="nothing to draw"): identity_sheet(np.full(len(samples), -1), samples, tmp_path)


# ---------------------------------------------------------------- the watch on chaining

def plant(x, samples, pairs, seed=0):
    "Pairs of people turned towards each other until they are 50° apart, and one tracklet half-way between."
    rng, x, pid = np.random.default_rng(seed), np.asarray(x, np.float64).copy(), samples.pid.to_numpy()
    units, tables = unit_centroids(group_sums(x, pid, pid.max() + 1), np.bincount(pid)), [samples]
    for n, (p, q) in enumerate(pairs):
        turned = np.flatnonzero(pid == q)
        x[turned] = unit_rows(x[turned] + .84 * units[p])
        middle = units[p] + unit_rows((units[q] + .84 * units[p])[None])[0]
        x = np.r_[x, unit_rows(middle / np.linalg.norm(middle) + .2 * rng.normal(size=(8, x.shape[1])) / x.shape[1]**.5)]
        tables.append(make_samples([f"extra/{n}_{f}.jpg" for f in range(8)], pid=pid.max() + 1 + n, video=f"extra{n}", tracklet=samples.tracklet.max() + 1 + n, frame=np.arange(8)))
    return x, pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize("seed", range(6))
def test_quiet_on_clean_worlds_and_awake_on_planted_chains(seed):
    x, samples = feature_world(600, seed=seed, switches=0, personless=0)
    clean = denoise(x, samples, measure=False)
    assert len(suspects(clean, x)) == 0
    pairs = np.random.default_rng(seed).permutation(samples.pid.max() + 1)[:8].reshape(4, 2)
    y, chained = plant(x, samples, pairs, seed)
    result = denoise(y, chained, measure=False)
    mixed = {k for k in range(result.labels.max() + 1) if chained.pid[(result.labels == k) & (chained.pid <= samples.pid.max())].nunique() > 1}
    found = suspects(result, y)
    assert set(found.identity) == mixed and len(mixed) >= 1 and (found.why == "two parts").all()
    assert (found.pairs.diff().dropna() <= 0).all() and (found.halves >= .18).all() and (found.images == found.images_a + found.images_b).all()


def test_suspects_by_hand():
    "Three tracklets in the plane, 30° apart: a-b and b-c are linked, a-c is not."
    angles = np.radians(np.repeat([0, 30, 60], 4))
    x, samples = np.stack([np.cos(angles), np.sin(angles)], -1), make_samples([f"{i}.jpg" for i in range(12)], video=np.repeat(["a", "b", "c"], 4), tracklet=np.repeat([7, 8, 9], 4), frame=np.arange(12))
    result = denoise(x, samples)
    assert result.labels.tolist() == [0] * 12
    found = suspects(result, x).iloc[0]
    assert {found.tracklet_a, found.tracklet_b} == {7, 9} and np.isclose(found.diameter, .5) and found.way in ([7, 8, 9], [9, 8, 7])
    assert found.joint == 8 and found.cuts_off == 4 and found.is_bridge and found.links == 2 and found.links_across == 1
    assert np.isclose(found.halves, 1 - np.cos(np.radians(45))) and {found.images_a, found.images_b} == {4, 8} and found.pairs == 32
    assert len(suspects(result, x, limit=.4)) == 0 and len(suspects(result, x, limit=.4, everything=True)) == 1
    searched = suspects(result, x, exact=2).iloc[0]
    assert searched.diameter <= .5 + 1e-6 and searched.diameter_at_most >= .5 - 1e-6
    with pytest.raises(ValueError, match="3 feature rows but 12 labels"): suspects(result, x[:3])


@pytest.mark.parametrize("seed", range(3))
def test_chains_of_reciprocal_links(seed):
    "A rule without a cosine threshold: the limit comes from its links. Nobody pure is reported, and at least half of those that hold two people are."
    x, samples = feature_world(600, seed=seed, switches=0, personless=0)
    y, chained = plant(x, samples, np.random.default_rng(seed).permutation(samples.pid.max() + 1)[:8].reshape(4, 2), seed)
    result = denoise(y, chained, link="reciprocal", measure=False)
    impure = {k for k in range(result.labels.max() + 1) if chained.pid[result.labels == k].nunique() > 1}
    mixed = {k for k in impure if chained.pid[(result.labels == k) & (chained.pid <= samples.pid.max())].nunique() > 1}      # not only a look-alike's tracklet
    found = suspects(result, y)
    assert set(found.identity) <= impure and 2 * len(mixed & set(found.identity)) >= len(mixed)
    assert "Jaccard distance" in explain(result, identity=int(found.identity[0])).words


def test_the_view_links_by_reciprocal(world):
    pytest.importorskip("ipywidgets")
    x, samples, _ = world
    view = explore(x, samples)
    view.link.value = "reciprocal"
    assert view.error is None and not view.sigma_drm.disabled and not view.eps.disabled and view.result.parameters["link"] == "reciprocal"
    before = view.words.value; view.eps.value = .3
    assert view.words.value != before and view.result.parameters["eps"] == .3
    view.eps.value = 1.                                                 # the slider ends where `denoise` does
    assert view.error is None and view.eps.value == view.result.parameters["eps"] == .99


def test_an_identity_of_strange_size():
    "Twenty people of four tracklets, one of eighty."
    rng = np.random.default_rng(0)
    people = unit_rows(rng.normal(size=(21, 64)))
    who = np.repeat(np.r_[np.repeat(np.arange(20), 4), np.full(80, 20)], 5)
    x = unit_rows(people[who] + .05 * rng.normal(size=(len(who), 64)) / 8)
    samples = make_samples([f"{i}.jpg" for i in range(len(who))], video=[f"v{i // 5}" for i in range(len(who))], tracklet=np.arange(len(who)) // 5, frame=np.arange(len(who)))
    found = suspects(denoise(x, samples, measure=False), x)
    assert found.why.tolist() == ["many images, many tracklets"] and found.images[0] == 400 and found.halves[0] < .01


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 120), dim=st.integers(2, 6), seed=st.integers(0, 2**32 - 1), tile=st.integers(1, 40))
def test_farthest_two(n, dim, seed, tile):
    x = unit_rows(np.random.default_rng(seed).normal(size=(n, dim)) + 1)
    d = np.clip(1 - x @ x.T, 0, 2)
    i, j, diameter, most = module._farthest_two(x, n, tile)
    assert np.isclose(diameter, d.max()) and np.isclose(d[i, j], d.max()) and most == diameter
    i, j, low, high = module._farthest_two(x.astype(np.float32), 1)
    assert low <= d.max() + 1e-5 and high >= d.max() - 1e-5 and abs(d[i, j] - low) < 1e-5


def test_suspects_at_a_size():
    "30,000 tracklets, one pass: seconds."
    x, samples = feature_world(30_000, dim=32, images=6, seed=0)
    result = denoise(x, samples, measure=False)
    start = time.process_time()
    suspects(result, x)
    assert time.process_time() - start < 30


# ---------------------------------------------------------------- exports

names = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\\"), min_size=1, max_size=12)
odd = st.sampled_from(["a b", "ü/ñ", 'say "hi", you', "x,y;z", "-1", "NA", "null", ".hidden", "..", "a/../b", " lead", "trail ", "50%", "new\nline", "tab\t", "#", "'", "人", "a\rb", ""])

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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(table=tables(), discarded=st.sampled_from(["leave out", "keep"]), link=st.sampled_from(["copy", "hard", "symlink"]))
def test_trees_come_back(table, discarded, link, tmp_path_factory):
    labels, samples = table
    there = labels >= 0 if discarded == "leave out" else np.ones(len(labels), bool)
    folder = tmp_path_factory.mktemp("tree")
    samples = samples.assign(path=[f"crop {i},ü.JPG" for i in range(len(samples))], frame=np.where(samples.frame < 0, -1, np.arange(len(samples))))  # once in a tracklet
    for i, p in enumerate(samples.path): (folder / p).write_bytes(b"%d" % i)
    out = export(labels, samples, folder / "made" / "tree", "tracklets", root=folder, link=link, discarded=discarded).path
    back = read_csv(out / "samples.csv", root=out)
    assert back.pid.tolist() == labels[there].tolist()
    assert [(out / p).read_bytes() for p in back.path] == [b"%d" % i for i in np.flatnonzero(there)]
    assert (folder / "made").resolve() in (out / "x").resolve().parents and sorted(os.listdir(folder / "made")) == ["tree"]
    if not there.any(): return
    tree = read_folder(out, TREE).set_index("path")
    assert len(tree) == there.sum() and tree.pid.reindex(back.path).tolist() == labels[there].tolist()
    assert tree.tracklet.reindex(back.path).tolist() == samples.tracklet[there].tolist() and tree.frame.reindex(back.path).tolist() == samples.frame[there].tolist()
    folders = read_tracklets(out)
    assert sorted(folders.path) == sorted(back.path)
    assert folders.tracklet.nunique() == len(set(zip(labels[there], samples.tracklet[there])))


def test_video_names_stay_inside_and_apart():
    given_ = ["a", "a/b", "..", "../..", "/etc", "a//b", "a/", ".a", "%2Ea", "a.", "a ", "c:d", "x" * 300, "x" * 299 + "y", "ü" * 150, "."]
    made = [module._folder_name(v) for v in given_]
    assert len(set(made)) == len(made)
    for m in made:
        parts = m.split("/")
        assert all(p and p not in (".", "..") and not p.startswith(".") and len(p.encode()) <= 255 for p in parts)


def test_a_tree_of_moved_images(world, tmp_path):
    x, samples, result = world
    for path in samples.path: (tmp_path / path).parent.mkdir(exist_ok=True); (tmp_path / path).touch()
    out = export(result, samples, tmp_path / "tree", "tracklets", root=tmp_path, link="symlink").path
    tree = read_csv(out / "samples.csv")
    there = result.labels >= 0
    assert tree.tracklet.tolist() == result.provenance.to_tracklet[there].tolist() and tree.source.tolist() == samples.path[there].tolist()
    assert read_tracklets(out).tracklet.nunique() == samples.tracklet.nunique()


def test_export_refuses(world, tmp_path):
    x, samples, result = world
    (tmp_path / "there").mkdir()
    for format in ("cion_al", "csv", "tracklets"):
        with pytest.raises(FileExistsError, match="nothing is overwritten"): export(result, samples, tmp_path / "there", format, root=tmp_path)
    with pytest.raises(FileNotFoundError, match="are not under"): export(result, samples, tmp_path / "tree", "tracklets", root=tmp_path)
    with pytest.raises(ValueError, match="say root="): export(result, samples, tmp_path / "tree", "tracklets")
    with pytest.raises(ValueError, match="row 0: 'a.mp4'"): export([0], make_samples(["a.mp4"]), tmp_path / "tree", "tracklets", root=tmp_path)
    with pytest.raises(ValueError, match="2 labels but"): export([0, 1], samples, tmp_path / "x")
    for bad in (dict(format="xml"), dict(link="move"), dict(discarded="hide")):
        with pytest.raises(ValueError, match="choose from"): export(result, samples, tmp_path / "x", **bad)
    assert os.listdir(tmp_path) == ["there"]


def test_ten_thousand_rows_and_ten_times_that(tmp_path):
    n = 100_000
    samples = make_samples([f"v{i // 1000}/{i}.jpg" for i in range(n)], video=[f"v{i // 1000}" for i in range(n)], tracklet=np.arange(n) // 10, frame=np.arange(n) % 10)
    labels = np.arange(n) // 30
    start = time.perf_counter()
    assert (read_cion_al(export(labels, samples, tmp_path / "a.json").path).pid.to_numpy() == labels).all()
    assert (read_csv(export(labels, samples, tmp_path / "a.csv", "csv").path).pid.to_numpy() == labels).all()
    assert time.perf_counter() - start < 15
    assert set(json.loads((tmp_path / "a.json").read_text())[0]) == {"id", "file_path"}                     # CION-AL's two keys and no other


KILLED = """
import sys, os, time
import numpy as np
from cion_nb.core.samples import make_samples
from cion_nb.identities import explain as e
slow = e.shutil.copyfile
e.shutil.copyfile = lambda a, b: (time.sleep(.01), slow(a, b))
n = 200
e.export(np.arange(n) // 10, make_samples([f"{i}.jpg" for i in range(n)], tracklet=np.arange(n) // 5, video="v"), sys.argv[1] + "/tree", "tracklets", root=sys.argv[1])
"""

def test_killed_while_exporting(tmp_path, monkeypatch):
    "Never half a tree; the same call goes on, another call clears the remains."
    n = 200
    for i in range(n): (tmp_path / f"{i}.jpg").write_bytes(b"x" * (i + 1))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=dict(os.environ, CION_NB_PROGRESS="0"))
    while not (made := list(tmp_path.glob(".tree.*.half/v/*/*.jpg"))) or len(made) < 20:
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(.005)
    process.send_signal(signal.SIGKILL); process.wait()
    assert not (tmp_path / "tree").exists()
    half = next(tmp_path.glob(".tree.*.half"))
    torn = sorted(half.rglob("*.jpg"))[0]; torn.write_bytes(b"")                                            # a copy that was cut off
    samples, labels = make_samples([f"{i}.jpg" for i in range(n)], tracklet=np.arange(n) // 5, video="v"), np.arange(n) // 10
    copied, copy = [], module.shutil.copyfile
    monkeypatch.setattr(module.shutil, "copyfile", lambda a, b: (copied.append(a), copy(a, b)))
    export(labels, samples, tmp_path / "tree", "tracklets", root=tmp_path)
    assert 0 < len(copied) < n                                                                              # went on
    back = read_csv(tmp_path / "tree" / "samples.csv", root=tmp_path / "tree")
    assert [(tmp_path / "tree" / p).stat().st_size for p in back.path] == list(range(1, n + 1)) and back.pid.tolist() == labels.tolist()
    half.mkdir(); (tmp_path / ".tree2.x.half").mkdir()
    export(labels, samples, tmp_path / "tree2", "tracklets", root=tmp_path, link="hard")
    assert not (tmp_path / ".tree2.x.half").exists() and half.exists()                                      # its own remains, not those of another tree


def test_two_at_once(tmp_path):
    (tmp_path / "0.jpg").touch()
    with module.FileLock(tmp_path / ".tree.lock"):
        caught = []
        def other():
            try: export([0], make_samples(["0.jpg"]), tmp_path / "tree", "tracklets", root=tmp_path)
            except RuntimeError as e: caught.append(str(e))
        thread = threading.Thread(target=other); thread.start(); thread.join()
        assert caught and "another process" in caught[0] and (tmp_path / ".tree.lock").exists()


# ---------------------------------------------------------------- the view

def test_sweep_and_counts(world):
    x, samples, result = world
    table = sweep(x, samples, (.2, .3), .18, truth=samples.pid)
    assert table[["sigma_cst", "sigma_drm"]].to_numpy().tolist() == [[.2, .18], [.3, .18]]
    found = counts(result)
    assert found["kept"] + found["moved"] + found["left_out"] == len(samples) and found["identities"] == table.identities[0] and "f1" not in found and table.f1[0] > .5
    assert counts(denoise(x[:0], samples[:0]))["identities"] == 0


def test_the_view_moves(world, tmp_path):
    pytest.importorskip("ipywidgets")
    x, samples, result = world
    view = explore(x, samples, tmp_path, truth=samples.pid, columns=4, rows=1)
    assert view.error is None and bytes(view.picture.value).startswith(b"\x89PNG") and np.array_equal(view.result.labels, result.labels)
    first = view.words.value
    view.sigma_cst.value = .4
    assert view.words.value != first and view.at.cache_info().misses == 2
    view.sigma_cst.value = .2
    assert view.words.value == first and view.at.cache_info().misses == 2                                   # remembered
    view.sigma_drm.value = 0.
    assert view.result.labels.max() + 1 == samples.tracklet.nunique()
    assert "application/vnd.jupyter.widget-view+json" in str(view._repr_mimebundle_())


def test_the_view_shows_what_went_wrong(world):
    pytest.importorskip("ipywidgets")
    x, samples, _ = world
    broken = np.asarray(x).copy(); broken[5] = 0
    view = explore(broken, samples)
    assert "rows 5" in view.words.value and "ValueError" in view.words.value and view.picture.value == b"" and isinstance(view.error, ValueError)
    view.features = x
    view.sigma_drm.value = .1
    assert view.error is None and "ValueError" not in view.words.value


def test_a_move_is_answered_within_a_second():
    "A thousand tracklets; counted in processor time, so that a busy machine does not matter."
    pytest.importorskip("ipywidgets")
    x, samples = feature_world(1000, dim=128)
    view, took = explore(x, samples), []
    for value in (.1, .12, .14):
        start = time.process_time(); view.sigma_drm.value = value; took.append(time.process_time() - start)
    assert min(took) < 1, took


def test_without_ipywidgets(world, monkeypatch):
    x, samples, _ = world
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"cion_nb\[dev\]"): explore(x, samples)
