"""Eq. 1-3 and the identity scores against plain loops written from the formulas."""
import math
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import adjusted_rand_score

from cion_nb.noise import IdentityScores, Noise, close_pairs, cosine_distance, identity_scores, noise, unit_centroids, unit_rows


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


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("labels, kw, message", [
    ([0, 1], {}, "3 feature rows but 2 labels"),
    ([0, 1, -2], {}, "-2"),
    ([0., 1., 1.], {}, "integer"),
    ([0, 1, 1], dict(sigma_cst=-.1), "sigma_cst"),
    ([0, 1, 1], dict(sigma_drm=2.1), "sigma_drm"),
    ([0, 1, 1], dict(sigma_drm=float("nan")), "sigma_drm"),
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
