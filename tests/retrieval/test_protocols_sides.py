"""Who is searched where: the queries in MARS's gallery, by its official counts; every other data set as it was."""
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from examples import quiet

from cion_nb.core.samples import make_samples, read_samples, write_samples
from cion_nb.data.check import check
from cion_nb.data.datasets import data_sets, READERS
from cion_nb.data.facts import DATASETS, facts_of
from cion_nb.retrieval.evaluate import Answers, evaluate
from cion_nb.retrieval.protocols import ranked, sides, tracklet_rows


def official_mars():
    """A row a tracklet, by MARS's counts: 1,980 queries of 626 people, 9,330 others, 3,248 of them distractors.
    70 people have two queries and nothing else: the 140 that have no match where queries are left out.
    """
    rows = [(p, c, "query") for p in range(1, 71) for c in (1, 2)]
    for p in range(71, 627):                                     # 556 people: 172 with four queries, 384 with three
        rows += [(p, c, "query") for c in range(1, 5 if p < 71 + 172 else 4)]
        rows += [(p, 1 + k % 6, "gallery") for k in range(11 if p < 71 + 522 else 10)]
    rows += [(0, 1 + k % 6, "gallery") for k in range(3_248)]
    pid, camid, split = zip(*(rows[i] for i in np.random.default_rng(0).permutation(len(rows))))
    numbers = np.arange(len(rows))
    table = make_samples([f"{i}.jpg" for i in numbers], pid, camid, tracklet=numbers, video="v", split=list(split))
    table.attrs["dataset"] = "mars"
    return table


@pytest.fixture(scope="module")
def mars(): return official_mars()


def test_the_official_gallery_of_mars(mars):
    query, gallery = sides(mars)
    assert (len(query), len(gallery), mars.pid[query].nunique()) == (1_980, 11_310, 626)
    assert set(query) <= set(gallery) and (np.diff(gallery) > 0).all()
    facts = DATASETS["mars"].tracklets
    assert (len(query), len(gallery) - len(query)) == (facts["query"], facts["gallery"])
    found = Answers(mars.iloc[query], mars.iloc[gallery], "market")
    assert (found.counts == 0).sum() == 0 and not len(found.own)     # its own tracklet is of its own camera, and goes
    without = np.flatnonzero(mars.split == "gallery")
    assert len(without) == 9_330
    assert (Answers(mars.iloc[query], mars.iloc[without], "market").counts == 0).sum() == 140


def test_a_querys_own_tracklet_is_never_its_answer(mars):
    query, gallery = sides(mars)
    for protocol in ("market", "no_camera"):
        found = Answers(mars.iloc[query], mars.iloc[gallery], protocol)
        for i in range(0, len(query), 37): assert query[i] not in gallery[found.hits(i)]
    unknown = mars.assign(camid=-1)                       # no camera is known: only the path tells
    found = Answers(unknown.iloc[query], unknown.iloc[gallery], "market")
    assert len(found.own) == 1_980 and query[5] not in gallery[found.hits(5)]


def test_images_and_tracklets_have_the_same_sides(mars):
    "Each tracklet three images, in disorder: the sides of the images are those of their tracklets."
    images = mars.loc[mars.index.repeat(3)].sample(frac=1, random_state=0).reset_index(drop=True)
    images["path"] = [f"{i}.jpg" for i in range(len(images))]
    query, gallery = sides(images, "mars")
    assert (len(query), len(gallery)) == (3 * 1_980, 3 * 11_310)
    table, _ = tracklet_rows(images)
    q, g = sides(table, "mars")
    assert set(table.tracklet[q]) == set(images.tracklet[query])
    assert set(table.tracklet[g]) == set(images.tracklet[gallery])
    features, rows = ranked(np.ones((len(images), 2), np.float32), images)
    assert len(features) == len(rows) == 11_310 and [len(s) for s in sides(rows)] == [1_980, 11_310]


def test_the_name_the_table_and_the_file_say_the_same(mars, tmp_path):
    kept = read_samples(write_samples(mars, tmp_path / "mars.parquet"))
    nameless = mars.copy()
    nameless.attrs = {}
    for table, data in ((mars, None), (kept, None), (kept, str(tmp_path / "mars.parquet")), (nameless, "mars"),
                        (mars, dict(stage="world"))):
        assert len(sides(table, data)[1]) == 11_310
    assert len(sides(nameless)[1]) == len(sides(nameless, "mine.parquet")[1]) == 9_330
    assert len(sides(nameless, "market1501")[1]) == 9_330


