"""The sparse room against plain dense oracles written from the definitions."""
import numpy as np
import pytest
import torch
from examples import people
from hypothesis import given, settings, strategies as st
from oracles import apart, check_lists, cosine_distances, nearest_plainly
from scipy.sparse import csr_matrix
from sklearn.cluster import DBSCAN

from cion_nb.identities import neighbours as module
from cion_nb.identities.neighbours import cluster, dbscan, jaccard, knn, rerank


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- the oracle

def memberships(d, index, k, half, k2, scale):
    "(n, n) weights, one Python set at a time."
    n = len(d)
    index = [[int(j) for j in row if j >= 0] for row in index]
    def R(i, k): return [j for j in index[i][:k] if i in index[j][:k]]
    V = np.zeros((n, n))
    for i in range(n):
        own = R(i, k)
        members = set(own)
        for c in own:
            H = R(c, half)
            if len(set(H) & set(own)) > 2 / 3 * len(H): members |= set(H)
        members = sorted(members)
        w = np.exp(-scale[i] * d[i, members])
        V[i, members] = w / w.sum()
    return np.stack([V[row[:k2]].mean(0) for row in index])


def compare(V, W):
    shared = np.stack([np.minimum(row, W).sum(1) for row in V])
    return np.maximum(1 - shared / (2 - shared), 0)


def jaccard_oracle(x, neighbours, k1, k2):
    n = len(x)
    d = cosine_distances(x)
    V = memberships(d, neighbours.index, k1, int(np.around(k1 / 2)) + 1, k2, np.full(n, 2.0))
    D = compare(V, V)
    if neighbours.half_width is not None: D[apart(n) > neighbours.half_width] = 1
    return D


def dense(J):
    D = np.ones(J.shape)
    D[np.repeat(np.arange(len(D)), np.diff(J.indptr)), J.indices] = J.data
    return D


def dbscan_oracle(D, eps, min_samples):
    n = len(D)
    near = D <= eps
    np.fill_diagonal(near, True)
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
    d = cosine_distances(np.concatenate([np.asarray(query, np.float64), np.asarray(gallery, np.float64)]))
    scaled = d / d.max(1, keepdims=True)
    n = len(query)
    V = memberships(scaled, nearest_plainly(d, k1 + 1), k1 + 1, int(np.around(k1 / 2)) + 1, k2, np.ones(len(d)))
    return (1 - lambda_value) * compare(V[:n], V[n:]) + lambda_value * scaled[:n, n:]


# ---------------------------------------------------------------- k nearest neighbours

@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n, dim, k, half_width",
                         [(1, 3, 1, None), (40, 5, 40, None), (300, 33, 7, None), (300, 33, 7, 0), (300, 8, 9, 3),
                          (900, 16, 10, 130), (900, 16, 10, 5000)])
def test_lists_are_those_of_the_definition(n, dim, k, half_width, dtype):
    x = people(n, dim, dtype=dtype)
    check_lists(x, knn(x, k, half_width, device="cpu"), k, half_width)


# ---------------------------------------------------------------- Jaccard distance and clusters

@pytest.mark.parametrize("n, dim, k1, k2, half_width, more", [
    (60, 4, 3, 1, None, {}), (60, 4, 4, 4, None, {}), (61, 300, 59, 6, None, {}),
    (500, 32, 30, 6, None, dict(copies=45)), (500, 8, 30, 6, None, dict(strangers=30)),
    (500, 16, 10, 3, None, dict(dtype=np.float16)), (500, 16, 10, 3, 40, dict(dtype=np.float16)),
    (300, 16, 10, 3, 4, {}), (300, 16, 12, 12, 0, {}), (400, 16, 20, 6, 1000, dict(dtype=np.float64))])
def test_jaccard_and_labels_are_those_of_the_dense_algorithm(n, dim, k1, k2, half_width, more):
    x = people(n, dim, **more)
    near = knn(x, k1, half_width, device="cpu")
    J, D = jaccard(x, k1, k2, near), jaccard_oracle(x, near, k1, k2)
    assert J.dtype == np.float32 and J.has_canonical_format and (J != J.T).nnz == 0 and (J.data < 1).all()
    assert (J.diagonal() == 0).all()
    assert np.abs(dense(J) - D).max() < 1e-6
    assert (jaccard(x, k1, k2, half_width=half_width, device="cpu") != J).nnz == 0
    for eps, min_samples in ((.2, 2), (.6, 4), (.9, 3)):
        assert np.array_equal(dense(jaccard(x, k1, k2, near, max_distance=eps)),
                              np.where(dense(J) <= np.float32(eps), dense(J), 1))
        labels = cluster(x, k1, k2, eps, min_samples, near)
        assert (labels == DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(J)).all()
        assert (labels == dbscan_oracle(dense(J), np.float32(eps), min_samples)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 40), st.integers(2, 5), st.data())
