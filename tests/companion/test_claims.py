"""Sentences about numbers: the paper's against its tables, ours against stored rows, and arms that other programs
made."""
import json

import numpy as np
import pandas as pd
import pytest
from places import ROOT

from cion_nb.companion import claims
from cion_nb.companion.claims import Comparison, exceptions, judge, mean_interval, other_sources, paper


def read(path): return json.loads((ROOT / path).read_text(encoding="utf-8"))


def text(name):
    "What a page says outside its code."
    return "\n".join("".join(c["source"]) for c in read(f"nbs/{name}.ipynb")["cells"] if c["cell_type"] == "markdown")


def book(name): return pd.DataFrame(read(f"reports/bench/{name}.json")["rows"])


def gap(one, other, name="map"):
    return [round(float(one[f"{d}_{name}"] - other[f"{d}_{name}"]), 1) for d in ("market", "msmt")]


def test_gains_that_pages_state_are_those_of_the_papers_tables():
    one, four = paper("table1").set_index("method"), paper("table4").set_index("method")
    mgn, vit = (paper("table1").query("backbone == @b").iloc[0] for b in ("ResNet50-IBN", "ViT-B"))
    (a, b), (c, d) = gap(mgn, one.loc["ISR"]), gap(vit, one.loc["DCAL"])
    assert f"by {a} and {b} points of mAP over ISR, and by {c} and {d} over DCAL" in text("reproduce/table1")
    (a, b), (c, d) = gap(four.loc["Ours+MGN"], four.loc["LUP+MGN"]), gap(four.loc["Ours+MGN"], four.loc["DINO+MGN"])
    assert f"by {a} and {b} points of mAP over LUP and by {c} and {d} over DINO" in text("reproduce/table4")
    three = paper("table3")
    gains = three[three.finetune == "TransReID"]
    assert (
        f"on average by {gains.market_map_gain.mean():.1f} and {gains.msmt_map_gain.mean():.1f} points of mAP" in text(
        "reproduce/table3"))
    assert len(gains) == 32 and (three.finetune == "MGN").sum() == 6
    assert three.arch[three.finetune == "MGN"].str.startswith("resnet").all()
    assert (gains[["market_map_gain", "msmt_map_gain", "market_r1_gain", "msmt_r1_gain"]] > 0).all(axis=None), (
        "each of the 32 does better")
    five = paper("fig5").pivot(index="strategy", columns="dataset", values="value")
    a, b = (five.loc["+ cross-video"] - five.loc["+ single-video"])[["Market1501", "MSMT17"]].round(1)
    assert f"the text states +{a} and +{b} mAP" in text("reproduce/figure5")
    assert len(paper("table6")) == 9 and "nine networks" in text("reproduce/table6")


def test_table_2_has_two_exceptions_and_table_6_agrees_with_it():
    two = paper("table2")
    found = exceptions(two, ["task1_map", "task1_r1", "task2_map", "task2_r1"],
                       ["setting", "backbone", "task1", "task2"])
    assert found[["setting", "backbone", "task1", "method", "score", "theirs", "ours"]].to_numpy().tolist() == [
        ["UDA", "ViT-S", "MS->Mar", "TranSSL", "task1_r1", 95.6, 95.6],
        ["UDA", "ViT-S", "MS->Mar", "PASS", "task1_r1", 95.8, 95.6]]
    six = paper("table6").set_index("arch")
    for r in two[two.method == "Ours"].itertuples():
        row = six.loc[{"R50": "resnet50", "R50-IBN": "resnet50_ibn", "ViT-S": "vit_small"}[r.backbone]]
        columns = ("uda_ms2mar", "uda_mar2ms") if r.setting == "UDA" else ("usl_market", "usl_msmt")
        assert [r.task1_map, r.task1_r1, r.task2_map, r.task2_r1] == [
            row[f"{c}_{k}"] for c in columns for k in ("map", "r1")]


