"""Eq. 1-3 against plain loops, estimates from samples, noises of several labellings."""
import math
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cion_nb.identities import noise as module
from cion_nb.identities.noise import estimate_total, Noise, noise, noises
from cion_nb.identities.pairs import _zeros, cosine_distance, unit_centroids, unit_rows

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

@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 60), dim=st.integers(2, 9), groups=st.integers(1, 12),
       spread=st.sampled_from([0.1, 0.5, 2.0]),
       sigma_cst=st.floats(0.01, 1.9), sigma_drm=st.floats(0.01, 1.9),
       dtype=st.sampled_from([np.float16, np.float32, np.float64]), copies=st.booleans())
def test_noise_is_the_formula(seed, n, dim, groups, spread, sigma_cst, sigma_drm, dtype, copies):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, groups, n) * 3                                  # gaps in the numbering
    labels[labels < 0] = -1
    # not normalised
    x = (rng.normal(size=(groups + 1, dim))[labels // 3] + spread
         * rng.normal(size=(n, dim))) * rng.uniform(.1, 9, (n, 1))
    x = x.astype(dtype)
    # the same vectors again, under other labels
    if copies and n > 4: x[n // 2:] = x[:n - n // 2]
    got = noise(x, labels, sigma_cst, sigma_drm)
    assert (got.consistency, got.discrimination) == plain_noise(x, labels, sigma_cst, sigma_drm)[:2]
    assert got.n_S == pytest.approx(plain_noise(x, labels, sigma_cst, sigma_drm)[2])
    assert got.n_identities == len(set(labels[labels >= 0])) and got.n_images == (labels >= 0).sum()
    assert got.identities.too_close.sum() == got.discrimination and got.identities.label.is_monotonic_increasing


@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 30), sigma=st.sampled_from([0.0, 1.0, 2.0]))
def test_exact_thresholds_on_axes(seed, n, sigma):
    "Distances of axis vectors are exactly 0, 1 or 2, so the step's side at zero is visible."
    rng = np.random.default_rng(seed)
    x = np.eye(3)[rng.integers(0, 3, n)] * rng.choice([-1., 1.], (n, 1))
    # means of several axes are 1 or 2 apart only but for rounding
    labels = np.arange(n) if seed % 2 or sigma else rng.integers(0, 3, n)
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
    x = np.eye(3)
    x[1] = np.nan
    assert noise(x, np.array([0, -1, 1])).n_images == 2


