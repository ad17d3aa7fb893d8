"""Eq. 4-7 against a plain, slow oracle written from the paper's formulas and the stated semantics: Python loops, float64."""
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cion_nb.identities import denoise as module
from cion_nb.identities import parts
from cion_nb.identities.parts import LEVELS
from cion_nb.identities.denoise import denoise, Denoised
from cion_nb.identities.explain import counts
from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities.levels import clean_tracklets, closure, lay_out
from cion_nb.identities.parts import blocks
from cion_nb.identities.pairs import unit_rows
from cion_nb.identities.noise import noise
from cion_nb.identities.truth import identity_scores
from cion_nb.core.samples import make_samples

PREFIXES = [(), ("tracklet",), ("tracklet", "video"), LEVELS]
OTHERS = [("video",), ("cross",), ("tracklet", "cross"), ("video", "cross")]


@pytest.fixture(autouse=True)
def quiet(monkeypatch): monkeypatch.setenv("CION_NB_PROGRESS", "0")


# ---------------------------------------------------------------- the oracle

def mean(vectors): return [sum(column) / len(vectors) for column in zip(*vectors)]

def unit(v):
    length = math.sqrt(sum(a * a for a in v))
    return None if length < 1e-9 else [a / length for a in v]

def distance(a, b):
    "Cosine distance of two vectors in float64, clamped; 1 where one has no direction."
    a, b = unit(a), unit(b)
    return 1.0 if a is None or b is None else min(2.0, max(0.0, 1 - sum(p * q for p, q in zip(a, b))))

def components(n, links):
    label = list(range(n))
    for a, b in links: label = [label[a] if l == label[b] else l for l in label]
    seen = {}
    return [seen.setdefault(l, len(seen)) for l in label]

def oracle(features, samples, sigma_cst=0.2, sigma_drm=0.18, half_width=1000, levels=LEVELS):
    "labels, states, destinations, distances at the decision, links."
    x = [unit(row) for row in np.asarray(features, dtype=np.float64).tolist()]
    rows = [dict(r, row=i) for i, r in enumerate(samples[["path", "video", "tracklet", "frame"]].to_dict("records"))]
    videos = list(dict.fromkeys(r["video"] for r in rows))
    members = {}
    for r in rows: members.setdefault(r["tracklet"], []).append(r)
    for t in members: members[t] = [r["row"] for r in sorted(members[t], key=lambda r: (r["frame"], r["path"]))]
    video_of = {r["tracklet"]: videos.index(r["video"]) for r in rows}
    order = sorted(members, key=lambda t: (video_of[t], min(rows[i]["frame"] for i in members[t]), t))
    state, goes_to, at = ["kept"] * len(rows), {r["row"]: r["tracklet"] for r in rows}, [math.nan] * len(rows)

    removed = {}
    if "tracklet" in levels:                                                    # Eq. 4
        for t in order:
            while len(members[t]) > 1:
                d = [distance(x[i], mean([x[j] for j in members[t] if j != i])) for i in members[t]]
                for i, v in zip(members[t], d): at[i] = v
                if max(d) < sigma_cst: break
                worst = max(n for n, v in enumerate(d) if v >= max(d) - 1e-9)
                i = members[t].pop(worst)
                removed[i], state[i], goes_to[i] = t, "removed", -1
            if len(members[t]) == 1: at[members[t][0]] = math.nan
    if "video" in levels:                                                       # Eq. 5
        centroid = {t: mean([x[i] for i in members[t]]) for t in order}
        for i, t in removed.items():
            state[i], at[i] = "discarded", math.nan
            others = [(distance(x[i], centroid[o]), o) for o in order if o != t and video_of[o] == video_of[t]]
            if not others: continue
            at[i], new = next((d, o) for d, o in others if d <= min(others)[0] + 1e-9)
            if at[i] < sigma_cst: state[i], goes_to[i] = "reallocated", new
        for i, t in goes_to.items():
            if state[i] == "reallocated": members[t].append(i)
    groups, found = [[t] for t in order], []
    if "video" in levels:                                                       # Eq. 6
        c = [mean([x[i] for i in members[t]]) for t in order]
        links = [(a, b) for a in range(len(order)) for b in range(a + 1, len(order)) if video_of[order[a]] == video_of[order[b]] and distance(c[a], c[b]) < sigma_drm]
        found += [("video", order[a], order[b]) for a, b in links]
        label = components(len(order), links)
        groups = [[t for t, l in zip(order, label) if l == k] for k in range(max(label, default=-1) + 1)]
    identity = list(range(len(groups)))
    if "cross" in levels:                                                       # Eq. 7
        c = [mean([x[i] for t in g for i in members[t]]) for g in groups]
        reach = len(groups) if half_width is None else half_width
        links = [(a, b) for a in range(len(groups)) for b in range(a + 1, min(a + reach, len(groups) - 1) + 1) if distance(c[a], c[b]) < sigma_drm]
        found += [("cross", a, b) for a, b in links]
        identity = components(len(groups), links)
    label_of = {t: identity[k] for k, g in enumerate(groups) for t in g}
    labels = [label_of[goes_to[i]] if goes_to[i] != -1 else -1 for i in range(len(rows))]
    return np.array(labels, dtype=np.int64), state, [goes_to[i] for i in range(len(rows))], at, found

