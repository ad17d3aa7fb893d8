"""Identity scores are counts of pairs."""
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import adjusted_rand_score

from cion_nb.identities.truth import identity_scores, IdentityScores

# ---------------------------------------------------------------- identity scores

@pytest.mark.slow("hundreds of random worlds")
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
    assert got.purity == share(sum(max(sum(x == (l, t) for x in judged) for t in range(5)) for l in range(6)),
                               len(judged))
    assert got.completeness == share(sum(max(sum(x == (l, t) for x in judged) for l in range(6)) for t in range(5)),
                                     len(known))
    # a discarded image is an identity of its own
    alone = [l if l >= 0 else 100 + i for i, (l, t) in enumerate(known)]
    assert got.adjusted_rand == pytest.approx(adjusted_rand_score([t for _, t in known], alone), abs=1e-9)
    labelled = [t for l, t in rows if l >= 0]
    assert got.coverage == share(len(labelled), len(rows))
    assert got.junk == pytest.approx(1 - share(len(judged), len(labelled)))


def test_identity_scores_of_many_rows_are_sparse():
    "200,000 rows of 50,000 identities: never N x N, never a dense table."
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 20_000, 200_000)
    labels = truth * 3 + rng.integers(0, 3, 200_000)
    tracemalloc.start()
    got = identity_scores(labels, truth)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6 and got.precision == got.purity == 1 and .2 < got.recall < .4
    assert isinstance(got, IdentityScores) and "F1" in repr(got)


def test_identity_scores_refuses_vectors_of_two_lengths():
    with pytest.raises(ValueError, match="one length"): identity_scores(np.zeros(3, int), np.zeros(4, int))
