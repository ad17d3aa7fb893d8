"""Recipes are what they were; a setting that comes later orphans no run; what is wrong with a value is said."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from cion_nb.core.runs import run_hash
from cion_nb.core.settings import as_before, describe, PROFILES, recipe, setting, settings_class, STAGES

# Hashes of recipes made before settings were classes: whoever changes one of them orphans stored runs.
STORED = dict(   # by profile: smoke, tiny, small, paper
    world="3e0ecffd1e 4a36f70e90 7d04fb099b d08ff33fae",
    extract="b0df104913 556b0a1b18 76523d716d 31ca9380a4",
    denoise="54add6c30b 3e6e54c8ed d0c95baed2 f6461800a3",
    pretrain="b4aed4b49b 145333f426 ffa07d5490 105a47eb09",
    finetune="d5421b1679 1f64d4839e bbf8dff05e 6b83c9132d",
    usl="f72e2b59e2 25124f3273 aa442e6d33 057f88b84b",
    uda="bf11ff5f6e 00e77c938b 1b0526ee6a 7176142049",
    video_reid="68f87c044f e8c1ab40cd e2b13eb08e b50703a1ea",
    find="21c50977b8 70a11f03cf 5e624587b9 8c2b0ccc39",
    idfree="37a71db4da 7b227b7c1d 9a07befc0d eb3e8d1a65",
    vills="93359c21d4 50a9b23c95 0cff2358d8 2a03d0df41")


def room(stage): return import_module(f"cion_nb.{STAGES[stage].replace('/', '.')}")


@pytest.mark.parametrize("stage", STAGES)
def test_runs_keep_their_names(stage):
    assert " ".join(run_hash(recipe(stage, profile)) for profile in PROFILES) == STORED[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_a_later_setting_leaves_the_names_of_runs(stage, monkeypatch):
    """At the value that leaves results as they were the hash does not see it, not even deep in a recipe; elsewhere
    it does."""
    base = settings_class(stage)
    before = {profile: run_hash(recipe(stage, profile)) for profile in PROFILES}
    later = type(base.__name__, (base,), dict(
        __annotations__=dict(gravity=float, wind=str), __module__=__name__, profiles=base.profiles,
        gravity=setting(9.81, "how things fall", since=9.81),
        wind=setting("west", "what came last year, with another value since", since="none")))
    monkeypatch.setattr(room(stage), base.__name__, later)
    for profile in PROFILES:
        now = recipe(stage, profile, wind="none")
        assert now["gravity"] == 9.81 and run_hash(now) == before[profile]
        assert run_hash(now | dict(gravity=1.6)) != before[profile] != run_hash(recipe(stage, profile))
    assert list(now)[-2:] == ["gravity", "wind"], "it stands behind those that were there"


def test_a_later_setting_of_a_nested_recipe(monkeypatch):
    before = run_hash(recipe("finetune", "tiny", weights=dict(stage="pretrain")))
    base = settings_class("world")
    later = type("WorldSettings", (base,), dict(__annotations__=dict(gravity=float), __module__=__name__,
                                                gravity=setting(9.81, "how things fall", since=9.81)))
    monkeypatch.setattr(room("world"), "WorldSettings", later)
    now = recipe("finetune", "tiny", weights=dict(stage="pretrain"))
    assert (now["data"]["gravity"] == now["weights"]["identities"]["features"]["data"]["gravity"] == 9.81
            and run_hash(now) == before)


def test_a_later_setting_that_nothing_reads():
    always = {"lr_by", "interpolation", "trunk_lr", "test_every"}
    for drawn, more in ((0., {"erasing_rule"}), (.5, set())):
        assert as_before(recipe("finetune", "tiny", erasing=drawn, erasing_rule="zhong")) == always | more
    assert (as_before(recipe("pretrain", "paper")) == {"erasing_rule"}
            and as_before(recipe("pretrain", "paper", method="lup")) == set())
    assert as_before(recipe("pretrain", "paper", view_changes=dict(erase=.5))) == set()
    old = {k: v for k, v in recipe("usl", "tiny").items() if k not in ("erasing_rule", "interpolation")}
    assert run_hash(old) == run_hash(recipe("usl", "tiny")), "a recipe of a run that knew neither"


def test_recipes_keep_their_numbers():
    "Checked, not converted: 3 and 3.0 are different runs, and NumPy's numbers are Python's."
    r = recipe("finetune", "tiny", epochs=3, lr=np.float64(0.5), few_ids=1, image_size=(np.int64(64), 32),
               weights=Path("a.safetensors"))
    assert ([type(r[k]) for k in ("epochs", "lr", "few_ids", "image_size", "weights")] == [int, float, int, list, str]
            and type(r["image_size"][0]) is int)
    assert json.loads(json.dumps(r)) == r and recipe(**r) == r


def test_recipes_are_nobodys_tables():
    "Who changes a recipe changes no other one."
    first = json.dumps(recipe("pretrain", "tiny"))
    r = recipe("pretrain", "tiny")
    r["n_id"].append(8)
    r["view_changes"]["strength"][0] = 9
    r["data"]["bank"] = "B"
    r["trackers"].append("x")
    assert json.dumps(recipe("pretrain", "tiny")) == first
    mine = [1]
    r = recipe("pretrain", "tiny", n_id=mine, n_id_epochs=[0])
    r["n_id"].append(2)
    assert mine == [1]


@pytest.mark.parametrize("stage,changes,word", [
    ("denoise", dict(sigma_cst=3), "denoise setting sigma_cst=3: must be at most 2"),
    ("denoise", dict(levels=["frame"]), "choose 'tracklet', 'video' or 'cross'"),
    ("denoise", dict(features="features.npy"), "a recipe"),
    ("world", dict(bank="C"), "world setting bank='C': choose 'A' or 'B'"),
    ("world", dict(seed=True), "a whole number"),
    ("extract", dict(flip=1), "extract setting flip=1: true or false"),
    ("extract", dict(model=3), "text or a recipe"), ("usl", dict(ghost_bn=1), "at least 2"),
    ("usl", dict(images_per_epoch=None), "a value is needed"),
    ("finetune", dict(lr="fast", k=0),
     "setting lr='fast': a number is needed; finetune setting k=0: must be positive"),
    ("finetune", dict(epochs=float("inf")), "finite"), ("finetune", dict(batchsize=3), "did you mean 'batch_size'"),
    ("pretrain", dict(method="dimo"), "did you mean 'dino'"),
    ("pretrain", dict(n_id=4), "pretrain setting n_id=4: a list"), ("finetun", {}, "did you mean 'finetune'")])
def test_what_is_wrong_is_said(stage, changes, word):
    with pytest.raises(ValueError) as e: recipe(stage, "tiny", **changes)
    assert word in str(e.value)


def test_choices_of_settings_are_those_of_the_code():
    from cion_nb.data.datasets import SUBSETS
    from cion_nb.data.film import PROFILES as WORLDS
    from cion_nb.data.scenery import BANKS
    from cion_nb.identities.denoise import SETTINGS
    from cion_nb.identities.neighbours import CLUSTERERS
    from cion_nb.identities.parts import LINKS
    from cion_nb.training.cluster_contrast import UPDATES
    from cion_nb.training.distill import VARIANTS
    from cion_nb.training.pretrain import TASKS
    from cion_nb.training.views import ERASING, VIEW_RECIPES

    ranges = {(stage, name): set(text.split(", ")) for stage in STAGES
              for name, text in describe(stage).set_index("setting").range.items()}
    for (stage, name), names in {("extract", "subset"): set(SUBSETS) - {"frames"},         # features are of crops
                                 ("world", "bank"): BANKS,
                                 ("world", "size"): WORLDS,
                                 ("denoise", "link"): LINKS,
                                 ("usl", "clusterer"): CLUSTERERS,
                                 ("usl", "memory_update"): UPDATES,
                                 ("pretrain", "variant"): VARIANTS,
                                 ("pretrain", "loss"): TASKS,
                                 ("pretrain", "augmentation"): VIEW_RECIPES,
                                 ("pretrain", "erasing_rule"): ERASING,
                                 ("vills", "augmentation"): VIEW_RECIPES,
                                 ("finetune", "erasing_rule"): ERASING}.items():
        assert ranges[stage, name] == set(names), name
    paper = recipe("denoise", "paper")
    assert {k: paper[k] for k in SETTINGS if k in paper} == {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in SETTINGS.items() if k != "measure"}, "the door's defaults are the paper's"


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_is_told(stage):
    table = describe(stage)
    assert table.setting.tolist() == [k for k in recipe(stage, "paper") if k not in ("stage", "profile")]
    assert (table.setting.is_unique and (table.type != "").all() and (table.source != "").all()
            and table.meaning.str.len().between(8, 130).all())
    schema = settings_class(stage).model_json_schema()
    assert json.loads(json.dumps(schema)) == schema and schema["additionalProperties"] is False


def test_settings_load_lightly():
    code = ("import sys, cion_nb.core.settings; "
            "print([m for m in ('torch', 'pandas', 'scipy', 'cion_nb.data.film') if m in sys.modules])")
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert p.stdout.strip() == "[]", p.stderr + p.stdout
