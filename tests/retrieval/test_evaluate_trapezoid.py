"""The AP that averages neighbouring precisions, against the walk down the list that defines it; the other as it was."""
import numpy as np
import pytest
from examples import quiet, tables
from hypothesis import given, settings, strategies as st
from oracles import cosine

from cion_nb.core.samples import make_samples
from cion_nb.retrieval import evaluate as E
from cion_nb.retrieval.evaluate import evaluate, evaluate_distances


def walk(is_match):
    "One list, rank by rank: the area under precision over recall by the trapezoid rule, from precision 1 at recall 0."
    area, found, n, old_recall, old_precision = 0., 0, sum(is_match), 0., 1.
    for k, hit in enumerate(is_match, 1):
        found += hit
        area += (found / n - old_recall) * (old_precision + found / k) / 2
        old_recall, old_precision = found / n, found / k
    return area


def walked(d, query, gallery, protocol):
    "Per query; nan without a match. Junk and the query's own camera leave the list before it is walked."
    out = []
    for i, (pid, camid) in enumerate(zip(query.pid, query.camid)):
        left = [j for j in np.lexsort((np.arange(len(gallery)), d[i])) if gallery.pid[j] != -1
                and not (protocol == "market" and gallery.pid[j] == pid and gallery.camid[j] == camid != -1)]
        hits = [bool(gallery.pid[j] == pid != -1) for j in left]
        out.append(walk(hits) if any(hits) else np.nan)
    return np.array(out)


@pytest.mark.parametrize("protocol", ["market", "no_camera"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_it_is_its_definition_on_every_path(protocol, dtype, memory):
    "Whole and tiled, one block and a row at a time; junk, distractors, unknown cameras, ties of signs."
    rng = np.random.default_rng(0)
    query, gallery = tables(rng, 25, 600)
    q, g = (rng.choice([-1., 1.], (n, 9)).astype(dtype) for n in (25, 600))
    expected = walked(cosine(q, g), query, gallery, protocol)
    plain = quiet(evaluate, q, g, query, gallery, protocol, memory=memory)
    found = quiet(evaluate, q, g, query, gallery, protocol, memory=memory, trapezoid=True)
    given_d = quiet(evaluate_distances, cosine(q, g), query, gallery, protocol, trapezoid=True)
    for score in (found, given_d):
        np.testing.assert_allclose(score.AP, expected, atol=1e-12)
        assert score.mAP == pytest.approx(np.nanmean(expected))
    columns = ["path", "pid", "camid", "matches", "first", "INP"]
    assert found.per_query[columns].equals(plain.per_query[columns]) and found.unmatched == plain.unmatched
    assert (found.cmc == plain.cmc).all() and found.mINP == plain.mINP and np.isnan(expected).any()


def test_own_images_and_tables_within_themselves():
    rng = np.random.default_rng(1)
    t = make_samples([f"{i}.png" for i in range(60)], rng.integers(0, 9, 60), -1)
    x = rng.normal(size=(60, 6)).astype(np.float32)
    d = cosine(x, x)
    hits = [[bool(t.pid[j] == t.pid[i]) for j in np.argsort(d[i], kind="stable") if j != i] for i in range(60)]
    found = quiet(evaluate, x, x, t, t, trapezoid=True)
    np.testing.assert_allclose(found.AP, [walk(h) if any(h) else np.nan for h in hits], atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 15), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_relations_of_the_two(seed, n_hits, n_wrong):
    "Never more than AP, never less than half; equal where all matches come first; half for one match behind rank 1."
    rng = np.random.default_rng(seed)
    is_match = rng.permutation(np.r_[np.ones(n_hits, bool), np.zeros(n_wrong, bool)])
    ranks = np.flatnonzero(is_match) + 1
    gallery = make_samples([f"g{i}" for i in range(len(is_match))], np.where(is_match, 1, 2), 2)
    query = make_samples(["q"], 1, 1)
    d = np.arange(len(is_match), dtype=np.float32)[None]
    plain, other = (evaluate_distances(d, query, gallery, trapezoid=t).AP[0] for t in (False, True))
    assert other == pytest.approx(walk(is_match.tolist())) and plain / 2 - 1e-12 <= other <= plain + 1e-12
    assert (other == pytest.approx(plain)) == (ranks[-1] == n_hits) and (ranks[-1] > n_hits or plain == other == 1)
    j = np.arange(1, n_hits + 1)
    assert plain - other == pytest.approx(np.mean((ranks - j) / np.maximum(ranks * (ranks - 1), 1)) / 2)
    if n_hits == 1 and ranks[0] > 1: assert other == pytest.approx(plain / 2)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_a_match_that_moves_up_lowers_neither(seed):
    rng = np.random.default_rng(seed)
    row = rng.permutation(30).astype(np.float32)
    gallery, query = make_samples([f"g{i}" for i in range(30)], rng.integers(1, 4, 30), 2), make_samples(["q"], 1, 1)
    if not (gallery.pid == 1).any(): return
    better = np.where(gallery.pid == 1, row - 3.5, row)
    for t in (False, True):
        before, after = (evaluate_distances(d[None], query, gallery, trapezoid=t).AP[0] for d in (row, better))
        assert after >= before - 1e-12


def test_the_result_names_its_ap():
    query, gallery = make_samples(["q"], 1, 1), make_samples(["a", "b"], [2, 1], 2)
    d = np.array([[.1, .2]])
    plain, other = (evaluate_distances(d, query, gallery, trapezoid=t) for t in (False, True))
    assert (plain.mAP, other.mAP) == (.5, .25) and (plain.trapezoid, other.trapezoid) == (False, True)
    assert "mAP 50.0" in str(plain) and "trapezoid" not in str(plain) and "AP" not in plain.asdict()
    assert "mAP (trapezoid) 25.0, rank-1 0.0" in str(other) and other.asdict()["AP"] == "trapezoid"
    assert list(plain.asdict()) == ["mAP", "mINP", "rank1", "rank5", "rank10", "protocol", "n_query", "n_unmatched",
                                    "n_gallery", "n_unreadable"]


def test_the_default_keeps_its_bits():
    "As the means were computed before there was a choice, bit for bit."
    rng = np.random.default_rng(2)
    query, gallery = tables(rng, 40, 500)
    q, g = rng.normal(size=(40, 16)).astype(np.float32), rng.normal(size=(500, 16)).astype(np.float32)
    score = quiet(evaluate, q, g, query, gallery)
    answers, has = E.Answers(query, gallery, "market"), score.per_query.matches.to_numpy() > 0
    lists = E.rank(q, g, query, gallery, k=500)
    ranks = np.concatenate([lists["rank"][(lists["query"] == i) & (lists.verdict == "right")].to_numpy(np.int64)
                            for i in np.flatnonzero(has)])
    n = answers.counts[has]
    starts = np.cumsum(n) - n
    expected = np.add.reduceat((np.arange(1, len(ranks) + 1) - np.repeat(starts, n)) / ranks, starts) / n
    assert score.AP[has].tobytes() == expected.tobytes() and score.mAP == float(expected.mean())