def check(features, samples, **kw):
    "The door against the oracle: labels, states, destinations, distances, links."
    got = denoise(features, samples, measure=False, **kw)
    labels, state, to, at, links = oracle(features, samples, **kw)
    p = got.provenance
    assert p.state.tolist() == state
    assert got.labels.dtype == np.int64 and got.labels.tolist() == labels.tolist() == p.identity.tolist()
    assert p.to_tracklet.tolist() == to and p.from_tracklet.tolist() == samples.tracklet.tolist()
    np.testing.assert_allclose(p.distance, at, atol=1e-7)
    assert sorted(got.links[["level", "a", "b"]].astype(str).agg(tuple, axis=1)) == sorted((l, str(a), str(b)) for l, a, b in links)
    return got


# ---------------------------------------------------------------- worlds

def random_world(seed, kind, n=40, dim=4, dtype=np.float64):
    "A small table in disorder: videos interleaved, frames that collide, odd tracklet numbers, features that are not normalised."
    rng = np.random.default_rng(seed)
    n_tracklets = int(rng.integers(1, max(2, n // 2)))
    tracklet = rng.integers(0, n_tracklets, n)
    numbers = rng.permutation(10 * n_tracklets)[:n_tracklets]
    video_of = rng.integers(0, max(1, n_tracklets // 4) + 1, n_tracklets)
    if kind == "clusters":
        x = rng.normal(size=(6, dim))[(tracklet + (rng.random(n) < .2)) % 6] + rng.choice([.1, .4, .8]) * rng.normal(size=(n, dim))
        x *= rng.uniform(.2, 5, (n, 1))
    elif kind == "lattice": x = rng.integers(0, 3, (n, dim)) + np.eye(dim)[rng.integers(0, dim, n)]      # many equal vectors, exact ties
    elif kind == "axes": x = np.eye(dim)[rng.integers(0, dim, n)] * rng.choice([-1, 1], (n, 1))         # distances 0, 1, 2; means without direction
    else: x = np.repeat(rng.normal(size=(3, dim)), n, axis=0)[rng.permutation(3 * n)[:n]]               # three vectors, again and again
    frame = rng.integers(0, 5, n) if rng.random() < .5 else np.arange(n)
    paths = [f"{p:04d}.jpg" for p in rng.permutation(n)]
    return x.astype(dtype), make_samples(paths, video=[f"v{v}" for v in video_of[tracklet]], tracklet=numbers[tracklet], frame=frame)

worlds = dict(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 60), dim=st.integers(2, 6), half_width=st.sampled_from([0, 1, 2, 5, 1000, None]), levels=st.sampled_from(PREFIXES + OTHERS))


@settings(max_examples=400, deadline=None)
@given(**worlds, sigma_cst=st.floats(.02, 1.5), sigma_drm=st.floats(.02, 1.5), dtype=st.sampled_from([np.float16, np.float32, np.float64]))
def test_clusters(seed, n, dim, half_width, levels, sigma_cst, sigma_drm, dtype):
    x, samples = random_world(seed, "clusters", n, dim, dtype)
    check(x, samples, sigma_cst=sigma_cst, sigma_drm=sigma_drm, half_width=half_width, levels=levels)


@settings(max_examples=300, deadline=None)
@given(**worlds, kind=st.sampled_from(["lattice", "copies"]), sigma_cst=st.sampled_from([.0731, .2113, .3719]), sigma_drm=st.sampled_from([.0311, .1879, .4013]))
def test_ties(seed, n, dim, half_width, levels, kind, sigma_cst, sigma_drm):
    x, samples = random_world(seed, kind, n, dim)
    check(x, samples, sigma_cst=sigma_cst, sigma_drm=sigma_drm, half_width=half_width, levels=levels)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40), levels=st.sampled_from([("tracklet",), ("tracklet", "video")]), sigma_cst=st.sampled_from([1.0, 2.0]))
def test_exact_thresholds_and_means_without_direction(seed, n, levels, sigma_cst):
    x, samples = random_world(seed, "axes", n, 3)
    check(x, samples, sigma_cst=sigma_cst, sigma_drm=.123, levels=levels)


@pytest.mark.parametrize("half_width", [1, 40, 1000])
def test_thousands_of_tracklets(half_width):
    "Enough rows for several blocks, a video larger than a block, and more identities than a tile."
    x, samples = feature_world(3000, dim=768, images=6, per_video=12, seed=2, shift=.3)
    samples["video"] = samples.video.where(samples.tracklet >= 1100, "one long video")
    assert (samples.tracklet < 1100).sum() > 4 * (2**20 // 768)
    got = denoise(x, samples, half_width=half_width, measure=False)
    labels, state = fast_oracle(x, samples, half_width)
    assert got.labels.tolist() == labels.tolist() and got.provenance.state.tolist() == state
    assert got.tracklets.video_identity.max() > 1024 and {"kept", "reallocated", "discarded"} == set(state)


def fast_oracle(features, samples, half_width, sigma_cst=.2, sigma_drm=.18):
    "The same rules with NumPy inside the loops: for worlds that the plain oracle would take minutes for. `test_oracles_agree` holds the two together."
    x = np.asarray(features, np.float64); x /= np.linalg.norm(x, axis=1, keepdims=True)
    table = samples.assign(row=np.arange(len(x)), rank=pd.factorize(samples.video)[0]).sort_values(["frame", "path"])
    tracklets = {t: g.row.tolist() for t, g in table.groupby("tracklet")}
    rank = dict(zip(samples.tracklet, pd.factorize(samples.video)[0]))
    order = sorted(tracklets, key=lambda t: (rank[t], samples.frame.iloc[tracklets[t][0]], t))
    state, home, removed = ["kept"] * len(x), np.full(len(x), -1), []
    for p, t in enumerate(order):
        rows = tracklets[t]
        while len(rows) > 1:
            others = x[rows].sum(0) - x[rows]
            d = 1 - (x[rows] * others).sum(1) / np.linalg.norm(others, axis=1)
            if d.max() < sigma_cst: break
            removed.append((rows.pop(int(np.flatnonzero(d >= d.max() - 1e-9)[-1])), p))
        home[rows] = p
    c = np.stack([x[tracklets[t]].mean(0) for t in order]); c /= np.linalg.norm(c, axis=1, keepdims=True)
    video = np.array([rank[t] for t in order])
    for i, p in removed:
        others = np.flatnonzero((video == video[p]) & (np.arange(len(order)) != p))
        d = 1 - c[others] @ x[i]
        state[i] = "reallocated" if d.min() < sigma_cst else "discarded"
        if d.min() < sigma_cst: home[i] = others[np.flatnonzero(d <= d.min() + 1e-9)[0]]
    def merge(group, n, may):
        c = np.zeros((n, x.shape[1])); np.add.at(c, group[group >= 0], x[group >= 0]); c /= np.linalg.norm(c, axis=1, keepdims=True)
        parent = list(range(n))
        def root(i):
            while parent[i] != i: i = parent[i]
            return i
        for i in range(n):
            for j in i + 1 + np.flatnonzero(1 - c[i + 1:] @ c[i] < sigma_drm):
                if may(i, j): a, b = sorted((root(i), root(int(j)))); parent[b] = a
        seen = {}
        return np.array([seen.setdefault(root(i), len(seen)) for i in range(n)])
    in_video = merge(home, len(order), lambda i, j: video[i] == video[j])
    group = np.where(home >= 0, in_video[home], -1)
    across = merge(group, in_video.max() + 1, lambda i, j: j - i <= half_width)
    return np.where(group >= 0, across[group], -1), state


@pytest.mark.parametrize("seed", range(5))
def test_oracles_agree(seed):
    x, samples = feature_world(60, dim=24, images=6, seed=seed)
    slow, fast = oracle(x, samples, half_width=7), fast_oracle(x, samples, 7)
    assert slow[0].tolist() == fast[0].tolist() and slow[1] == fast[1]


# ---------------------------------------------------------------- properties

@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["clusters", "lattice", "copies", "axes"]), levels=st.sampled_from(PREFIXES))
def test_row_order_inside_a_video_changes_nothing(seed, kind, levels):
    x, samples = random_world(seed, kind, 50)
    order = np.arange(50)
    for rows in samples.groupby("video").indices.values(): order[rows] = np.random.default_rng(seed).permutation(rows)
    a, b = denoise(x, samples, levels=levels), denoise(x[order], samples.iloc[order], levels=levels)
    assert np.array_equal(a.labels[order], b.labels)
    pd.testing.assert_frame_equal(a.provenance.iloc[order].reset_index(drop=True), b.provenance, check_exact=True)
    pd.testing.assert_frame_equal(a.tracklets, b.tracklets); pd.testing.assert_frame_equal(a.links, b.links, check_exact=True)


def test_rows_with_one_frame_and_path_are_ordered_by_their_features():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3)); samples = make_samples(["same.jpg"] * 30, tracklet=np.arange(30) // 10, frame=0)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(30)
        assert np.array_equal(denoise(x, samples, measure=False).labels[order], denoise(x[order], samples.iloc[order], measure=False).labels)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["clusters", "lattice"]))
