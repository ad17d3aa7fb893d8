"""Single-gallery-shot, clothes-changing, camera by camera, whole tracklets, against their definitions."""
import warnings

import numpy as np
import pandas as pd
import pytest
from examples import tables
from hypothesis import given, settings, strategies as st
from oracles import cosine

from cion_nb.core.samples import make_samples
from cion_nb.data.datasets import data_sets, reader_of
from cion_nb.retrieval import evaluate as E
from cion_nb.retrieval.evaluate import evaluate
from cion_nb.retrieval.protocols import by_camera, draw_keys, evaluate_single_shot, tracklet_features


def quiet(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **kw)


def single_shot_oracle(d, query, gallery, keys, protocol):
    "Ranks (repeats, queries), 0 without a match, from the words: remove, draw one image of each person, sort."
    out, ids = np.zeros((len(keys), len(query)), int), list(zip(gallery.pid.tolist(), gallery.camid.tolist()))
    for r, key in enumerate(keys):
        for i, (pid, cam) in enumerate(zip(query.pid.tolist(), query.camid.tolist())):
            left = [j for j, (p, c) in enumerate(ids) if p != -1
                    and not (protocol == "market" and p == pid and c == cam != -1)]
            if pid == -1 or not any(ids[j][0] == pid for j in left): continue
            drawn = [j for j in left if ids[j][0] == 0]
            for p in {ids[j][0] for j in left} - {0}:
                drawn.append(min((j for j in left if ids[j][0] == p), key=lambda j: key[j]))
            out[r, i] = 1 + [ids[j][0] for j in sorted(drawn, key=lambda j: (d[i, j], j))].index(pid)
    return out


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(2, 60), st.sampled_from(["market", "no_camera"]),
       st.sampled_from([1, 4096, 1 << 30]))
@settings(max_examples=80, deadline=None)
def test_single_shot_is_its_definition(seed, n_query, n_gallery, protocol, memory):
    "Junk, distractors, unknown cameras, ties of signs, small blocks."
    rng = np.random.default_rng(seed)
    query, gallery = tables(rng, n_query, n_gallery)
    q, g = (rng.choice([-1., 1.], (n, 5)).astype(np.float32) for n in (n_query, n_gallery))
    ranks = single_shot_oracle(cosine(q, g), query, gallery, draw_keys(n_gallery, 3, seed), protocol)
    has = ranks[0] > 0
    if not has.any():
        with pytest.raises(ValueError, match="Nothing is left"):
            quiet(evaluate_single_shot, q, g, query, gallery, protocol=protocol, distractors=0)
        return
    found = quiet(evaluate_single_shot, q, g, query, gallery, repeats=3, seed=seed, protocol=protocol, memory=memory,
                  distractors=0)
    np.testing.assert_allclose(found.per_repeat.mAP, (1 / ranks[:, has]).mean(1))
    np.testing.assert_allclose(found.per_repeat.rank1, (ranks[:, has] == 1).mean(1))
    np.testing.assert_allclose(found.cmc, [(ranks[:, has] <= k).mean() for k in range(1, len(found.cmc) + 1)])
    assert found.n_query == has.sum() and len(found.unmatched) == (~has).sum()


def test_draws_are_fair():
    "Each of a person's images is drawn equally often."
    gallery = make_samples(list("abcdef"), [1, 1, 1, 2, 2, 3], [0] * 6)
    from cion_nb.retrieval.protocols import _drawn
    rows, person = _drawn(gallery.pid.to_numpy(), draw_keys(6, 6000))
    assert person.tolist() == [1, 2, 3] and (rows[:, 2] == 5).all()
    for column, n in ((0, 3), (1, 2)):
        np.testing.assert_allclose(np.unique(rows[:, column], return_counts=True)[1] / 6000, 1 / n, atol=.03)


