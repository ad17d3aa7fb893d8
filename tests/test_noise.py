"""Eq. 1-3 and the identity scores against plain loops written from the formulas."""
import math
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import adjusted_rand_score

from cion_nb.identities import noise as module
from cion_nb.identities.pairs import (
    _least_product, _screen, _zeros, close_pairs, cosine_distance, screen_type, unit_centroids, unit_rows,
    UnitCentroids)
from cion_nb.identities.noise import estimate_total, Noise, noise, noises
from cion_nb.identities.truth import identity_scores, IdentityScores


# ---------------------------------------------------------------- the oracle

def plain_distance(x, c):
    "Cosine distance; a centroid without direction is at distance 1."
    length = math.sqrt(sum(v * v for v in c))
    if length < 1e-9: return 1.0
    return min(2.0, max(0.0, 1 - sum(a * b for a, b in zip(x, c)) / length))

def plain_noise(features, labels, sigma_cst, sigma_drm):
    "consistency, discrimination, n_S by Eq. 1, 2, 3."
    points = {}
    for row, label in zip(features.astype(np.float64).tolist(), labels.tolist()):
        length = math.sqrt(sum(v * v for v in row))
        if label >= 0: points.setdefault(label, []).append([v / length for v in row])
    means = {k: [sum(column) / len(xs) for column in zip(*xs)] for k, xs in points.items()}
    consistency = sum(max(plain_distance(x, means[k]) for x in xs) - sigma_cst >= 0 for k, xs in points.items())
    discrimination = 0
    for i in points:
        for j in points:
            if i == j: continue
            length = math.sqrt(sum(v * v for v in means[i]))
            d = 1.0 if length < 1e-9 else plain_distance([v / length for v in means[i]], means[j])
            discrimination += sigma_drm - d > 0
    return consistency, discrimination, (consistency + discrimination) / len(points) if points else 0.0


# ---------------------------------------------------------------- n_S

@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 60), dim=st.integers(2, 9), groups=st.integers(1, 12), spread=st.sampled_from([0.1, 0.5, 2.0]),
       sigma_cst=st.floats(0.01, 1.9), sigma_drm=st.floats(0.01, 1.9), dtype=st.sampled_from([np.float16, np.float32, np.float64]), copies=st.booleans())
