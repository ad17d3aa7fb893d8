"""Links and bridges against brute force, histories, sheets, suspects, and the view."""
import sys
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from cion_nb.core.samples import make_samples
from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities import explain as module
from cion_nb.identities.denoise import denoise
from cion_nb.identities.explain import counts, explain, explore, identity_sheet, links_of, suspects, sweep
from cion_nb.identities.pairs import group_sums, unit_centroids, unit_rows


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


@pytest.mark.slow("hundreds of random worlds")
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
        assert cuts_off[e] == (0 if q in side
                               else min(weight[list(side)].sum(), weight[list(next(s for s in after if q in s))].sum()))
    for v in range(n):
        own = next(s for s in whole if v in s)
        after = [weight[list(s)].sum() for s in pieces(own - {v}, [l for l in links if v not in l])]
        assert hangs[v] == sum(after) - max(after, default=0)


def test_links_of_an_identity(world):
    x, samples, result = world
    k = result.tracklets.identity.value_counts().index[0]
    table = links_of(result, k)
    assert (table.identity == k).all() and table.distance.is_monotonic_decreasing
    assert len(table) == (result.links.identity == k).sum()
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
        if state == "reallocated":
            assert f"moved to tracklet {p.to_tracklet} at {p.distance:.2f}" in story.words
            assert f"removed from tracklet {p.from_tracklet} in round {p['round']} at {p.deviation:.2f}" in story.words
        assert story._repr_html_().startswith("<p>Image ") and str(story).startswith(story.words)


@pytest.mark.parametrize("levels",
                         [(), ("tracklet",), ("video",), ("cross",), ("tracklet", "cross"), ("tracklet", "video")])
def test_any_levels(world, levels, tmp_path):
    x, samples, _ = world
    result = denoise(x, samples, levels=levels, measure=False)
    for row in (0, 100, len(samples) - 1): assert explain(result, row=row).words
    for k in result.tracklets.identity.unique()[:20]: assert explain(result, identity=int(k)).words
    assert isinstance(suspects(result, x), pd.DataFrame)
    identity_sheet(result, samples, tmp_path, rows=1, columns=3)
    if levels == ("tracklet",):
        assert "removed" in set(module._crops_of(result.labels, samples, result.provenance).state)


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
    assert (once[~lost].identity.to_numpy() == result.labels[once[~lost].row]).all()
    assert (result.labels[once[lost].row] == -1).all()
    away = crops[crops.state == "moved away"]
    assert (result.labels[away.row] != away.identity).all()
    assert (result.provenance.state[away.row] == "reallocated").all()


@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), places=st.integers(0, 60), odd=st.floats(0, 1),
       seed=st.integers(0, 999))
def test_selection(sizes, places, odd, seed):
    share = module._share(sizes, places)
    assert share.sum() == min(places, sum(sizes)) and (share <= sizes).all()
    if places >= len(sizes): assert (share >= 1).all()
    n = sum(sizes)
    crops = pd.DataFrame(dict(tracklet=np.repeat(np.arange(len(sizes)), sizes),
                              state=np.where(np.random.default_rng(seed).random(n) < odd, "discarded", "kept")))
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
    # no tracklets, no videos
    truth = identity_sheet(samples.pid, samples.assign(tracklet=-1, video=""), tmp_path, rows=2, columns=4)
    assert len([t for t in texts(truth) if t.startswith("identity")]) == 2
    for bad, words in ((dict(identities=[10**6]), "no images of identities 1000000"),
                       (dict(identities=[]), "identities is empty"), (dict(rows=0), "rows=0"),
                       (dict(columns=0), "columns=0")):
        with pytest.raises(ValueError, match=words): identity_sheet(result, samples, tmp_path, **bad)
    with pytest.raises(ValueError, match="3 labels"): identity_sheet(np.zeros(3, int), samples, tmp_path)
    with pytest.raises(ValueError, match="nothing to draw"):
        identity_sheet(np.full(len(samples), -1), samples, tmp_path)


# ---------------------------------------------------------------- the watch on chaining