def test_new_tracklet_numbers_in_the_same_order_change_no_label(seed, kind):
    x, samples = random_world(seed, kind, 50)
    renamed = samples.assign(tracklet=samples.tracklet * 3 + 11)
    a, b = denoise(x, samples), denoise(x, renamed)
    assert np.array_equal(a.labels, b.labels) and np.array_equal(a.tracklets.tracklet * 3 + 11, b.tracklets.tracklet)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_tracklet_numbers_only_rename_labels(seed):
    "Where no two tracklets of a video begin in one frame, their numbers decide nothing at all."
    x, samples = random_world(seed, "clusters", 50)
    samples = samples.assign(frame=np.arange(50))
    new = dict(zip(samples.tracklet.unique(), np.random.default_rng(seed).permutation(1000)))
    assert np.array_equal(denoise(x, samples).labels, denoise(x, samples.assign(tracklet=samples.tracklet.map(new))).labels)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["clusters", "lattice", "copies"]))
def test_open_thresholds_change_nothing(seed, kind):
    x, samples = random_world(seed, kind, 50)
    got = denoise(x, samples, sigma_cst=2, sigma_drm=0)
    assert (got.provenance.state == "kept").all() and len(got.links) == 0
    assert np.array_equal(got.labels, got.labels_after("before")) and samples.tracklet.nunique() == got.labels.max() + 1


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["clusters", "lattice"]), sigma_cst=st.floats(.05, .8))
def test_what_each_state_promises(seed, kind, sigma_cst):
    x, samples = random_world(seed, kind, 60)
    got = denoise(x, samples, sigma_cst=sigma_cst)
    p, units = got.provenance, unit_rows(x)
    kept = {t: units[(p.from_tracklet == t) & (p.state == "kept")].mean(0) for t in samples.tracklet.unique()}
    for i in np.flatnonzero(p.state != "kept"):
        others = [distance(units[i], kept[t]) for t in samples.tracklet[samples.video == samples.video[i]].unique() if t != samples.tracklet[i]]
        if p.state[i] == "discarded": assert all(d >= sigma_cst - 1e-9 for d in others) and p.identity[i] == -1
        else: assert min(others) == pytest.approx(p.distance[i], abs=1e-9) and p.distance[i] < sigma_cst
    assert (p[p.state == "kept"].distance.dropna() < sigma_cst).all() and all(len(c) for c in kept.values())
    assert (p.deviation[p["round"] > 0] >= sigma_cst - 1e-9).all()