def test_many_identities_in_tiles_and_little_memory():
    "6,000 identities: several tiles; a matrix of all pairs would take 144 MB in float32 alone."
    rng = np.random.default_rng(0)
    m, dim = 6000, 24
    centres = rng.normal(size=(m, dim))
    centres[1::3] = centres[::3] + .3 * rng.normal(size=(m // 3, dim))
    labels = rng.permutation(np.repeat(np.arange(m), 2))
    x = (centres[labels] + .4 * rng.normal(size=(2 * m, dim))).astype(np.float32)
    tracemalloc.start()
    got = noise(x, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 90e6
    units = unit_rows(x)
    c = np.zeros((m, dim))
    np.add.at(c, labels, units)
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    close = sum(int((1 - c[i:i + 500] @ c.T < .18).sum()) for i in range(0, m, 500)) - m
    wide = np.zeros(m)
    np.maximum.at(wide, labels, 1 - (units * c[labels]).sum(1))
    assert (got.discrimination, got.consistency) == (close, int((wide >= .2).sum())) and close > 100


# ---------------------------------------------------------------- estimates from a sample

def every_sample(wide, close, m):
    "Total and variance estimate for every sample of m identities there is."
    for s in combinations(range(len(wide)), m):
        s = list(s)
        yield estimate_total(wide[s], close[np.ix_(s, s)].sum(1), len(wide))


@pytest.mark.parametrize("seed, m", [(0, 4), (1, 5), (2, 6), (3, 8)])
def test_the_estimate_and_its_variance_are_unbiased_over_all_samples_there_are(seed, m):
    """Nine identities, every sample of m: the mean estimate is the truth, and the mean variance estimate the variance.
    No sampling error, no tolerance.
    """
    rng = np.random.default_rng(seed)
    close = np.triu(rng.random((9, 9)) < (.15, .3, .6, .9)[seed], 1)
    close = close | close.T
    if seed == 2: close[0, 1:] = close[1:, 0] = True                                            # a hub
    wide = rng.random(9) < .4
    truth = wide.sum() + close.sum()
    totals, variances, intervals = zip(*every_sample(wide, close.astype(int), m))
    assert np.mean(totals) == pytest.approx(truth, rel=1e-12)
    assert np.mean(variances) == pytest.approx(np.var(totals), rel=1e-9)
    assert all(0 <= low <= total <= high <= 81 for total, (low, high) in zip(totals, intervals))


@pytest.mark.parametrize("pairs_per_identity, m",
                         [(.02, 30), (.02, 300), (.02, 1000), (1, 30), (1, 300), (1, 1000), (4, 100)])
def test_the_interval_covers(pairs_per_identity, m):
    "Close pairs spread over 3,000 identities: 95 % or more, with none, a few and many of them in the sample."
    rng, M = np.random.default_rng(m), 3000
    i, j = rng.integers(0, M, (2, int(M * pairs_per_identity)))
    i, j = i[i != j], j[i != j]
    e = np.unique(np.minimum(i, j) * M + np.maximum(i, j))
    i, j = e // M, e % M
    wide, covered = rng.random(M) < .2, []
    truth = wide.sum() + 2 * len(i)
    for _ in range(400):
        inside = np.zeros(M, bool)
        inside[rng.choice(M, m, replace=False)] = True
        both = inside[i] & inside[j]
        degree = np.bincount(np.r_[i[both], j[both]], minlength=M)
        low, high = estimate_total(wide[inside], degree[inside], M)[2]
        covered.append(low <= truth <= high)
    # 95 % less three standard errors of 400 draws
    assert np.mean(covered) > .92


def test_no_pair_in_the_sample_leaves_the_poisson_limit():
    """Nothing seen: up to 3.69 pairs could have been there with 2.5 % chance (Garwood), each standing for 1/p2 pairs of
    the set.
    """
    nothing = np.zeros(20, int)
    total, variance, (low, high) = estimate_total(nothing > 0, nothing, 10**5)
    assert (total, variance, low) == (0, 0, 0) and high == pytest.approx(2 * 3.689 * 1e5 * 99_999 / (20 * 19), rel=1e-3)


def test_a_sampled_noise_is_the_estimate_of_its_own_table():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 12))[rng.integers(0, 80, 500)][np.repeat(np.arange(500), 4)] + .3 * rng.normal(
        size=(2000, 12))
    labels = rng.permutation(500)[np.repeat(np.arange(500), 4)] * 2 + 5
    labels[:40] = -1
    exact, got = noise(x, labels, .2, .3), noise(x, labels, .2, .3, sample=150, seed=3)
    assert got == noise(x, labels, .2, .3, sample=150, seed=3) != noise(x, labels, .2, .3, sample=150, seed=4)
    assert (got.n_identities, got.n_images, got.sample) == (490, 1960, 150) and len(got.identities) == 150
    assert "estimated from 150" in repr(got)
    t, whole = got.identities, exact.identities.set_index("label").loc[got.identities.label]
    assert np.array_equal(t.radius, whole.radius) and np.array_equal(t.images, whole.images)
    assert (t.too_close.to_numpy() <= whole.too_close.to_numpy()).all()
    assert got.n_S == pytest.approx((t.too_wide.sum() + t.too_close.sum() * 489 / 149) / 150) == pytest.approx(
        (got.consistency + got.discrimination) / 490)
    many = [noise(x, labels, .2, .3, sample=150, seed=s) for s in range(60)]
    assert np.mean([n.n_S for n in many]) == pytest.approx(exact.n_S, rel=.05)
    assert np.mean([n.interval[0] <= exact.n_S <= n.interval[1] for n in many]) > .85
    assert exact.sample is exact.interval is None
    assert noise(x, labels, .2, .3, sample=490) == noise(x, labels, .2, .3, sample=9999) == exact
    with pytest.raises(ValueError, match="at least 4"): noise(x, labels, sample=3)


def test_sums_that_do_not_fit_lie_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    big = _zeros((1000, 16), in_memory=1000)
    assert isinstance(big, np.memmap) and not big.any() and not list(tmp_path.iterdir())
    big[3] = 1
    assert big.sum() == 16 and not isinstance(_zeros((1000, 16)), np.memmap)
    monkeypatch.setattr("cion_nb.identities.pairs._zeros", lambda shape: _zeros(shape, in_memory=0))
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(300, 6)), rng.integers(0, 60, 300)
    on_disk = noise(x, labels, .3, .5)
    monkeypatch.undo()
    assert on_disk == noise(x, labels, .3, .5)


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("labels, kw, message", [
    ([0, 1], {}, "3 feature rows but 2 labels"), ([0, 1, -2], {}, "-2"), ([0., 1., 1.], {}, "integer"),
    ([0, 1, 1], dict(sigma_cst=-.1), "sigma_cst"), ([0, 1, 1], dict(sigma_drm=2.1), "sigma_drm"),
    ([0, 1, 1], dict(sigma_drm=float("nan")), "sigma_drm"),
    ([0, 1, 1], dict(sample=3), "sample=3: a whole number of identities, at least 4"),
    ([0, 1, 1], dict(sample="a"), "sample='a'"), ([0, 1, 1], dict(sample=True), "sample=True")])