@pytest.mark.slow("hundreds of random worlds")
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_clothes_changing_is_its_definition(seed):
    "Removed: the same person in the same camera, or in the same known clothes."
    rng = np.random.default_rng(seed)
    query, gallery = tables(rng, 9, 50)
    for t in (query, gallery):
        t["clothes"] = pd.array([None if rng.random() < .15 else f"{p}_{rng.integers(3)}" for p in t.pid],
                                dtype="string")
    q, g = rng.normal(size=(9, 6)).astype(np.float32), rng.normal(size=(50, 6)).astype(np.float32)
    d = cosine(q, g)
    APs = []
    for i in range(9):
        pid, cam, worn = query.pid[i], query.camid[i], query.clothes[i]
        kept = [j for j in np.argsort(d[i], kind="stable") if gallery.pid[j] != -1
                and not (gallery.pid[j] == pid
                         and (gallery.camid[j] == cam != -1
                              or (worn is not pd.NA and gallery.clothes[j] is not pd.NA
                                  and gallery.clothes[j] == worn)))]
        right = [k for k, j in enumerate(kept, 1) if gallery.pid[j] == pid != -1]
        APs.append(np.mean([n / k for n, k in enumerate(right, 1)]) if right else np.nan)
    if np.isnan(APs).all(): return
    score = quiet(evaluate, q, g, query, gallery, protocol="clothes_changing")
    np.testing.assert_allclose(score.AP, APs, atol=1e-6)


def test_clothes_need_their_column():
    t = make_samples(["a", "b"], [1, 1], [0, 1])
    with pytest.raises(ValueError, match="no column clothes"):
        evaluate(np.eye(2), np.eye(2), t, t, protocol="clothes_changing")


@pytest.mark.parametrize("seed", range(4))
def test_cameras_one_by_one(seed):
    rng = np.random.default_rng(seed)
    query, gallery = tables(rng, 30, 90)
    q, g = rng.normal(size=(30, 8)), rng.normal(size=(90, 8))
    found = quiet(by_camera, q, g, query, gallery)
    assert len(found) == query.camid.nunique() * gallery.camid.nunique()
    for row in found.itertuples():
        here, there = (query.camid == row.query_camera).to_numpy(), (gallery.camid == row.gallery_camera).to_numpy()
        a, b = query[here].reset_index(drop=True), gallery[there].reset_index(drop=True)
        if not E.Answers(a, b, "market").counts.any():
            assert row.queries == 0 and np.isnan(row.mAP)
            continue
        own = quiet(evaluate, q[here], g[there], a, b)
        assert row.queries == own.AP.size - np.isnan(own.AP).sum() and row.mAP == pytest.approx(own.mAP)
        assert row.rank1 == pytest.approx(own.rank1)


def test_tracklet_features_are_means_of_what_is_kept():
    rng = np.random.default_rng(0)
    t = make_samples([f"{i}" for i in range(300)], np.repeat(np.arange(1, 31), 10), np.repeat(np.arange(1, 31) % 3, 10),
                     tracklet=np.repeat(rng.permutation(60), 5), video="v", split="gallery")
    x, keep = rng.normal(size=(300, 7)).astype(np.float32), rng.random(300) < .5
    for k in (None, keep):
        f, table = tracklet_features(x, t, k)
        for row, vector in zip(table.itertuples(), f):
            of = (t.tracklet == row.tracklet).to_numpy()
            use = of & (keep if k is not None and (of & keep).any() else True)
            mean = x[use].mean(0)
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)
            assert row.pid == t.pid[of].iloc[0]
    with pytest.raises(ValueError, match="no tracklet"): tracklet_features(x, t.assign(tracklet=-1))


def test_names_of_data_sets_open_their_readers(tmp_path):
    for name in data_sets():
        if name == "cion_al": continue
        with pytest.raises((FileNotFoundError, ValueError), match="looked in|holds no image"): reader_of(name)(tmp_path)


def test_distractors_are_whole_numbers():
    from cion_nb.core.samples import make_samples
    t = make_samples(["a.jpg", "b.jpg"], [1, 2], 1)
    with pytest.raises(ValueError, match=r"distractors=\[99.5\]: pids are whole numbers"):
        evaluate_single_shot(np.eye(2), np.eye(2), t, t.assign(path=["c.jpg", "d.jpg"]), distractors=[99.5],
                             protocol="no_camera")