def test_noise_is_the_formula(seed, n, dim, groups, spread, sigma_cst, sigma_drm, dtype, copies):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, groups, n) * 3                                  # gaps in the numbering
    labels[labels < 0] = -1
    x = (rng.normal(size=(groups + 1, dim))[labels // 3] + spread * rng.normal(size=(n, dim))) * rng.uniform(.1, 9, (n, 1))  # not normalised
    x = x.astype(dtype)
    if copies and n > 4: x[n // 2:] = x[:n - n // 2]                          # the same vectors again, under other labels
    got = noise(x, labels, sigma_cst, sigma_drm)
    assert (got.consistency, got.discrimination) == plain_noise(x, labels, sigma_cst, sigma_drm)[:2]
    assert got.n_S == pytest.approx(plain_noise(x, labels, sigma_cst, sigma_drm)[2])
    assert got.n_identities == len(set(labels[labels >= 0])) and got.n_images == (labels >= 0).sum()
    assert got.identities.too_close.sum() == got.discrimination and got.identities.label.is_monotonic_increasing


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 30), sigma=st.sampled_from([0.0, 1.0, 2.0]))
def test_exact_thresholds_on_axes(seed, n, sigma):
    "Distances of axis vectors are exactly 0, 1 or 2, so the step's side at zero is visible."
    rng = np.random.default_rng(seed)
    x = np.eye(3)[rng.integers(0, 3, n)] * rng.choice([-1., 1.], (n, 1))
    labels = np.arange(n) if seed % 2 or sigma else rng.integers(0, 3, n)          # means of several axes are 1 or 2 apart only but for rounding
    got = noise(x, labels, sigma, sigma)
    assert (got.consistency, got.discrimination) == plain_noise(x, labels, sigma, sigma)[:2]


def test_steps_at_zero():
    assert noise(np.eye(2), np.array([0, 1]), sigma_drm=1.0).discrimination == 0
    assert noise(np.ones((3, 2)), np.zeros(3, int), sigma_cst=0.0).consistency == 1
    assert noise(np.ones((2, 2)), np.array([0, 1]), sigma_drm=0.0).discrimination == 0


def test_no_identity_and_one():
    none = noise(np.eye(3), np.full(3, -1))
    assert (none.n_S, none.n_identities, none.n_images) == (0.0, 0, 0)
    assert noise(np.empty((0, 4)), np.empty(0, int)).n_S == 0
    one = noise(np.eye(3), np.zeros(3, int))
    assert (one.n_S, one.consistency, one.discrimination) == (1.0, 1, 0)
    assert "n_S" in repr(none) and "1 identities" in repr(one)


def test_row_order_does_not_matter():
    rng = np.random.default_rng(3)
    x, labels = rng.normal(size=(500, 8)), rng.integers(-1, 60, 500)
    order = rng.permutation(500)
    a, b = noise(x, labels, .3, .6), noise(x[order], labels[order], .3, .6)
    assert a == b and np.allclose(a.identities.radius, b.identities.radius, atol=1e-14)


def test_rows_without_label_are_never_read_as_bad():
    x = np.eye(3); x[1] = np.nan
    assert noise(x, np.array([0, -1, 1])).n_images == 2


def test_many_identities_in_tiles_and_little_memory():
    "6,000 identities: several tiles; a matrix of all pairs would take 144 MB in float32 alone."
    rng = np.random.default_rng(0)
    m, dim = 6000, 24
    centres = rng.normal(size=(m, dim)); centres[1::3] = centres[::3] + .3 * rng.normal(size=(m // 3, dim))
    labels = rng.permutation(np.repeat(np.arange(m), 2))
    x = (centres[labels] + .4 * rng.normal(size=(2 * m, dim))).astype(np.float32)
    tracemalloc.start()
    got = noise(x, labels)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 90e6
    units = unit_rows(x)
    c = np.zeros((m, dim)); np.add.at(c, labels, units); c /= np.linalg.norm(c, axis=1, keepdims=True)
    close = sum(int((1 - c[i:i + 500] @ c.T < .18).sum()) for i in range(0, m, 500)) - m
    wide = np.zeros(m); np.maximum.at(wide, labels, 1 - (units * c[labels]).sum(1))
    assert (got.discrimination, got.consistency) == (close, int((wide >= .2).sum())) and close > 100


@pytest.mark.parametrize("sigma", [0.05, 0.18, 0.9, 2.0])
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_close_pairs_do_not_depend_on_tiles(sigma, tile):
    rng = np.random.default_rng(5)
    u = unit_rows(rng.normal(size=(90, 5))); u[7] = 0; u[50:60] = u[20:30]
    last = np.maximum.accumulate(rng.integers(0, 90, 90))
    def collect(t): return sorted((a, b, c) for i, j, d in close_pairs(u, sigma, last, t) for a, b, c in zip(i.tolist(), j.tolist(), d.tolist()))
    want = [(i, j) for i in range(90) for j in range(i + 1, int(last[i]) + 1) if min(2, max(0, 1 - float(u[i] @ u[j]))) < sigma]
    got = collect(tile)
    assert [g[:2] for g in got] == want
    assert np.allclose([g[2] for g in got], [g[2] for g in collect(1024)], atol=1e-12)


def test_a_pair_just_at_the_threshold_is_decided_by_its_own_product():
    "The float32 screen may be off by 1e-5: pairs closer to the threshold than that still come out right, in sparse tiles and full ones."
    rng = np.random.default_rng(0)
    a = unit_rows(rng.normal(size=(400, 512)))
    away = unit_rows(rng.normal(size=(400, 512))); away -= np.einsum("nd,nd->n", a, away)[:, None] * a; away = unit_rows(away)
    cosine = .82 + rng.choice([-1e-10, 1e-10, -1e-7, 1e-7], 400)
    b = unit_rows(cosine[:, None] * a + np.sqrt(1 - cosine**2)[:, None] * away)
    units, last = np.concatenate([a, b]), np.full(800, 799)
    linked = {(i, j) for p, q, _ in close_pairs(units, .18, last) for i, j in zip(p.tolist(), q.tolist())}
    assert linked == {(i, 400 + i) for i in range(400) if cosine[i] > .82}


def test_a_threshold_equal_to_a_distance_excludes_that_pair_in_any_tile():
    "The product of a whole tile may round otherwise than the product of the two rows, which decides."
    units = unit_rows(np.random.default_rng(0).normal(size=(60, 96)))
    for i, j in np.random.default_rng(1).permutation([(i, j) for i in range(60) for j in range(i + 1, 60)])[:250].tolist():
        sigma = float(cosine_distance(units[[i]], units[[j]])[0])
        for threshold, is_linked in ((sigma, False), (np.nextafter(sigma, 2), True)):
            for tile in (4, 64): assert any(((a == i) & (b == j)).any() for a, b, _ in close_pairs(units, threshold, tile=tile)) == is_linked


# ---------------------------------------------------------------- the fast product

SCREENS = ("float32", "bfloat16", "float16")

def pair_set(*args, **kw): return {(i, j) for a, b, _ in close_pairs(*args, device="cpu", **kw) for i, j in zip(a.tolist(), b.tolist())}

def plain_pairs(u, sigma, last): return {(i, j) for i in range(len(u)) for j in range(i + 1, int(last[i]) + 1) if min(2, max(0, 1 - float(u[i] @ u[j]))) < sigma}


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 120), dim=st.integers(1, 40), sigma=st.floats(0, 2), screen=st.sampled_from(SCREENS), spread=st.sampled_from([.02, .3, 3.]),
       tile=st.sampled_from([None, 3, 16]), panel=st.sampled_from([1, 700, 2**27]), band=st.sampled_from([0, 1, 9, None]), dtype=st.sampled_from([np.float32, np.float64]))
def test_close_pairs_in_any_format_panel_and_band(seed, n, dim, sigma, screen, spread, tile, panel, band, dtype):
    rng = np.random.default_rng(seed)
    u = unit_rows(rng.normal(size=dim) + spread * rng.normal(size=(n, dim))).astype(dtype) if n else np.empty((0, dim), dtype)
    if n > 9: u[3] = 0; u[n // 2] = u[1]; u[5] = -u[4]
    last = np.full(n, n - 1) if band is None else np.minimum(np.maximum.accumulate(np.arange(n) + rng.integers(0, band + 1, n)), n - 1)
    exact = u.astype(np.float64)
    got, want = pair_set(u, sigma, None if band is None else last, tile=tile, screen=screen, panel_bytes=panel), plain_pairs(exact, sigma, last)
    assert all(abs(1 - exact[i] @ exact[j] - sigma) < 1e-12 for i, j in got ^ want)          # the oracle's own dot product may round otherwise


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("k, scale", [(1017, .5), (1017, 1.), (1016, .5), (1023, .5), (1000, .75)])
def test_rows_that_round_in_the_worst_way_are_not_lost(screen, k, scale):
    """1/sqrt(1017) lies just below the middle between two bfloat16 numbers, and so does half of it: all values of both rows are
    rounded down, and the fast product of a pair at the threshold comes out as much too small as it can."""
    rng = np.random.default_rng(k)
    pairs, dim = 60, k + 20
    offset = rng.choice([-1e-10, 1e-10, -1e-6, 1e-6], pairs)
    cosine = np.minimum(scale + offset, 1 - 1e-6 + offset)
    a, b = np.zeros((pairs, dim)), np.zeros((pairs, dim))
    for p in range(pairs):
        sign, column = rng.choice([-1., 1.], k), rng.permutation(dim)
        a[p, column[:k]] = sign / np.sqrt(k)
        b[p, column[:k]] = cosine[p] * sign / np.sqrt(k); b[p, column[k]] = np.sqrt(1 - cosine[p]**2)
    sigma = 1 - scale if scale < 1 else 1e-6
    units = np.concatenate([a, b])
    got = {(i, j) for i, j in pair_set(units, sigma, screen=screen) if j == i + pairs}
    assert got == {(p, p + pairs) for p in range(pairs) if cosine_distance(a[[p]], b[[p]])[0] < sigma} == {(p, p + pairs) for p in range(pairs) if offset[p] > 0}
    if screen == "bfloat16" and k == 1017:                                                     # without the slack they would all be lost
        p, q = _screen(a, 0, pairs, screen, "cpu"), _screen(b, 0, pairs, screen, "cpu")
        assert ((p.light.float() * q.light.float()).sum(1).numpy() < cosine - .003).all()


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("dim", [1, 31, 768, 4096])
def test_the_bound_holds_on_every_product(screen, dim):
    "Rows of many kinds: dense, sparse, of one sign, tiny values, not even of length 1."
    rng = np.random.default_rng(dim)
    rows = [rng.normal(size=(30, dim)), np.abs(rng.normal(size=(30, dim))), np.where(rng.random((30, dim)) < .9, 0, rng.normal(size=(30, dim))), np.exp(8 * rng.normal(size=(30, dim))), np.ones((2, dim))]
    u = unit_rows(np.concatenate(rows) + 1e-30) * rng.uniform(.2, 3, (122, 1))
    s = _screen(u, 0, len(u), screen, "cpu")
    light = s.light.double().numpy()
    assert (s.error >= np.linalg.norm(u - light, axis=1)).all() and (s.length >= np.linalg.norm(light, axis=1)).all()
    fast = (s.light @ s.light.T).double().numpy()
    half_a_step = np.abs(fast) * torch.finfo(s.light.dtype).eps                                 # the product is rounded to the format, too
    slack = s.error[:, None] * (s.length + s.error) + s.length[:, None] * s.error + (dim + 8) * 2.0**-22 * s.length[:, None] * s.length
    assert (np.abs(fast - u @ u.T) <= slack + half_a_step).all()


@pytest.mark.parametrize("screen", SCREENS)
def test_the_limit_is_a_number_of_the_format_and_below_the_bound(screen):
    "Rounded down, so that it holds however the machine rounds its sums."
    s = _screen(unit_rows(np.random.default_rng(0).normal(size=(5, 64))), 0, 5, screen, "cpu")
    for sigma in np.random.default_rng(1).uniform(0, 2, 200):
        e, l = s.error.max(), s.length.max()
        t, got = 1 - sigma - 2 * e * l - e * e - 72 * 2.0**-22 * l * l, _least_product(s, s, sigma)
        assert got <= t + 1e-15 and t - got <= abs(t) * torch.finfo(s.light.dtype).eps + 1e-7 and torch.tensor(got, dtype=s.light.dtype).item() == got


def test_formats_settings_and_sources_give_the_same_pairs():
    "Panels, steps of waiting pairs and full tiles are all reached; a global setting that lets torch shorten float32 changes nothing."
    rng = np.random.default_rng(0)
    people = rng.normal(size=(900, 48))
    sums = people[rng.integers(0, 900, 6000)] + .3 * rng.normal(size=(6000, 48)) + .2
    sums[:700] = people[0] + .15 * rng.normal(size=(700, 48))                                   # a corner where every pair is close
    counts = rng.integers(1, 9, 6000)
    units = unit_centroids(sums, counts)
    def ordered(**kw): i, j, d = map(np.concatenate, zip(*close_pairs(kw.pop("units", units), .18, device="cpu", **kw))); o = np.lexsort((j, i)); return i[o], j[o], d[o]
    want = ordered(screen="float32", tile=512)
    assert len(want[0]) > 2**18
    before = torch.get_float32_matmul_precision(); torch.set_float32_matmul_precision("medium")
    try: found = [ordered(screen=s, tile=t, panel_bytes=b) for s in SCREENS for t, b in ((None, 2**27), (100, 2**15))] + [ordered(units=UnitCentroids(sums, counts), panel_bytes=2**16)]
    finally: torch.set_float32_matmul_precision(before)
    for got in found: assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1]) and np.allclose(got[2], want[2], atol=1e-12, rtol=0)


