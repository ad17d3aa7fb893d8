"""Searches in parts, on files and through cells give the lists of one search; bad input is named."""
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from examples import people
from oracles import check_lists
from scipy.sparse import csr_matrix

from cion_nb.identities import neighbours as module
from cion_nb.identities.neighbours import (
    cluster,
    dbscan,
    hdbscan,
    jaccard,
    knn,
    knn_approximate,
    knn_part,
    merge_neighbours,
    Neighbours,
    recall,
    rerank,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed")


@pytest.mark.slow("a size that fills many tiles")
@pytest.mark.parametrize("n, half_width", [(4700, None), (5000, 700), (5000, 9)])
def test_lists_over_many_tiles_and_threads(n, half_width):
    x = people(n, 16, copies=50)
    torch.set_num_threads(2)
    check_lists(x, knn(x, 6, half_width, device="cpu"), 6, half_width)


@pytest.mark.parametrize("half_width", [None, 30])
def test_the_gpu_step_gives_the_same_lists(half_width, monkeypatch):
    x = people(500, 16, copies=20)
    scanned = knn(x, 8, half_width, device="cpu")
    search = module._search_torch
    monkeypatch.setattr(module, "_search_torch", lambda *args: search(*args, keep=module._keep_topk))
    by_topk = knn(x, 8, half_width, device="cpu")
    check_lists(x, by_topk, 8, half_width)
    assert np.allclose(scanned.distance, by_topk.distance, atol=1e-5)


@needs_faiss
def test_faiss_agrees():
    x = people(700, 24, copies=30)
    ours, theirs = knn(x, 9, backend="torch", device="cpu"), knn(x, 9, backend="faiss", device="cpu")
    assert theirs.backend == "faiss cpu" and ours.backend == "torch cpu"
    check_lists(x, theirs, 9)
    assert np.allclose(ours.distance, theirs.distance, atol=1e-5)
    for a, b, at in zip(ours.index, theirs.index, ours.distance):                      # who differs ties with the last
        assert (at[~np.isin(a, b)] >= at[-1] - 1e-5).all()


def test_inputs_of_every_kind_give_the_same(tmp_path):
    x = people(200, 12, dtype=np.float16)
    np.save(tmp_path / "x.npy", x)
    first = knn(x, 5)
    for other in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(x), np.asfortranarray(x),
                  x.astype(np.float32) * 37, torch.from_numpy(x.astype(np.float64)).requires_grad_()):
        assert np.allclose(knn(other, 5).distance, first.distance, atol=1e-6)
        assert (knn(other, 5).index == first.index).all()
    assert knn(torch.from_numpy(x).bfloat16(), 5).k == 5
    assert knn(np.eye(4, dtype=np.int64) + 1, 2).k == 2


def test_reduced_precision_of_the_caller_does_not_reach_the_search():
    x = people(600, 64, scatter=.1)
    first = knn(x, 9, device="cpu")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16): again = knn(x, 9, device="cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally: torch.set_float32_matmul_precision(before)
    assert (again.index == first.index).all()


# ---------------------------------------------------------------- bad input

X = people(50, 6)


@pytest.mark.parametrize("call, message", [
    (lambda: knn(X, 0), "k=0"), (lambda: knn(X, 51), "1 … 50"), (lambda: knn(X[0], 3), "matrix"),
    (lambda: knn(X[:0], 1), "matrix"), (lambda: knn(X.astype(str), 3), "matrix"),
    (lambda: knn(X, 3, half_width=-1), "half_width=-1"), (lambda: knn(X, 2.5), "k=2.5"),
    (lambda: knn(X, 3, half_width=2.5), "half_width=2.5"), (lambda: dbscan(np.zeros((3, 3)), .5, 2), "scipy sparse"),
    (lambda: hdbscan(np.zeros((3, 3))), "scipy sparse"), (lambda: recall(knn(X, 3), X[:20]), "50 lists, 20 rows"),
    (lambda: knn(X, 3, backend="annoy"), "auto, torch, faiss"),
    (lambda: knn(X, 3, half_width=5, backend="faiss"), "band"),
    (lambda: jaccard(X, 2, 1), "k1=2"), (lambda: jaccard(X, 50), "k1=50 with 50 rows"),
    (lambda: jaccard(X, 10, 0), "k2=0"), (lambda: jaccard(X, 10, 11), "k2=11"),
    (lambda: jaccard(X, 10, 3, knn(X, 9)), r"knn\(features, 10\)"),
    (lambda: jaccard(X, 5, 3, knn(X[:40], 9)), "40 rows, features have 50"),
    (lambda: jaccard(X, 5, 3, knn(X, 9, half_width=6), half_width=7), "half_width=7"),
    (lambda: jaccard(X, 5, 3, knn(X, 9), half_width=7), "half_width=None"),
    (lambda: jaccard(X, 5, 3, Neighbours(knn(X, 9).index[:, ::-1].copy(), knn(X, 9).distance, "mine")),
     "begin with the row itself"),
    (lambda: cluster(X, 5, 3, eps=1), "eps=1"), (lambda: dbscan(csr_matrix((3, 4)), .5, 2), "square"),
    (lambda: dbscan(csr_matrix((3, 3)), 0, 2), "eps=0"), (lambda: dbscan(csr_matrix((3, 3)), .5, 0), "min_samples=0"),
    (lambda: rerank(X[:5], X[5:, :4], 5, 2), "6 dimensions, gallery_features 4"),
    (lambda: rerank(X[:5], X[5:], 49), "k1=49"), (lambda: rerank(X[:5], X[5:], 5, 7), "k2=7"),
    (lambda: rerank(X[:5], X[5:], 5, 2, 1.5), "lambda_value=1.5")])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [0, np.nan, np.inf, -np.inf])
