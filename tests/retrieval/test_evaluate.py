"""`evaluate` against the protocol written out slowly: ties, junk, distractors, missing cameras, every block branch, bad
input."""
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from examples import tables
from hypothesis import given, settings, strategies as st
from oracles import cosine

from cion_nb.core.samples import make_samples
from cion_nb.retrieval import evaluate as E
from cion_nb.retrieval.evaluate import evaluate, evaluate_distances, hit_ranks, plot_ranked, rank
from cion_nb.retrieval.protocols import evaluate_single_shot


def oracle(distances, query, gallery, protocol="market"):
    """Per query: AP, rank of the first match, INP, CMC rows; None without a match. Straight from the protocol, nothing
    shared with the code under test.
    """
    scores, gallery_ids = [], list(zip(gallery.pid.tolist(), gallery.camid.tolist()))
    for d, pid, camid in zip(np.asarray(distances).tolist(), query.pid.tolist(), query.camid.tolist()):
        listed = []
        for j in sorted(range(len(gallery)), key=lambda j: (d[j], j)):          # equal distances: gallery order
            its_pid, its_camera = gallery_ids[j]
            if its_pid == -1: continue                                          # junk
            if protocol == "market" and its_pid == pid and camid != -1 and its_camera == camid: continue
            listed.append(pid != -1 and its_pid == pid)
        right, precision, first, last = 0, [], None, None
        for k, is_right in enumerate(listed, 1):
            if is_right:
                right += 1
                precision.append(right / k)
                first = first or k
                last = k
        scores.append(None if not right else (sum(precision) / right, first, right / last))
    return scores


def agree(score, expected):
    has = [s for s in expected if s is not None]
    AP, first, INP = map(np.array, zip(*has))
    np.testing.assert_allclose([score.mAP, score.mINP], [AP.mean(), INP.mean()], atol=1e-6)
    np.testing.assert_allclose(score.cmc, [(first <= k).mean() for k in range(1, len(score.cmc) + 1)], atol=1e-6)
    np.testing.assert_allclose(score.AP, [np.nan if s is None else s[0] for s in expected], atol=1e-6)
    assert score.per_query["first"].fillna(0).tolist() == [0 if s is None else s[1] for s in expected]
    assert len(score.unmatched) == len(expected) - len(has)


def compare(q, g, query, gallery, **kw):
    for protocol in (name for name, p in E.PROTOCOLS.items() if not p.needs):
        expected = oracle(cosine(q, g), query, gallery, protocol)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not any(expected):
                with pytest.raises(ValueError, match="Nothing is left to score"):
                    evaluate(q, g, query, gallery, protocol, **kw)
            else: agree(evaluate(q, g, query, gallery, protocol, **kw), expected)


@pytest.mark.slow("hundreds of random worlds")
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 60), st.integers(3, 9),
       st.sampled_from([1, 4096, 1 << 30]))
@settings(max_examples=120, deadline=None)
def test_ties_of_signs(seed, n_query, n_gallery, dim, memory):
    "Features of signs: few distances, all exact, most of them tied."
    rng = np.random.default_rng(seed)
    query, gallery = tables(rng, n_query, n_gallery)
    q, g = (rng.choice([-1., 1.], (n, dim)).astype(np.float32) for n in (n_query, n_gallery))
    compare(q, g, query, gallery, memory=memory)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("memory", [1, 60_000, 1 << 30])
@pytest.mark.parametrize("seed", range(3))
def test_repeated_rows_tie_exactly(seed, memory, dtype):
    """Real features of which many are the same image twice: equal rows must tie whatever block, tile or kernel computed
    them.
    """
    rng = np.random.default_rng(seed)
    query, gallery = tables(rng, 23, 311, people=9)
    g = rng.normal(size=(311, 67)).astype(dtype)
    g[rng.integers(0, 311, 150)] = g[rng.integers(0, 311, 150)]
    compare(rng.normal(size=(23, 67)).astype(dtype), g, query, gallery, memory=memory)