def test_rows_from_a_memory_map(tmp_path):
    units = unit_rows(np.random.default_rng(0).normal(size=(300, 4))).astype(np.float32)
    np.save(tmp_path / "u.npy", units)
    assert pair_set(np.load(tmp_path / "u.npy", mmap_mode="r"), .18) == pair_set(units, .18) == pair_set(units.astype(np.float64), .18)


def test_neither_the_rows_nor_the_pairs_are_ever_held_as_a_whole():
    "24,000 x 256 made from sums as they are needed: 49 MB as float64, 12 MB as bfloat16, 288 million pairs."
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(size=(24_000, 256)).astype(np.float32), np.full(24_000, 3)
    list(close_pairs(UnitCentroids(sums[:500], counts[:500]), .18, device="cpu"))
    tracemalloc.start()
    for _ in close_pairs(UnitCentroids(sums, counts), .18, device="cpu", panel_bytes=2**21): pass
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 32e6                                                                          # torch's own panels (2 x 2 MB) are not traced


def test_rows_that_are_not_finite_are_named():
    u = np.eye(6); u[4, 1] = np.nan
    with pytest.raises(ValueError, match="finite: 4 are not"): list(close_pairs(u, .18, device="cpu"))
    with pytest.raises(ValueError, match="3 sums but 2 counts"): UnitCentroids(np.eye(3), np.ones(2))


