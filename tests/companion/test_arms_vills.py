"""Arms of VILLS: one term or one source apart, readings that share a run, a ladder that decides where they begin."""
import json

import numpy as np
import pytest

from cion_nb.companion import arms as A, choices as C, experiments as E


@pytest.fixture
def climbed(monkeypatch):
    for room in (A, E): monkeypatch.setattr(room, "dino_learned_at", lambda *a: 28_800)


def of(name): return A.ARMS[f"vills_{name}"].recipe("small", 1)


def differ(one, other): return {name for name in one if one[name] != other[name]}


def test_arms_differ_in_what_their_claim_is_about(climbed):
    assert differ(of("on"), of("off")) == {"lambda_lse"} and differ(of("on"), of("boxes")) == {"parts"}
    assert differ(of("still"), of("still_off")) == {"lambda_adapt"}
    assert {"method", "identities"} <= differ(of("on"), of("both")) and of("both")["identities"]["stage"] == "denoise"
    assert differ(of("both"), of("cion")) == {"lambda_lse", "lambda_temp", "lambda_adapt"}
    assert differ(of("tuned"), of("tuned_off")) == {"weights"} and of("tuned")["protocol"] == "clothes_changing"
    assert of("on")["epochs"] * of("on")["images_per_epoch"] == 28_800
    for name in ("exchanged", "part_tokens", "class_token", "temporal", "frames", "shuffled", "still"):
        assert of(name) == of("on")                                   # another question, the same network


def test_people_who_are_asked_about_were_not_trained_on(climbed):
    stills, twins = A.ARMS["vills_on"].asked_about("small", 3), A.ARMS["vills_temporal"].asked_about("small", 3)
    assert stills == A.ARMS["vills_on"].recipe("small", 3)["data"] and stills["values"]["outfits"] == 3
    assert twins["values"]["twins"] == "gait" and twins["seed"] == 3 and stills["values"]["clip_frames"] > 0


def climb(folder, scores):
    for rung, own in scores.items():
        for world, mAP in enumerate(own, 1):
            C.add_trial(dict(backbone=C._dino(), part="ladder", start=str(rung), settings=json.dumps(dict(world=world)),
                             presentations=rung, mAP=mAP, seconds=1., run=f"{rung}-{world}", commit="", cpu=""), folder)


def test_the_ladder_ends_where_the_lead_holds_or_nowhere(tmp_path):
    base = [.05, .06, .05, .07, .06]
    climb(tmp_path, {0: base})
    with pytest.raises(LookupError, match="9,600"): C.dino_learned_at(tmp_path)
    climb(tmp_path, {9_600: np.add(base, .0002 * np.array([1, -1, 2, -2, 1]))})
    with pytest.raises(LookupError, match="28,800"): C.dino_learned_at(tmp_path)
    climb(tmp_path, {28_800: base[::-1]})
    climb(tmp_path, {57_600: np.add(base, .04 + .001 * np.arange(5))})
    assert C.dino_learned_at(tmp_path) == 57_600
    climb(tmp_path, {57_600: base[:3]})                               # rows of the same runs are replaced
    assert C.dino_ladder(tmp_path).shape == (5, 4)
    climb(tmp_path, {57_600: base})
    assert C.dino_learned_at(tmp_path) is None


def test_climbing_stops_at_the_first_rung_that_holds(monkeypatch, tmp_path):
    made = []
    def trial(profile, world, rung, settings, jobs):
        made.append((rung, world))
        mAP = .05 + .001 * world + .05 * (rung > 9_600)
        return dict(backbone=C._dino(), part="ladder", start=str(rung), settings=settings, presentations=rung, mAP=mAP,
                    seconds=1., run=f"{rung}-{world}", commit="", cpu="")
    monkeypatch.setattr(C, "_dino_trial", trial)
    assert C.climb_dino("small", tmp_path) == 28_800
    assert len(made) == 3 * C.DINO_WORLDS and made[0] == (0, 1)
    assert C.climb_dino("small", tmp_path) == 28_800 and len(made) == 3 * C.DINO_WORLDS     # nothing twice


def test_arms_wait_for_the_ladder_and_say_so(monkeypatch, tmp_path):
    def nothing(*a): raise LookupError("not climbed")
    for room in (A, E): monkeypatch.setattr(room, "dino_learned_at", nothing)
    assert E.asked_of("vills_on", "small", 1) is None and E.asked_of("vills_on", "tiny", 1)
    row = E.costs("small", ["VILLS clothes"], tmp_path).iloc[0]
    assert row["to_do"] == row["worlds"] and np.isnan(row["minutes"])
    for room in (A, E): monkeypatch.setattr(room, "dino_learned_at", lambda *a: None)
    assert E.costs("small", ["VILLS clothes"], tmp_path).iloc[0]["to_do"] == 0
    verdicts = E.claims_table("small", ["VILLS clothes"], tmp_path)["verdict"]
    assert verdicts.eq("DINO does not lead at 57,600 presentations").all()


def test_readings_of_one_run_are_rows_of_their_own(climbed, monkeypatch, tmp_path):
    monkeypatch.setattr(E, "make_runs", lambda *a, **k: None)
    monkeypatch.setattr(E, "_made", lambda asked: {})
    monkeypatch.setattr(E, "_reading", lambda arm, world, asked: dict(mass=.3 if arm == "vills_part_tokens" else .2 +
                                                                      .001 * world))
    claim = A.CLAIMS["VILLS attention"]
    for world in range(1, claim.worlds + 1): E._compute_world(claim, world, "small", tmp_path, None)
    table = E.read_results("small", tmp_path)
    assert len(table) == 2 * claim.worlds and table["run"].nunique() == claim.worlds and table["mAP"].isna().all()
    assert not E.missing(claim, "small", 1, tmp_path)
    told = E.claims_table("small", ["VILLS attention"], tmp_path)
    assert told["verdict"].tolist() == ["holds"] and told.iloc[0, 1].startswith("+9.7")


def test_who_is_asked_about_is_drawn_before(climbed):
    asked = dict(vills_temporal=of("temporal"))
    assert E._needed(asked) == [of("temporal"), A.ARMS["vills_temporal"].asked_about("small", 1)]