@pytest.mark.parametrize("name", [*data_sets(), "world", None])
def test_every_other_data_set_keeps_its_sides(name):
    "Queries ask and gallery answers, row for row; the features that are scored are the same arrays."
    rng = np.random.default_rng(0)
    table = make_samples([f"{i}.jpg" for i in range(90)], rng.integers(1, 9, 90), rng.integers(0, 4, 90),
                         tracklet=np.arange(90), video="v", split=rng.choice(["train", "query", "gallery", ""], 90))
    query, gallery = sides(table, name)
    joins = name == "mars"
    assert query.tolist() == np.flatnonzero(table.split == "query").tolist()
    assert gallery.tolist() == np.flatnonzero(table.split.isin(["gallery", "query"][:1 + joins])).tolist()
    assert facts_of(name).searched == (("gallery", "query") if joins else ("gallery",))
    x = rng.normal(size=(90, 4)).astype(np.float32)
    if facts_of(name).ranks == "images": assert ranked(x, table, name)[0] is x


def test_the_report_counts_by_the_same_fact(mars):
    assert not [p for p in check(mars).problems if "no match" in p]
    mars = mars.copy()
    mars.attrs = {}
    assert [p for p in check(mars).problems if p.startswith("140 queries have no match in another camera")]


@pytest.mark.parametrize("split, words", [("query", "the table has none of split gallery"),
                                          ("gallery", "none of split query"), ("train", "split gallery and query")])
def test_one_side_alone_is_refused(split, words):
    table = make_samples(list("ab"), 1, [1, 2], split=split)
    for data in (None, "mars", "ilids_vid_0"):
        with pytest.raises(ValueError, match=words if data is None else words.removeprefix("the table has ")):
            sides(table, data)
    without = pd.DataFrame(dict(path=["a"]))
    with pytest.raises(ValueError, match="the table has no column split, but path"): sides(without)


def test_a_misspelt_name_is_refused(mars):
    "It would be no data set's name: MARS's queries would not join the gallery, and the score would be another one."
    nameless, x = mars.copy(), np.ones((len(mars), 2), np.float32)
    nameless.attrs = {}
    for name in ("mras", "Mars", "foo", "viper_12", "mars.csv", ""):
        said = f"data set '{name}' is not known"
        with pytest.raises(ValueError, match=said): sides(nameless, name)
        for tracklets in (None, False):
            with pytest.raises(ValueError, match=said): ranked(x, nameless, name, tracklets)
    with pytest.raises(ValueError, match="did you mean 'mars'.*Known: market1501, .*world_clips"): sides(mars, "mras")
    for data in (5, ["mars"]):
        with pytest.raises(TypeError, match="give a data set's name, a samples .parquet"): sides(mars, data)


@pytest.mark.parametrize("name", [*data_sets(), *DATASETS])
def test_every_name_that_is_known_is_taken(name):
    table = make_samples(list("ab"), 1, [1, 2], tracklet=[0, 1], split=["query", "gallery"])
    assert len(sides(table, name)[0]) == 1 and len(ranked(np.eye(2, dtype=np.float32), table, name)[1]) == 2


def test_a_reader_of_ones_own_is_known_by_its_name_and_without_its_split(mars, monkeypatch):
    for k in (0, 1): monkeypatch.setitem(READERS, f"campus_{k}", lambda root: mars)
    assert {len(sides(mars, name)[1]) for name in ("campus_0", "campus_1", "campus")} == {11_310}
    with pytest.raises(ValueError, match="'campus_2' is not known; did you mean 'campus_"): sides(mars, "campus_2")


@pytest.mark.slow("two products of 1,980 by 11,310 by 512")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_sides_of_mars_are_scored_within_memory(mars, dtype):
    "Nothing beyond the features and `memory`; the whole matrix would be 90 MB."
    query, gallery = sides(mars)
    x = np.random.default_rng(0).normal(size=(len(mars), 512)).astype(dtype)
    q, g, rows = x[query], x[gallery], (mars.iloc[query], mars.iloc[gallery])
    tracemalloc.start()
    score = evaluate(q, g, *rows, memory=32 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20, peak
    assert (len(score.AP), score.n_gallery, score.unmatched) == (1_980, 11_310, [])
    some = np.arange(0, 1_980, 180)
    own = quiet(evaluate, q[some], g, rows[0].iloc[some], rows[1])
    np.testing.assert_allclose(own.AP, score.AP[some], atol=1e-6)
