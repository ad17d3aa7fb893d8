"""Claims as experiments: worlds differ in all that they are made of, rows outlive their runs, and a damaged table is
refused."""
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
from places import ROOT

from cion_nb.companion import experiments as E, reproduce
from cion_nb.core.files import read_json
from cion_nb.core.runs import Run


@pytest.fixture
def chosen(monkeypatch):
    "As if every network's settings were chosen."
    monkeypatch.setattr(E, "settled", lambda *a: {})
    monkeypatch.setattr(E, "learned_at", lambda *a: 38_400)


@pytest.mark.parametrize("arm", E.ARMS)
def test_a_world_is_another_world_in_all_that_an_arm_is_made_of(arm, chosen):
    one, two = (E.ARMS[arm].recipe("small", world) for world in (1, 2))
    text = [repr(made).replace("'seed': 1", "'seed': W").replace("'seed': 2", "'seed': W") for made in (one, two)]
    assert text[0] == text[1] and one != two                             # nothing but seeds differs
    assert one["seed"] == one["data"]["seed"] == 1
    assert E.run_name(one) != E.run_name(two)


def test_arms_of_a_world_share_data_and_budget():
    usual = [arm for arm in E.ARMS.values() if arm.method and not arm.then and not arm.backbone and not arm.epochs]
    made = [arm.recipe("small", 3) for arm in usual]
    for name in ("data", "epochs", "images_per_epoch", "batch_size", "backbone", "lr", "seed"):
        assert all(recipe[name] == made[0][name] for recipe in made)


def test_pairs_of_a_claim_differ_in_what_it_is_about():
    "Fine-tunings and adaptations of a pair share all but their start; a tenth of the data all but the share."
    for better, worse in (*E.CLAIMS["few labels"].comparisons, E.CLAIMS["C6"].comparisons[0]):
        one, other = (E.ARMS[name].recipe("small", 1) for name in (better, worse))
        assert {k for k in one if one[k] != other[k]} == {"weights"} and other["weights"] is None
    one, other = (E.ARMS[name].recipe("small", 1) for name in E.CLAIMS["C6"].comparisons[1])
    assert {k for k in one if one[k] != other[k]} == {"weights"} and one["stage"] == "uda"
    starts = one["weights"], other["weights"]                            # both learned from labels of world B
    assert {k for k in starts[0] if starts[0][k] != starts[1][k]} == {"weights"} and starts[1]["weights"] is None
    assert starts[0]["data"]["bank"] == "B" != one["data"]["bank"]
    one, other = (E.ARMS[name].recipe("small", 1) for name in E.CLAIMS["C4"].comparisons[0])
    assert {k for k in one if one[k] != other[k]} == {"data_share"}
    assert [E.ARMS[f"tuned_{few:g}"].recipe("small", 1)["few_ids"] for few in E.FEW] == list(E.FEW)


def test_pairs_of_a_network_of_its_own_differ_in_start_and_chosen_settings(chosen):
    for name in ("budget tuned", "C3"):
        for better, worse in E.CLAIMS[name].comparisons:
            one, other = (E.ARMS[arm].recipe("small", 1) for arm in (better, worse))
            assert {k for k in one if one[k] != other[k]} == {"weights"} and other["weights"] is None
            assert one["image_size"] == one["weights"]["image_size"] == [64, 32]
    for n in E.BUDGETS:
        dino, cion = (E.ARMS[f"{m}_{n}"].recipe("small", 1) for m in ("dino", "cion"))
        assert dino["epochs"] * dino["images_per_epoch"] == cion["epochs"] * cion["images_per_epoch"] == n