def test_a_large_set_is_measured_on_a_sample_and_says_so(monkeypatch):
    "1,200 tracklets: n_S is estimated by default, the interval holds the exact one, and the result tells."
    x, samples = feature_world(1200, dim=16, images=3, seed=2)
    got, exact = denoise(x, samples), denoise(x, samples, measure=True)
    assert "estimated from 1,000 identities" in repr(got) and "estimated" not in repr(exact) and "low" not in exact.noise
    assert ((got.noise.low <= exact.noise.n_S) & (exact.noise.n_S <= got.noise.high)).all() and not got.noise.n_S.equals(exact.noise.n_S)
    assert (got.labels == exact.labels).all() and counts(got)["n_S is estimated"] and "n_S is estimated" not in counts(exact)
    looked = []
    monkeypatch.setattr(module, "noises", lambda features, labellings, *a: looked.append(a[-1]) or [exact_noise] * len(labellings))
    exact_noise = noise(x, exact.labels)
    for n in (1000, 1001, 20_000, 433_000): module._noise_table(x, [("before", exact.labels)], dict(measure="auto", sigma_cst=.2, sigma_drm=.18), n, "cpu")
    assert looked == [None, 1000, 2000, 14713]


def test_noise_table_is_the_noise_of_the_labels_at_each_moment():
    x, samples = feature_world(200, seed=4)
    got = denoise(x, samples)
    assert list(got.noise.index) == ["before", *LEVELS]
    for level in got.noise.index:
        want = noise(x, got.labels_after(level))
        assert got.noise.n_S[level] == want.n_S and got.noise.n_identities[level] == want.n_identities
    assert np.array_equal(got.labels_after("cross"), got.labels)
    assert (got.labels_after("tracklet") == -1).sum() == (got.provenance["round"] > 0).sum()
    f1 = [identity_scores(got.labels_after(l), samples.pid).f1 for l in got.noise.index]
    assert f1[3] > f1[2] > f1[0] and got.noise.n_S["cross"] < got.noise.n_S["before"]
    with pytest.raises(ValueError, match="cross"): denoise(x, samples, levels=("tracklet",)).labels_after("cross")


