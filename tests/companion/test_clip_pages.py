"""DenseIL's pages: what is printed stays as printed, what is counted is counted, and what was not run is empty."""
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from cion_nb.companion import clip_pages as C, experiments as E
from cion_nb.companion.arms import CLIP_CLAIMS
from cion_nb.companion.claims import paper
from cion_nb.companion.reproduce import Page
from cion_nb.core.samples import make_samples
from cion_nb.retrieval.evaluate import evaluate
from cion_nb.retrieval.protocols import sides


@pytest.fixture(autouse=True)
def settings_of_pictures():
    "A page changes how pictures are saved; the next test shall not see it."
    with matplotlib.rc_context(): yield


def tracklets(*pids, frames=3, camids=None):
    n = len(pids)
    return make_samples([f"{t}_{f}.jpg" for t in range(n) for f in range(frames)], pid=np.repeat(pids, frames),
                        camid=np.repeat(camids or [t % 2 for t in range(n)], frames),
                        tracklet=np.repeat(np.arange(n), frames), frame=np.tile(np.arange(frames), n))


def test_a_folder_is_counted_without_distractors_and_junk():
    found = C.clip_statistics(tracklets(5, 5, 7, 0, -1), distractor=0)
    assert found == dict(identities=2, sequences=5, boxes=15, frames_per_sequence_avg=3., cameras=2)


def test_names_of_data_sets_with_splits_and_without():
    assert C.splits_of("ilids_vid") == [f"ilids_vid_{i}" for i in range(10)]
    assert C.splits_of("mars") == ["mars"]


def test_recipes_stand_on_one_stage_1_a_split_and_seed():
    assert C.clip_recipes("smoke") == {}
    asked = C.clip_recipes("paper", "mean dense", 2, "ilids_vid", "/data/ilids")
    assert len(asked) == 2 * 10 * 2
    for (method, name, seed), made in asked.items():
        assert made["data"] == name and made["seed"] == seed and made["method"] == method
        if method == "dense": assert made["weights"] == asked["mean", name, seed]
    assert len(C.clip_recipes("paper", data="mars")) == 4
    with pytest.raises(ValueError, match="does not|not known|mean"): C.clip_recipes("paper", "meen", data="mars")


def test_the_printed_table_is_shown_as_printed_and_our_rows_beside_it():
    printed = paper("denseil_table2").set_index("method")
    page = Page("denseil_table2", "smoke")
    table = C.denseil_table2(page, {})["table"]
    assert len(table) == 25 and not table.index.str.contains("run here").any()
    for column, key in C._COLUMNS.items():
        for name, value in printed[key].items():
            shown = table.loc["Ours (DenseIL)" if name == "Ours" else name, column]
            assert shown == "" if np.isnan(value) else shown == value
    assert [line.split(": ")[1].split(" ")[0] for line in C.gains()[:3]] == ["+1.1", "+0.9", "+3.4"]
    assert C.leads()[0].startswith("DenseIL leads in 9 of 10")


def test_our_rows_are_means_over_splits_first():
    rows = pd.DataFrame([dict(method="dense", data=f"ilids_vid_{s % 10}", seed=seed, mAP=.5, rank1=.1 * s, rank5=1.,
                              rank10=1., rank20=1.) for seed in (0, 1) for s in (1, 2, 3)])
    assert C._mine(rows, "ilids_vid") == {("iLIDS-VID", "rank-1"): "20.0 ± 0.0", ("iLIDS-VID", "rank-5"): "100.0 ± 0.0"}
    assert set(C._mine(rows, "mars")) == {column for column in C._COLUMNS if column[0] == "MARS"}


def test_printed_numbers_that_disagree_are_found():
    said = "\n".join(C.oddities())
    for part in ("20,715 sequences", "20,751", "51.5", "70.8", "20,478 tracklets, 58.2 each"): assert part in said
    assert "DukeV" not in said                                    # 168.8 is printed as 168: cut, not wrong


def test_table_1_counts_the_embedded_world():
    found = C.denseil_table1(Page("denseil_table1", "smoke"))
    (row,) = found["rows"]
    assert row["identities"] == 8 + 4 and row["boxes"] == 6 * row["sequences"] and row["cameras"] == 6
    assert list(found["table"].index).count("MARS") == 1 and found["shown"][0].startswith("counted here: embedded")


