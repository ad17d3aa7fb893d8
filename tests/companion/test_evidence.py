"""The front page's table: pairs are paired, verdicts are those of stored rows, README says what the table says."""
import numpy as np
import pandas as pd
from places import ROOT

from cion_nb.companion import evidence as E
from cion_nb.companion.claims import decide
from cion_nb.core.files import write_json


def test_differences_are_of_pairs_alone():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame([dict(seed=s, arm=a, mAP=rng.random()) for s in range(5) for a in "ab"])
    kept = rows.drop(3)                                                  # seed 1 lacks b
    found = E.pairs_of(kept.sample(frac=1, random_state=0), "arm", "seed", {"a over b": ("a", "b")})["a over b"]
    plain = [100 * (rows.mAP[2 * s] - rows.mAP[2 * s + 1]) for s in (0, 2, 3, 4)]
    assert np.allclose(found, plain)


def test_the_table_says_what_its_rows_say():
    "By hand from the stored file: the means, and a verdict that follows from its interval."
    rows, table = E.ladder_rows(), E.holds_so_far()
    means = 100 * rows.groupby("method").mAP.mean()
    effects = table.xs(E.ladder().claim)["points of mAP [interval]"].str.extract(r"^([-+.\d]+) ")[0]
    assert np.allclose(effects.astype(float), [means.cion_true - means.cion, means.cion - means.tracklet,
                                                  means.tracklet - means.dino], atol=.051)
    for kind in (E.ladder(), E.photographs()):
        part = table.xs(kind.claim)
        low = part["points of mAP [interval]"].str.extract(r"\[([-+.\d]+),")[0].astype(float)
        assert (part["verdict"].str.startswith("holds") == (low > 0)).all()
        assert (part["n"] == f"{len(next(iter(kind.differences.values())))} {kind.unit}").all()


def test_what_was_not_computed_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("cion_nb.companion.experiments.results_folder", lambda: tmp_path)
    table = E.holds_so_far()
    worlds = table[table["page"] == "reproduce/claims.ipynb"]
    assert len(worlds) == 3 and (worlds["verdict"] == "not run").all() and (worlds["n"] == "0 of 5").all()


def test_the_families_are_told_in_one_line():
    kind = E.families()
    line = E._one_line(kind, "x")
    words = decide(kind.differences, 3)["verdict"].value_counts()
    assert line[5] == ", ".join(f"{n} of 10 {word}" for word, n in words.items())


def test_costs_are_medians_of_finished_runs(tmp_path):
    for i, seconds in enumerate((3., 1., 8.)):
        folder = tmp_path / f"run-{i}"
        write_json(folder / "recipe.json", dict(stage="pretrain", method="cion", profile="tiny"))
        write_json(folder / "environment.json", dict(cpu="a", commit="c"))
        write_json(folder / "result.json", dict(seconds=seconds, images=5, threads=1))
    (tmp_path / "unfinished").mkdir()
    found = E.run_costs(tmp_path)
    assert found[["what", "seconds", "runs"]].to_numpy().tolist() == [["pretrain cion", 3., 3]]
    assert E.run_costs(tmp_path / "unfinished").empty


def test_readme_shows_the_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for (_, comparison), row in E.holds_so_far().iterrows():
        line = next((line for line in readme.splitlines() if comparison in line and row["n"] in line), None)
        assert line, f"README lacks {comparison}: run nbs/index.ipynb, then `make readme`"
        assert row["verdict"] in line and row["points of mAP [interval]"] in line, comparison
    for what, row in E.cost_table().iterrows():
        assert any(what in line and row["takes"] in line for line in readme.splitlines()), what
