"""The front page's table: pairs are paired, verdicts are those of stored rows, README says what the table says."""
import numpy as np
import pandas as pd
from places import ROOT

from cion_nb.companion import evidence as E, experiments as X
from cion_nb.companion.claims import decide, mean_interval
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
    effects = table.xs(E.ladder().claim)["difference [interval]"].str.extract(r"^([-+.\d]+) ")[0]
    assert np.allclose(effects.astype(float), [means.cion_true - means.cion, means.cion - means.tracklet,
                                                  means.tracklet - means.dino], atol=.051)
    for kind in (E.ladder(), E.photographs()):
        part = table.xs(kind.claim)
        low = part["difference [interval]"].str.extract(r"\[([-+.\d]+),")[0].astype(float)
        assert (part["verdict"].str.startswith("holds") == (low > 0)).all()
        assert (part["n"] == f"{len(next(iter(kind.differences.values())))} {kind.unit}").all()


def test_what_was_not_computed_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("cion_nb.companion.experiments.results_folder", lambda: tmp_path)
    table = E.holds_so_far()
    worlds = table[table["page"] == "reproduce/claims.ipynb"]
    assert len(worlds) == 3 and (worlds["verdict"] == "not run").all() and (worlds["n"] == "0 of 5").all()


def test_the_families_are_told_in_one_line():
    "With what each would say alone: the correction for ten hides nothing."
    kind, said = E.families(), E._families_line()[6]
    words = decide(kind.differences, 3)["verdict"].value_counts()
    assert said.startswith(", ".join(f"{n} of 10 {word}" for word, n in words.items()))
    low = {name: mean_interval(d)[0] + mean_interval(d)[2] for name, d in kind.differences.items()}
    assert {name for name in kind.differences if name in said} == {name for name, high in low.items() if high < 0}


def test_levels_are_means_of_the_arms():
    for kind in (E.ladder(), E.photographs(), E.adaptation(), E.families()):
        for name, differences in kind.differences.items():
            worse, better = kind.levels[name]
            assert np.isclose(better - worse, np.mean(differences)), name


def test_a_claim_begins_with_a_row_of_each_arm(tmp_path, monkeypatch):
    "One that shares an arm with another is not shown for its sake."
    monkeypatch.setattr("cion_nb.companion.experiments.results_folder", lambda: tmp_path)
    def row(arm): return dict(world=1, arm=arm, mAP=.1, run=X.run_name(X.ARMS[arm].recipe("small", 1)))
    rows = [row(arm) for arm in X.CLAIMS["C2"].arms]
    X.write_results("small", rows, {}, tmp_path)
    table = E.holds_so_far()
    worlds = table[table["page"] == "reproduce/claims.ipynb"]
    assert set(worlds.index.get_level_values(0)) == {X.CLAIMS["C2"].says}
    assert (worlds["mAP, %"] == "10.0 → 10.0").all() and (worlds["verdict"] == "1 of 5 worlds").all()


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
        assert row["verdict"] in line and row["difference [interval]"] in line, comparison
    for what, row in E.cost_table().iterrows():
        assert any(what in line and row["takes"] in line for line in readme.splitlines()), what
