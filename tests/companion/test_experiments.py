"""Claims as experiments: rows outlive their runs, and a damaged table is refused."""
from functools import partial

import numpy as np
import pandas as pd
import pytest
from places import ROOT

from cion_nb.companion import arms as A, experiments as E, publishing as P, reproduce
from cion_nb.core.files import read_json
from cion_nb.core.runs import Run
from cion_nb.core.settings import PROFILES


@pytest.fixture
def chosen(monkeypatch):
    "As if every network's settings were chosen."
    monkeypatch.setattr(A, "settled", lambda *a: {})
    for room in (A, E): monkeypatch.setattr(room, "learned_at", lambda *a: 38_400)


def test_arms_wait_for_their_settings(monkeypatch):
    def nothing(*a): raise LookupError("not chosen")
    for room in (A, E): monkeypatch.setattr(room, "settled", nothing)
    for room in (A, E): monkeypatch.setattr(room, "learned_at", nothing)
    assert set(E.missing(E.CLAIMS["budget"], "small", 1)) <= {"curve_untrained"}
    assert not E.missing(E.CLAIMS["C3"], "small", 1)
    plan = E.costs("small", ["budget", "C3"])
    assert plan["trainings"].isna().all()
    assert set(E.claims_table("small", ["C3"])["verdict"]) == {"not run"}


def test_a_family_that_does_not_learn_is_shown_as_such(monkeypatch, chosen):
    def at(backbone): return None if backbone == "vit_trial" else 38_400
    for room in (A, E): monkeypatch.setattr(room, "learned_at", at)
    assert {arm for arm in E.missing(E.CLAIMS["C3"], "small", 1) if arm.startswith("vit_")} <= {"vit_trial_scratch"}
    words = E.claims_table("small", ["C3"])["verdict"]
    of_vit = words.index.get_level_values(1).str.startswith("vit_trial")
    assert words[of_vit].tolist() == ["does not learn in 30 core-minutes"]
    assert (words != "not run").sum() == 1


def times(world, b):
    def told(share):
        arm, n = f"time_{share:g}", 9_600 * share
        return row(world, arm, np.nan) | dict(presentations=n, seconds=.01 * n**b)
    return [told(share) for share in E.SHARES]


@pytest.mark.parametrize("b, words", [
    (1., ["holds", "holds"]), (1.3, ["holds", "contradicts"]), (.7, ["contradicts", "holds"])])
def test_time_is_linear_where_the_exponent_is_inside(tmp_path, b, words):
    rows = [made for world in range(1, 8) for made in times(world, b + .01 * (-1)**world)]
    E.write_results("small", rows, {}, tmp_path)
    found = E.exponents(E.read_results("small", tmp_path))
    assert found[1] == pytest.approx(b - .01, abs=1e-3) and len(found) == 7
    assert E.claims_table("small", ["C5"], tmp_path)["verdict"].tolist() == words
    assert P.arms_table(E.CLAIMS["C5"], "small", tmp_path).index[0] == "timed on 10% of the images"
    assert P.plot_arms(E.CLAIMS["C5"], "small", tmp_path).axes[0].lines


def test_a_world_that_lacks_a_share_has_no_exponent(tmp_path):
    E.write_results("small", [*times(1, 1.), *times(2, 1.)[:-1]], {}, tmp_path)
    assert list(E.exponents(E.read_results("small", tmp_path))) == [1]


SHORT = dict(C2=A.Claim("C2", "order", "", (("identity", "instance"),), ("untrained",)))
UNTRAINED = dict(C2=A.Claim("C2", "order", "", (), ("untrained",)))


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """Two worlds in small pictures, computed once, the second by its untrained arm alone: the folder of their results,
    and of their runs.
    """
    folder = tmp_path_factory.mktemp("experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CION_NB_RUNS", str(folder / "runs"))
        patch.setattr(reproduce, "make_world", partial(reproduce.make_world, crop=(64, 32)))
        for claims, worlds in ((UNTRAINED, 2), (SHORT, 1)):
            patch.setattr(E, "CLAIMS", claims)
            E.compute("smoke", worlds=worlds, folder=folder / "results", jobs=1)
    return folder / "results", folder / "runs"


