"""Settings are chosen by one search for all, on training people of a world that no experiment uses."""
import json

import numpy as np
import pytest

from cion_nb.companion import choices as C, reproduce
from cion_nb.core.runs import Run
from cion_nb.core.settings import recipe
from cion_nb.data.datasets import read_data

PRETRAIN, TUNE = C.TRIES["pretrain"], C.TRIES["finetune"]


def add(folder, part, start, settings, presentations, mAP, backbone="a", seconds=10.):
    said = json.dumps(settings, sort_keys=True)
    run = f"{backbone}-{part}-{start}-{said}-{presentations}"
    C.add_trial(dict(backbone=backbone, part=part, start=start, settings=said, presentations=presentations, mAP=mAP,
                     seconds=seconds, run=run, commit="0", cpu=""), folder)


def search(folder, scores, start="cion", part="pretrain", tries=PRETRAIN, **about):
    for settings, mAP in zip(tries, scores): add(folder, part, start, settings, C.RUNGS[0], mAP, **about)


def test_every_start_is_given_the_same_search():
    assert len({json.dumps(s, sort_keys=True) for s in PRETRAIN}) == len(PRETRAIN) == 6
    for settings in PRETRAIN: recipe("pretrain", "small", **settings)
    for settings in TUNE: recipe("finetune", "small", **settings)
    scratch = [C.trial_finetuning("resnet18", None, **s) for s in TUNE]
    weights = C.trial_pretraining("resnet18", "cion", 9_600)
    tuned = [C.trial_finetuning("resnet18", weights, **s) for s in TUNE]
    for one, other in zip(scratch, tuned): assert {k for k in one if one[k] != other[k]} == {"weights"}


@pytest.mark.parametrize("presentations", [4_800, *C.RUNGS])
@pytest.mark.parametrize("method", C.LADDER)
def test_a_pretraining_sees_as_many_images_as_asked(method, presentations):
    asked = C.trial_pretraining("resnet18", method, presentations, world=3)
    assert asked["epochs"] * asked["images_per_epoch"] == presentations
    assert not asked["images_per_epoch"] % asked["batch_size"]
    assert asked["seed"] == asked["data"]["seed"] == 3 and asked["image_size"] == [64, 32]


def test_local_views_are_no_smaller_than_a_family_takes():
    assert C.trial_pretraining("convnext_tiny", "dino", 9_600)["local_size"] == [32, 32]
    assert C.trial_pretraining("resnet18", "dino", 9_600)["local_size"] == [32, 16]


def test_the_best_of_a_whole_search_is_chosen(tmp_path):
    rng = np.random.default_rng(0)
    for start in ("dino", "cion"):
        scores = rng.random(6)
        search(tmp_path, scores[:5], start)
        with pytest.raises(LookupError, match=f"a, pretrain {start}: 1 of 6 settings"):
            C.settled("a", "pretrain", start, tmp_path)
        search(tmp_path, scores, start)
        add(tmp_path, "pretrain", start, PRETRAIN[int(scores.argmin())], C.RUNGS[1], .99)   # a rung is no trial
        assert C.settled("a", "pretrain", start, tmp_path) == PRETRAIN[int(scores.argmax())]
    assert C.settled("a", "pretrain", "cion_true", tmp_path) == C.settled("a", "pretrain", "cion", tmp_path)
    assert len(C.read_choices(tmp_path)) == 14                           # a run that is tried again has one row


def test_a_network_learns_where_the_truth_brings_twice(tmp_path):
    with pytest.raises(LookupError, match="no rung"): C.learned_at("a", tmp_path)
    search(tmp_path, [.1, .2, .1, .1, .1, .1])
    search(tmp_path, [.2, .1, .1, .1, .1, .1], "dino")
    add(tmp_path, "pretrain", "untrained", {}, 0, .2)
    for rung, mAP, learns in zip(C.RUNGS, (.3, .4, .9), (None, C.RUNGS[1], C.RUNGS[1])):
        add(tmp_path, "pretrain", "cion_true", PRETRAIN[1], rung, mAP)
        assert C.learned_at("a", tmp_path) == learns
    ladder = C.ladder_of("a", tmp_path)
    assert ladder.index.tolist() == list(C.RUNGS) and (ladder["untrained"] == 20).all()
    assert ladder["cion"].iloc[0] == ladder["dino"].iloc[0] == 20 and ladder["cion"].iloc[1:].isna().all()


def test_a_rung_is_not_climbed_where_it_would_take_too_long(tmp_path):
    search(tmp_path, [.1] * 6, seconds=500.)
    assert not C._too_long("a", C.RUNGS[0], tmp_path)                    # 500 s are allowed
    assert C._too_long("a", C.RUNGS[1], tmp_path)                        # 2,000 s are not
    assert not C._too_long("a", round(C.MOST_SECONDS / 500 * C.RUNGS[0]) - 1, tmp_path)


@pytest.mark.parametrize("text, said", [
    ("", "no table of trials"), ("backbone,part\na,b\n", "other columns"),
    (",".join(C.TRIAL_COLUMNS) + "\na,pretrain,cion,{},9600,50,1,run,0,cpu\n", "no fraction")])
def test_a_damaged_table_of_trials_is_refused_by_name(tmp_path, text, said):
    C.choices_file(tmp_path).write_text(text)
    with pytest.raises(ValueError, match=said) as error: C.read_choices(tmp_path)
    assert str(C.choices_file(tmp_path)) in str(error.value)


@pytest.mark.slow("trains networks")
def test_a_search_judges_people_that_nobody_trained_on_and_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs"))
    small = dict(crop=(64, 32), distractors=0, test_people=2, company=0)
    draw = reproduce.make_world
    monkeypatch.setattr(reproduce, "make_world", lambda *a, **asked: draw(*a, **asked | small))
    monkeypatch.setattr(C, "TRIES", dict(pretrain=PRETRAIN[:2], finetune=TUNE[:2]))
    monkeypatch.setattr(C, "RUNGS", (96,))
    monkeypatch.setattr(C, "LADDER", ("dino", "cion_true"))
    network = "resnet10_tiny_ibn"
    at = C.climb(network, "smoke", tmp_path, jobs=1)
    assert at in (None, 96)
    C.search_finetuning(network, "scratch", 96, "smoke", tmp_path, jobs=1)
    C.search_finetuning(network, "cion", 96, "smoke", tmp_path, jobs=1)
    table = C.read_choices(tmp_path)
    counts = table.groupby(["part", "start"]).size().to_dict()
    assert counts == {("pretrain", "dino"): 2, ("pretrain", "cion"): 2, ("pretrain", "cion_true"): 1,
                      ("pretrain", "untrained"): 1, ("finetune", "scratch"): 2, ("finetune", "cion"): 2}
    for row in table[table["start"] == "dino"].itertuples():
        tries = [Run(C.trial_pretraining(network, "dino", 96, profile="smoke", **s)) for s in PRETRAIN[:2]]
        run = next(run for run in tries if run.name == row.run)
        seen = set(read_data(run.recipe, "tracklets")[0]["true_pid"]) - {-1}
        judged = set(read_data(run.recipe, "train")[0]["pid"])
        assert judged and not seen & judged                              # other people than it learned from
    monkeypatch.setattr(C, "make_runs", lambda asked, *a: asked and pytest.fail("computed again"))
    C.climb(network, "smoke", tmp_path)
    C.search_finetuning(network, "cion", 96, "smoke", tmp_path)