def test_rows_without_direction_are_named(value, dtype):
    x = X.astype(dtype)
    x[7] = value
    x[31] = value
    for call in (lambda: knn(x, 3), lambda: cluster(x, 5, 3), lambda: rerank(X[:9], x, 5, 2)):
        with pytest.raises(ValueError, match="rows 7, 31"): call()


@pytest.mark.parametrize("probes,lists", [(1, 60), (3, 20), (1000, 20)])
def test_approximate_lists_hold_what_their_cells_hold(probes, lists):
    """Short lists end in -1; members, distances and order are those of the exact search among what was found;
    everything is found where all cells are looked into.
    """
    pytest.importorskip("faiss")
    from cion_nb.identities.neighbours import cluster, knn_approximate, recall
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(25, 12)).repeat(12, 0) + .5 * rng.normal(size=(300, 12))).astype(np.float32)
    x[7] = x[8]
    near, exact = knn_approximate(x, 10, probes, lists), knn(x, 10, device="cpu")
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    d = 1 - u @ u.T
    for i, (index, distance) in enumerate(zip(near.index, near.distance)):
        n = (index >= 0).sum()
        assert index[0] == i and (index[n:] == -1).all() and np.isinf(distance[n:]).all() and len(set(index[:n])) == n
        np.testing.assert_allclose(distance[1:n], d[i, index[1:n]], atol=1e-5)
        assert (np.diff(distance[:n]) >= 0).all()
    share = recall(near, x, sample=300)
    if probes == 1000: assert share == 1 and (near.index == exact.index).all()
    else: assert .2 < share < 1
    labels = cluster(x, 10, 3, neighbours=near)
    assert labels.shape == (300,) and labels.max() >= 2
    with pytest.raises(ValueError, match="whole number in 1 … 300"): knn_approximate(x, 301)


# ---------------------------------------------------------------- the work in parts

@pytest.mark.parametrize("n, parts", [(40, 1), (300, 4), (5000, 3), (9000, 2)])
def test_parts_together_are_the_whole_search(n, parts):
    x = people(n, 16, copies=min(30, n // 3))
    whole, found = knn(x, 9, device="cpu"), [knn_part(x, 9, p, parts, "cpu") for p in range(parts)]
    together = merge_neighbours(found)
    assert (together.index == whole.index).all() and (together.distance == whole.distance).all()
    for p in found: assert (p.index[:, 0] == np.arange(n)).all() and ((p.index < 0) == np.isinf(p.distance)).all()
    if n > 4096:
        assert any((p.index[:, 1:] < 0).any() or not (p.index == whole.index).all() for p in found), "a part is a part"


def test_lists_of_parts_that_hold_little_are_merged_like_a_sort():
    rng = np.random.default_rng(0)
    n, k, parts = 200, 6, 4
    for _ in range(20):
        made = [{j: np.float32(rng.integers(0, 4)) for j in rng.permutation(n)[:rng.integers(0, 9)]}
                for _ in range(parts)]
        owner = {}                                                          # a pair belongs to one part
        made = [{j: d for j, d in part.items() if owner.setdefault(j, p) == p and j != 3}
                for p, part in enumerate(made)]
        index, distance = np.full((parts, n, k), -1, np.int32), np.full((parts, n, k), np.inf, np.float32)
        index[:, :, 0], distance[:, :, 0] = np.arange(n), 0
        for p, part in enumerate(made):
            for q, (d, j) in enumerate(sorted((d, j) for j, d in part.items())[:k - 1]):
                index[p, 3, q + 1], distance[p, 3, q + 1] = j, d
        best = [(np.float32(0), 3)] + sorted((d, j) for part in made for j, d in part.items())[:k - 1]
        out = merge_neighbours([Neighbours(i, d, "", part=(p, parts)) for p, (i, d) in enumerate(zip(index, distance))])
        assert [j for j in out.index[3] if j >= 0] == [j for _, j in best]
        assert [d for d in out.distance[3] if np.isfinite(d)] == [d for d, _ in best]


@needs_faiss
def test_parts_of_the_approximate_search_are_the_whole():
    x = people(3000, 24)
    whole = knn_approximate(x, 8, 3)
    together = merge_neighbours([knn_part(x, 8, p, 7, probes=3) for p in range(7)])
    assert (together.index == whole.index).all() and (together.distance == whole.distance).all()
    few = merge_neighbours([knn_part(x[:5], 3, p, 8, probes=3) for p in range(8)])      # more parts than rows
    assert (few.index == knn_approximate(x[:5], 3, 3).index).all()


def test_parts_that_do_not_fit_are_named():
    x = people(50, 8)
    with pytest.raises(ValueError, match="part=2 of 2"): knn_part(x, 5, 2, 2)
    with pytest.raises(ValueError, match="k=51"): knn_part(x, 51, 0, 2)
    a, b = knn_part(x, 5, 0, 2), knn_part(x, 5, 1, 2)
    with pytest.raises(ValueError, match="same rows and lengths"): merge_neighbours([a, knn_part(x, 6, 1, 2)])
    for wrong in ([a], [a, a], [a, b, b], [], [a, knn_part(x, 5, 1, 3)]):
        with pytest.raises(ValueError, match="each once"): merge_neighbours(wrong)
    with pytest.raises(ValueError, match="part 0 of 2: merge_neighbours"): jaccard(x, 5, 2, a)
    assert (merge_neighbours([b, a]).index == knn(x, 5, device="cpu").index).all()
    assert merge_neighbours([knn(x, 5, half_width=7)]).half_width == 7
    beyond = knn(x, 5)
    beyond.index[3, 2] = 50
    with pytest.raises(ValueError, match="beyond the 50"): jaccard(x, 5, 2, beyond)
