"""Arms of person search: they differ in what their claim is about, no identity reaches them, and weak ones are void."""
import pandas as pd
import pytest
from places import ROOT

from cion_nb.companion import arms as A, choices as C, experiments as E, search_pages as P


@pytest.fixture
def chosen(monkeypatch):
    rates = dict(image=.003, memory=.001, cross_entropy=.006)
    monkeypatch.setattr(A, "settled", lambda network, part, method: dict(lr=rates[method]))


def differ(one, other): return {name for name in one if one[name] != other[name]}


def recipes(*names): return [A.ARMS[f"search_{name}"].recipe("small", 1) for name in names]


def test_arms_differ_in_what_their_claim_is_about(chosen):
    image, memory, classes = recipes("image", "memory", "cross_entropy")
    assert differ(image, memory) == {"method", "loss", "lr"} == differ(image, classes)
    assert (image["lr"], memory["lr"], classes["lr"]) == (.003, .001, .006)
    on, video = recipes("image_on", "video")
    assert differ(on, video) == {"method", "labels", "found"} and on["weights"] == image
    assert on["epochs"] * 2 == image["epochs"] and on["drops"][0] < on["epochs"] and video["found"]["model"] == image
    whole, none, colourless = recipes("all", "none", "no_colour")
    assert differ(whole, none) == {"transforms"} and "colour" not in colourless["transforms"]
    assert differ(*recipes("all", "lambda_learned")) == {"balance"} and whole["balance"] == .4
    assert whole["image_size"] < image["image_size"] and whole["profile"] == "tiny"


def test_training_names_nobody_and_the_search_is_elsewhere(chosen):
    for name, arm in A.ARMS.items():
        if not isinstance(arm, A.SearchArm): continue
        asked = arm.recipe("small", 2)
        assert asked["labels"] != "pid" and asked["data"]["bank"] == "A", name
        found = A.searched(asked)
        assert found["data"]["bank"] == "B" and found["data"]["seed"] == 2 and found["frames"] == "test"
        assert found["model"] == asked


def test_arms_of_small_wait_for_their_rates(monkeypatch):
    def nothing(*a): raise LookupError("not chosen")
    monkeypatch.setattr(A, "settled", nothing)
    assert E.asked_of("search_image", "small", 1) is None and E.asked_of("search_image", "tiny", 1)


def test_the_search_for_rates_keeps_what_it_found(monkeypatch, tmp_path):
    made = []
    class Done:
        result = dict(train_seconds=1.)
        def __init__(self, asked): self.recipe, self.name = asked, f"idfree-{len(made)}"
        machine = dict(commit="c", cpu="x")
        def require(self): return self
    monkeypatch.setattr(C, "Run", Done)
    monkeypatch.setattr(C, "make_runs", lambda asked, *a: made.extend(asked))
    monkeypatch.setattr(C, "held_out_search", lambda run: .9 if run.recipe["lr"] == .002 else .1)
    def add(row, folder, whole=C.add_trial): whole(row | dict(run=f"{row['start']}{row['settings']}"), folder)
    monkeypatch.setattr(C, "add_trial", add)
    C.search_losses("small", tmp_path, methods=("image", "memory"))
    assert len(made) == 2 * len(C.TRIES["idfree"]) and all(r["held_out"] == C.HELD_OUT for r in made)
    assert C.settled(made[0]["backbone"], "idfree", "image", tmp_path) == dict(lr=.002)
    C.search_losses("small", tmp_path, methods=("image",))
    assert len(made) == 2 * len(C.TRIES["idfree"])                                    # nothing is tried twice
    with pytest.raises(LookupError): C.settled(made[0]["backbone"], "idfree", "cross_entropy", tmp_path)
    assert P.rates_table(tmp_path).shape == (3, 2)


def rows(tmp_path, AP50):
    "Six worlds in which contrastive leads by ten points, near by none."
    out = []
    for world in range(1, 7):
        for arm, mAP in (("search_image", .5), ("search_cross_entropy", .4), ("search_video", .6),
                         ("search_image_on", .5)):
            run = E.run_name(A.ARMS[arm].recipe("small", world))
            out.append(dict(world=world, arm=arm, mAP=mAP + .001 * world * (arm == "search_image"), rank1=.5, run=run,
                            mAP_near=.8 + .001 * (-1)**world * (arm == "search_video"), AP50=AP50))
    E.write_results("small", out, {}, tmp_path)


def test_a_search_is_void_where_people_are_not_found(chosen, tmp_path):
    rows(tmp_path, .93)
    verdicts = E.claims_table("small", ["Id-Free losses", "Id-Free video", "Id-Free near"], tmp_path)["verdict"]
    assert verdicts.tolist() == ["holds", "not run", "holds", "not resolved"]
    assert not P.too_few_found("small", tmp_path)
    rows(tmp_path, .34)
    verdicts = E.claims_table("small", ["Id-Free losses"], tmp_path)["verdict"]
    assert verdicts.iloc[0] == "void: AP50 34 %" and P.too_few_found("small", tmp_path)
    shown = P.losses_table("small", tmp_path)["ours, generated worlds"]
    assert shown.loc["Cross Entropy", "mAP, changed"] == "40.0 ± 0.0" and shown.loc["Contrastive (Memory)"].eq("").all()


def test_a_table_from_before_is_read_with_empty_columns(tmp_path):
    E.write_results("tiny", [dict(world=1, arm="tracklet", mAP=.5, run="a")], {}, tmp_path)
    file = tmp_path / "tiny.csv"
    old = pd.read_csv(file).drop(columns=list(E.LATER))
    old.to_csv(file, index=False)
    assert list(E.read_results("tiny", tmp_path).columns) == E.COLUMNS
    assert E.read_results("tiny", tmp_path)["AP50"].isna().all()
    old.drop(columns="rank1").to_csv(file, index=False)
    with pytest.raises(ValueError, match="rank1"): E.read_results("tiny", tmp_path)
    assert (ROOT / "reports/results/small.csv").read_text().split("\n")[0].split(",") == E.COLUMNS


def test_balances_have_the_printed_numbers_and_no_other(tmp_path):
    table = P.balances_table("small", tmp_path)
    theirs = table["the paper's mAP, CUHK-SYSU"]
    assert theirs["learned"] == "75.8" and (theirs.drop("learned") == "").all()
    assert P.plot_balances("small", tmp_path) is None
