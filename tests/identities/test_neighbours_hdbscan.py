"""HDBSCAN on the sparse matrix against scikit-learn's on the dense one."""
import numpy as np
import pytest
import torch
from examples import people
from scipy.sparse import csr_matrix
from sklearn.cluster import HDBSCAN
from sklearn.metrics import adjusted_rand_score

from cion_nb.identities.neighbours import cluster, hdbscan, jaccard


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- HDBSCAN

def filled(J):
    D = np.ones(J.shape)
    D[np.repeat(np.arange(len(D)), np.diff(J.indptr)), J.indices] = J.data
    return D


def untied(J, seed=0):
    "The same distances moved by up to 1e-6, so that no two are equal; symmetric."
    D = filled(J)
    E = np.triu(np.random.default_rng(seed).uniform(0, 1e-6, D.shape), 1)
    D = np.where(D < .999, D + E + E.T, 1)
    np.fill_diagonal(D, 0)
    return D


@pytest.mark.parametrize("n, per, scatter, size",
                         [(300, 20, .6, 4), (500, 20, .9, 4), (700, 8, .7, 3), (400, 5, .6, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_hdbscan_is_scikit_learns_on_the_dense_matrix(n, per, scatter, size, seed):
    """With min_samples=1 reachability is distance, so nothing ties below 1, and the dense tree is unique there. What it
    joins at
    exactly 1 depends on the order of rows: points without any near one, which ours leaves out."""
    D = untied(jaccard(people(n, 24, per, scatter, seed), 12, 3))
    sparse = csr_matrix(np.where(D < 1, np.maximum(D, 1e-12), 0))
    ours = hdbscan(sparse, size, 1)
    theirs = HDBSCAN(min_cluster_size=size, min_samples=1, metric="precomputed", copy=True).fit(D).labels_
    joined = ours >= 0
    assert joined.sum() > n / 2 and adjusted_rand_score(ours[joined], theirs[joined]) == 1
    for k in set(theirs[~joined]) - {-1}:                                  # what they have more hangs on by distance 1
        for i in np.flatnonzero(~joined & (theirs == k)): assert D[i, joined & (theirs == k)].min(initial=1) == 1


@pytest.mark.parametrize("seed", range(3))
def test_hdbscan_finds_clear_people_whatever_the_order(seed):
    x = people(600, 24, 20, .5, seed)
    J = jaccard(x, 15, 4)
    p = np.random.default_rng(seed).permutation(600)
    theirs = HDBSCAN(min_cluster_size=4, metric="precomputed", copy=True).fit(filled(J)).labels_
    assert adjusted_rand_score(hdbscan(J), theirs) == 1
    # ties of reachability are broken by the order of rows, in the dense tree too
    U = np.where(filled(J) < 1, np.maximum(untied(J), 1e-12), 0)
    assert adjusted_rand_score(hdbscan(csr_matrix(U), 4, 1)[p], hdbscan(csr_matrix(U[p][:, p]), 4, 1)) == 1
    first = [np.flatnonzero(hdbscan(J) == k)[0] for k in range(hdbscan(J).max() + 1)]
    assert first == sorted(first)


def test_hdbscan_of_copies_strangers_and_nothing():
    x = people(400, 24, 20, .5, copies=60, strangers=80)
    labels = cluster(x, 12, 3, min_samples=4, clusterer="hdbscan")
    assert len(set(labels[(x == x[0]).all(1)])) == 1 and labels[0] >= 0
    assert (hdbscan(csr_matrix((30, 30))) == -1).all() and (hdbscan(csr_matrix(np.full((5, 5), .5)), 6) == -1).all()
    given = csr_matrix(np.where(filled(jaccard(x, 12, 3)) < 1, .5, 0))
    given.setdiag(0)
    before = given.copy()
    hdbscan(given)
    assert (given != before).nnz == 0 and given.nnz == before.nnz
    two = filled(csr_matrix((12, 12)))
    two[:6, :6] = two[6:, 6:] = .3
    np.fill_diagonal(two, 0)
    assert hdbscan(csr_matrix(np.where(two < 1, np.maximum(two, 1e-12), 0))).tolist() == [0] * 6 + [1] * 6
    for wrong in (dict(min_cluster_size=1), dict(min_samples=-1)):
        with pytest.raises(ValueError, match="must be at least"): hdbscan(csr_matrix((9, 9)), **wrong)
    with pytest.raises(ValueError, match="square"): hdbscan(csr_matrix((9, 8)))
    with pytest.raises(ValueError, match="none of dbscan, hdbscan"): cluster(x, clusterer="infomap")
