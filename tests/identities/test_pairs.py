"""Close pairs in any format, tile and band, rows that round in the worst way, little memory."""
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cion_nb.identities.noise import noise
from cion_nb.identities.pairs import (
    _least_product,
    _screen,
    close_pairs,
    cosine_distance,
    screen_type,
    unit_centroids,
    unit_rows,
    UnitCentroids,
)


@pytest.mark.parametrize("sigma", [0.05, 0.18, 0.9, 2.0])
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_close_pairs_do_not_depend_on_tiles(sigma, tile):
    rng = np.random.default_rng(5)
    u = unit_rows(rng.normal(size=(90, 5)))
    u[7] = 0
    u[50:60] = u[20:30]
    last = np.maximum.accumulate(rng.integers(0, 90, 90))
    def collect(t):
        return sorted((a, b, c) for i, j, d in close_pairs(u, sigma, last, t)
                      for a, b, c in zip(i.tolist(), j.tolist(), d.tolist()))
    want = [(i, j) for i in range(90) for j in range(i + 1, int(last[i]) + 1)
            if min(2, max(0, 1 - float(u[i] @ u[j]))) < sigma]
    got = collect(tile)
    assert [g[:2] for g in got] == want
    assert np.allclose([g[2] for g in got], [g[2] for g in collect(1024)], atol=1e-12)


def test_a_pair_just_at_the_threshold_is_decided_by_its_own_product():
    """The float32 screen may be off by 1e-5: pairs closer to the threshold than that still come out right, in sparse
    tiles and full ones.
    """
    rng = np.random.default_rng(0)
    a = unit_rows(rng.normal(size=(400, 512)))
    away = unit_rows(rng.normal(size=(400, 512)))
    away -= np.einsum("nd,nd->n", a, away)[:, None] * a
    away = unit_rows(away)
    cosine = .82 + rng.choice([-1e-10, 1e-10, -1e-7, 1e-7], 400)
    b = unit_rows(cosine[:, None] * a + np.sqrt(1 - cosine**2)[:, None] * away)
    units, last = np.concatenate([a, b]), np.full(800, 799)
    linked = {(i, j) for p, q, _ in close_pairs(units, .18, last) for i, j in zip(p.tolist(), q.tolist())}
    assert linked == {(i, 400 + i) for i in range(400) if cosine[i] > .82}


@pytest.mark.slow("hundreds of random worlds")
def test_a_threshold_equal_to_a_distance_excludes_that_pair_in_any_tile():
    "The product of a whole tile may round otherwise than the product of the two rows, which decides."
    units = unit_rows(np.random.default_rng(0).normal(size=(60, 96)))
    for i, j in np.random.default_rng(1).permutation(
            [(i, j) for i in range(60) for j in range(i + 1, 60)])[:250].tolist():
        sigma = float(cosine_distance(units[[i]], units[[j]])[0])
        for threshold, is_linked in ((sigma, False), (np.nextafter(sigma, 2), True)):
            for tile in (4, 64):
                assert any(((a == i) & (b == j)).any()
                           for a, b, _ in close_pairs(units, threshold, tile=tile)) == is_linked


# ---------------------------------------------------------------- the fast product

SCREENS = ("float32", "bfloat16", "float16")


def pair_set(*args, **kw):
    return {(i, j) for a, b, _ in close_pairs(*args, device="cpu", **kw) for i, j in zip(a.tolist(), b.tolist())}


def plain_pairs(u, sigma, last):
    return {(i, j) for i in range(len(u)) for j in range(i + 1, int(last[i]) + 1)
            if min(2, max(0, 1 - float(u[i] @ u[j]))) < sigma}


@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 120), dim=st.integers(1, 40), sigma=st.floats(0, 2),
       screen=st.sampled_from(SCREENS), spread=st.sampled_from([.02, .3, 3.]),
       tile=st.sampled_from([None, 3, 16]), panel=st.sampled_from([1, 700, 2**27]),
       band=st.sampled_from([0, 1, 9, None]), dtype=st.sampled_from([np.float32, np.float64]))