@pytest.mark.parametrize("levels", PREFIXES + OTHERS)
def test_last_level_gives_the_labels(levels):
    x, samples = feature_world(100, seed=5)
    got = denoise(x, samples, levels=levels)
    last = levels[-1] if levels else "before"
    assert np.array_equal(got.labels, got.labels_after(last))
    assert list(got.noise.index) == ["before", *levels] and (("video" in levels) or not (got.provenance.state == "reallocated").any())
    if "video" not in levels and "tracklet" in levels: assert (got.labels[got.provenance["round"] > 0] == -1).all()


def test_tables_tell_the_same_story():
    x, samples = feature_world(300, seed=6)
    got = denoise(x, samples)
    p, t, l = got.provenance, got.tracklets, got.links
    assert t.images.sum() == len(samples) and t.kept.sum() == (p.state == "kept").sum() and t.came_in.sum() == (p.state == "reallocated").sum()
    assert t.set_index("tracklet").identity.reindex(p.to_tracklet).fillna(-1).astype(int).tolist() == p.identity.tolist()
    by_number = t.set_index("tracklet")
    assert (by_number.identity[l.tracklet_a].to_numpy() == l.identity).all() and (by_number.identity[l.tracklet_b].to_numpy() == l.identity).all()
    video, cross = l[l.level == "video"], l[l.level == "cross"]
    assert (by_number.video[video.a].to_numpy() == by_number.video[video.b].to_numpy()).all() and len(video) and len(cross)
    assert (by_number.video_identity[cross.tracklet_a].to_numpy() == cross.a).all()
    n = t.video_identity.max() + 1                                              # the links alone give the identities back
    assert np.array_equal(closure(n, cross.a.to_numpy(np.int64), cross.b.to_numpy(np.int64))[t.video_identity], t.identity)


# ---------------------------------------------------------------- single rules

def angles(*degrees): return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], -1)

def test_of_two_the_later_by_frame_then_path_goes():
    x = angles(0, 90)
    assert denoise(x, make_samples(["a", "b"], tracklet=0, frame=[4, 3])).labels.tolist() == [-1, 0]
    assert denoise(x, make_samples(["b", "a"], tracklet=0, frame=[3, 3])).labels.tolist() == [-1, 0]
    assert denoise(x, make_samples(["img10", "img9"], tracklet=0)).labels.tolist() == [0, -1]         # paths compare as text


def test_ties_in_eq5_go_to_the_earlier_tracklet():
    x = angles(0, 0, 0, 90, 88, 92)                                             # image 3 is as far from tracklet 5 as from tracklet 2
    samples = make_samples(list("abcdef"), tracklet=[9, 9, 9, 9, 2, 5], frame=[0, 1, 2, 3, 8, 7])
    assert denoise(x, samples, sigma_drm=0).provenance.to_tracklet[3] == 5       # which begins earlier, in frame 7
    assert denoise(x, samples.assign(frame=[0, 1, 2, 3, 7, 7]), sigma_drm=0).provenance.to_tracklet[3] == 2