def test_every_branch_at_size(monkeypatch):
    """Several blocks with a short last one, tiles, rows cut to what is near and whole ones, thousands of hits, queries
    without hits.
    """
    rng = np.random.default_rng(1)
    people = np.r_[np.full(2500, 1), np.arange(2, 302).repeat(4)]
    gallery = make_samples([f"g{i}" for i in range(3700)], rng.permutation(people), rng.integers(0, 5, 3700))
    query = make_samples([f"q{i}" for i in range(130)], np.r_[np.full(4, 1), np.arange(2, 126), 900, 901],
                         rng.integers(0, 5, 130))
    centres = rng.normal(size=(1000, 24))
    q, g = (centres[t.pid] + s * rng.normal(size=(len(t), 24)) for t, s in ((query, .3), (gallery, .5)))
    seen = dict(blocks=0)
    blocks = E.product_blocks
    def spy_blocks(*args):
        for b in blocks(*args):
            seen["blocks"] += 1
            seen["sizes"] = seen.get("sizes", set()) | {len(b[1])}
            yield b
    monkeypatch.setattr(E, "product_blocks", spy_blocks)
    for dtype in (np.float32, np.float16):
        # float16: 355 kB do not fit in 3/4 of it, so 14 tiles
        compare(q.astype(dtype), g.astype(dtype), query, gallery, memory=400_000)
    distances = 1 - (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (g / np.linalg.norm(g, axis=1, keepdims=True)).T
    same = query.pid.to_numpy()[:, None] == gallery.pid.to_numpy()
    near = np.array([(d <= d[s].max()).mean() for d, s in zip(distances, same) if s.any()])
    assert (near < .2).any() and (near > .3).any(), "rows whose near part is cut out, and rows that are taken whole"
    assert seen["blocks"] > 4 and len(seen["sizes"]) == 2


@pytest.mark.parametrize("step", [1, 2, 7])
def test_hit_ranks_of_small_integers(step):
    rng = np.random.default_rng(step)
    for _ in range(300):
        row = rng.integers(0, 1 + step, rng.integers(1, 40)).astype(np.float32)
        hits = np.sort(rng.choice(len(row), rng.integers(1, len(row) + 1), replace=False))
        order = np.argsort(row, kind="stable")
        assert hit_ranks(row, hits).tolist() == (1 + np.flatnonzero(np.isin(order, hits))).tolist()


def test_distances_of_any_kind_agree_and_are_not_changed():
    rng = np.random.default_rng(3)
    query, gallery = tables(rng, 40, 200)
    for d in (rng.integers(0, 12, (40, 200)), rng.normal(size=(40, 200)), rng.random((40, 200), np.float32)):
        before = d.copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agree(evaluate_distances(d, query, gallery), oracle(d, query, gallery))
        np.testing.assert_array_equal(d, before)
    for bad in (np.nan, np.inf):
        d = rng.random((40, 200))
        d[3, 7] = bad
        with pytest.raises(ValueError, match="distances, row 3: not finite in columns 7"):
            evaluate_distances(d, query, gallery)


def test_tensors_memory_maps_and_filtered_tables(tmp_path):
    rng = np.random.default_rng(4)
    query, gallery = tables(rng, 30, 90)
    q, g = rng.normal(size=(30, 16)).astype(np.float32), rng.normal(size=(90, 16)).astype(np.float32)
    np.save(tmp_path / "g.npy", g)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = evaluate(q, g, query, gallery).asdict()
        assert evaluate(torch.from_numpy(q).requires_grad_(), np.load(tmp_path / "g.npy", mmap_mode="r"), query,
                        gallery).asdict() == plain
        assert evaluate(torch.from_numpy(q).bfloat16(), g.tolist(), query, gallery).n_gallery == plain["n_gallery"]
        both = pd.concat([query.assign(split="query"), gallery.assign(split="gallery")], ignore_index=True)
        some = both[both.split == "gallery"]
        assert evaluate(q, g, query, some).asdict() == plain and some.index[0] == 30
        assert evaluate(q * 1e15, g * 1e-15, query, gallery).asdict() == plain
        ids_only = evaluate(q, g, query[["pid", "camid"]], gallery[["pid", "camid"]])
        assert ids_only.asdict() == plain and all(n.startswith("row ") for n in ids_only.unmatched)


@pytest.mark.parametrize("protocol", ["market", "no_camera"])
@pytest.mark.parametrize("unknown", [.4, 1.])
def test_an_image_never_answers_itself(protocol, unknown):
    """A table searched within itself, cameras known in part: the pairs of a row with itself leave every score and every
    list.
    """
    rng = np.random.default_rng(int(10 * unknown))
    n = 60
    x = rng.normal(size=(n, 6)).astype(np.float32)
    t = make_samples([f"{i}.png" for i in range(n)], rng.integers(0, 12, n),
                     np.where(rng.random(n) < unknown, -1, rng.integers(0, 3, n)))
    d = cosine(x, x)
    d[np.arange(n), np.arange(n)] = np.inf
    scores = []
    for i in range(n):
        listed = [t.pid[j] == t.pid[i] for j in np.lexsort((np.arange(n), d[i])) if j != i
                  and not (protocol == "market" and t.pid[j] == t.pid[i] and t.camid[j] == t.camid[i] != -1)]
        at = np.flatnonzero(listed) + 1
        scores.append(None if not len(at) else (float(np.mean(np.arange(1, len(at) + 1) / at)), int(at[0]),
                                                len(at) / at[-1]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        agree(evaluate(x, x, t, t, protocol), scores)
        agree(evaluate_distances(cosine(x, x), t, t, protocol), scores)
        drawn = evaluate_single_shot(x, x, t, t, repeats=2, protocol=protocol)
    own = int((t.camid < 0).sum()) if protocol == "market" else n
    assert sum(f"{own:,} queries lie in the gallery themselves" in str(w.message) for w in said) == (3 if own else 0)
    assert drawn.n_query == sum(s is not None for s in scores)
    ranked = rank(x, x, t, t, k=5, protocol=protocol)
    assert not (ranked["query"] == ranked["gallery"]).any()
    # files of the same names in another camera are others
    elsewhere = t.assign(camid=t.camid.where(t.camid < 0, t.camid + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert E.Answers(t, elsewhere, protocol).own.tolist() == np.flatnonzero(t.camid < 0).tolist()
    assert not len(E.Answers(t.drop(columns="path"), t, protocol).own)


def test_unmatched_queries_are_named():
    query = make_samples(["a.jpg", "b.jpg", "c.jpg"], pid=[1, 2, 3], camid=[1, 1, 1])
    gallery = make_samples(["d.jpg", "e.jpg", "f.jpg"], pid=[1, 2, 0], camid=[2, 1, 1])
    x = np.eye(3)
    with pytest.warns(UserWarning, match="2 of 3 queries have no gallery image in another camera; people: 2, 3"):
        score = evaluate(x, x, query, gallery)
    assert score.unmatched == ["b.jpg", "c.jpg"] and score.mAP == score.rank1 == 1
    assert "2 queries without a match left out" in str(score)
    with pytest.raises(ValueError, match="3 of 3 queries.*people: 1, 2, 3.*no_camera"):
        evaluate(x, x, query, gallery.assign(camid=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # unknown cameras differ
        assert len(evaluate(x, x, query.assign(camid=-1), gallery.assign(camid=-1)).unmatched) == 1
        assert len(evaluate(x, x, query, gallery, "no_camera").unmatched) == 1


@pytest.mark.parametrize("change, words", [
    (dict(query_features=np.ones((3, 5))), "query: 3 feature rows for 4 rows"),
    (dict(gallery_features=np.ones((4, 4))), "5 dimensions, gallery features 4"),
    (dict(query_features=np.ones(4)), r"\(N, D\) array"),
    (dict(query_features=np.full((4, 5), "a")), r"\(N, D\) array"),
    (dict(gallery_features=np.array([[1.] * 5, [0.] * 5, [1.] * 5, [0.] * 5])),
     "2 rows of the gallery features are zero and have no direction: rows 1, 3"),
    (dict(query_features=np.array([[1.] * 5, [np.nan] * 5, [1.] * 5, [np.inf] * 5])),
     "2 rows of the query features hold NaN.*rows 1, 3"),
    (dict(protocol="cuhk"), "none of market, no_camera"),
    (dict(query=pd.DataFrame(dict(pid=[1] * 4))), "query has no column camid")])
def test_bad_input_is_named(change, words):
    table = make_samples(list("abcd"), pid=[1, 1, 2, 2], camid=[1, 2, 1, 2])
    given = dict(query_features=np.ones((4, 5)), gallery_features=np.ones((4, 5)), query=table, gallery=table)
    for door in (evaluate, rank):
        with pytest.raises(ValueError, match=words): door(**{**given, **change})
    with pytest.raises(ValueError, match="gallery is empty"):
        evaluate(np.ones((4, 5)), np.ones((0, 5)), table, table[:0])


def test_memory_stays_in_its_bounds():
    rng = np.random.default_rng(5)
    q, g = rng.normal(size=(600, 32)).astype(np.float32), rng.normal(size=(20_000, 32)).astype(np.float32)
    query, gallery = make_samples(["q"] * 600, np.arange(600) % 300,
                                  1), make_samples(["g"] * 20_000, np.arange(20_000) % 300, 2)
    tracemalloc.start()
    score = evaluate(q, g, query, gallery, memory=16 << 20)   # the whole matrix is 48 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20, peak
    assert len(score.AP) == 600


def test_rank_lists_follow_the_order_of_the_score(tmp_path):
    rng = np.random.default_rng(6)
    query, gallery = tables(rng, 20, 70)
    q, g = rng.choice([-1., 1.], (20, 5)), rng.choice([-1., 1.], (70, 5))
    d = cosine(q, g)
    for memory in (1, 1 << 30):
        full = rank(q, g, query, gallery, k=100, ignored=True, memory=memory)
        for i, entries in full.groupby("query"):
            assert entries.gallery.tolist() == np.argsort(np.round(d[i], 6), kind="stable").tolist()
            np.testing.assert_allclose(entries.distance, d[i][entries.gallery], atol=1e-6)
            if query.pid[i] < 0:
                assert set(entries.verdict) == {"unknown"}
                continue
            shown = entries[entries.verdict != "ignored"]
            assert shown["rank"].tolist() == list(range(1, len(shown) + 1))
            assert entries["rank"][entries.verdict == "ignored"].isna().all()
            junk = gallery.pid[entries.gallery].to_numpy() == -1
            own = ((gallery.pid[entries.gallery] == query.pid[i]).to_numpy()
                   & (gallery.camid[entries.gallery] == query.camid[i]).to_numpy() & (query.camid[i] >= 0))
            assert ((entries.verdict == "ignored").to_numpy() == (junk | own)).all()
            top = rank(q, g, query, gallery, k=4, memory=memory)
            pd.testing.assert_frame_equal(top[top["query"] == i].reset_index(drop=True),
                                          shown.head(4).reset_index(drop=True))
    assert full.distance.between(0, 2).all()
    figure = plot_ranked(top, query, gallery, tmp_path, rows=[0, 3])     # no image is there: the figure says so
    assert len(figure.axes) == 2 * 5 and "no such file" in figure.axes[0].texts[0].get_text()


def test_equal_to_torchreids_evaluator():
    "Its file alone: the package's own import wants more than an evaluator needs."
    import importlib.util
    from pathlib import Path
    package = importlib.util.find_spec("torchreid")
    file = next(iter(Path(package.submodule_search_locations[0]).rglob("metrics/rank.py")), None) if package else None
    if file is None: pytest.skip("torchreid is not there: pip install --no-deps torchreid")
    spec = importlib.util.spec_from_file_location("torchreid_rank", file)
    theirs = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(theirs)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n_query, n_gallery = rng.integers(20, 200), rng.integers(100, 900)
        (qp, qc), (gp, gc) = ((rng.integers(1, people, n), rng.integers(0, 6, n))
                              for people, n in ((40, n_query), (60, n_gallery)))
        d = rng.random((n_query, n_gallery)).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = evaluate_distances(d, *(make_samples([f"{k}{i}" for i in range(len(p))], p, c)
                                           for k, p, c in (("q", qp, qc), ("g", gp, gc))))
        cmc, mAP = theirs.evaluate_rank(d, qp, gp, qc, gc, max_rank=50, use_cython=False)
        assert ours.mAP == pytest.approx(mAP, abs=1e-6)
        np.testing.assert_allclose(ours.cmc[:50], cmc[:50], atol=1e-6)