def test_a_folder_that_is_not_there_fails_by_name(tmp_path):
    page = Page("denseil_table1", "smoke")
    found = C.denseil_table1(page, "mars", str(tmp_path / "nowhere"))
    assert found["rows"] == [] and "nowhere" in page.failed[("mars",)]


def test_the_first_of_a_ranking_leave_out_junk():
    table = pd.DataFrame(dict(pid=[1, 1, 1, 2, 3], camid=[0, 0, 1, 0, 1]))
    assert C.first_of(0, np.array([0, 1, 3, 2, 4]), table, 2).tolist() == [3, 2]


@pytest.fixture(scope="module")
def gait(tmp_path_factory):
    "One world of the claim on gait, and the mean of its denoised frames."
    folder = tmp_path_factory.mktemp("clips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CION_NB_RUNS", str(folder / "runs"))
        E.compute("smoke", ["DenseIL gait"], worlds=1, folder=folder / "results", jobs=1)
        asked = C.ARMS["clip_gait_denoised"].recipe("smoke", 1)
        E.make_runs([asked])
        yield folder, E.measure("clip_gait_denoised", 1, asked)


@pytest.mark.slow("trains networks")
def test_a_world_of_clips_is_computed_and_found_again(gait, monkeypatch):
    folder, _ = gait
    monkeypatch.setenv("CION_NB_RUNS", str(folder / "runs"))
    rows = E.read_results("smoke", folder / "results")
    assert rows["arm"].tolist() == ["clip_gait_mean", "clip_gait_dense", "clip_gait_no_step"]
    assert rows["mAP"].between(0, 1).all() and not E.missing(CLIP_CLAIMS[1], "smoke", 1, folder / "results")
    assert E.claims_table("smoke", ["DenseIL gait"], folder / "results")["verdict"].tolist() == ["1 of 5 worlds"]
    figure = C.plot_ranked(("clip_gait_mean", "clip_gait_dense"), "smoke", 1, queries=1)
    assert len(figure.axes) == 2 * 6


@pytest.mark.slow("trains networks")
def test_the_mean_of_frames_is_that_of_its_plain_definition(gait, monkeypatch):
    folder, denoised = gait
    monkeypatch.setenv("CION_NB_RUNS", str(folder / "runs"))
    rows = E.read_results("smoke", folder / "results").set_index("arm")
    features = C.Features.open(C.Run(C.ARMS["clip_gait_mean"].recipe("smoke", 1)).folder)
    x, samples = np.asarray(features.x, np.float64), features.samples
    assert {"train", "query"} <= set(samples["split"])
    tests = samples[samples["split"] != "train"]
    means, first = [], []
    for tracklet, part in tests.groupby("tracklet", sort=False):
        means.append(x[part.index].mean(0))
        first.append(part.iloc[0])
    table, y = pd.DataFrame(first).reset_index(drop=True), np.stack(means)
    y = (y / np.linalg.norm(y, axis=1, keepdims=True)).astype(np.float32)
    query, gallery = sides(table, "world_clips")
    score = evaluate(y[query], y[gallery], table.iloc[query], table.iloc[gallery])
    assert rows.loc["clip_gait_mean", "mAP"] == pytest.approx(score.mAP, abs=1e-6)
    assert 0 < denoised["mAP"] <= 1 and denoised["run"].startswith("denoise-")


def test_pages_without_rows_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(E, "results_folder", lambda: tmp_path)
    rows, said = C.clip_claims_rows([claim.name for claim in CLIP_CLAIMS])
    assert not len(rows) and len(said) == 1 and said[0].startswith("Planned, and not run yet")
    assert not len(C.variants_table("small"))
    monkeypatch.setattr(C, "results_folder", lambda: tmp_path)
    monkeypatch.setattr(C, "plot_ranked", lambda **k: None)
    assert "not here" in C.ranked_picture(SimpleNamespace(profile="smoke")).data


def test_the_order_of_frames_is_learned_with_step_embeddings_and_never_without():
    for seed in (0, 1):
        assert C.order_accuracy(None, seed) == .5
        assert C.order_accuracy("absolute", seed) >= .95 and C.order_accuracy("relative", seed) >= .95
