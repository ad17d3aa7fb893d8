"""The page that `make reproduce` leaves: read as a file, with what is missing named, and driven in a browser."""
import json
import os
import re

import pytest
from bs4 import BeautifulSoup
from report_page import entry, fill

from cion_nb.companion import report as room, reproduce as caller
from cion_nb.companion.commands import main
from cion_nb.companion.report import ABOUT, check_reports, made_text, read_verdict, write_index
from cion_nb.companion.reproduce import reproduce, run_notebook, TITLES


@pytest.fixture
def reports(tmp_path, monkeypatch):
    "A folder of reports and one of runs, both empty."
    for module in (room, caller): monkeypatch.setattr(module, "report_folder", lambda profile: tmp_path / profile)
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "tiny"


@pytest.fixture
def page(reports):
    reports.mkdir()
    return BeautifulSoup(write_index("tiny", fill(reports)).read_text(encoding="utf-8"), "html.parser")


def text(part): return " ".join(part.get_text(" ").split())


def test_the_claims_of_all_pages_come_first(page):
    first = page.find("table")
    assert [text(th) for th in first.find_all("th")] == ["claim", "verdict", "evidence", "page"]
    lines = [[text(td) for td in tr.find_all("td")] for tr in first.tbody.find_all("tr")]
    assert [line[:2] for line in lines] == [["cion above lup, mAP", "agrees"], ["cion above dino, mAP", "not resolved"],
                                            ["cion above lup, silhouette", "contradicts"]]
    assert [line[3] for line in lines] == ["table4", "table4", "figure4"]
    assert "an earlier run" in lines[2][2] and "an earlier run" not in lines[0][2]
    assert "3 comparisons: 1 as stated, 1 the other way round, 1 not resolved" in text(first.find_parent("section"))


def test_every_page_of_the_companion_is_introduced_in_words_without_numbers(page):
    assert set(ABOUT) == set(TITLES)
    for name, words in ABOUT.items(): assert len(words) > 100 and not re.search(r"\d", words), name
    for section in page.find_all("section", id=list(TITLES)):
        title, about = section.find_all(True, recursive=False)[:2]
        assert title.name == "h2" and text(about) == " ".join(ABOUT[section["id"]].split())


def test_links_lead_somewhere_and_nothing_comes_from_another_host(page):
    ids = [tag["id"] for tag in page.find_all(id=True)]
    assert len(ids) == len(set(ids)), "an id stands twice"
    links = [a["href"] for a in page.find_all("a")]
    assert len(links) > 30 and all(link[1:] in ids for link in links if link.startswith("#"))
    assert {link for link in links if not link.startswith("#")} == {
        "table4.html", "figure4.html", "order.html", "road.html"}
    assert all(img["src"].startswith("data:image/png;base64,") for img in page.find_all("img", src=True))
    assert not page.find_all(["link", "iframe"]) and not page.find("script", src=True)
    assert not re.search(r"(https?:)?//\w", re.sub(r'base64,[^"]*', "", str(page))), "an address"
    assert "<without>" not in str(page) and "<died>" not in str(page), "what others wrote is text"


def test_every_number_leads_to_the_run_that_made_it(page):
    rows = page.find(id="rows-table4").tbody.find_all("tr")
    names = [text(th) for th in page.find(id="rows-table4").find_all("th")]
    assert names[:5] == ["method", "seed", "data", "mAP, %", "rank-1, %"] and "epochs" not in names and len(rows) == 9
    made = page.find(id=rows[4].find_all("td")[3].a["href"][1:])
    assert made.name == "details" and made.summary.get_text().startswith("finetune-bnneck-smoke-")
    facts = {text(dt): text(dt.find_next("dd")) for dt in made.find_all("dt")}
    assert facts["seed"] == "1" and facts["shown in"] == "table4"
    assert {"commit", "machine", "versions", "finished", "time"} <= set(facts) and "torch 2" in facts["versions"]
    start = next(a for a in made.pre.find_all("a") if "pretrain dino smoke, seed 1" in text(a))
    assert 'method: "dino"' in page.find(id=start["href"][1:]).get_text(), "a recipe in a recipe is written once"
    assert page.find(id="rows-order").find_all("td")[3].a["href"] == "#made-order", "it has no run"
    assert "61.5" not in text(page.find(id="made-order")) and "62 s" in text(page.find(id="made-order"))
    ours = page.find(id="table4").find("table", class_="").tbody.find_all("tr")[-1]
    assert [a["href"] for a in ours.find_all("a")] == 3 * ["#rows-table4"] and "31.0 ± 2.5" in text(ours)