def test_arms_wait_for_their_settings(monkeypatch):
    def nothing(*a): raise LookupError("not chosen")
    monkeypatch.setattr(E, "settled", nothing)
    monkeypatch.setattr(E, "learned_at", nothing)
    assert set(E.missing(E.CLAIMS["budget"], "small", 1)) <= {"curve_untrained"}
    assert not E.missing(E.CLAIMS["C3"], "small", 1)
    plan = E.costs("small", ["budget", "C3"])
    assert plan["trainings"].isna().all()
    assert set(E.claims_table("small", ["C3"])["verdict"]) == {"not run"}


def test_a_family_that_does_not_learn_is_shown_as_such(monkeypatch, chosen):
    monkeypatch.setattr(E, "learned_at", lambda backbone: None if backbone == "vit_trial" else 38_400)
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
    assert E.arms_table(E.CLAIMS["C5"], "small", tmp_path).index[0] == "timed on 10% of the images"
    assert E.plot_arms(E.CLAIMS["C5"], "small", tmp_path).axes[0].lines


def test_a_world_that_lacks_a_share_has_no_exponent(tmp_path):
    E.write_results("small", [*times(1, 1.), *times(2, 1.)[:-1]], {}, tmp_path)
    assert list(E.exponents(E.read_results("small", tmp_path))) == [1]


def test_the_budget_curve_is_drawn_from_rows(tmp_path, chosen):
    rows = [dict(world=w, arm=arm, mAP=.1 * w, feature_rank=3., run=E.run_name(E.ARMS[arm].recipe("small", w)))
            for w in (1, 2) for arm in {*E.CLAIMS["budget"].arms, *E.CLAIMS["budget tuned"].arms}]
    E.write_results("small", rows, {}, tmp_path)
    frozen, tuned, rank = E.plot_budget("small", tmp_path).axes
    means = [line for line in frozen.lines if line.get_marker() == "o"]
    assert len(means) == len(E.CURVE) and np.allclose(means[0].get_ydata(), 15)
    assert [line.get_linestyle() for line in tuned.lines].count("--") == 1 and rank.lines


def test_the_worlds_of_the_settings_are_none_of_an_experiments():
    "Settings of the profiles were looked for in world 0."
    assert E.ARMS["identity"].recipe("small", 1)["identities"]["features"]["model"]["data"]["bank"] == "B"
    for claim in E.CLAIMS.values():
        assert claim.worlds >= 5 and set(claim.arms) <= set(E.ARMS)
        assert all(better != worse for better, worse in claim.comparisons)


SHORT = dict(C2=E.Claim("C2", "order", "", (("identity", "instance"),), ("untrained",)))
UNTRAINED = dict(C2=E.Claim("C2", "order", "", (), ("untrained",)))


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
    changed = E.ARMS | dict(identity=E.Arm("fewer levels", "cion", ("tracklet",)))
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


def test_an_unknown_claim_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'C9' is not known.* Known: C2, C1, few labels"): E.costs("smoke", ["C9"])
    with pytest.raises(ValueError, match="'smal' is not known; did you mean 'small'"): E.read_results("smal")


def test_stored_results_are_whole():
    "Every stored row has its recipe, and was made by a program that was committed."
    for file in (ROOT / "reports/results").glob("*.csv"):
        rows = E.read_results(file.stem)
        assert file.stem != "smoke" and len(rows)
        for r in rows.itertuples():
            asked = read_json(E.results_folder() / "recipes" / f"{r.run}.json")
            assert asked["seed"] == r.world and asked["profile"] == file.stem
        assert not rows.commit.str.endswith("+").any()