def test_refused(labels, kw, message):
    with pytest.raises(ValueError, match=message): noise(np.eye(3), np.array(labels), **kw)


@pytest.mark.parametrize("value, word", [(0.0, "zero"), (np.nan, "NaN"), (np.inf, "infinite")])
def test_bad_rows_are_named(value, word):
    x = np.random.default_rng(0).normal(size=(40, 4))
    x[[5, 17]] = value
    with pytest.raises(ValueError, match=f"{word}.*rows 5, 17"): noise(x, np.arange(40))


def test_tiny_and_huge_rows_have_a_direction():
    x = np.array([[3e-200, 4e-200], [3e200, 4e200]])
    assert np.allclose(unit_rows(x), [[.6, .8], [.6, .8]])
    assert np.allclose(cosine_distance(unit_rows(x[:1]), unit_centroids(unit_rows(x[1:]), np.array([1]))), 0)


def test_noise_is_a_plain_value():
    a = noise(np.eye(3), np.arange(3))
    assert isinstance(a, Noise) and a == noise(np.eye(3), np.arange(3))
    assert list(a.identities.columns) == ["label", "images", "radius", "too_wide", "too_close"]


# ---------------------------------------------------------------- several labellings at once

@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 80), dim=st.integers(2, 6), groups=st.integers(1, 20),
       moments=st.integers(1, 4),
       changes=st.sampled_from([0., .05, .5]), sample=st.sampled_from([None, 4, 7]),
       dtype=st.sampled_from([np.float16, np.float32, np.float64]))
def test_noises_of_several_labellings_are_those_of_each(seed, n, dim, groups, moments, changes, sample, dtype):
    "Images leave, move and come back, identities are joined; what stays is taken over, what changes is computed anew."
    rng = np.random.default_rng(seed)
    x, labels = (rng.normal(size=(n, dim)) + 1e-3).astype(dtype), rng.integers(-1, groups, n)
    labellings = [labels]
    for _ in range(moments - 1):
        labels = np.where(rng.random(n) < changes, rng.integers(-1, groups, n), labels)
        if rng.random() < changes: labels = np.where(labels >= 0, labels // 2, -1)
        # other numbers; -1 becomes somebody
        labellings.append(rng.permutation(groups)[labels] if rng.random() < .5 and n else labels)
    assert noises(x, []) == []
    together = noises(x, labellings, .3, .6, sample=sample, seed=seed % 5)
    for got, labels in zip(together, labellings, strict=True):
        want = noise(x, labels, .3, .6, sample=sample, seed=seed % 5)
        assert got == want and got.identities.equals(want.identities)
        if sample is None: assert (got.consistency, got.discrimination) == plain_noise(x, labels, .3, .6)[:2]


def test_an_identity_that_stays_is_computed_once(monkeypatch):
    rng = np.random.default_rng(0)
    x, first = rng.normal(size=(900, 8)), np.arange(900) // 3
    second = first.copy()
    second[:30] = -1  # ten identities go, one loses an image, two are joined
    second[33] = -1
    second[second == 20] = 21
    numbers, groups, n = module._pool([first, second - (second > 20) - 10 * (second >= 0)])
    assert n == 300 + 2 and (groups[:, 1] >= 0).sum() == 2 + 6
    seen = []
    real = module.close_pairs
    monkeypatch.setattr(module, "close_pairs", lambda units, sigma, **kw: seen.append((kw["rows"], units.shape[0]))
                        or real(units, sigma, **kw))
    noises(x, [first, second])
    assert seen == [((0, 300), 300), ((0, 2), 289)]