def test_the_format_is_one_the_machine_has():
    assert screen_type("cpu") in ("bfloat16", "float32") and screen_type("cuda") == "float16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the walk on a GPU cannot be tried here")
def test_a_gpu_finds_the_same_pairs():
    rng = np.random.default_rng(0)
    units = unit_rows(rng.normal(size=(500, 256))[rng.integers(0, 500, 20_000)] + .4 * rng.normal(size=(20_000, 256)))
    for last in (None, np.arange(20_000) + 300):
        assert {(i, j) for a, b, _ in close_pairs(units, .18, last, device="cuda") for i, j in zip(a.tolist(), b.tolist())} == pair_set(units, .18, last)


# ---------------------------------------------------------------- estimates from a sample

def every_sample(wide, close, m):
    "Total and variance estimate for every sample of m identities there is."
    for s in combinations(range(len(wide)), m):
        s = list(s)
        yield estimate_total(wide[s], close[np.ix_(s, s)].sum(1), len(wide))


@pytest.mark.parametrize("seed, m", [(0, 4), (1, 5), (2, 6), (3, 8)])
def test_the_estimate_and_its_variance_are_unbiased_over_all_samples_there_are(seed, m):
    "Nine identities, every sample of m: the mean estimate is the truth, and the mean variance estimate the variance. No sampling error, no tolerance."
    rng = np.random.default_rng(seed)
    close = np.triu(rng.random((9, 9)) < (.15, .3, .6, .9)[seed], 1); close = close | close.T
    if seed == 2: close[0, 1:] = close[1:, 0] = True                                            # a hub
    wide = rng.random(9) < .4
    truth = wide.sum() + close.sum()
    totals, variances, intervals = zip(*every_sample(wide, close.astype(int), m))
    assert np.mean(totals) == pytest.approx(truth, rel=1e-12)
    assert np.mean(variances) == pytest.approx(np.var(totals), rel=1e-9)
    assert all(0 <= low <= total <= high <= 81 for total, (low, high) in zip(totals, intervals))