def test_what_is_published_is_written_from_the_rows(tmp_path):
    rng = np.random.default_rng(1)
    machine = dict(cpu="a CPU", cores=2, device="cpu", rank1=.5, own_camera=2., feature_rank=9.)
    rows = [row(w, arm, rng.random()) | machine for w in range(1, 6) for arm in E.CLAIMS["C2"].arms]
    E.write_results("small", rows, {}, tmp_path / "results")
    text = E.publish("small", tmp_path / "results").read_text(encoding="utf-8")
    assert text == E.results_text("small", tmp_path / "results")
    for link in re.findall(r"\]\((results/[^)]+)\)", text): assert (tmp_path / link).exists(), link
    stored = pd.read_csv(tmp_path / "results/tables/small_C2.csv", index_col=0)
    means = pd.DataFrame(rows).groupby("arm").mAP.mean()
    for arm in E.CLAIMS["C2"].arms:
        said = stored.loc[E.ARMS[arm].label, "mAP"]
        assert float(said.split()[0]) == pytest.approx(100 * means[arm], abs=.051)
        assert f"| {E.ARMS[arm].label} | {said} |" in text
    tex = (tmp_path / "results/tables/small_C2.tex").read_text(encoding="utf-8")
    assert tex.count(r"\\") == 1 + len(stored) and r"$\pm$" in tex and r"\toprule" in tex


def test_a_claim_without_rows_is_not_run_and_has_no_picture(tmp_path):
    text = E.publish("small", tmp_path / "results").read_text(encoding="utf-8")
    assert "not run" in text and "![" not in text and "nothing yet" in text
    counts = {name: len(E.claims_table("small", [name])) for name in E.CLAIMS}
    for name, n in counts.items(): assert f"({name}, {n} comparison{'s' * (n != 1)})" in text


def test_the_published_text_is_that_of_the_stored_rows():
    assert (ROOT / "reports/README.md").read_text(encoding="utf-8") == E.results_text("small")


KEPT = sorted((ROOT / "reports/results/pages").glob("*.json"))


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_kept_pages_say_what_their_pages_show(file):
    "The box of the stored page, its table and pictures are those of the published text."
    kept = read_json(file)
    cells = read_json(ROOT / f"nbs/reproduce/{file.stem}.ipynb")["cells"]
    box = next("".join(out["data"]["text/markdown"]) for cell in cells for out in cell.get("outputs", [])
               if "text/markdown" in out.get("data", {}))
    text = (ROOT / "reports/README.md").read_text(encoding="utf-8")
    for line in kept["said"]: assert f"* {line}\n" in box and f"* {line}\n" in text
    for figure in kept["figures"]: assert (file.parent / figure).stat().st_size < 100_000, figure
    assert kept["profile"] != "smoke" and kept["commit"] and kept["cpu"]
    if not kept["table"]: return
    shown = E.page_table(kept["table"])
    stored = pd.read_csv(ROOT / f"reports/results/tables/{kept['profile']}_{file.stem}.csv", dtype=str,
                         keep_default_na=False)
    assert stored.to_numpy().tolist() == shown.reset_index().to_numpy().tolist()
    assert E.pipes(shown) in text


def test_pages_are_kept_from_their_reports(tmp_path, monkeypatch):
    from cion_nb.companion import report
    from cion_nb.companion.reproduce import Page
    for room in (report, reproduce, E): monkeypatch.setattr(room, "report_folder", lambda profile: tmp_path / profile)
    table = pd.DataFrame({("paper", "mAP"): {"CION": 93.3}, ("ours", "mAP"): {"CION": "71.8 ± 2.4 %"}})
    page, rows = Page("table4", "tiny"), [dict(mAP=.718, commit="012345678901", cpu="a CPU")]
    import matplotlib.pyplot as plt
    page.save(plt.figure(figsize=(1, 1)))
    page.finish(rows, ["CION above LUP: holds (+1.0 points)"], table=table, figures=["table4.png"])
    assert E.keep_pages("tiny", tmp_path / "results") == ["table4"]
    text = E.pages_text(tmp_path / "results")
    for part in ("CION above LUP: holds", "| CION | 93.3 | 71.8 ± 2.4 % |", "results/pages/table4.png", "a CPU"):
        assert part in text
    assert r"$\pm$ 2.4 \%" in (tmp_path / "results/tables/tiny_table4.tex").read_text(encoding="utf-8")
    assert (tmp_path / "results/pages/table4.png").stat().st_size