def plant(x, samples, pairs, seed=0):
    "Pairs of people turned towards each other until they are 50° apart, and one tracklet half-way between."
    rng, x, pid = np.random.default_rng(seed), np.asarray(x, np.float64).copy(), samples.pid.to_numpy()
    units, tables = unit_centroids(group_sums(x, pid, pid.max() + 1), np.bincount(pid)), [samples]
    for n, (p, q) in enumerate(pairs):
        turned = np.flatnonzero(pid == q)
        x[turned] = unit_rows(x[turned] + .84 * units[p])
        middle = units[p] + unit_rows((units[q] + .84 * units[p])[None])[0]
        x = np.r_[x,
                  unit_rows(middle / np.linalg.norm(middle) + .2 * rng.normal(size=(8, x.shape[1])) / x.shape[1]**.5)]
        tables.append(make_samples([f"extra/{n}_{f}.jpg" for f in range(8)], pid=pid.max() + 1 + n, video=f"extra{n}",
                                   tracklet=samples.tracklet.max() + 1 + n, frame=np.arange(8)))
    return x, pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize("seed", range(6))
def test_quiet_on_clean_worlds_and_awake_on_planted_chains(seed):
    x, samples = feature_world(600, seed=seed, switches=0, personless=0)
    clean = denoise(x, samples, measure=False)
    assert len(suspects(clean, x)) == 0
    pairs = np.random.default_rng(seed).permutation(samples.pid.max() + 1)[:8].reshape(4, 2)
    y, chained = plant(x, samples, pairs, seed)
    result = denoise(y, chained, measure=False)
    mixed = {k for k in range(result.labels.max() + 1)
             if chained.pid[(result.labels == k) & (chained.pid <= samples.pid.max())].nunique() > 1}
    found = suspects(result, y)
    assert set(found.identity) == mixed and len(mixed) >= 1 and (found.why == "two parts").all()
    assert (found.pairs.diff().dropna() <= 0).all() and (found.halves >= .18).all()
    assert (found.images == found.images_a + found.images_b).all()


def test_suspects_by_hand():
    "Three tracklets in the plane, 30° apart: a-b and b-c are linked, a-c is not."
    angles = np.radians(np.repeat([0, 30, 60], 4))
    x, samples = np.stack([np.cos(angles), np.sin(angles)],
                          -1), make_samples([f"{i}.jpg" for i in range(12)], video=np.repeat(["a", "b", "c"], 4),
                                            tracklet=np.repeat([7, 8, 9], 4), frame=np.arange(12))
    result = denoise(x, samples)
    assert result.labels.tolist() == [0] * 12
    found = suspects(result, x).iloc[0]
    assert {found.tracklet_a, found.tracklet_b} == {7, 9} and np.isclose(found.diameter, .5)
    assert found.way in ([7, 8, 9], [9, 8, 7])
    assert found.joint == 8 and found.cuts_off == 4 and found.is_bridge and found.links == 2 and found.links_across == 1
    assert np.isclose(found.halves, 1 - np.cos(np.radians(45))) and {found.images_a, found.images_b} == {4, 8}
    assert found.pairs == 32
    assert len(suspects(result, x, limit=.4)) == 0 and len(suspects(result, x, limit=.4, everything=True)) == 1
    searched = suspects(result, x, exact=2).iloc[0]
    assert searched.diameter <= .5 + 1e-6 and searched.diameter_at_most >= .5 - 1e-6
    with pytest.raises(ValueError, match="3 feature rows but 12 labels"): suspects(result, x[:3])


