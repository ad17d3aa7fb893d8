"""The sparse room against plain dense oracles written from the definitions."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.cluster import DBSCAN

from cion_nb.identities import neighbours as module
from cion_nb.identities.neighbours import (
    Neighbours,
    cluster,
    dbscan,
    hdbscan,
    jaccard,
    knn,
    knn_approximate,
    knn_part,
    merge_neighbours,
    recall,
    rerank,
)

from examples import people


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def has_faiss():
    try: import faiss  # noqa: F401
    except ImportError: return False
    return True


needs_faiss = pytest.mark.skipif(not has_faiss(), reason="faiss is not installed")


# ---------------------------------------------------------------- the oracle

def cosine_distances(x):
    x = np.asarray(x, np.float64); x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.maximum(1 - x @ x.T, 0)


def apart(n): return np.abs(np.subtract.outer(np.arange(n), np.arange(n)))


def lists(d, k, half_width=None):
    d = d.copy(); np.fill_diagonal(d, -1)
    if half_width is not None: d[apart(len(d)) > half_width] = np.inf
    index = np.argsort(d, axis=1, kind="stable")[:, :k]
    return np.where(np.isinf(np.take_along_axis(d, index, 1)), -1, index)


def memberships(d, index, k, half, k2, scale):
    "(n, n) weights, one Python set at a time."
    n = len(d); index = [[int(j) for j in row if j >= 0] for row in index]
    def R(i, k): return [j for j in index[i][:k] if i in index[j][:k]]
    V = np.zeros((n, n))
    for i in range(n):
        own = R(i, k); members = set(own)
        for c in own:
            H = R(c, half)
            if len(set(H) & set(own)) > 2 / 3 * len(H): members |= set(H)
        members = sorted(members); w = np.exp(-scale[i] * d[i, members]); V[i, members] = w / w.sum()
    return np.stack([V[row[:k2]].mean(0) for row in index])


def compare(V, W):
    shared = np.stack([np.minimum(row, W).sum(1) for row in V])
    return np.maximum(1 - shared / (2 - shared), 0)


def jaccard_oracle(x, neighbours, k1, k2):
    n = len(x); d = cosine_distances(x)
    V = memberships(d, neighbours.index, k1, int(np.around(k1 / 2)) + 1, k2, np.full(n, 2.0))
    D = compare(V, V)
    if neighbours.half_width is not None: D[apart(n) > neighbours.half_width] = 1
    return D


def dense(J):
    D = np.ones(J.shape); D[np.repeat(np.arange(len(D)), np.diff(J.indptr)), J.indices] = J.data
    return D


def dbscan_oracle(D, eps, min_samples):
    n = len(D); near = D <= eps; np.fill_diagonal(near, True)
    is_core = near.sum(1) >= min_samples
    label = np.where(is_core, np.arange(n), n)
    while True:
        new = np.where(is_core, np.where(near & is_core, label, n).min(1), n)
        if (new == label).all(): break
        label = new
    names = {v: i for i, v in enumerate(sorted(set(label[is_core].tolist())))}
    border = np.where(near & is_core, label, n).min(1)
    return np.array([names.get(int(v), -1) for v in border])


def rerank_oracle(query, gallery, k1, k2, lambda_value):
    d = cosine_distances(np.concatenate([np.asarray(query, np.float64), np.asarray(gallery, np.float64)])); scaled = d / d.max(1, keepdims=True); n = len(query)
    V = memberships(scaled, lists(d, k1 + 1), k1 + 1, int(np.around(k1 / 2)) + 1, k2, np.ones(len(d)))
    return (1 - lambda_value) * compare(V[:n], V[n:]) + lambda_value * scaled[:n, n:]


# ---------------------------------------------------------------- k nearest neighbours

def check_lists(x, near, k, half_width=None, tolerance=1e-5):
    "Distances agree; sets agree except among ties; the row first; the order is (distance, index)."
    d = cosine_distances(x); index = lists(d, k, half_width); missing = index < 0
    assert near.index.shape == near.distance.shape == index.shape and near.distance.dtype == np.float32
    assert ((near.index < 0) == missing).all() and (np.isinf(near.distance) == missing).all()
    assert np.allclose(near.distance[~missing], np.take_along_axis(d, near.index, 1)[~missing], atol=1e-6)
    assert np.allclose(near.distance[~missing], np.take_along_axis(d, index, 1)[~missing], atol=tolerance)
    assert (near.index[:, 0] == np.arange(len(x))).all() and (near.distance[:, 0] == 0).all()
    for row, at in zip(near.index, near.distance):
        own = row[row >= 0]; assert len(set(own.tolist())) == len(own)
        assert (np.lexsort((own[1:], at[1:len(own)])) == np.arange(len(own) - 1)).all()
    if half_width is not None: assert (np.abs(near.index - np.arange(len(x))[:, None])[~missing] <= half_width).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n, dim, k, half_width", [(1, 3, 1, None), (40, 5, 40, None), (300, 33, 7, None), (300, 33, 7, 0), (300, 8, 9, 3), (900, 16, 10, 130), (900, 16, 10, 5000)])
def test_lists_are_those_of_the_definition(n, dim, k, half_width, dtype):
    x = people(n, dim, dtype=dtype)
    check_lists(x, knn(x, k, half_width, device="cpu"), k, half_width)


@pytest.mark.parametrize("n, half_width", [(4700, None), (5000, 700), (5000, 9)])
def test_lists_over_many_tiles_and_threads(n, half_width):
    x = people(n, 16, copies=50); torch.set_num_threads(2)
    check_lists(x, knn(x, 6, half_width, device="cpu"), 6, half_width)


@pytest.mark.parametrize("half_width", [None, 30])
def test_the_gpu_step_gives_the_same_lists(half_width, monkeypatch):
    x = people(500, 16, copies=20); scanned = knn(x, 8, half_width, device="cpu")
    search = module._search_torch
    monkeypatch.setattr(module, "_search_torch", lambda *args: search(*args, keep=module._keep_topk))
    by_topk = knn(x, 8, half_width, device="cpu")
    check_lists(x, by_topk, 8, half_width)
    assert np.allclose(scanned.distance, by_topk.distance, atol=1e-5)


@needs_faiss
def test_faiss_agrees():
    x = people(700, 24, copies=30); ours, theirs = knn(x, 9, backend="torch", device="cpu"), knn(x, 9, backend="faiss", device="cpu")
    assert theirs.backend == "faiss cpu" and ours.backend == "torch cpu"
    check_lists(x, theirs, 9)
    assert np.allclose(ours.distance, theirs.distance, atol=1e-5)
    for a, b, at in zip(ours.index, theirs.index, ours.distance):                      # who differs ties with the last
        assert (at[~np.isin(a, b)] >= at[-1] - 1e-5).all()


def test_inputs_of_every_kind_give_the_same(tmp_path):
    x = people(200, 12, dtype=np.float16); np.save(tmp_path / "x.npy", x)
    first = knn(x, 5)
    for other in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(x), np.asfortranarray(x), x.astype(np.float32) * 37, torch.from_numpy(x.astype(np.float64)).requires_grad_()):
        assert np.allclose(knn(other, 5).distance, first.distance, atol=1e-6) and (knn(other, 5).index == first.index).all()
    assert knn(torch.from_numpy(x).bfloat16(), 5).k == 5
    assert knn(np.eye(4, dtype=np.int64) + 1, 2).k == 2


def test_reduced_precision_of_the_caller_does_not_reach_the_search():
    x = people(600, 64, scatter=.1); first = knn(x, 9, device="cpu")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16): again = knn(x, 9, device="cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally: torch.set_float32_matmul_precision(before)
    assert (again.index == first.index).all()


# ---------------------------------------------------------------- Jaccard distance and clusters

@pytest.mark.parametrize("n, dim, k1, k2, half_width, more", [
    (60, 4, 3, 1, None, {}), (60, 4, 4, 4, None, {}), (61, 300, 59, 6, None, {}), (500, 32, 30, 6, None, dict(copies=45)), (500, 8, 30, 6, None, dict(strangers=30)),
    (500, 16, 10, 3, None, dict(dtype=np.float16)), (500, 16, 10, 3, 40, dict(dtype=np.float16)), (300, 16, 10, 3, 4, {}), (300, 16, 12, 12, 0, {}), (400, 16, 20, 6, 1000, dict(dtype=np.float64))])
def test_jaccard_and_labels_are_those_of_the_dense_algorithm(n, dim, k1, k2, half_width, more):
    x = people(n, dim, **more); near = knn(x, k1, half_width, device="cpu")
    J, D = jaccard(x, k1, k2, near), jaccard_oracle(x, near, k1, k2)
    assert J.dtype == np.float32 and J.has_canonical_format and (J != J.T).nnz == 0 and (J.data < 1).all() and (J.diagonal() == 0).all()
    assert np.abs(dense(J) - D).max() < 1e-6
    assert (jaccard(x, k1, k2, half_width=half_width, device="cpu") != J).nnz == 0
    for eps, min_samples in ((.2, 2), (.6, 4), (.9, 3)):
        assert np.array_equal(dense(jaccard(x, k1, k2, near, max_distance=eps)), np.where(dense(J) <= np.float32(eps), dense(J), 1))
        labels = cluster(x, k1, k2, eps, min_samples, near)
        assert (labels == DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(J)).all()
        assert (labels == dbscan_oracle(dense(J), np.float32(eps), min_samples)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 40), st.integers(2, 5), st.data())
def test_any_small_world(n, dim, data):
    "Grids of few values: many ties and copies."
    x = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-1, 2, (n, dim)) + np.eye(1, dim) * 3.0
    k1 = data.draw(st.integers(3, n - 1)); k2 = data.draw(st.integers(1, k1)); half_width = data.draw(st.none() | st.integers(0, n))
    near = knn(x, k1, half_width, device="cpu"); J = jaccard(x, k1, k2, near)
    assert np.abs(dense(J) - jaccard_oracle(x, near, k1, k2)).max() < 1e-6
    assert (dbscan(J, .5, 3) == dbscan_oracle(dense(J), np.float32(.5), 3)).all()


def dense_float32(x, near, k1, k2):
    "The same algorithm with dense rows, fast enough for thousands of rows: `memberships` without its Python sets."
    n = len(x); index = near.index[:, :k1].astype(np.int64); half = int(np.around(k1 / 2)) + 1
    x = np.asarray(x, np.float64); x = x / np.linalg.norm(x, axis=1, keepdims=True)
    def named(k):
        A = np.zeros((n, n), bool); A[np.repeat(np.arange(n), k), index[:, :k].ravel()] = True
        return A & A.T
    R, H = named(k1).astype(np.float32), named(half).astype(np.float32)
    brings = (R > 0) & ((R @ H.T) * 3 > 2 * H.sum(1) + .5)       # counts are whole numbers
    members = (R > 0) | (brings.astype(np.float32) @ H > 0)
    V = np.where(members, np.exp(2 * (x @ x.T) - 2), 0); V /= V.sum(1, keepdims=True)
    V = V[index[:, :k2]].mean(1) if n * k2 < 10_000 else sum(V[index[:, q]] for q in range(k2)) / k2
    by = csr_matrix(V)
    for i in range(n):
        members = by[i].indices; shared = np.minimum(V[:, members], V[i, members]).sum(1)
        yield i, np.maximum(1 - shared / (2 - shared), 0)


@pytest.mark.parametrize("threads, page", [(1, 2**17), (2, 2**17), (2, 500)])
def test_jaccard_at_a_size_that_fills_pages(threads, page, monkeypatch):
    n = 2000; x = people(n, 48, per=20, copies=35, strangers=100); torch.set_num_threads(threads)
    near = knn(x, 30, device="cpu")
    distances = module._distances
    monkeypatch.setattr(module, "_distances", lambda V, reach, limit: distances(V, reach, limit, page=page))
    J = jaccard(x, 30, 6, near)
    worst, row = 0, np.empty(n)
    for i, D in dense_float32(x, near, 30, 6):
        row[:] = 1; row[J.indices[J.indptr[i]:J.indptr[i + 1]]] = J.data[J.indptr[i]:J.indptr[i + 1]]
        worst = max(worst, np.abs(row - D).max())
    assert worst < 1e-6
    labels = dbscan(J, .6, 4)
    assert (labels == DBSCAN(eps=.6, min_samples=4, metric="precomputed").fit_predict(J)).all() and labels.max() > 50


def test_dbscan_on_any_sparse_matrix():
    rng = np.random.default_rng(0)
    for n, density in ((30, .1), (200, .02), (200, .2)):
        D = np.round(rng.random((n, n)), 1).astype(np.float32) * (rng.random((n, n)) < density)
        np.fill_diagonal(D, 0)
        for D in (csr_matrix(D), csr_matrix(np.maximum(D, D.T)), csr_matrix(D.astype(np.float64))):      # one-sided neighbourhoods too
            for eps in (.1, .3, .7):
                for min_samples in (1, 3, 6): assert (dbscan(D, eps, min_samples) == DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(D)).all()


def test_all_noise_and_one_cluster():
    assert (cluster(np.eye(40), 5, 1, eps=.3, min_samples=4, device="cpu") == -1).all()
    assert (cluster(people(30, 3, per=30, scatter=.05), 20, 6, eps=.9, device="cpu") == 0).all()


# ---------------------------------------------------------------- re-ranking

@pytest.mark.parametrize("nq, ng, dim, k1, k2, lambda_value, dtype", [(1, 30, 4, 3, 1, .3, np.float32), (50, 250, 24, 20, 6, .3, np.float32), (50, 250, 24, 7, 8, 0, np.float16), (120, 80, 24, 20, 6, 1, np.float64), (200, 100, 12, 15, 1, .5, np.float32)])
def test_rerank_is_that_of_the_paper(nq, ng, dim, k1, k2, lambda_value, dtype):
    x = people(nq + ng, dim, dtype=dtype); out = rerank(x[:nq], x[nq:], k1, k2, lambda_value)
    assert out.shape == (nq, ng) and out.dtype == np.float32
    assert np.abs(out - rerank_oracle(x[:nq], x[nq:], k1, k2, lambda_value)).max() < 2e-6


def test_rerank_over_many_blocks():
    x = people(2500, 16); out = rerank(x[:2200], x[2200:], 10, 3)
    rows = slice(2100, 2200)
    assert out.shape == (2200, 300) and np.isfinite(out).all()
    assert np.allclose(out[rows], rerank_oracle(x[:2200], x[2200:], 10, 3, .3)[rows], atol=2e-6)


def test_rerank_of_equal_rows_is_finite(): assert np.isfinite(rerank(np.ones((3, 4)), np.ones((30, 4)), 5, 2)).all()


# ---------------------------------------------------------------- bad input

X = people(50, 6)


@pytest.mark.parametrize("call, message", [
    (lambda: knn(X, 0), "k=0"), (lambda: knn(X, 51), "1 … 50"), (lambda: knn(X[0], 3), "matrix"), (lambda: knn(X[:0], 1), "matrix"), (lambda: knn(X.astype(str), 3), "matrix"),
    (lambda: knn(X, 3, half_width=-1), "half_width=-1"), (lambda: knn(X, 2.5), "k=2.5"), (lambda: knn(X, 3, half_width=2.5), "half_width=2.5"), (lambda: dbscan(np.zeros((3, 3)), .5, 2), "scipy sparse"), (lambda: hdbscan(np.zeros((3, 3))), "scipy sparse"), (lambda: recall(knn(X, 3), X[:20]), "50 lists, 20 rows"), (lambda: knn(X, 3, backend="annoy"), "auto, torch, faiss"), (lambda: knn(X, 3, half_width=5, backend="faiss"), "band"),
    (lambda: jaccard(X, 2, 1), "k1=2"), (lambda: jaccard(X, 50), "k1=50 with 50 rows"), (lambda: jaccard(X, 10, 0), "k2=0"), (lambda: jaccard(X, 10, 11), "k2=11"),
    (lambda: jaccard(X, 10, 3, knn(X, 9)), r"knn\(features, 10\)"), (lambda: jaccard(X, 5, 3, knn(X[:40], 9)), "40 rows, features have 50"),
    (lambda: jaccard(X, 5, 3, knn(X, 9, half_width=6), half_width=7), "half_width=7"), (lambda: jaccard(X, 5, 3, knn(X, 9), half_width=7), "half_width=None"),
    (lambda: jaccard(X, 5, 3, Neighbours(knn(X, 9).index[:, ::-1].copy(), knn(X, 9).distance, "mine")), "begin with the row itself"),
    (lambda: cluster(X, 5, 3, eps=1), "eps=1"), (lambda: dbscan(csr_matrix((3, 4)), .5, 2), "square"), (lambda: dbscan(csr_matrix((3, 3)), 0, 2), "eps=0"), (lambda: dbscan(csr_matrix((3, 3)), .5, 0), "min_samples=0"),
    (lambda: rerank(X[:5], X[5:, :4], 5, 2), "6 dimensions, gallery_features 4"), (lambda: rerank(X[:5], X[5:], 49), "k1=49"), (lambda: rerank(X[:5], X[5:], 5, 7), "k2=7"), (lambda: rerank(X[:5], X[5:], 5, 2, 1.5), "lambda_value=1.5")])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [0, np.nan, np.inf, -np.inf])
def test_rows_without_direction_are_named(value, dtype):
    x = X.astype(dtype); x[7] = value; x[31] = value
    for call in (lambda: knn(x, 3), lambda: cluster(x, 5, 3), lambda: rerank(X[:9], x, 5, 2)):
        with pytest.raises(ValueError, match="rows 7, 31"): call()


@pytest.mark.parametrize("probes,lists", [(1, 60), (3, 20), (1000, 20)])
def test_approximate_lists_hold_what_their_cells_hold(probes, lists):
    "Short lists end in -1; members, distances and order are those of the exact search among what was found; everything is found where all cells are looked into."
    pytest.importorskip("faiss")
    from cion_nb.identities.neighbours import cluster, knn_approximate, recall
    rng = np.random.default_rng(0); x = (rng.normal(size=(25, 12)).repeat(12, 0) + .5 * rng.normal(size=(300, 12))).astype(np.float32); x[7] = x[8]
    near, exact = knn_approximate(x, 10, probes, lists), knn(x, 10, device="cpu")
    u = x / np.linalg.norm(x, axis=1, keepdims=True); d = 1 - u @ u.T
    for i, (index, distance) in enumerate(zip(near.index, near.distance)):
        n = (index >= 0).sum(); assert index[0] == i and (index[n:] == -1).all() and np.isinf(distance[n:]).all() and len(set(index[:n])) == n
        np.testing.assert_allclose(distance[1:n], d[i, index[1:n]], atol=1e-5); assert (np.diff(distance[:n]) >= 0).all()
    share = recall(near, x, sample=300)
    if probes == 1000: assert share == 1 and (near.index == exact.index).all()
    else: assert .2 < share < 1
    labels = cluster(x, 10, 3, neighbours=near); assert labels.shape == (300,) and labels.max() >= 2
    with pytest.raises(ValueError, match="whole number in 1 … 300"): knn_approximate(x, 301)


# ---------------------------------------------------------------- the work in parts

@pytest.mark.parametrize("n, parts", [(40, 1), (300, 4), (5000, 3), (9000, 2)])
def test_parts_together_are_the_whole_search(n, parts):
    x = people(n, 16, copies=min(30, n // 3))
    whole, found = knn(x, 9, device="cpu"), [knn_part(x, 9, p, parts, "cpu") for p in range(parts)]
    together = merge_neighbours(found)
    assert (together.index == whole.index).all() and (together.distance == whole.distance).all()
    for p in found: assert (p.index[:, 0] == np.arange(n)).all() and ((p.index < 0) == np.isinf(p.distance)).all()
    if n > 4096: assert any((p.index[:, 1:] < 0).any() or not (p.index == whole.index).all() for p in found), "a part is a part"


def test_lists_of_parts_that_hold_little_are_merged_like_a_sort():
    rng = np.random.default_rng(0); n, k, parts = 200, 6, 4
    for _ in range(20):
        made = [{j: np.float32(rng.integers(0, 4)) for j in rng.permutation(n)[:rng.integers(0, 9)]} for _ in range(parts)]
        owner = {}                                                          # a pair belongs to one part
        made = [{j: d for j, d in part.items() if owner.setdefault(j, p) == p and j != 3} for p, part in enumerate(made)]
        index, distance = np.full((parts, n, k), -1, np.int32), np.full((parts, n, k), np.inf, np.float32)
        index[:, :, 0], distance[:, :, 0] = np.arange(n), 0
        for p, part in enumerate(made):
            for q, (d, j) in enumerate(sorted((d, j) for j, d in part.items())[:k - 1]): index[p, 3, q + 1], distance[p, 3, q + 1] = j, d
        best = [(np.float32(0), 3)] + sorted((d, j) for part in made for j, d in part.items())[:k - 1]
        out = merge_neighbours([Neighbours(i, d, "", part=(p, parts)) for p, (i, d) in enumerate(zip(index, distance))])
        assert [j for j in out.index[3] if j >= 0] == [j for _, j in best] and [d for d in out.distance[3] if np.isfinite(d)] == [d for d, _ in best]


@needs_faiss
def test_parts_of_the_approximate_search_are_the_whole():
    x = people(3000, 24); whole = knn_approximate(x, 8, 3)
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
    assert (merge_neighbours([b, a]).index == knn(x, 5, device="cpu").index).all() and merge_neighbours([knn(x, 5, half_width=7)]).half_width == 7
    beyond = knn(x, 5); beyond.index[3, 2] = 50
    with pytest.raises(ValueError, match="beyond the 50"): jaccard(x, 5, 2, beyond)
