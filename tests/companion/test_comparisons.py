"""Pages judge all their comparisons together: by the same rule as the front page, and by a plain count over null
tables; a page begins with its claim and verdicts."""
import json

import numpy as np
import pandas as pd
import pytest
from places import ROOT

from cion_nb.companion import evidence
from cion_nb.companion.claims import Comparison, decide, judge
from cion_nb.companion.families import table3
from cion_nb.companion.report import flat_table, read_verdict
from cion_nb.companion.reproduce import Page

PAGES = sorted(path for path in (ROOT / "nbs/reproduce").glob("*.ipynb") if path.stem not in ("claims", "drawings"))


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def shown(output): return "".join(output.get("data", {}).get("text/markdown", ""))


def comparisons_of(rng, arms, seeds, gain=0.):
    rows = pd.DataFrame([dict(method=arm, seed=s, mAP=.5 + gain * i + .02 * rng.standard_normal())
                         for i, arm in enumerate(arms) for s in range(seeds)])
    return [Comparison(f"{b} above {a}", rows, "method", b, a) for a, b in zip(arms, arms[1:])]


def test_a_page_says_what_the_front_page_says_of_the_same_rows():
    "Ten families: same rows, same correction, same words."
    found = table3(Page("table3", "tiny"), {})
    kind = evidence.families()
    table = decide(kind.differences, worlds=3)
    for name, row in table.iterrows():
        line = next(line for line in found["verdicts"] if line.startswith(f"{name}: "))
        claim, word, said = read_verdict(line)
        assert word == row["verdict"] and f"{row['effect']:+.1f} ± {(row['high'] - row['low']) / 2:.1f} points" in said
        assert "3 seeds, corrected for 10 comparisons" in said
        alone = decide({name: kind.differences[name]}, worlds=3)["verdict"].iloc[0]
        assert ("uncorrected: " in line) == (alone != word) and (alone == word or f"uncorrected: {alone}" in line)


@pytest.mark.parametrize("seeds, arms", [(3, "abcde"), (5, "abc")])
def test_null_pages_give_a_false_verdict_in_one_of_twenty(seeds, arms):
    rng = np.random.default_rng(seeds)
    wrong = 0
    for _ in range(200):
        lines = judge(comparisons_of(rng, arms, seeds))
        wrong += any(read_verdict(line)[1] in ("holds", "contradicts") for line in lines)
    assert wrong <= 20, "of 200 null tables about 10, at most, are decided by accident"


def test_one_seed_gives_no_verdict_and_a_lost_seed_is_counted():
    rng = np.random.default_rng(0)
    assert all(": no verdict (" in line and "1 seed" in line for line in judge(comparisons_of(rng, "abc", 1, .3)))
    pairs = comparisons_of(rng, "abc", 3, .3)
    less = pairs[0].rows[~((pairs[0].rows["method"] == "a") & (pairs[0].rows["seed"] == 2))]
    lines = judge([Comparison("b above a", less, "method", "b", "a"), pairs[1]])
    assert read_verdict(lines[0])[1] == "2 of 3 seeds" and "3 seeds" in lines[1]
    assert judge([]) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_begins_with_its_claim_and_verdicts(path):
    outputs = [output for cell in cells(path) for output in cell.get("outputs", [])]
    assert "**The claim.**" in shown(outputs[0]), "the first output is the box"
    text = path.read_text(encoding="utf-8")
    assert "the `smoke` profile: a thumbnail" not in text and "since it failed" not in text
    code = [cell for cell in cells(path) if cell["cell_type"] == "code" and "parameters" not in
            cell["metadata"].get("tags", [])]
    long = ["".join(cell["source"])[:60] for cell in code if len("".join(cell["source"]).splitlines()) > 10]
    assert not long, f"set-up belongs in the package: {long}"


def test_a_table_is_kept_as_it_is_shown():
    table = pd.DataFrame({("paper", "mAP"): [93.3, None], ("", "seeds"): [3, 0]},
                         index=pd.MultiIndex.from_tuples([("a", "x"), ("b", "y")], names=["net", None]))
    assert flat_table(table) == dict(groups=["", "", "paper", ""], names=["net", "", "mAP", "seeds"],
                                     rows=[["a", "x", "93.3", "3"], ["b", "y", "", "0"]])