@pytest.fixture
def results(computed, monkeypatch):
    "The folder of these results, while there is that one claim."
    monkeypatch.setattr(E, "CLAIMS", SHORT)
    monkeypatch.setenv("CION_NB_RUNS", str(computed[1]))
    return computed[0]


@pytest.mark.slow("trains networks")
def test_rows_say_what_they_are_and_recipes_lead_back_to_them(results):
    rows = E.read_results("smoke", results)
    assert rows[["world", "arm"]].to_numpy().tolist() == [[1, "untrained"], [1, "instance"], [1, "identity"],
                                                          [2, "untrained"]]
    assert rows[["mAP", "rank1", "own_camera", "commit", "cpu", "torch"]].notna().all(axis=None)
    assert rows.mAP.between(0, 1).all() and (rows.feature_rank >= 1).all()
    trained = rows[rows.arm != "untrained"]
    assert (trained.presentations == trained.presentations.iloc[0]).all()
    for row in rows.itertuples():
        asked = read_json(results / "recipes" / f"{row.run}.json")
        assert E.run_name(asked) == row.run and asked["seed"] == row.world
        if row.arm != "untrained": assert Run(asked).result["images"] == row.presentations


@pytest.mark.slow("trains networks")
def test_rows_outlive_their_runs(results, tmp_path, monkeypatch):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "empty"))
    monkeypatch.setattr(E, "make_runs", lambda *a, **k: pytest.fail("computed again"))
    E.compute("smoke", worlds=1, folder=results)
    assert not E.missing(E.CLAIMS["C2"], "smoke", 1, results)
    assert set(E.missing(E.CLAIMS["C2"], "smoke", 2, results)) == {"instance", "identity"}
    assert set(E.missing(E.CLAIMS["C2"], "smoke", 3, results)) == {"untrained", "instance", "identity"}
    plan = E.costs("smoke", folder=results)
    assert plan.loc["C2", "to_do"] == plan.loc["C2", "worlds"] - 1
    assert plan.loc["C2", "trainings"] == 2 * plan.loc["C2", "to_do"]


@pytest.mark.slow("trains networks")
def test_a_row_of_other_settings_is_computed_again(results, monkeypatch):
    changed = E.ARMS | dict(identity=A.Arm("fewer levels", "cion", ("tracklet",)))
    monkeypatch.setattr(E, "ARMS", changed)
    assert set(E.missing(E.CLAIMS["C2"], "smoke", 1, results)) == {"identity"}


def row(world, arm, mAP, profile="small"):
    return dict(world=world, arm=arm, mAP=mAP, run=E.run_name(E.ARMS[arm].recipe(profile, world)))


def test_differences_are_paired_within_worlds(tmp_path):
    rng, scores = np.random.default_rng(0), {}
    for world in range(1, 8):
        for arm in ("identity", "tracklet", "instance"): scores[world, arm] = rng.random()
    del scores[4, "tracklet"]                                            # a world that is not finished
    E.write_results("small", [row(*key, value) for key, value in scores.items()], {}, tmp_path)
    found = E.differences(E.CLAIMS["C2"], E.of_today(E.read_results("small", tmp_path), "small"))
    over = found["denoised, all levels (CION) over raw tracklets"]
    wanted = [100 * (scores[w, "identity"] - scores[w, "tracklet"]) for w in (1, 2, 3, 5)]
    assert over == pytest.approx(wanted, abs=1e-3)                       # worlds 6 and 7 were not planned
    assert E.verdicts("small", ["C2"], tmp_path).verdict.iloc[0] == "4 of 5 worlds"


@pytest.mark.parametrize("change, said", [
    (lambda text: "", "no table of results"),
    (lambda text: text.replace("rank1", "rank_1"), "other columns"),
    (lambda text: text + text.splitlines()[1] + "\n", "two rows of one arm and world"),
    (lambda text: text + "2,track", "an arm 'track'"),
    (lambda text: text.replace(",identity,", ",,"), "an arm nan"),
    (lambda text: text.replace("1,identity,0.5", "0,identity,0.5"), "a world 0"),
    (lambda text: text.replace("1,identity,0.5", "1.5,identity,0.5"), "a world 1.5"),
    (lambda text: text.replace("1,identity,0.5", "one,identity,0.5"), "text in column world"),
    (lambda text: text.replace("identity,0.5", "identity,50"), "no fraction"),
    (lambda text: text.replace("identity,0.5", "identity,"), "a mAP that is empty"),
    (lambda text: text.replace("identity,0.5", "identity,inf"), "no fraction"),
])
def test_a_damaged_table_is_refused_by_name(tmp_path, change, said):
    file = E.write_results("small", [row(1, "identity", .5)], {}, tmp_path)
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=said) as error: E.read_results("small", tmp_path)
    assert str(file) in str(error.value) and "git checkout" in str(error.value)