def test_any_small_world(n, dim, data):
    "Grids of few values: many ties and copies."
    x = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-1, 2, (n, dim)) + np.eye(1, dim) * 3.0
    k1 = data.draw(st.integers(3, n - 1))
    k2 = data.draw(st.integers(1, k1))
    half_width = data.draw(st.none() | st.integers(0, n))
    near = knn(x, k1, half_width, device="cpu")
    J = jaccard(x, k1, k2, near)
    assert np.abs(dense(J) - jaccard_oracle(x, near, k1, k2)).max() < 1e-6
    assert (dbscan(J, .5, 3) == dbscan_oracle(dense(J), np.float32(.5), 3)).all()


def dense_float32(x, near, k1, k2):
    "The same algorithm with dense rows, fast enough for thousands of rows: `memberships` without its Python sets."
    n = len(x)
    index = near.index[:, :k1].astype(np.int64)
    half = int(np.around(k1 / 2)) + 1
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    def named(k):
        A = np.zeros((n, n), bool)
        A[np.repeat(np.arange(n), k), index[:, :k].ravel()] = True
        return A & A.T
    R, H = named(k1).astype(np.float32), named(half).astype(np.float32)
    brings = (R > 0) & ((R @ H.T) * 3 > 2 * H.sum(1) + .5)       # counts are whole numbers
    members = (R > 0) | (brings.astype(np.float32) @ H > 0)
    V = np.where(members, np.exp(2 * (x @ x.T) - 2), 0)
    V /= V.sum(1, keepdims=True)
    V = V[index[:, :k2]].mean(1) if n * k2 < 10_000 else sum(V[index[:, q]] for q in range(k2)) / k2
    by = csr_matrix(V)
    for i in range(n):
        members = by[i].indices
        shared = np.minimum(V[:, members], V[i, members]).sum(1)
        yield i, np.maximum(1 - shared / (2 - shared), 0)


@pytest.mark.slow("a size that fills many tiles")
@pytest.mark.parametrize("threads, page", [(1, 2**17), (2, 2**17), (2, 500)])
def test_jaccard_at_a_size_that_fills_pages(threads, page, monkeypatch):
    n = 2000
    x = people(n, 48, per=20, copies=35, strangers=100)
    torch.set_num_threads(threads)
    near = knn(x, 30, device="cpu")
    distances = module._distances
    monkeypatch.setattr(module, "_distances", lambda V, reach, limit: distances(V, reach, limit, page=page))
    J = jaccard(x, 30, 6, near)
    worst, row = 0, np.empty(n)
    for i, D in dense_float32(x, near, 30, 6):
        row[:] = 1
        row[J.indices[J.indptr[i]:J.indptr[i + 1]]] = J.data[J.indptr[i]:J.indptr[i + 1]]
        worst = max(worst, np.abs(row - D).max())
    assert worst < 1e-6
    labels = dbscan(J, .6, 4)
    assert (labels == DBSCAN(eps=.6, min_samples=4, metric="precomputed").fit_predict(J)).all() and labels.max() > 50


def test_dbscan_on_any_sparse_matrix():
    rng = np.random.default_rng(0)
    for n, density in ((30, .1), (200, .02), (200, .2)):
        D = np.round(rng.random((n, n)), 1).astype(np.float32) * (rng.random((n, n)) < density)
        np.fill_diagonal(D, 0)
        # one-sided neighbourhoods too
        for D in (csr_matrix(D), csr_matrix(np.maximum(D, D.T)), csr_matrix(D.astype(np.float64))):
            for eps in (.1, .3, .7):
                for min_samples in (1, 3, 6):
                    assert (dbscan(D, eps, min_samples)
                            == DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(D)).all()


def test_all_noise_and_one_cluster():
    assert (cluster(np.eye(40), 5, 1, eps=.3, min_samples=4, device="cpu") == -1).all()
    assert (cluster(people(30, 3, per=30, scatter=.05), 20, 6, eps=.9, device="cpu") == 0).all()


# ---------------------------------------------------------------- re-ranking

@pytest.mark.parametrize("nq, ng, dim, k1, k2, lambda_value, dtype",
                         [(1, 30, 4, 3, 1, .3, np.float32), (50, 250, 24, 20, 6, .3, np.float32),
                          (50, 250, 24, 7, 8, 0, np.float16), (120, 80, 24, 20, 6, 1, np.float64),
                          (200, 100, 12, 15, 1, .5, np.float32)])
def test_rerank_is_that_of_the_paper(nq, ng, dim, k1, k2, lambda_value, dtype):
    x = people(nq + ng, dim, dtype=dtype)
    out = rerank(x[:nq], x[nq:], k1, k2, lambda_value)
    assert out.shape == (nq, ng) and out.dtype == np.float32
    assert np.abs(out - rerank_oracle(x[:nq], x[nq:], k1, k2, lambda_value)).max() < 2e-6


def test_rerank_over_many_blocks():
    x = people(2500, 16)
    out = rerank(x[:2200], x[2200:], 10, 3)
    rows = slice(2100, 2200)
    assert out.shape == (2200, 300) and np.isfinite(out).all()
    assert np.allclose(out[rows], rerank_oracle(x[:2200], x[2200:], 10, 3, .3)[rows], atol=2e-6)


def test_rerank_of_equal_rows_is_finite(): assert np.isfinite(rerank(np.ones((3, 4)), np.ones((30, 4)), 5, 2)).all()
