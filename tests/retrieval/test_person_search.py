"""Scores of a person search against the protocol in loops."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score

from cion_nb.core.samples import make_samples
from cion_nb.retrieval.person_search import draw_galleries, evaluate_search


def table(path, box, pid, **more):
    found = make_samples(list(path), pid=pid)
    found[["x", "y", "w", "h"]] = np.asarray(box, np.float32).reshape(-1, 4)
    return found.assign(**more)


def street(seed, frames=12, people=6, dim=5, missed=.3, moved=3., ties=False):
    "Truth and detections of a few frames: some people missed, some found twice, some boxes on nobody."
    rng = np.random.default_rng(seed)
    path, box, pid, found, of, x = [], [], [], [], [], []
    person = rng.standard_normal((people, dim))
    for f in range(frames):
        here = np.flatnonzero(rng.random(people) < .5)
        for p in here:
            own = np.r_[rng.uniform(0, 200, 2), rng.uniform(4, 40), rng.uniform(8, 90)]
            path.append(f"{f}.jpg"), box.append(own), pid.append(p)
            for _ in range(rng.integers(1, 3) if rng.random() >= missed else 0):
                found.append(own + rng.normal(0, moved, 4) * [1, 1, .3, .3]), of.append(f"{f}.jpg")
                x.append(person[p] + .8 * rng.standard_normal(dim))
        for _ in range(rng.integers(0, 3)):
            found.append(np.r_[rng.uniform(0, 200, 2), 20, 50]), of.append(f"{f}.jpg")
            x.append(rng.standard_normal(dim))
        if not len(here): path.append(f"{f}.jpg"), box.append([0, 0, 1, 1]), pid.append(-1)
    x = np.array(x).reshape(-1, dim)
    if ties: x, person = np.sign(x), np.sign(person)
    truth = table(path, box, pid)
    found = table(of, np.maximum(np.array(found).reshape(-1, 4), 1e-3), -1)
    found["score"] = np.float32(rng.choice([.4, .5, .9], len(found), p=[.1, .2, .7]))
    order = rng.permutation(len(found))
    query = truth[truth.pid >= 0].groupby("pid").head(2).reset_index(drop=True)
    return query, person[query.pid], found.iloc[order].reset_index(drop=True), x[order], truth


def iou(a, b):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inside = max(w, 0) * max(h, 0)
    return inside / (a[2] * a[3] + b[2] * b[3] - inside)


def plain(query, query_features, found, x, truth, galleries, ks=(1, 5, 10)):
    "The protocol, frame by frame."
    boxes, sure = found[["x", "y", "w", "h"]].to_numpy(float), found.score.to_numpy() >= .5
    rows_of = {name: [r for r in rows if sure[r]] for name, rows in found.groupby("path").indices.items()}
    true = {(t.path, t.pid): (t.x, t.y, t.w, t.h) for t in truth.itertuples()}
    APs, firsts = [], []
    for i, q in enumerate(query.itertuples()):
        label, similarity, row, present, hit = [], [], [], 0, 0
        for name in galleries[i]:
            if name == q.path: continue
            rows = rows_of.get(name, [])
            a = query_features[i] / np.linalg.norm(query_features[i])
            s = [np.dot(a, x[r]) / np.linalg.norm(x[r]) for r in rows]
            y = [0] * len(rows)
            if (name, q.pid) in true:
                present += 1
                gt = true[name, q.pid]
                needed = min(.5, gt[2] * gt[3] / ((gt[2] + 10) * (gt[3] + 10)))
                for j in np.argsort(-np.float32(s), kind="stable"):
                    if iou(boxes[rows[j]], gt) >= needed:
                        y[j], hit = 1, hit + 1
                        break
            label, similarity, row = label + y, similarity + s, row + list(rows)
        if not present: continue
        APs.append(average_precision_score(label, np.float32(similarity)) * hit / present if hit else 0)
        order = np.lexsort((row, -np.float32(similarity)))
        firsts.append(next((k for k, j in enumerate(order, 1) if label[j]), 10**9))
    return np.mean(APs), [np.mean(np.array(firsts) <= k) for k in ks]


def scored(asked, protocol, **more):
    "Ours, and warnings of queries without a match left unsaid."
    try: score = evaluate_search(*asked, protocol, **more)
    except ValueError as e:
        assert "found in no frame" in str(e)
        return None
    return score


@pytest.mark.filterwarnings("ignore:.*found in no frame")
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, .3, .8]), st.sampled_from([0, 3, 12]))
def test_scores_are_the_protocols(seed, missed, moved):
    asked = street(seed, missed=missed, moved=moved)
    frames = pd.unique(asked[4].path)
    if (ours := scored(asked, "prw")) is not None:
        want = plain(*asked, [frames] * len(asked[0]))
        np.testing.assert_allclose([ours.mAP, *(ours.rank(k) for k in (1, 5, 10))], [want[0], *want[1]], atol=1e-6)
    drawn = draw_galleries(asked[0], asked[4], 12, seed)
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(own)[:7] for own in drawn]
    if (ours := scored(asked, "cuhk_sysu", galleries=drawn)) is not None:
        want = plain(*asked, drawn)
        np.testing.assert_allclose([ours.mAP, *(ours.rank(k) for k in (1, 5, 10))], [want[0], *want[1]], atol=1e-6)
        query = asked[0].copy()
        query.attrs["galleries"] = {7: drawn}
        assert str(evaluate_search(query, *asked[1:], gallery_size=7)) == str(ours)


@pytest.mark.filterwarnings("ignore:.*found in no frame")
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_equal_similarities_come_together_and_the_earlier_row_first(seed):
    "Features of signs: many products are equal, and exact in any order of summing (four of them: length 2)."
    query, q, found, x, truth = street(seed, dim=4, ties=True)
    if (ours := scored((query, q, found, x, truth), "prw")) is not None:
        want = plain(query, q, found, x, truth, [pd.unique(truth.path)] * len(query))
        np.testing.assert_allclose([ours.mAP, *(ours.rank(k) for k in (1, 5, 10))], [want[0], *want[1]], atol=1e-6)


def perfect(truth):
    found = truth[truth.pid >= 0].reset_index(drop=True)
    return found.assign(score=np.float32(1)), np.eye(50)[found.pid]


@pytest.mark.filterwarnings("ignore:.*found in no frame")
def test_a_perfect_detector_and_feature_score_one_and_one_that_misses_half_no_more_than_its_recall():
    query, _, _, _, truth = street(1, frames=30)
    found, x = perfect(truth)
    whole = evaluate_search(query, np.eye(50)[query.pid], found, x, truth, "prw")
    assert whole.mAP == whole.rank1 == whole.recall == 1
    kept = np.random.default_rng(0).random(len(found)) < .5
    half = evaluate_search(query, np.eye(50)[query.pid], found[kept], x[kept], truth, "prw")
    shares = half.per_query.found / half.per_query.present
    np.testing.assert_allclose(half.per_query.AP, shares)                    # what was found comes first
    assert .3 < half.recall < .7 and half.mAP == pytest.approx(shares.mean())


@pytest.mark.filterwarnings("ignore:.*found in no frame")
def test_what_may_not_matter_does_not():
    "Order of rows, lengths of features, unsure boxes, people without a name, the query's own frame."
    query, q, found, x, truth = street(5, frames=20)
    base = evaluate_search(query, q, found, x, truth, "prw")
    rng = np.random.default_rng(0)
    a, b, c = (rng.permutation(len(t)) for t in (query, found, truth))
    longer = x[b] * rng.uniform(.1, 9, (len(b), 1))
    mixed = evaluate_search(query.iloc[a], 3 * q[a], found.iloc[b], longer, truth.iloc[c], "prw")
    assert mixed.mAP == pytest.approx(base.mAP, abs=1e-12) and mixed.recall == base.recall
    more = pd.concat([found, found.assign(score=np.float32(.49))], ignore_index=True)
    assert evaluate_search(query, q, more, np.r_[x, -x], truth, "prw").asdict() == base.asdict()
    nameless = pd.concat([truth, truth.assign(pid=-1)], ignore_index=True)
    assert evaluate_search(query, q, found, x, nameless, "prw").asdict() == base.asdict()
    first = query.iloc[:1]
    at_home = (found.path == first.path[0]).to_numpy()
    away = evaluate_search(first, q[:1], found[~at_home], x[~at_home], truth, "prw")
    assert away.per_query.equals(evaluate_search(first, q[:1], found, x, truth, "prw").per_query)


def test_a_query_without_a_match_is_left_out_and_told():
    query, q, found, x, truth = street(5, frames=20)
    lonely = pd.concat([query, query[:1].assign(pid=77)], ignore_index=True)
    with pytest.warns(UserWarning, match="1 query of"):
        score = evaluate_search(lonely, np.r_[q, q[:1]], found, x, truth, "prw")
    assert score.unmatched == [query.path[0]] and np.isnan(score.per_query.AP.iloc[-1])
    assert score.mAP == evaluate_search(query, q, found, x, truth, "prw").mAP


def test_no_detection_at_all_scores_nothing():
    query, q, found, x, truth = street(5, frames=20)
    score = evaluate_search(query, q, found[:0], x[:0], truth, "prw")
    assert score.mAP == score.rank(10) == score.recall == 0


def test_a_thousand_queries_in_a_hundred_frames_each():
    "1,300 queries and more in 100 frames each, of 3,000: some of them against the loops."
    rng = np.random.default_rng(0)
    frames = [f"{i}.jpg" for i in range(3_000)]
    n = 3 * len(frames)
    pid = np.where(rng.random(n) < .4, rng.integers(0, 1_500, n), -1)
    boxes = np.c_[rng.uniform(0, 400, (n, 2)), rng.uniform(20, 90, (n, 2))]
    truth = table(rng.permutation(np.repeat(frames, 3)), boxes, pid)
    truth = truth[~(truth.duplicated(["path", "pid"]) & (truth.pid >= 0))].reset_index(drop=True)
    query = truth[truth.pid >= 0].groupby("pid").head(1).reset_index(drop=True)
    person = rng.standard_normal((1_500, 32)).astype(np.float32)
    found = truth.assign(score=np.float32(.9))
    x = np.where(truth.pid.to_numpy()[:, None] >= 0, person[truth.pid], 0) + rng.standard_normal((len(truth), 32))
    lone = ~query.pid.isin(truth[truth.pid >= 0].pid.value_counts().loc[lambda c: c > 1].index)
    query = query[~lone].reset_index(drop=True)
    galleries = draw_galleries(query, truth, 100)
    score = evaluate_search(query, person[query.pid], found, x, truth, galleries=galleries)
    assert score.n_gallery == 100 and score.recall == 1
    some = slice(0, len(query), 150)
    part = evaluate_search(query[some].reset_index(drop=True), person[query.pid[some]], found, x, truth,
                           galleries=galleries[some])
    want = plain(query[some].reset_index(drop=True), person[query.pid[some]], found, x, truth, galleries[some])
    np.testing.assert_allclose([part.mAP, part.rank1], [want[0], want[1][0]], atol=1e-6)
