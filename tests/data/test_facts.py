"""Facts of the data sets stand once, and no score depends on how people are numbered."""
import numpy as np
import pytest
from examples import quiet
from hypothesis import given, settings, strategies as st
from oracles import cosine

from cion_nb.core.samples import make_samples, read_samples, write_samples
from cion_nb.data.facts import DATASETS
from cion_nb.retrieval.evaluate import evaluate, evaluate_distances, rank
from cion_nb.retrieval.inspection import pair_distances
from cion_nb.retrieval.protocols import by_camera, evaluate_single_shot, ranked, sides

# ---- no score hangs on how people, cameras and tracklets are numbered ----------

def scores(q, g, query, gallery, distractors):
    "Every evaluator's numbers."
    single = evaluate_single_shot(q, g, query, gallery, repeats=3, distractors=distractors)
    one, given = evaluate(q, g, query, gallery), evaluate_distances(cosine(q, g), query, gallery)
    listed, pairs, cameras = rank(q, g, query, gallery,
                                  k=5), pair_distances(q, g, query, gallery, bins=50), by_camera(q, g, query, gallery)
    return [one.AP, one.cmc, given.AP, single.cmc, single.per_repeat, listed.verdict.tolist(), pairs.right, pairs.wrong,
            np.sort(cameras.mAP), np.sort(cameras.queries)]


@pytest.mark.slow("hundreds of random worlds")
@given(st.integers(0, 2**32 - 1), st.sampled_from(["permuted", "from 0", "far"]))
@settings(max_examples=8, deadline=None)
def test_renumbering_changes_no_score(seed, how):
    "Person 0, distractors, junk and unknown cameras among them; ties too."
    rng = np.random.default_rng(seed)
    query, gallery = (make_samples([f"{side}{i}" for i in range(n)], rng.integers(low, 8, n), rng.integers(-1, 3, n))
                      for side, n, low in (("q", 14, 1), ("g", 70, -1)))
    q, g = rng.choice([-1., 1.], (14, 6)).astype(np.float32), rng.choice([-1., 1.], (70, 6)).astype(np.float32)
    people, cameras = (dict(permuted=(rng.permutation(8), rng.permutation(3)),
                            far=(10**6 + 7 * rng.permutation(8), 900 + np.arange(3)))[how]
                       if how != "from 0" else (np.roll(np.arange(8), 1), np.arange(3)[::-1]))
    def again(t):
        return t.assign(pid=np.where(t.pid < 0, -1, people[t.pid]), camid=np.where(t.camid < 0, -1, cameras[t.camid]))
    if not quiet(lambda: any((gallery.pid == p).any() for p in query.pid)): return
    for distractors, renamed in (((), ()), (0, [int(people[0])])):
        try: expected = quiet(scores, q, g, query, gallery, distractors)
        except ValueError as e:
            assert "Nothing is left" in str(e)
            return
        for a, b in zip(expected, quiet(scores, q, g, again(query), again(gallery), renamed)):
            np.testing.assert_array_equal(a, b)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_renumbered_tracklets_score_the_same(seed):
    "Means, ties and draws do not follow a tracklet's number."
    rng = np.random.default_rng(seed)
    n = 24
    t = make_samples([str(i) for i in range(3 * n)], np.repeat(rng.integers(0, 5, n), 3),
                     np.repeat(rng.integers(0, 3, n), 3), tracklet=np.repeat(np.arange(n), 3), video="v",
                     split=np.repeat(["query", "gallery", "gallery"], n))
    x = rng.choice([-1., 1.], (3 * n, 4)).astype(np.float32)
    out = []
    for number in (np.arange(n), rng.permutation(n), 500 - 3 * np.arange(n)):
        f, table = ranked(x, t.assign(tracklet=number[t.tracklet]), "mars")
        a, b = sides(table, "mars")
        try:
            out.append((quiet(evaluate, f[a], f[b], table.iloc[a], table.iloc[b]).AP,
                        quiet(evaluate_single_shot, f[a], f[b], table.iloc[a], table.iloc[b], repeats=2).cmc))
        except ValueError as e:
            assert "Nothing is left" in str(e)
            return
    for other in out[1:]:
        for a, b in zip(out[0], other): np.testing.assert_array_equal(a, b)


def test_nobody_is_a_fact_of_the_data_set(tmp_path):
    gallery, query = make_samples(list("abcde"), [0, 0, 0, 5, 6], 2,
                                  split="gallery"), make_samples(list("xy"), [5, 6], 1, split="query")
    x, q = np.eye(5), np.ones((2, 5))
    def images(t, **kw): return evaluate_single_shot(q, x, query, t, repeats=2, **kw).n_people
    assert images(gallery) == 3 and images(gallery, distractors=0) == 5 and images(gallery, distractors=[0, 7]) == 5
    for name, n in (("market1501", 5), ("mars", 5), ("world", 5), ("msmt17", 3), ("viper", 3), ("folder", 3)):
        gallery.attrs = dict(dataset=name)
        kept = read_samples(write_samples(gallery, tmp_path / "t.parquet"))
        assert images(kept) == n and images(kept, distractors=()) == 3
    with pytest.raises(ValueError, match=r"2 queries are distractors \(pid 5\).*say distractors="):
        evaluate_single_shot(q, x, query.assign(pid=5), gallery, distractors=5)


@pytest.mark.slow("real images and clips")
def test_facts_stand_once():
    "Every reader's data set has its facts, a licence and a home; what the field prints follows from them."
    for facts in DATASETS.values(): assert facts.title and facts.licence and facts.home and facts.protocol == "market"
    mars = DATASETS["mars"]
    assert mars.queries_in_gallery and mars.tracklets["gallery"] + mars.tracklets["query"] == 11_310
    assert mars.total - mars.counts["train"][0] == 681_089
    assert [n for n, f in DATASETS.items() if f.queries_in_gallery] == ["mars", "world_clips"]
    assert [n for n, f in DATASETS.items() if f.distractor is not None] == [
        "market1501", "mars", "world", "world_clips"]