@pytest.mark.parametrize("seed", range(3))
def test_chains_of_reciprocal_links(seed):
    """A rule without a cosine threshold: the limit comes from its links. Nobody pure is reported, and at least half of
    those that hold two people are.
    """
    x, samples = feature_world(600, seed=seed, switches=0, personless=0)
    y, chained = plant(x, samples, np.random.default_rng(seed).permutation(samples.pid.max() + 1)[:8].reshape(4, 2),
                       seed)
    result = denoise(y, chained, link="reciprocal", measure=False)
    impure = {k for k in range(result.labels.max() + 1) if chained.pid[result.labels == k].nunique() > 1}
    # not only a look-alike's tracklet
    mixed = {k for k in impure if chained.pid[(result.labels == k) & (chained.pid <= samples.pid.max())].nunique() > 1}
    found = suspects(result, y)
    assert set(found.identity) <= impure and 2 * len(mixed & set(found.identity)) >= len(mixed)
    assert "Jaccard distance" in explain(result, identity=int(found.identity[0])).words


def test_the_view_links_by_reciprocal(world):
    pytest.importorskip("ipywidgets")
    x, samples, _ = world
    view = explore(x, samples)
    view.link.value = "reciprocal"
    assert view.error is None and not view.sigma_drm.disabled and not view.eps.disabled
    assert view.result.parameters["link"] == "reciprocal"
    before = view.words.value
    view.eps.value = .3
    assert view.words.value != before and view.result.parameters["eps"] == .3
    view.eps.value = 1.                                                 # the slider ends where `denoise` does
    assert view.error is None and view.eps.value == view.result.parameters["eps"] == .99


def test_an_identity_of_strange_size():
    "Twenty people of four tracklets, one of eighty."
    rng = np.random.default_rng(0)
    people = unit_rows(rng.normal(size=(21, 64)))
    who = np.repeat(np.r_[np.repeat(np.arange(20), 4), np.full(80, 20)], 5)
    x = unit_rows(people[who] + .05 * rng.normal(size=(len(who), 64)) / 8)
    samples = make_samples([f"{i}.jpg" for i in range(len(who))], video=[f"v{i // 5}" for i in range(len(who))],
                           tracklet=np.arange(len(who)) // 5, frame=np.arange(len(who)))
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


@pytest.mark.slow("a hundred thousand images")
def test_suspects_at_a_size():
    "30,000 tracklets, one pass: seconds."
    x, samples = feature_world(30_000, dim=32, images=6, seed=0)
    result = denoise(x, samples, measure=False)
    start = time.process_time()
    suspects(result, x)
    assert time.process_time() - start < 30


# ---------------------------------------------------------------- the view

def test_sweep_and_counts(world):
    x, samples, result = world
    table = sweep(x, samples, (.2, .3), .18, truth=samples.pid)
    assert table[["sigma_cst", "sigma_drm"]].to_numpy().tolist() == [[.2, .18], [.3, .18]]
    found = counts(result)
    assert found["kept"] + found["moved"] + found["left_out"] == len(samples)
    assert found["identities"] == table.identities[0] and "f1" not in found and table.f1[0] > .5
    assert counts(denoise(x[:0], samples[:0]))["identities"] == 0


def test_the_view_moves(world, tmp_path):
    pytest.importorskip("ipywidgets")
    x, samples, result = world
    view = explore(x, samples, tmp_path, truth=samples.pid, columns=4, rows=1)
    assert view.error is None and bytes(view.picture.value).startswith(b"\x89PNG")
    assert np.array_equal(view.result.labels, result.labels)
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
    broken = np.asarray(x).copy()
    broken[5] = 0
    view = explore(broken, samples)
    assert "rows 5" in view.words.value and "ValueError" in view.words.value and view.picture.value == b""
    assert isinstance(view.error, ValueError)
    view.features = x
    view.sigma_drm.value = .1
    assert view.error is None and "ValueError" not in view.words.value


@pytest.mark.slow("a hundred thousand images")
def test_a_move_is_answered_within_a_second():
    "A thousand tracklets; counted in processor time, so that a busy machine does not matter."
    pytest.importorskip("ipywidgets")
    x, samples = feature_world(1000, dim=128)
    view, took = explore(x, samples), []
    for value in (.1, .12, .14):
        start = time.process_time()
        view.sigma_drm.value = value
        took.append(time.process_time() - start)
    assert min(took) < 1, took


def test_without_ipywidgets(world, monkeypatch):
    x, samples, _ = world
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"cion_nb\[dev\]"): explore(x, samples)