def test_close_pairs_in_any_format_panel_and_band(seed, n, dim, sigma, screen, spread, tile, panel, band, dtype):
    rng = np.random.default_rng(seed)
    u = unit_rows(rng.normal(size=dim) + spread * rng.normal(size=(n, dim))).astype(dtype) if n else np.empty(
        (0, dim), dtype)
    if n > 9:
        u[3] = 0
        u[n // 2] = u[1]
        u[5] = -u[4]
    last = np.full(n, n - 1) if band is None else np.minimum(
        np.maximum.accumulate(np.arange(n) + rng.integers(0, band + 1, n)), n - 1)
    exact = u.astype(np.float64)
    got, want = pair_set(u, sigma, None if band is None else last, tile=tile, screen=screen,
                         panel_bytes=panel), plain_pairs(exact, sigma, last)
    # the oracle's own dot product may round otherwise
    assert all(abs(1 - exact[i] @ exact[j] - sigma) < 1e-12 for i, j in got ^ want)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("k, scale", [(1017, .5), (1017, 1.), (1016, .5), (1023, .5), (1000, .75)])
def test_rows_that_round_in_the_worst_way_are_not_lost(screen, k, scale):
    """1/sqrt(1017) lies just below the middle between two bfloat16 numbers, and so does half of it: all values of both
    rows are
    rounded down, and the fast product of a pair at the threshold comes out as much too small as it can."""
    rng = np.random.default_rng(k)
    pairs, dim = 60, k + 20
    offset = rng.choice([-1e-10, 1e-10, -1e-6, 1e-6], pairs)
    cosine = np.minimum(scale + offset, 1 - 1e-6 + offset)
    a, b = np.zeros((pairs, dim)), np.zeros((pairs, dim))
    for p in range(pairs):
        sign, column = rng.choice([-1., 1.], k), rng.permutation(dim)
        a[p, column[:k]] = sign / np.sqrt(k)
        b[p, column[:k]] = cosine[p] * sign / np.sqrt(k)
        b[p, column[k]] = np.sqrt(1 - cosine[p]**2)
    sigma = 1 - scale if scale < 1 else 1e-6
    units = np.concatenate([a, b])
    got = {(i, j) for i, j in pair_set(units, sigma, screen=screen) if j == i + pairs}
    assert got == {(p, p + pairs) for p in range(pairs) if cosine_distance(a[[p]], b[[p]])[0] < sigma} == {
        (p, p + pairs) for p in range(pairs) if offset[p] > 0}
    # without the slack they would all be lost
    if screen == "bfloat16" and k == 1017:
        p, q = _screen(a, 0, pairs, screen, "cpu"), _screen(b, 0, pairs, screen, "cpu")
        assert ((p.light.float() * q.light.float()).sum(1).numpy() < cosine - .003).all()


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("dim", [1, 31, 768, 4096])
def test_the_bound_holds_on_every_product(screen, dim):
    "Rows of many kinds: dense, sparse, of one sign, tiny values, not even of length 1."
    rng = np.random.default_rng(dim)
    rows = [rng.normal(size=(30, dim)), np.abs(rng.normal(size=(30, dim))),
            np.where(rng.random((30, dim)) < .9, 0, rng.normal(size=(30, dim))), np.exp(8 * rng.normal(size=(30, dim))),
            np.ones((2, dim))]
    u = unit_rows(np.concatenate(rows) + 1e-30) * rng.uniform(.2, 3, (122, 1))
    s = _screen(u, 0, len(u), screen, "cpu")
    light = s.light.double().numpy()
    assert (s.error >= np.linalg.norm(u - light, axis=1)).all() and (s.length >= np.linalg.norm(light, axis=1)).all()
    fast = (s.light @ s.light.T).double().numpy()
    # the product is rounded to the format, too
    half_a_step = np.abs(fast) * torch.finfo(s.light.dtype).eps
    slack = (s.error[:, None] * (s.length + s.error) + s.length[:, None] * s.error
             + (dim + 8) * 2.0**-22 * s.length[:, None] * s.length)
    assert (np.abs(fast - u @ u.T) <= slack + half_a_step).all()


@pytest.mark.parametrize("screen", SCREENS)
def test_the_limit_is_a_number_of_the_format_and_below_the_bound(screen):
    "Rounded down, so that it holds however the machine rounds its sums."
    s = _screen(unit_rows(np.random.default_rng(0).normal(size=(5, 64))), 0, 5, screen, "cpu")
    for sigma in np.random.default_rng(1).uniform(0, 2, 200):
        e, l = s.error.max(), s.length.max()
        t, got = 1 - sigma - 2 * e * l - e * e - 72 * 2.0**-22 * l * l, _least_product(s, s, sigma)
        assert got <= t + 1e-15 and t - got <= abs(t) * torch.finfo(s.light.dtype).eps + 1e-7
        assert torch.tensor(got, dtype=s.light.dtype).item() == got


def test_formats_settings_and_sources_give_the_same_pairs():
    """Panels, steps of waiting pairs and full tiles are all reached; a global setting that lets torch shorten float32
    changes nothing.
    """
    rng = np.random.default_rng(0)
    people = rng.normal(size=(900, 48))
    sums = people[rng.integers(0, 900, 6000)] + .3 * rng.normal(size=(6000, 48)) + .2
    # a corner where every pair is close
    sums[:700] = people[0] + .15 * rng.normal(size=(700, 48))
    counts = rng.integers(1, 9, 6000)
    units = unit_centroids(sums, counts)
    def ordered(**kw):
        i, j, d = map(np.concatenate, zip(*close_pairs(kw.pop("units", units), .18, device="cpu", **kw)))
        o = np.lexsort((j, i))
        return i[o], j[o], d[o]
    want = ordered(screen="float32", tile=512)
    assert len(want[0]) > 2**18
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = ([ordered(screen=s, tile=t, panel_bytes=b) for s in SCREENS for t, b in ((None, 2**27), (100, 2**15))]
                 + [ordered(units=UnitCentroids(sums, counts), panel_bytes=2**16)])
    finally: torch.set_float32_matmul_precision(before)
    for got in found:
        assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])
        assert np.allclose(got[2], want[2], atol=1e-12, rtol=0)


