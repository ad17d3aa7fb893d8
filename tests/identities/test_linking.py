"""Co-occurrence, reciprocal links and constrained closure against their definitions."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cion_nb.core.samples import make_samples
from cion_nb.data.feature_worlds import street_world
from cion_nb.identities.levels import closure, lay_out
from cion_nb.identities.linking import (
    centre_on_videos,
    constrained_closure,
    link_by_reciprocal,
    link_within,
    seen_together,
)
from cion_nb.identities.neighbours import dbscan, jaccard, knn


def unit(x): return x / np.linalg.norm(x, axis=1, keepdims=True)


# ---- seen_together ----------

def iou(p, q):
    w, h = min(p[0] + p[2], q[0] + q[2]) - max(p[0], q[0]), min(p[1] + p[3], q[1] + q[3]) - max(p[1], q[1])
    return w * h / (p[2] * p[3] + q[2] * q[3] - w * h) if w > 0 and h > 0 else 0.


def seen_plain(samples, layout, kept, max_iou, min_frames):
    at, has_boxes, frames = {t: i for i, t in enumerate(layout.tracklets)}, "x" in samples, {}
    rows = samples.to_dict("records")
    for video in samples["video"].unique():
        for frame in samples["frame"].unique():
            here = [r for r, k in zip(rows, kept) if k and r["video"] == video and r["frame"] == frame and frame >= 0]
            for a in {r["tracklet"] for r in here}:
                for b in {r["tracklet"] for r in here}:
                    if at[a] >= at[b]: continue
                    apart = all(iou([p[c] for c in "xywh"], [q[c] for c in "xywh"]) <= max_iou for p in here
                                if p["tracklet"] == a for q in here if q["tracklet"] == b) if has_boxes else True
                    if apart: frames[at[a], at[b]] = frames.get((at[a], at[b]), 0) + 1
    return {p: n for p, n in frames.items() if n >= min_frames}


def crowd(seed, n=120, videos=3, tracklets=9, frames=12, boxes=True):
    rng = np.random.default_rng(seed)
    video, frame = rng.integers(0, videos, n), rng.integers(-1, frames, n)
    extra = dict(x=rng.uniform(0, 60, n), y=rng.uniform(0, 30, n), w=rng.uniform(20, 40, n),
                 h=rng.uniform(20, 40, n)) if boxes else {}
    return make_samples([f"{i}.jpg" for i in range(n)], video=[f"v{v}" for v in video],
                        tracklet=video * 100 + rng.integers(0, tracklets, n), frame=frame, **extra), rng.random(n) < 0.8


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), boxes=st.booleans(), max_iou=st.sampled_from([0., .2, .5, 1.]),
       min_frames=st.integers(1, 3), max_rows=st.sampled_from([1, 50, 10**6]))
def test_seen_together_is_its_definition(seed, boxes, max_iou, min_frames, max_rows):
    samples, kept = crowd(seed, boxes=boxes)
    layout = lay_out(samples)
    found = seen_together(samples, layout, kept, max_iou, min_frames, max_rows)
    assert {(a, b): n for a, b, n in zip(*found)} == seen_plain(samples, layout, kept, max_iou, min_frames)
    assert found.has_boxes == boxes and found.n_images == (kept & (samples["frame"] >= 0)).sum()
    assert (found.a < found.b).all()
    assert (np.diff(found.a * len(layout.tracklets) + found.b) > 0).all()


def test_seen_together_does_not_depend_on_the_order_of_rows():
    samples, kept = crowd(3)
    mixed = np.random.default_rng(0).permutation(len(samples))
    def named(s, k):
        lay = lay_out(s)
        return {frozenset(lay.tracklets[[a, b]]): n for a, b, n in zip(*seen_together(s, lay, k))}
    assert named(samples, kept) == named(samples.iloc[mixed].reset_index(drop=True), kept[mixed])


def test_seen_together_without_anything_to_see():
    samples = make_samples([f"{i}.jpg" for i in range(6)], video="v", tracklet=[0, 0, 1, 1, 2, 2], frame=-1)
    found = seen_together(samples, lay_out(samples))                       # unknown frames
    assert len(found) == 0 and found.n_images == 0 and found.a.dtype == np.int64 and "no boxes" in repr(found)
    empty = samples.iloc[:0]
    assert len(seen_together(empty, lay_out(empty))) == 0
    one = make_samples(["a", "b"], video="v", tracklet=0, frame=[1, 2])
    assert len(seen_together(one, lay_out(one))) == 0


def test_seen_together_with_nan_boxes_counts_as_apart():
    samples = make_samples(list("abcd"), video="v", tracklet=[0, 0, 1, 1], frame=[1, 2, 1, 2], x=np.nan, y=0., w=1.,
                           h=1.)
    assert list(zip(*seen_together(samples, lay_out(samples)))) == [(0, 1, 2)]


@pytest.mark.parametrize("change, message",
                         [(dict(kept=np.ones(3, bool)), "one bool a row"), (dict(kept=np.ones(120)), "bool"),
                          (dict(max_iou=1.5), "max_iou"), (dict(min_frames=0), "min_frames")])
def test_seen_together_refuses(change, message):
    samples, _ = crowd(0)
    with pytest.raises(ValueError, match=message): seen_together(samples, lay_out(samples), **change)
    with pytest.raises(ValueError, match="lay out this table"): seen_together(samples.iloc[:5], lay_out(samples))


# ---- constrained_closure ----------

def constrained_plain(n, a, b, distance, apart_a, apart_b):
    of, apart, refused = {i: frozenset([i]) for i in range(n)}, {frozenset(p) for p in zip(apart_a, apart_b)}, set()
    for _, i, j in sorted(zip(distance, np.minimum(a, b), np.maximum(a, b))):
        if of[i] == of[j]: continue
        if any(frozenset((u, v)) in apart for u in of[i] for v in of[j]):
            refused.add((i, j))
            continue
        both = of[i] | of[j]
        for u in both: of[u] = both
    return of, refused


@st.composite
def problems(draw):
    n, seed = draw(st.integers(1, 40)), draw(st.integers(0, 10**6))
    rng, m, k = np.random.default_rng(seed), draw(st.integers(0, 80)), draw(st.integers(0, 60))
    a, b, c, d = *rng.integers(0, n, (2, m)), *rng.integers(0, n, (2, k))
    return n, a, b, rng.integers(0, 6, m) / 5, c[c != d], d[c != d], rng          # few distances: many ties


@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=150, deadline=None)
@given(problems())
def test_constrained_closure_is_its_definition(problem):
    n, a, b, distance, c, d, rng = problem
    labels, refused = constrained_closure(n, a, b, distance, c, d)
    of, wanted = constrained_plain(n, a, b, distance, c, d)
    assert all((labels[i] == labels[j]) == (of[i] == of[j]) for i in range(n) for j in range(n))
    assert {(min(i, j), max(i, j)) for i, j in zip(a[refused], b[refused])} == wanted
    assert (labels[c] != labels[d]).all()                                          # no forbidden pair together
    assert (np.unique(labels) == np.arange(labels.max() + 1)).all()
    assert (np.diff(np.unique(labels, return_index=True)[1]) > 0).all()
    mixed, pairs = rng.permutation(len(a)), rng.permutation(len(c))
    again, refused_again = constrained_closure(n, b[mixed], a[mixed], distance[mixed], d[pairs], c[pairs])
    assert (again == labels).all() and (refused_again == refused[mixed]).all()     # order and sides change nothing
    assert (constrained_closure(n, a, b, distance, [], [])[0] == closure(n, a, b)).all()


def test_constrained_closure_at_size():
    """Long lists of forbidden partners, so that the table is swept; checked by its two properties instead of the plain
    version.
    """
    rng = np.random.default_rng(0)
    n = 30_000
    a = rng.integers(0, n, 120_000)
    b = np.clip(a + rng.integers(1, 30, len(a)), 0, n - 1)
    c = rng.integers(0, n - 40, 80_000)
    d = c + rng.integers(1, 40, len(c))
    labels, refused = constrained_closure(n, a, b, rng.random(len(a)), c, d)
    assert (labels[c] != labels[d]).all() and 0 < refused.mean() < 1
    assert (labels[a[~refused]] == labels[b[~refused]]).all()
    across = labels[a] != labels[b]
    assert (refused | ~across).all()                                               # what is not one group was refused


@pytest.mark.parametrize("args, message",
                         [((3, [0], [1, 2], [.1], [], []), "as many a as b"),
                          ((3, [0], [3], [.1], [], []), "there are 3"), ((3, [0], [-1], [.1], [], []), "there are 3"),
                          ((3, [0], [1], [np.nan], [], []), "not a number"),
                          ((3, [0], [1], [.1], [2], [2]), "apart from itself"),
                          ((3, [0], [1], [.1], [2], []), "both sides")])
def test_constrained_closure_refuses(args, message):
    with pytest.raises(ValueError, match=message): constrained_closure(*args)


# ---- link_by_reciprocal ----------

def people(seed, n=40, each=5, dim=32, noise=.5):
    rng = np.random.default_rng(seed)
    who = rng.permutation(np.repeat(np.arange(n), each))
    return unit(rng.standard_normal((n, dim))[who] + noise * rng.standard_normal((n * each, dim))), who


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), eps=st.sampled_from([.2, .4, .5, .7]), min_samples=st.integers(1, 5),
       half_width=st.sampled_from([None, 60]))
def test_components_of_the_links_are_dbscans_clusters(seed, eps, min_samples, half_width):
    units, _ = people(seed, noise=.9)
    links = link_by_reciprocal(units, None, half_width, eps=eps, min_samples=min_samples)
    d = jaccard(units, 10, 3, neighbours=knn(units, 10, half_width=half_width))
    near = d.copy()
    near.data = (d.data <= np.float32(eps)).astype(np.int8)
    near.eliminate_zeros()
    core = near.getnnz(1) >= min_samples
    labels, wanted = closure(len(units), links.a, links.b), dbscan(d, eps, min_samples)
    i, j = np.flatnonzero(core)[:, None], np.flatnonzero(core)
    # core points: scikit-learn's clusters
    assert ((labels[i] == labels[j]) == (wanted[i] == wanted[j])).all()
    full, stored = np.ones(d.shape, np.float32), d.tocoo()
    full[stored.row, stored.col] = stored.data  # a stored pair may have distance 0
    for p in np.flatnonzero(~core):
        reach = [(full[p, q], q) for q in np.flatnonzero(core) if full[p, q] <= np.float32(eps)]
        mine = {(min(a, b), max(a, b)) for a, b in zip(links.a, links.b) if p in (a, b)}
        assert mine == ({(min(p, min(reach)[1]), max(p, min(reach)[1]))} if reach else set())
    assert links.rule == "reciprocal" and links.k1 == 10 and links.why == "" and (links.a < links.b).all()
    assert (links.distance <= np.float32(eps)).all()


def test_the_video_only_restricts_who_may_join():
    units, _ = people(1)
    video = np.repeat(np.arange(20), 10)
    everywhere, inside = link_by_reciprocal(units, None, origin=video), link_by_reciprocal(units, video)
    pairs = set(zip(everywhere.a.tolist(), everywhere.b.tolist()))
    assert set(zip(inside.a.tolist(), inside.b.tolist())) == {(a, b) for a, b in pairs if video[a] == video[b]}
    assert len(inside) > 10


def test_it_finds_people_that_no_threshold_separates():
    """Half of the people look alike and are seen sharply, the other half are seen badly: one threshold cannot serve
    both.
    """
    rng = np.random.default_rng(0)
    sharp, loose = 4 * rng.standard_normal(64) + .5 * rng.standard_normal((40, 64)), 1.2 * rng.standard_normal((40, 64))
    who = np.repeat(np.arange(80), 6)
    x = np.concatenate([sharp, loose])[who] + np.where(who < 40, .15, .6)[:, None] * rng.standard_normal((480, 64))
    units = unit(x)
    def f1(labels):
        same, truth = labels[:, None] == labels, who[:, None] == who
        return 2 * (same & truth).sum() / (same.sum() + truth.sum())
    links = link_by_reciprocal(units, None)
    by_lists = f1(closure(480, links.a, links.b))
    by_threshold = max(f1(closure(480, *link_within(units, None, None, s)[:2])) for s in np.linspace(.002, .6, 60))
    assert by_lists > 0.9 and by_lists > by_threshold + 0.2


@pytest.mark.parametrize("n", [3, 8, 15])
@pytest.mark.parametrize("seed", range(8))
def test_strangers_alone_in_the_table_stay_apart(n, seed):
    rng = np.random.default_rng(seed)
    for units in (unit(rng.standard_normal((n, 256))), unit(rng.standard_normal((n, 64)) + rng.standard_normal(64))):
        for video in (np.zeros(n, np.int64), None): assert len(link_by_reciprocal(units, video)) == 0


@pytest.mark.parametrize("n", [3, 8, 15])
def test_strangers_in_one_video_among_others_stay_apart(n):
    joined = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        units, who = people(seed, n=60, each=5, dim=256, noise=.7)
        units = np.concatenate([units, unit(rng.standard_normal((n, 256)))])
        video = np.r_[np.arange(300) // 12, np.full(n, 25)]
        links = link_by_reciprocal(units, video)
        assert links.rule == "reciprocal" and links.k1 == 10
        joined += (links.a >= 300).sum()
    assert joined == 0


def stands_out(units, video, a, b):
    "The rule for one link, from its words: pair by pair."
    n, d = len(units), 1 - units @ units.T
    others = [k for k in range(n) if video[k] == video[a] and k not in (a, b)]
    different = video[:, None] != video
    D = d[different].mean() if different.any() else d[~np.eye(n, dtype=bool)].mean()
    return video[a] != video[b] or d[a, b] <= max(.25 * D, .6 * (d[[a, b]][:, others].mean() if others else D))


@pytest.mark.parametrize("videos", [1, 8, 60])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_of_one_video_must_stand_out_from_it(videos, dtype):
    refused = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        units, _ = people(seed, n=30, each=5, dim=8, noise=.8)
        video = np.sort(rng.integers(0, videos, len(units)))
        units = unit(units + .6 * unit(rng.standard_normal((videos, 8)))[video]).astype(dtype)
        free, guarded = link_by_reciprocal(units, None), link_by_reciprocal(units, None, origin=video)
        wanted = [p for p in zip(free.a.tolist(), free.b.tolist()) if stands_out(units.astype(float), video, *p)]
        assert list(zip(guarded.a.tolist(), guarded.b.tolist())) == wanted
        named = link_by_reciprocal(units, None, origin=np.array([f"v{v}" for v in video]))
        assert (named.a == guarded.a).all() and (named.b == guarded.b).all()
        inside = link_by_reciprocal(units, video)
        assert list(zip(inside.a.tolist(), inside.b.tolist())) == [(a, b) for a, b in wanted if video[a] == video[b]]
        # rows without direction count for nothing
        holes = np.insert(units, [0, 70], 0, axis=0)
        at, origin = np.flatnonzero(holes.any(1)), np.insert(video, [0, 70], [video[0], video[70]])
        assert (link_by_reciprocal(holes, None, None, origin=origin).a
                == at[link_by_reciprocal(units, None, None, origin=video).a]).all()
        refused += len(free) - len(wanted)
    # videos of two or three: hardly anybody to be mixed up with
    assert refused > 0 or videos == 60
    with pytest.raises(ValueError, match="origin"): link_by_reciprocal(units, None, origin=video[:3])


def identities_in_a_street(n, mark, dim, seed, centre=None, persons=None, guarded=True):
    """The identities of n tracklets (of all-different people, or of `persons`) in one more video of a street: video
    level, then cross level.
    """
    x, samples = street_world(dim=dim, images=6, seed=seed)
    rng, count = np.random.default_rng(1000 + seed), samples["tracklet"].max() + 1
    def directions(k): return rng.standard_normal((k, dim)) / np.sqrt(dim)
    who = np.arange(n) if persons is None else np.asarray(persons)
    y = np.repeat(directions(n)[who] + mark * directions(1), 6, 0) + .9 * directions(6 * n)
    tracklet, video = (np.r_[samples["tracklet"], count + np.repeat(np.arange(n), 6)],
                       np.r_[pd.factorize(samples["video"])[0], np.full(6 * n, 12)])
    sums = np.zeros((count + n, dim))
    np.add.at(sums, tracklet, np.concatenate([x, unit(y)]))
    origin = np.zeros(count + n, np.int64)
    origin[tracklet] = video
    def merged(sums, origin, video):
        units = unit(sums) if centre is None else centre_on_videos(unit(sums), origin)
        links = link_by_reciprocal(units, None, origin=origin if guarded else None)
        may = np.ones(len(links), bool) if video is None else video[links.a] == video[links.b]
        labels = closure(len(units), links.a[may], links.b[may])
        total = np.zeros((labels.max() + 1, dim))
        np.add.at(total, labels, sums)
        return labels, total, origin[np.unique(labels, return_index=True)[1]]
    inside, total, of = merged(sums, origin, origin)
    return merged(total, of, None)[0][inside][-n:]


@pytest.mark.parametrize("n", [3, 8, 15])
@pytest.mark.parametrize("mark", [0, .25, .5, 1.])
@pytest.mark.parametrize("centre", [None, "video"])
def test_strangers_of_one_video_of_a_street_stay_apart(n, mark, centre):
    """All of six worlds in 256 dimensions; five of six in 64, where two strangers may look alike. In 16 they do not:
    the page has the table.
    """
    for dim, apart in ((256, 6), (64, 5)):
        assert sum(len(np.unique(identities_in_a_street(n, mark, dim, seed, centre))) == n
                   for seed in range(6)) >= apart, dim
    # without the rule: never
    if mark == 1:
        assert sum(len(np.unique(identities_in_a_street(n, mark, 256, seed, centre, guarded=False))) == n
                   for seed in range(6)) == 0


@pytest.mark.parametrize("centre", [None, "video"])
def test_pieces_of_one_person_in_a_street_stay_together(centre):
    """One person alone in a video, in five pieces; and eight people in two pieces each, of whom the rule costs next to
    none (without it some come together by way of strangers).
    """
    joined = np.zeros(2)
    for seed in range(6):
        alone = identities_in_a_street(5, .7, 64, seed, centre, persons=[0] * 5)
        assert len(np.unique(alone)) == 1, seed
        for k in (0, 1):
            pairs = identities_in_a_street(16, .5, 64, seed, centre, np.arange(16) // 2, guarded=k == 0)
            joined[k] += (pairs[::2] == pairs[1::2]).sum()
    assert joined[0] >= 0.85 * joined[1] and joined[0] > 20


def test_a_small_band_says_what_was_done():
    units, _ = people(0, n=20, each=5)
    for n, half_width, k1, rule in ((100, None, 10, "reciprocal"), (40, None, 10, "reciprocal"),
                                    (39, None, 9, "reciprocal"), (12, None, 3, "reciprocal"),
                                    (11, None, 0, "threshold"), (100, 19, 5, "reciprocal"), (100, 5, 0, "threshold")):
        links = link_by_reciprocal(units[:n], None, half_width)
        assert (links.k1, links.rule) == (k1, rule) and bool(links.why) == (k1 != 10)
    links = link_by_reciprocal(units[:11], None, sigma_drm=0.3)
    assert "11 identities" in links.why and "0.3" in links.why
    assert [v.tolist() for v in links] == [v.tolist() for v in link_within(units[:11], None, 1000, 0.3)]
    small = link_by_reciprocal(units[:30], None, sigma_drm=0.3)                     # lowered k1: both tests
    assert (1 - np.einsum("nd,nd->n", units[small.a], units[small.b]) < 0.3).all()


def test_rows_without_direction_and_memory_maps(tmp_path):
    units, _ = people(2)
    np.save(tmp_path / "u.npy", units.astype(np.float32))
    mapped = np.load(tmp_path / "u.npy", mmap_mode="r")
    plain, from_file = link_by_reciprocal(units.astype(np.float32), None), link_by_reciprocal(mapped, None)
    assert (plain.a == from_file.a).all() and (plain.b == from_file.b).all()
    holes = np.insert(units.astype(np.float32), [0, 50, 200], 0, axis=0)
    at = np.flatnonzero(holes.any(1))
    with_holes = link_by_reciprocal(holes, None, None)
    assert (with_holes.a == at[plain.a]).all() and (with_holes.b == at[plain.b]).all()
    assert len(link_by_reciprocal(np.zeros((60, 8)), None)) == 0
    assert len(link_by_reciprocal(np.zeros((0, 8)), None)) == 0


@pytest.mark.parametrize("change, message", [(dict(k1=2), "k1"), (dict(k1=5.5), "k1"), (dict(k2=0), "k2"),
                                             (dict(k2=11), "k2=11"), (dict(eps=0.), "eps"), (dict(eps=1.), "eps"),
                                             (dict(min_samples=0), "min_samples"),
                                             (dict(half_width=-1), "half_width"), (dict(sigma_drm=3), "sigma_drm")])
def test_link_by_reciprocal_refuses(change, message):
    with pytest.raises(ValueError, match=message): link_by_reciprocal(people(0)[0], None, **change)


# ---- centre_on_videos ----------

def test_centring_is_its_formula_and_works_in_place():
    units, _ = people(3)
    video = np.random.default_rng(0).integers(5, 11, len(units))
    wanted = np.stack([u - (n := (video == v).sum()) / (n + 20) * (units[video == v].mean(0) - units.mean(0))
                       for u, v in zip(units, video)])
    assert np.allclose(centre_on_videos(units, video), unit(wanted), atol=1e-12)
    same = units.astype(np.float32)
    assert centre_on_videos(same, video, out=same) is same and np.allclose(same, unit(wanted), atol=1e-6)
    holes = units.copy()
    holes[7] = 0
    assert (centre_on_videos(holes, video)[7] == 0).all()
    assert np.allclose(centre_on_videos(units, video, strength=np.inf), units)
    assert len(centre_on_videos(units[:0], video[:0])) == 0
    with pytest.raises(ValueError, match="videos"): centre_on_videos(units, video[:3])
    with pytest.raises(ValueError, match="strength"): centre_on_videos(units, video, -1)