@pytest.mark.parametrize("pairs_per_identity, m", [(.02, 30), (.02, 300), (.02, 1000), (1, 30), (1, 300), (1, 1000), (4, 100)])
def test_the_interval_covers(pairs_per_identity, m):
    "Close pairs spread over 3,000 identities: 95 % or more, with none, a few and many of them in the sample."
    rng, M = np.random.default_rng(m), 3000
    i, j = rng.integers(0, M, (2, int(M * pairs_per_identity))); i, j = i[i != j], j[i != j]
    e = np.unique(np.minimum(i, j) * M + np.maximum(i, j)); i, j = e // M, e % M
    wide, covered = rng.random(M) < .2, []
    truth = wide.sum() + 2 * len(i)
    for _ in range(400):
        inside = np.zeros(M, bool); inside[rng.choice(M, m, replace=False)] = True
        both = inside[i] & inside[j]
        degree = np.bincount(np.r_[i[both], j[both]], minlength=M)
        low, high = estimate_total(wide[inside], degree[inside], M)[2]
        covered.append(low <= truth <= high)
    assert np.mean(covered) > .92                                                               # 95 % less three standard errors of 400 draws


def test_no_pair_in_the_sample_leaves_the_poisson_limit():
    "Nothing seen: up to 3.69 pairs could have been there with 2.5 % chance (Garwood), each standing for 1/p2 pairs of the set."
    nothing = np.zeros(20, int)
    total, variance, (low, high) = estimate_total(nothing > 0, nothing, 10**5)
    assert (total, variance, low) == (0, 0, 0) and high == pytest.approx(2 * 3.689 * 1e5 * 99_999 / (20 * 19), rel=1e-3)