def test_rows_that_could_not_be_read_again_are_not_written(tmp_path):
    twice = [row(1, "identity", .5), row(1, "identity", .6)]
    for rows in (twice, [row(1, "identity", 50.)], [row(1, "identity", .5) | dict(run=None)]):
        with pytest.raises(ValueError, match="what should be written"): E.write_results("small", rows, {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_what_is_read(tmp_path):
    told = dict(commit="012345678901", torch="2.10", cpu="7", presentations=1234567, seconds=1234.5678, device="cpu")
    rows = [row(1, "untrained", .1), row(1, "identity", 1 / 3) | told]
    rows.append(row(2, "identity", .5) | dict(commit="1234567890e1"))
    E.write_results("small", rows, {}, tmp_path)
    back = E.read_results("small", tmp_path)
    for name, value in told.items(): assert back[name][1] == value
    assert back.commit[2] == "1234567890e1" and back.mAP[1] == pytest.approx(1 / 3, abs=1e-9)


def test_rows_of_other_settings_are_in_no_verdict(tmp_path):
    rows = [row(w, arm, .1 * w) for w in range(1, 6) for arm in ("identity", "tracklet", "instance")]
    rows[0] |= dict(run="pretrain-cion-small-of-yesterday")
    E.write_results("small", rows, {}, tmp_path)
    verdict = E.verdicts("small", ["C2"], tmp_path).verdict
    assert verdict.tolist() == ["4 of 5 worlds", "not resolved", "4 of 5 worlds"]
    assert set(E.missing(E.CLAIMS["C2"], "small", 1, tmp_path)) == {"identity", "untrained", "truth"}


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    file = E.write_results("small", [row(1, "identity", .5)], {}, tmp_path)
    before = file.read_bytes()
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): E.write_results("small", [row(2, "identity", .5)], {}, tmp_path)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["small.csv"]


@pytest.mark.parametrize("together, calls", [(True, [2, 1, 1]), (False, [1, 1])])
def test_short_worlds_may_be_computed_together(tmp_path, monkeypatch, together, calls):
    "First the runs of both, so that no core waits; then the rows, world by world."
    made, rows = [], []
    monkeypatch.setattr(E, "make_runs", lambda asked, *a: made.append(len(asked)))
    monkeypatch.setattr(E, "missing", lambda claim, profile, world, folder: {"untrained": dict(stage="x", seed=world)})
    monkeypatch.setattr(E, "measure", lambda arm, world, made: dict(world=world, arm=arm, mAP=.1))
    monkeypatch.setattr(E, "run_name", str)
    monkeypatch.setattr(E, "write_results", lambda profile, new, *a: rows.extend(new))
    E.compute("tiny", ["C2"], 2, tmp_path, 1, together)
    assert made == calls and [row["world"] for row in rows] == [1, 2]


def test_an_unknown_claim_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'C9' is not known.* Known: C2, C1, few labels"): E.costs("smoke", ["C9"])
    with pytest.raises(ValueError, match="'smal' is not known; did you mean 'small'"): E.read_results("smal")


def seed_of(asked: dict) -> int:
    "Of a training; of features and what is denoised of them, that of their data."
    return seed_of(asked["features"]) if "features" in asked else asked.get("seed", asked["data"]["seed"])


def test_stored_results_are_whole():
    "Every stored row has its recipe, and was made by a program that was committed."
    stored = [name for name in PROFILES if (ROOT / f"reports/results/{name}.csv").exists()]
    assert "small" in stored and "smoke" not in stored
    for profile in stored:
        rows = E.read_results(profile)
        assert len(rows)
        for r in rows.itertuples():
            asked = read_json(E.results_folder() / "recipes" / f"{r.run}.json")
            assert asked["profile"] == profile and seed_of(asked) == r.world
        assert not rows.commit.str.endswith("+").any()