def test_what_is_lost_is_named_and_hides_nothing(page):
    lost = page.find(id="run-finetune-bnneck-tiny-deleted")
    assert "not here" in text(lost.summary) and "deleted" in text(lost) and "0123456789ab" in text(lost)
    table4 = page.find(id="table4")
    assert "lost.png is not there" in text(table4) and len(table4.find_all("img")) == 1
    assert "--only table4" in text(table4)
    failed = text(page.find(id="figure4").find(class_="failed"))
    assert "not made: DeadKernelError: Kernel <died>" in failed
    assert "python -m cion_nb reproduce --profile tiny --only figure4 --set seeds=5" in failed
    assert "earlier run" in text(page.find(id="figure4")) and page.find(id="figure4").find(class_="against")
    partial = text(page.find(id="order").find(class_="failed"))
    assert "partial, without: truth, seed 0: the loss is nan" in partial and "--only order" in partial
    assert "mean gain" in text(page.find(id="order").find_all("ul")[1]), "a measurement is shown, and judged by nobody"
    states = {a["href"]: text(a.parent) for a in page.nav.find_all("a")}
    assert states["#figure4"].endswith("not made") and states["#order"].endswith("in part")


@pytest.mark.parametrize("damage", ["{", "[]", '{"rows": [], "verdicts": []}', '{"rows": [3], "verdicts": [], '
                                    '"notes": []}', '{"rows": [{}], "verdicts": [3], "notes": []}'])
def test_a_damaged_report_is_named_and_the_others_are_shown(reports, damage):
    reports.mkdir()
    entries = fill(reports)
    (reports / "road.json").write_text(damage)
    whole = BeautifulSoup(write_index("tiny", entries).read_text(encoding="utf-8"), "html.parser")
    assert len(whole.find(id="verdicts").tbody.find_all("tr")) == 3
    if damage != "[]": assert "its report is damaged" in text(whole.find(id="road"))
    assert "--only road" in text(whole.find(id="road")) or damage == "[]"


def test_damaged_runs_and_figures_are_lost_ones(reports):
    reports.mkdir()
    entries = fill(reports)
    name = json.loads((reports / "table4.json").read_text())["rows"][0]["run"]
    (reports.parent / "runs" / name / "result.json").write_text("{")
    (reports / "table4.png").write_bytes(b"\x89PNG")
    whole = BeautifulSoup(write_index("tiny", entries).read_text(encoding="utf-8"), "html.parser")
    assert "not here" in text(whole.find(id=f"run-{name}").summary)
    assert "table4.png is not there, or damaged" in text(whole.find(id="table4"))


def test_a_page_without_any_report_is_a_page(reports):
    lost = entry("road", html=None, error="OSError: full")
    whole = BeautifulSoup(write_index("tiny", [lost]).read_text(encoding="utf-8"), "html.parser")
    assert "No page has given a verdict yet" in text(whole.find(id="verdicts")) and "OSError: full" in text(whole)


@pytest.mark.parametrize("line", ["time grows almost linearly with the data (exponent within 0.9 to 1.1): not run",
                                  "C2, denoised, all levels (CION) over raw tracklets: 3 of 5 worlds",
                                  "resnet18: CION above random weights, mAP: agrees (+3.0 ± 1.0 points, 3 seeds); "
                                  "caution, the arms were made by different programs: core/files between a and b"])
def test_verdict_lines_of_the_pages_are_read(line):
    claim, word, evidence = read_verdict(line)
    assert line.startswith(f"{claim}: {word}") and word in ("not run", "3 of 5 worlds", "agrees")
    assert "caution" not in line or evidence.startswith("+3.0 ± 1.0 points, 3 seeds; caution")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(reports, monkeypatch, capsys):
    monkeypatch.setattr(caller, "run_notebook", lambda *a, **k: pytest.fail("a page was run"))
    reports.write_text("a file where the folder should be")
    assert main(["reproduce", "--profile", "tiny"]) == 2
    said = capsys.readouterr().err
    assert str(reports) in said and said.count("\n") == 1
    reports.unlink()
    def refuse(**_): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(room.tempfile, "TemporaryFile", refuse)
    assert main(["reproduce", "--profile", "tiny"]) == 2
    said = capsys.readouterr().err
    assert f"cannot be written to {reports} (Permission denied)" in said and said.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder(reports):
    reports.mkdir(mode=0o555)
    with pytest.raises(PermissionError, match="cannot be written"): check_reports("tiny")


def test_a_damaged_list_of_pages_is_refused_first(reports, monkeypatch):
    monkeypatch.setattr(caller, "run_notebook", lambda *a, **k: pytest.fail("a page was run"))
    reports.mkdir()
    (reports / "index.json").write_text("[")
    with pytest.raises(ValueError, match="index.json is not valid JSON"): reproduce("tiny", ["table4"])


def test_checking_a_folder_leaves_nothing(reports):
    check_reports("tiny")
    assert not list(reports.iterdir())


def test_parameters_of_a_page_are_in_the_command_that_tries_again(reports, monkeypatch):
    import papermill
    def kill(*_, **__): raise RuntimeError("killed")
    monkeypatch.setattr(papermill, "execute_notebook", kill)
    made = run_notebook("table4", "tiny", seeds=2)
    assert room.try_again(made, "tiny").endswith("--only table4 --set seeds=2")
    assert made_text([made]) == "0 of 1 pages made, not made: table4"