def test_ties_in_eq5_reach_to_1e_9():
    "The later tracklet is nearer, but by 3e-10 only; by 3e-8 it wins."
    samples = make_samples(list("abcdef"), tracklet=[9, 9, 9, 9, 2, 5], frame=[0, 1, 2, 3, 8, 7])
    for radians, tracklet in ((1e-8, 5), (1e-6, 2)):
        got = denoise(angles(0, 0, 0, 90, 92 - math.degrees(radians), 88), samples, sigma_drm=0)
        assert got.provenance.to_tracklet[3] == tracklet


def test_ties_in_eq4_reach_to_1e_9():
    "Images 0 and 1 lie on either side of the rest; the earlier one is farther out, by less or by more than 1e-9."
    samples = make_samples(list("abcdef"), tracklet=0, frame=range(6))
    for radians, last in ((1e-10, [0, 1, 0, 0, 0, 0]), (1e-6, [1, 0, 0, 0, 0, 0])):
        rounds, _ = clean_tracklets(angles(-60 - math.degrees(radians), 60, 0, 0, 0, 0), np.array([0, 6]), .2)
        assert (rounds == 1).tolist() == [bool(v) for v in last]
    assert denoise(angles(-60, 60, 0, 0, 0, 0), samples).provenance["round"].tolist() == [2, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-5, 1e-7])
def test_others_that_nearly_cancel_out(left):
    "The short formula loses its digits where the mean of the others is short; the definition does not."
    x = np.array([[1, 0, 0], [-1, left, 0], [.3, .5, .8], [-.3, -.5, -.8 + left]])
    rounds, deviation = clean_tracklets(unit_rows(x), np.array([0, 4]), 2)
    units = unit_rows(x)
    for i in range(4): assert deviation[i] == pytest.approx(distance(units[i], mean([units[j].tolist() for j in range(4) if j != i])), abs=1e-8)
    three = unit_rows(x[:3])
    assert clean_tracklets(three, np.array([0, 3]), 2)[1][2] == pytest.approx(distance(three[2], mean(three[:2].tolist())), abs=1e-8)


def test_reallocation_uses_the_centroids_left_by_eq4_and_eq6_those_with_the_newcomers():
    x = angles(0, 0, 0, 70, 100, 100, 60)
    samples = make_samples(list("abcdefg"), tracklet=[0, 0, 0, 0, 1, 1, 2], frame=range(7))
    got = denoise(x, samples)
    assert got.provenance.to_tracklet[3] == 2 and got.provenance.distance[3] == pytest.approx(1 - math.cos(math.radians(10)))
    assert len(got.links) == 0                                                  # 65° and 100°: 35° apart, 0.181; without the newcomer 40°
    assert len(denoise(x, samples, sigma_drm=1 - math.cos(math.radians(37))).links) == 1


def test_half_width_counts_identities_after_merging():
    x = angles(0, 100, 103, 200, 5)
    samples = make_samples(list("abcde"), video=["v0", "v1", "v1", "v2", "v3"], tracklet=range(5))
    assert denoise(x, samples, half_width=3).labels.tolist() == [0, 1, 1, 2, 0]  # 3 positions away: v1 is one identity
    assert denoise(x, samples, half_width=2).labels.tolist() == [0, 1, 1, 2, 3]


def test_merged_centroid_is_the_mean_of_all_images():
    x = angles(0, 0, 0, 0, 0, 0, 30, 45)                                        # 6:1 puts the merged centroid near 4°, 41° from 45°
    samples = make_samples(list("abcdefgh"), video=["a"] * 7 + ["b"], tracklet=[0] * 6 + [1, 2])
    assert denoise(x, samples).labels.tolist() == [0] * 7 + [1]


def test_position_uses_the_trackers_lowest_frame():
    "A tracklet keeps its place although its first image is removed."
    x = angles(180, 0, 0, 90)
    samples = make_samples(list("abcd"), tracklet=[0, 0, 0, 1], frame=[1, 9, 10, 5])
    assert denoise(x, samples).tracklets.tracklet.tolist() == [0, 1]