def test_rows_from_a_memory_map(tmp_path):
    units = unit_rows(np.random.default_rng(0).normal(size=(300, 4))).astype(np.float32)
    np.save(tmp_path / "u.npy", units)
    assert pair_set(np.load(tmp_path / "u.npy", mmap_mode="r"), .18) == pair_set(units, .18) == pair_set(
        units.astype(np.float64), .18)


def test_neither_the_rows_nor_the_pairs_are_ever_held_as_a_whole():
    "24,000 x 256 made from sums as they are needed: 49 MB as float64, 12 MB as bfloat16, 288 million pairs."
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(size=(24_000, 256)).astype(np.float32), np.full(24_000, 3)
    list(close_pairs(UnitCentroids(sums[:500], counts[:500]), .18, device="cpu"))
    tracemalloc.start()
    for _ in close_pairs(UnitCentroids(sums, counts), .18, device="cpu", panel_bytes=2**21): pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # torch's own panels (2 x 2 MB) are not traced
    assert peak < 32e6


def test_rows_that_are_not_finite_are_named():
    u = np.eye(6)
    u[4, 1] = np.nan
    with pytest.raises(ValueError, match="finite: 4 are not"): list(close_pairs(u, .18, device="cpu"))
    with pytest.raises(ValueError, match="3 sums but 2 counts"): UnitCentroids(np.eye(3), np.ones(2))


def test_the_format_is_one_the_machine_has():
    assert screen_type("cpu") in ("bfloat16", "float32") and screen_type("cuda") == "float16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the walk on a GPU cannot be tried here")
def test_a_gpu_finds_the_same_pairs():
    rng = np.random.default_rng(0)
    units = unit_rows(rng.normal(size=(500, 256))[rng.integers(0, 500, 20_000)] + .4 * rng.normal(size=(20_000, 256)))
    for last in (None, np.arange(20_000) + 300):
        assert {(i, j) for a, b, _ in close_pairs(units, .18, last, device="cuda")
                for i, j in zip(a.tolist(), b.tolist())} == pair_set(units, .18, last)


def test_rows_of_odd_length_go_through_blocks():
    "Lengths that squares cannot hold, in a set of several blocks; bad rows are named."
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(3000, 700)), rng.integers(0, 50, 3000)
    x[5] *= 1e-160
    x[2900] *= 1e160
    assert noise(x, labels, .9, .9) == noise(unit_rows(x), labels, .9, .9)
    x[7] = 0
    x[2800, 3] = np.nan
    with pytest.raises(ValueError, match="7|2800"): noise(x, labels)