def test_a_sampled_noise_is_the_estimate_of_its_own_table():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 12))[rng.integers(0, 80, 500)][np.repeat(np.arange(500), 4)] + .3 * rng.normal(size=(2000, 12))
    labels = rng.permutation(500)[np.repeat(np.arange(500), 4)] * 2 + 5; labels[:40] = -1
    exact, got = noise(x, labels, .2, .3), noise(x, labels, .2, .3, sample=150, seed=3)
    assert got == noise(x, labels, .2, .3, sample=150, seed=3) != noise(x, labels, .2, .3, sample=150, seed=4)
    assert (got.n_identities, got.n_images, got.sample) == (490, 1960, 150) and len(got.identities) == 150 and "estimated from 150" in repr(got)
    t, whole = got.identities, exact.identities.set_index("label").loc[got.identities.label]
    assert np.array_equal(t.radius, whole.radius) and np.array_equal(t.images, whole.images) and (t.too_close.to_numpy() <= whole.too_close.to_numpy()).all()
    assert got.n_S == pytest.approx((t.too_wide.sum() + t.too_close.sum() * 489 / 149) / 150) == pytest.approx((got.consistency + got.discrimination) / 490)
    many = [noise(x, labels, .2, .3, sample=150, seed=s) for s in range(60)]
    assert np.mean([n.n_S for n in many]) == pytest.approx(exact.n_S, rel=.05) and np.mean([n.interval[0] <= exact.n_S <= n.interval[1] for n in many]) > .85
    assert exact.sample is exact.interval is None and noise(x, labels, .2, .3, sample=490) == noise(x, labels, .2, .3, sample=9999) == exact
    with pytest.raises(ValueError, match="at least 4"): noise(x, labels, sample=3)


def test_sums_that_do_not_fit_lie_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    big = _zeros((1000, 16), in_memory=1000)
    assert isinstance(big, np.memmap) and not big.any() and not list(tmp_path.iterdir())
    big[3] = 1
    assert big.sum() == 16 and not isinstance(_zeros((1000, 16)), np.memmap)
    monkeypatch.setattr("cion_nb.identities.noise._zeros", lambda shape: _zeros(shape, in_memory=0))
    rng = np.random.default_rng(0); x, labels = rng.normal(size=(300, 6)), rng.integers(0, 60, 300)
    on_disk = noise(x, labels, .3, .5); monkeypatch.undo()
    assert on_disk == noise(x, labels, .3, .5)


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("labels, kw, message", [
    ([0, 1], {}, "3 feature rows but 2 labels"),
    ([0, 1, -2], {}, "-2"),
    ([0., 1., 1.], {}, "integer"),
    ([0, 1, 1], dict(sigma_cst=-.1), "sigma_cst"),
    ([0, 1, 1], dict(sigma_drm=2.1), "sigma_drm"),
    ([0, 1, 1], dict(sigma_drm=float("nan")), "sigma_drm"),
    ([0, 1, 1], dict(sample=3), "sample=3: a whole number of identities, at least 4"),
    ([0, 1, 1], dict(sample="a"), "sample='a'"),
    ([0, 1, 1], dict(sample=True), "sample=True"),
])
def test_refused(labels, kw, message):
    with pytest.raises(ValueError, match=message): noise(np.eye(3), np.array(labels), **kw)


@pytest.mark.parametrize("value, word", [(0.0, "zero"), (np.nan, "NaN"), (np.inf, "infinite")])
def test_bad_rows_are_named(value, word):
    x = np.random.default_rng(0).normal(size=(40, 4)); x[[5, 17]] = value
    with pytest.raises(ValueError, match=f"{word}.*rows 5, 17"): noise(x, np.arange(40))


def test_tiny_and_huge_rows_have_a_direction():
    x = np.array([[3e-200, 4e-200], [3e200, 4e200]])
    assert np.allclose(unit_rows(x), [[.6, .8], [.6, .8]])
    assert np.allclose(cosine_distance(unit_rows(x[:1]), unit_centroids(unit_rows(x[1:]), np.array([1]))), 0)


# ---------------------------------------------------------------- identity scores

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 5), st.integers(-1, 4)), max_size=40))
def test_identity_scores_are_counts_of_pairs(rows):
    labels, truth = np.array([r[0] for r in rows], dtype=int), np.array([r[1] for r in rows], dtype=int)
    got = identity_scores(labels, truth)
    known = [(l, t) for l, t in rows if t >= 0]
    judged = [(l, t) for l, t in known if l >= 0]
    def share(a, b): return a / b if b else 1.0
    both = sum(a == b for a, b in combinations(judged, 2))
    assert got.precision == share(both, sum(a[0] == b[0] for a, b in combinations(judged, 2)))
    assert got.recall == share(both, sum(a[1] == b[1] for a, b in combinations(known, 2)))
    p, r = got.precision, got.recall
    assert got.f1 == pytest.approx(2 * p * r / (p + r) if p + r else 0)
    assert got.purity == share(sum(max(sum(x == (l, t) for x in judged) for t in range(5)) for l in range(6)), len(judged))
    assert got.completeness == share(sum(max(sum(x == (l, t) for x in judged) for l in range(6)) for t in range(5)), len(known))
    alone = [l if l >= 0 else 100 + i for i, (l, t) in enumerate(known)]       # a discarded image is an identity of its own
    assert got.adjusted_rand == pytest.approx(adjusted_rand_score([t for _, t in known], alone), abs=1e-9)
    labelled = [t for l, t in rows if l >= 0]
    assert got.coverage == share(len(labelled), len(rows)) and got.junk == pytest.approx(1 - share(len(judged), len(labelled)))