@pytest.mark.parametrize("seed", range(5))
def test_exceptions_are_those_of_a_plain_search(seed):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(dict(method=["Ours, a", "Ours, b", *"ABCDEF"], size=[1, 2, *rng.integers(1, 3, 6)],
                              m=rng.integers(0, 4, 8).astype(float), r=rng.integers(0, 4, 8).astype(float)))
    table.loc[rng.integers(2, 8), "m"] = np.nan
    pairs = [(t, o) for _, t in table.iloc[2:].iterrows() for _, o in table.iloc[:2].iterrows()]
    for within, same in ((["size"], lambda t, o: t["size"] == o["size"]), ([], lambda t, o: True)):
        plain = sorted((t.method, s, t[s], o[s]) for t, o in pairs for s in "mr" if same(t, o) and t[s] >= o[s])
        found = exceptions(table, ["m", "r"], within)[["method", "score", "theirs", "ours"]]
        assert sorted(found.itertuples(index=False, name=None)) == plain


def test_sentences_about_stored_rows_hold():
    rows = book("order")
    means = rows.groupby(["profile", "bank", "method"])[["mAP", "own_camera"]].mean()
    map_, own = (lambda m: 100 * means.mAP["small", "A", m]), (lambda m: means.own_camera["small", "A", m])
    page = text("reproduce/order")
    assert (f"take the frozen features to {map_('cion'):.1f} mAP, where raw tracklets and DINO end at "
            f"{map_('tracklet'):.1f} and {map_('dino'):.1f}; true identities reach {map_('cion_true'):.1f}") in page
    assert (f"{own('dino'):.1f} and {own('tracklet'):.1f} for DINO and raw tracklets, {own('random'):.1f} for "
            f"untrained weights, {own('cion'):.1f} for CION, {own('cion_true'):.1f} for true identities") in page
    small = rows[(rows["profile"] == "small") & (rows.bank == "A")].pivot(index="seed", columns="method", values="mAP")
    for better, worse, said in (("dino", "random", "untrained to DINO"), ("tracklet", "dino", "DINO to raw tracklets")):
        mean, _, half = mean_interval(small[better] - small[worse])
        assert f"{said} ({100 * mean:+.1f} ± {100 * half:.1f})" in page and half > mean
    assert all(means.mAP["tiny", "B", m] < means.mAP["tiny", "B", "random"] for m in ("dino", "tracklet")), (
        "world B: below the untrained network")
    families = book("families").pivot(index=["arch", "seed"], columns="start", values="mAP")
    gain = (families["cion"] - families["without"]).unstack("seed")
    mean, _, half = mean_interval(gain.mean(axis=1))
    assert f"the mean over the ten, {100 * mean:.1f} ± {100 * half:.1f} points" in text("reproduce/table3")
    assert len(gain) == 10
    resolved = [a for a, g in gain.iterrows() if abs(mean_interval(g)[0]) > mean_interval(g)[2]]
    assert resolved == ["edgenext_x_small"] and (gain.loc[resolved[0]] < 0).all(), (
        "nine of ten not resolved, EdgeNeXt worse in all seeds")


def test_stored_arms_of_other_programs_are_flagged(monkeypatch):
    "Equal sources of the stage: no word; other ones: named; a change elsewhere does not matter."
    rows = pd.DataFrame([dict(start=a, seed=s, mAP=.1 * s + .2 * (a == "cion"), run="finetune-bnneck-tiny-x", commit=c)
                         for a, c in (("cion", "aaa"), ("without", "bbb")) for s in range(3)])
    changed = []
    monkeypatch.setattr(
        claims, "other_sources",
        lambda a, b, stage: () if a == b else tuple(r for r in changed if r in claims.rooms_of(stage)))
    said = lambda: judge([Comparison("a claim", rows, "start", "cion", "without")])[0]
    assert said() == "a claim: holds (+20.0 ± 0.0 points, 3 seeds, corrected for 1 comparison)"
    changed.append("identities/denoise")
    assert "caution" not in said()
    changed.append("training/engine")
    assert said().endswith("caution, the arms were made by different programs: training/engine between aaa and bbb")


def test_without_sources_there_are_no_rooms_to_name(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "project_root", lambda: tmp_path)
    claims._modules.cache_clear()
    with pytest.raises(FileNotFoundError, match="a checkout is needed"): claims.rooms_of("finetune")
    claims._modules.cache_clear()


def test_sources_that_git_cannot_compare_count_as_other():
    assert other_sources("abc", "abc", "finetune") == ()
    assert other_sources("abc+", "abc", "finetune") == ("what was not committed",)
    assert other_sources("0" * 12, "1" * 12, "finetune")[0].startswith("what ")