def test_long_tracklet_with_many_removals():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(1, 6)) + .25 * rng.normal(size=(220, 6)), rng.normal(size=(80, 6))])[rng.permutation(300)]
    check(x, make_samples([f"{i:03d}" for i in range(300)], tracklet=np.arange(300) // 290, frame=range(300)))


def test_blocks_never_divide_a_group():
    offsets, groups = np.array([0, 3, 5, 9, 10, 30, 31]), np.array([0, 0, 1, 2, 3, 4])
    assert list(blocks(offsets, groups, 9)) == [(0, 3), (3, 4), (4, 5), (5, 6)]
    assert list(blocks(offsets, groups, 1)) == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert list(blocks(offsets, groups, 99)) == [(0, 6)] and list(blocks(np.array([0]), np.empty(0), 9)) == []


@pytest.mark.parametrize("part_rows, floats", [(1, 1), (300, 500), (2000, 2**21)])
def test_parts_and_blocks_change_nothing(part_rows, floats, monkeypatch):
    x, samples = feature_world(80, dim=16, seed=8)
    samples["video"] = samples.video.where(samples.tracklet >= 20, "one long video")
    want = denoise(x, samples)
    monkeypatch.setattr(parts, "PART_ROWS", (part_rows, part_rows)); monkeypatch.setattr(parts, "_BLOCK_FLOATS", floats)
    got = denoise(x, samples)
    for name in ("provenance", "tracklets", "links", "noise"): pd.testing.assert_frame_equal(getattr(got, name), getattr(want, name), check_exact=True)


# ---------------------------------------------------------------- keeping a result

def test_save_and_load(tmp_path):
    x, samples = feature_world(60, seed=1)
    got = denoise(x, samples, half_width=None)
    folder = got.save(tmp_path / "result")
    back = Denoised.load(folder)
    assert np.array_equal(back.labels, got.labels) and back.labels.dtype == np.int64 and back.parameters == got.parameters
    for name in ("provenance", "tracklets", "links", "noise"): pd.testing.assert_frame_equal(getattr(back, name), getattr(got, name), check_index_type=False)
    assert np.array_equal(back.labels_after("video"), got.labels_after("video")) and repr(back) == repr(got)


def test_out_computes_a_request_once(tmp_path, monkeypatch):
    x, samples = feature_world(40, seed=1)
    first = denoise(x, samples, out=tmp_path / "a")
    monkeypatch.setattr(module, "do_parts", None)                      # a second computation would fail
    assert np.array_equal(denoise(x, samples, out=tmp_path / "a").labels, first.labels)
    assert np.array_equal(denoise(x, samples.assign(pid=-1), out=tmp_path / "a").labels, first.labels)  # columns it does not read
    for kw in (dict(sigma_cst=.3), dict(levels=("tracklet",)), dict(half_width=3)):
        with pytest.raises(TypeError): denoise(x, samples, out=tmp_path / "a", **kw)
    y = x.copy(); y[3] = x[4]
    with pytest.raises(TypeError): denoise(y, samples, out=tmp_path / "a")
    with pytest.raises(TypeError): denoise(x, samples.assign(frame=samples.frame + 1), out=tmp_path / "a")


def test_an_interrupted_save_is_no_result(tmp_path, monkeypatch):
    x, samples = feature_world(40, seed=1)
    got = denoise(x, samples, out=tmp_path / "a")
    real = module.write_json
    def stop(path, obj):
        if path.name == "denoised.json": raise KeyboardInterrupt
        return real(path, obj)
    monkeypatch.setattr(module, "write_json", stop)
    with pytest.raises(KeyboardInterrupt): denoise(x, samples, sigma_cst=.4, out=tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="unfinished|no finished"): Denoised.load(tmp_path / "a")
    monkeypatch.undo()
    assert np.array_equal(denoise(x, samples, out=tmp_path / "a").labels, got.labels)


def test_a_damaged_result_is_named(tmp_path):
    x, samples = feature_world(40, seed=1)
    folder = denoise(x, samples).save(tmp_path / "a")
    pd.read_parquet(folder / "links.parquet").iloc[:-1].to_parquet(folder / "links.parquet")
    with pytest.raises(ValueError, match="links.parquet"): Denoised.load(folder)
    assert "parameters" in json.loads((folder / "denoised.json").read_text())


# ---------------------------------------------------------------- refusals, and odd tables with a meaning

def test_memory_map_and_float16(tmp_path):
    x, samples = feature_world(60, seed=1)
    np.save(tmp_path / "f.npy", x); mapped = np.load(tmp_path / "f.npy", mmap_mode="r")
    assert x.dtype == np.float16 and np.array_equal(denoise(mapped, samples).labels, denoise(x.astype(np.float64) * 7, samples).labels)


@pytest.mark.parametrize("kw, message", [
    (dict(sigma_cst=-.1), "sigma_cst"), (dict(sigma_drm=2.01), "sigma_drm"), (dict(half_width=-1), "half_width"), (dict(half_width=2.5), "half_width"), (dict(half_width=True), "half_width"),
    (dict(levels=("track",)), "unknown level 'track'"), (dict(levels=("video", "tracklet")), "order"), (dict(levels=("video", "video")), "once"), (dict(link="nearest"), "unknown link 'nearest'"),
    (dict(sigma_cst="0.2"), "sigma_cst"), (dict(sigma_drm=None), "sigma_drm"), (dict(sigma_cst=True), "sigma_cst"), (dict(levels=5), "levels"), (dict(link="reciprocal", eps="x"), "eps"), (dict(link="reciprocal", k1=2), "k1"),
    (dict(workers="2"), "workers"), (dict(workers=0), "workers"), (dict(device="cudaa"), "device"), (dict(centre="v"), "unknown centre"), (dict(cannot_link="time"), "unknown cannot_link"), (dict(measure="yes"), "unknown measure"),
])
def test_requests_without_meaning(kw, message):
    x, samples = feature_world(10, seed=1)
    with pytest.raises(ValueError, match=message): denoise(x, samples, **kw)


def test_one_level_as_a_word():
    x, samples = feature_world(10, seed=1)
    assert np.array_equal(denoise(x, samples, levels="tracklet").labels, denoise(x, samples, levels=("tracklet",)).labels)


def test_tables_that_do_not_fit():
    x, samples = feature_world(12, dim=8, seed=1)
    with pytest.raises(ValueError, match=f"{len(x) - 1} feature rows but {len(x)} samples"): denoise(x[:-1], samples)
    with pytest.raises(ValueError, match="matrix"): denoise(x[:, 0], samples)
    with pytest.raises(ValueError, match="no column frame"): denoise(x, samples.drop(columns="frame"))
    with pytest.raises(ValueError, match="no tracklet.*rows 2, 7"): denoise(x, samples.assign(tracklet=np.where(np.isin(np.arange(len(x)), [2, 7]), -1, samples.tracklet)))
    with pytest.raises(ValueError, match="tracklet.*11.*'video00000', 'elsewhere'"): denoise(x, samples.assign(video=samples.video.where(samples.index < len(x) - 1, "elsewhere")))
    for value, word in ((0, "zero"), (np.nan, "NaN")):
        bad = x.copy(); bad[[3, 20]] = value
        with pytest.raises(ValueError, match=f"{word}.*rows 3, 20"): denoise(bad, samples)


@pytest.mark.parametrize("levels", PREFIXES)
def test_empty_table(levels, tmp_path):
    got = denoise(np.empty((0, 5), np.float32), feature_world(3)[1].iloc[:0], levels=levels, out=tmp_path / "e")
    assert len(got.labels) == 0 and got.labels.dtype == np.int64 and (got.noise.n_S == 0).all() and "0 images" in repr(got)
    assert list(Denoised.load(tmp_path / "e").provenance.columns) == list(feature_world(3) and denoise(*feature_world(3)).provenance.columns)


def test_single_tracklet_and_single_images():
    x = angles(0, 90, 180)
    assert denoise(x, make_samples(list("abc"), tracklet=0)).labels.tolist().count(-1) == 2              # nowhere else to go: discarded, with no distance
    assert denoise(x, make_samples(list("abc"), tracklet=0)).provenance.distance.isna().all()
    one = denoise(x, make_samples(list("abc"), tracklet=[4, 5, 6]))
    assert one.labels.tolist() == [0, 1, 2] and (one.provenance.state == "kept").all() and one.provenance.distance.isna().all()
    assert denoise(x[:1], make_samples("a", tracklet=3)).labels.tolist() == [0]


def test_duplicate_images():
    "The same row again: at distance 0 of itself, in the same tracklet one more vote, in another tracklet a reason to merge."
    x = angles(0, 0, 0, 100)
    assert denoise(x, make_samples(["a", "a", "a", "b"], tracklet=0, frame=[0, 0, 0, 1])).labels.tolist() == [0, 0, 0, -1]
    assert denoise(x, make_samples(["a", "a", "a", "b"], tracklet=[0, 1, 2, 3], frame=0)).labels.tolist() == [0, 0, 0, 1]


def test_eq4_on_one_block():
    rounds, deviation = clean_tracklets(angles(0, 2, 4, 80, 170), np.array([0, 4, 5]), .2)
    assert rounds.tolist() == [0, 0, 0, 1, 0] and np.isnan(deviation[4]) and deviation[3] == pytest.approx(1 - math.cos(math.radians(78)))