def test_identity_scores_of_many_rows_are_sparse():
    "200,000 rows of 50,000 identities: never N x N, never a dense table."
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 20_000, 200_000); labels = truth * 3 + rng.integers(0, 3, 200_000)
    tracemalloc.start(); got = identity_scores(labels, truth); peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 60e6 and got.precision == got.purity == 1 and .2 < got.recall < .4
    assert isinstance(got, IdentityScores) and "F1" in repr(got)


def test_identity_scores_refuses_vectors_of_two_lengths():
    with pytest.raises(ValueError, match="one length"): identity_scores(np.zeros(3, int), np.zeros(4, int))


def test_noise_is_a_plain_value():
    a = noise(np.eye(3), np.arange(3))
    assert isinstance(a, Noise) and a == noise(np.eye(3), np.arange(3)) and list(a.identities.columns) == ["label", "images", "radius", "too_wide", "too_close"]


# ---------------------------------------------------------------- several labellings at once

@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 80), dim=st.integers(2, 6), groups=st.integers(1, 20), moments=st.integers(1, 4),
       changes=st.sampled_from([0., .05, .5]), sample=st.sampled_from([None, 4, 7]), dtype=st.sampled_from([np.float16, np.float32, np.float64]))
def test_noises_of_several_labellings_are_those_of_each(seed, n, dim, groups, moments, changes, sample, dtype):
    "Images leave, move and come back, identities are joined; what stays is taken over, what changes is computed anew."
    rng = np.random.default_rng(seed)
    x, labels = (rng.normal(size=(n, dim)) + 1e-3).astype(dtype), rng.integers(-1, groups, n)
    labellings = [labels]
    for _ in range(moments - 1):
        labels = np.where(rng.random(n) < changes, rng.integers(-1, groups, n), labels)
        if rng.random() < changes: labels = np.where(labels >= 0, labels // 2, -1)
        labellings.append(rng.permutation(groups)[labels] if rng.random() < .5 and n else labels)      # other numbers; -1 becomes somebody
    assert noises(x, []) == []
    together = noises(x, labellings, .3, .6, sample=sample, seed=seed % 5)
    for got, labels in zip(together, labellings, strict=True):
        want = noise(x, labels, .3, .6, sample=sample, seed=seed % 5)
        assert got == want and got.identities.equals(want.identities)
        if sample is None: assert (got.consistency, got.discrimination) == plain_noise(x, labels, .3, .6)[:2]


def test_an_identity_that_stays_is_computed_once(monkeypatch):
    rng = np.random.default_rng(0)
    x, first = rng.normal(size=(900, 8)), np.arange(900) // 3
    second = first.copy(); second[:30] = -1                          # ten identities go, one loses an image, two are joined
    second[33] = -1; second[second == 20] = 21
    numbers, groups, n = module._pool([first, second - (second > 20) - 10 * (second >= 0)])
    assert n == 300 + 2 and (groups[:, 1] >= 0).sum() == 2 + 6
    seen = []
    real = module.close_pairs
    monkeypatch.setattr(module, "close_pairs", lambda units, sigma, **kw: seen.append((kw["rows"], units.shape[0])) or real(units, sigma, **kw))
    noises(x, [first, second])
    assert seen == [((0, 300), 300), ((0, 2), 289)]


def test_rows_of_odd_length_go_through_blocks():
    "Lengths that squares cannot hold, in a set of several blocks; bad rows are named."
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(3000, 700)), rng.integers(0, 50, 3000)
    x[5] *= 1e-160; x[2900] *= 1e160
    assert noise(x, labels, .9, .9) == noise(unit_rows(x), labels, .9, .9)
    x[7] = 0; x[2800, 3] = np.nan
    with pytest.raises(ValueError, match="7|2800"): noise(x, labels)
