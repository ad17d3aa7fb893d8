"""What readers get of stored results: every number of the text is a row's."""
import re

import numpy as np
import pandas as pd
import pytest
from places import ROOT

from cion_nb.companion import arms as A, experiments as E, publishing as P, reproduce
from cion_nb.core.files import read_json


@pytest.fixture
def chosen(monkeypatch):
    "As if every network's settings were chosen."
    monkeypatch.setattr(A, "settled", lambda *a: {})
    for room in (A, E): monkeypatch.setattr(room, "learned_at", lambda *a: 38_400)


def row(world, arm, mAP, profile="small"):
    return dict(world=world, arm=arm, mAP=mAP, run=E.run_name(A.ARMS[arm].recipe(profile, world)))


def test_the_budget_curve_is_drawn_from_rows(tmp_path, chosen):
    rows = [dict(world=w, arm=arm, mAP=.1 * w, feature_rank=3., run=E.run_name(A.ARMS[arm].recipe("small", w)))
            for w in (1, 2) for arm in {*A.CLAIMS["budget"].arms, *A.CLAIMS["budget tuned"].arms}]
    E.write_results("small", rows, {}, tmp_path)
    frozen, tuned, rank = P.plot_budget("small", tmp_path).axes
    means = [line for line in frozen.lines if line.get_marker() == "o"]
    assert len(means) == len(A.CURVE) and np.allclose(means[0].get_ydata(), 15)
    assert [line.get_linestyle() for line in tuned.lines].count("--") == 1 and rank.lines


def test_what_is_published_is_written_from_the_rows(tmp_path):
    rng = np.random.default_rng(1)
    machine = dict(cpu="a CPU", cores=2, device="cpu", rank1=.5, own_camera=2., feature_rank=9.)
    rows = [row(w, arm, rng.random()) | machine for w in range(1, 6) for arm in A.CLAIMS["C2"].arms]
    E.write_results("small", rows, {}, tmp_path / "results")
    text = P.publish("small", tmp_path / "results").read_text(encoding="utf-8")
    assert text == P.results_text("small", tmp_path / "results")
    for link in re.findall(r"\]\((results/[^)]+)\)", text): assert (tmp_path / link).exists(), link
    stored = pd.read_csv(tmp_path / "results/tables/small_C2.csv", index_col=0)
    means = pd.DataFrame(rows).groupby("arm").mAP.mean()
    for arm in A.CLAIMS["C2"].arms:
        said = stored.loc[A.ARMS[arm].label, "mAP"]
        assert float(said.split()[0]) == pytest.approx(100 * means[arm], abs=.051)
        assert f"| {A.ARMS[arm].label} | {said} |" in text
    tex = (tmp_path / "results/tables/small_C2.tex").read_text(encoding="utf-8")
    assert tex.count(r"\\") == 1 + len(stored) and r"$\pm$" in tex and r"\toprule" in tex


def test_a_claim_without_rows_is_not_run_and_has_no_picture(tmp_path):
    text = P.publish("small", tmp_path / "results").read_text(encoding="utf-8")
    assert "not run" in text and "![" not in text and "nothing yet" in text
    counts = {name: len(E.claims_table("small", [name])) for name in A.CLAIMS}
    for name, n in counts.items(): assert f"({name}, {n} comparison{'s' * (n != 1)})" in text


def test_the_published_text_is_that_of_the_stored_rows():
    assert (ROOT / "reports/README.md").read_text(encoding="utf-8") == P.results_text("small")


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
    shown = P.page_table(kept["table"])
    stored = pd.read_csv(ROOT / f"reports/results/tables/{kept['profile']}_{file.stem}.csv", dtype=str,
                         keep_default_na=False)
    assert stored.to_numpy().tolist() == shown.reset_index().to_numpy().tolist()
    assert P.pipes(shown) in text


def test_pages_are_kept_from_their_reports(tmp_path, monkeypatch):
    from cion_nb.companion import report
    from cion_nb.companion.reproduce import Page
    for room in (report, reproduce, P): monkeypatch.setattr(room, "report_folder", lambda profile: tmp_path / profile)
    table = pd.DataFrame({("paper", "mAP"): {"CION": 93.3}, ("ours", "mAP"): {"CION": "71.8 ± 2.4 %"}})
    page, rows = Page("table4", "tiny"), [dict(mAP=.718, commit="012345678901", cpu="a CPU")]
    import matplotlib.pyplot as plt
    page.save(plt.figure(figsize=(1, 1)))
    page.finish(rows, ["CION above LUP: holds (+1.0 points)"], table=table, figures=["table4.png"])
    assert P.keep_pages("tiny", tmp_path / "results") == ["table4"]
    text = P.pages_text(tmp_path / "results")
    for part in ("CION above LUP: holds", "| CION | 93.3 | 71.8 ± 2.4 % |", "results/pages/table4.png", "a CPU"):
        assert part in text
    assert r"$\pm$ 2.4 \%" in (tmp_path / "results/tables/tiny_table4.tex").read_text(encoding="utf-8")
    assert (tmp_path / "results/pages/table4.png").stat().st_size
