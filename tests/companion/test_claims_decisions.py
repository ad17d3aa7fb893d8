"""Verdicts of a table of claims: how often null worlds are taken for an effect, how often an effect is found, and
Holm's correction against a plain one."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from cion_nb.companion.claims import decide, holm_levels, paired, verdict, worlds_needed

PAIRS = {"a over b": (0, 1), "b over c": (1, 2), "a over c": (0, 2), "c over d": (2, 3)}


def worlds_of(draw, n, means=(0, 0, 0, 0)):
    "Differences between four arms in `n` worlds; a world is hard or easy for all of them."
    scores = draw((n, 4)) + 3 * draw((n, 1)) + np.array(means, float)
    return {name: scores[:, i] - scores[:, j] for name, (i, j) in PAIRS.items()}


def plain_holm(p, alpha):
    "Which hypotheses Holm (1979) rejects, one after another."
    p, rejected = list(p), set()
    while len(rejected) < len(p):
        left = [i for i in range(len(p)) if i not in rejected]
        smallest = min(left, key=lambda i: p[i])
        if not p[smallest] <= alpha / len(left): break
        rejected.add(smallest)
    return [i in rejected for i in range(len(p))]


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "skewed"])
def test_null_worlds_give_a_false_verdict_in_at_most_five_of_a_hundred_tables(kind):
    rng = np.random.default_rng(0)
    draw = {"normal": rng.standard_normal, "heavy tails": lambda size: rng.standard_t(4, size),
            "skewed": lambda size: rng.gamma(2., size=size)}[kind]
    tables, wrong = 600, 0
    for _ in range(tables):
        words = decide(worlds_of(draw, 5), worlds=5).verdict
        wrong += bool(words.isin(["holds", "contradicts"]).any())
    assert wrong / tables <= .05 + 3 * np.sqrt(.05 * .95 / tables)
    assert wrong > 0                                                       # a rule that never decides would pass, too


def test_without_the_correction_null_tables_would_be_wrong_far_more_often():
    rng = np.random.default_rng(1)
    alone = np.mean([min(paired(d)[2] for d in worlds_of(rng.standard_normal, 5).values()) < .05 for _ in range(600)])
    assert alone > .09


@pytest.mark.parametrize("effect, sd, comparisons", [(4, 1.4, 3), (2, 1.4, 4), (1.5, .41, 3)])
def test_so_many_worlds_find_the_effect_four_times_in_five(effect, sd, comparisons):
    n, rng = worlds_needed(effect, sd, comparisons), np.random.default_rng(2)
    draws = rng.normal(effect, sd, (4000, n))
    found = np.mean([paired(d)[2] <= .05 / comparisons for d in draws])
    assert found >= .8 - 3 * np.sqrt(.16 / 4000)
    if n > 5:                                                              # and one world fewer does not
        fewer = np.mean([paired(d[1:])[2] <= .05 / comparisons for d in draws])
        assert fewer < .8 + 3 * np.sqrt(.16 / 4000)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(.01, .2))
def test_levels_reject_what_a_plain_holm_rejects(p, alpha):
    assert (np.array(p) <= holm_levels(p, alpha)).tolist() == plain_holm(p, alpha)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_a_word_and_its_interval_say_the_same(seed, mean):
    table = decide(worlds_of(np.random.default_rng(seed).standard_normal, 5, (2 * mean, mean, 0, 0)), worlds=5)
    rejected = plain_holm(table.p, .05)
    for row, is_decided in zip(table.itertuples(), rejected):
        assert is_decided == (row.low > 0 or row.high < 0) == (row.verdict in ("holds", "contradicts"))
        assert row.verdict != "holds" or row.effect > 0
        assert row.high - row.effect == pytest.approx(row.effect - row.low)


def test_a_paired_test_is_scipys():
    rng = np.random.default_rng(3)
    better, worse = rng.random((2, 7))
    mean, error, p = paired(better - worse)
    theirs = stats.ttest_rel(better, worse)
    assert (mean, p) == pytest.approx((np.mean(better - worse), theirs.pvalue))
    assert mean / error == pytest.approx(theirs.statistic)
    table = decide({"one": better - worse}, worlds=7)
    assert (table.low.iloc[0], table.high.iloc[0]) == pytest.approx(tuple(theirs.confidence_interval(.95)))


def test_there_is_no_verdict_before_all_worlds_are_there():
    clear = [5., 5.1, 4.9, 5.2]
    table = decide({"four": clear, "five": [*clear, 5.], "none": []}, worlds=5)
    assert table.verdict.tolist() == ["4 of 5 worlds", "holds", "not run"]
    assert table.level["five"] == pytest.approx(.05 / 3)                   # unfinished ones count in the correction
    assert np.isnan(table.effect["none"]) and table.n["none"] == 0


def test_what_is_unknown_is_not_counted():
    clear = [5., 5.1, 4.9, 5.2]
    table = decide({"one unknown": [*clear, np.nan], "five": [*clear, 5.]}, worlds=5)
    assert table.verdict.tolist() == ["4 of 5 worlds", "holds"] and table.n.tolist() == [4, 5]
    assert decide({}, worlds=5).empty
    told = verdict([.5, .6, np.nan, .7], [.4, .5, .1, .6])
    assert (told["seeds"], told["verdict"]) == (3, "agrees")
    assert verdict([np.nan], [.1])["verdict"] == "not run"


def test_worlds_that_all_say_the_same_have_no_spread():
    table = decide({"same": [1.] * 5, "nothing": [0.] * 5, "less": [-2.] * 5}, worlds=5)
    assert table.verdict.tolist() == ["holds", "not resolved", "contradicts"]
    assert isinstance(table, pd.DataFrame) and (table.high == table.low).all()


def test_an_effect_must_be_an_effect():
    for effect, sd, comparisons in ((0, 1, 1), (-1, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be positive"): worlds_needed(effect, sd, comparisons)
    with pytest.raises(ValueError, match="more than 999 worlds"): worlds_needed(.01, 10)
