"""People who change clothes: the column, the pixels, the protocol; and worlds where nobody does keep every byte."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cion_nb.core.samples import read_samples
from cion_nb.data import film as P
from cion_nb.data.cameras import stream
from cion_nb.data.film import make_world, render
from cion_nb.data.people import random_person, wardrobe_of
from cion_nb.retrieval.evaluate import Answers, evaluate
from cion_nb.retrieval.protocols import sides, tracklet_rows

FEW = dict(cameras=3, cameras_per_person=3, pretrain_people=4, appearances=2, walks_per_video=4, train_people=3,
           test_people=6, distractors=6, crop=(64, 32), clip_frames=4, frames=2)


@pytest.fixture(scope="module")
def world(): return make_world("tiny", 3, **FEW, outfits=3)


@pytest.fixture(scope="module")
def plain(): return make_world("tiny", 3, **FEW)


def cast(seed=0, **changes): return P._cast("tiny", seed, P.PROFILES["tiny"] | changes)       # without tables


def test_without_outfits_a_world_says_nothing_of_them(plain):
    assert plain.worn is None and not any("clothes" in t for t in plain.tables.values())
    told = P._describe(plain)
    assert "outfits" not in {*told["values"], *told["changes"]} and not any(p.outfits for p in plain.people)
    assert json.dumps(P._describe(cast(3, **FEW, outfits=1))) == json.dumps(told)
    assert P._describe(cast(3, **FEW, outfits=2))["fingerprint"] != told["fingerprint"]


def test_outfits_change_clothes_and_nothing_else(world, plain):
    "The same people walk the same ways before the same tracker."
    assert plain.videos == world.videos and set(world.tables) == {"tracklets", "reid", "clips", "frames"}
    for name, table in world.tables.items():
        pd.testing.assert_frame_equal(table.drop(columns="clothes"), plain.tables[name])
        assert table.attrs == plain.tables[name].attrs and table.clothes.dtype == "string"
    assert [replace(p, outfits=()) for p in world.people] == list(plain.people)


def test_clothes_name_whom_a_box_shows_and_what_they_wear(world):
    for table in world.tables.values():
        nobody = table.true_pid < 0
        assert ((table.clothes == "") == nobody).all()
        named = table.clothes[~nobody].str.split("_", expand=True)
        of, outfit = named[0], named[1]
        assert (of.astype(int) == table.true_pid[~nobody]).all() and set(outfit) <= set("012")
        assert table[~nobody].groupby(["video", "true_pid"]).clothes.nunique().eq(1).all()
    t = pd.concat([world.tracklets, world.clips])
    mixed = t[t.true_pid > 0].groupby("tracklet").true_pid.nunique() > 1
    assert mixed.any(), "a tracklet that went over to somebody else shows two people's clothes"
    assert (t[t.true_pid > 0].groupby("tracklet").clothes.nunique()[mixed] > 1).all()


def test_everybody_changes_between_videos_in_no_fixed_order():
    w = cast(pretrain_people=0, outfits=3, cameras_per_person=6)
    worn = pd.DataFrame([(pid, video, k) for (video, pid), k in w.worn.items()], columns=["pid", "video", "outfit"])
    assert worn.groupby("pid").outfit.value_counts().eq(2).all(), "six videos, each outfit twice"
    share = worn.groupby("video").outfit.value_counts(normalize=True)
    assert share.between(.2, .47).all(), "what is worn says little of the camera"
    orders = worn.sort_values("video").groupby("pid").outfit.apply(tuple)
    assert orders.nunique() > 30
    few = cast(pretrain_people=4, appearances=2, walks_per_video=4, train_people=2, test_people=2, cameras_per_person=2,
               outfits=5)
    assert pd.Series(few.worn).groupby(level=1).nunique().eq(2).all(), "two videos, two outfits"


def test_a_renderer_finds_the_same_clothes(world):
    told = P._describe(world)
    again = P._cast(told["profile"], told["seed"], P._LATER | told["values"])
    assert again.worn == world.worn and again.people == world.people


def test_a_tracklet_wears_what_its_person_does(world):
    "Though its end may show somebody else: the protocol goes by a tracklet's first row."
    table, _ = tracklet_rows(world.clips)
    worn = [f"{r.pid}_{world.worn[r.video, r.pid]}" if r.pid > 0 else "" for r in table.itertuples()]
    assert table.clothes.tolist() == worn


@pytest.mark.parametrize("change", [dict(lookalikes=.9), dict(twins="mark"), dict(twins="gait")])
def test_a_group_shares_its_outfits(change):
    w = cast(1, outfits=3, **change)
    groups = pd.Series([p.outfits for p in w.people]).groupby([p.group for p in w.people])
    grouped = [set(outfits) for group, outfits in groups if group >= 0]
    assert len(grouped) > 10 and all(len(outfits) == 1 for outfits in grouped)
    assert len(set.union(*grouped)) == len(grouped)


@pytest.mark.parametrize("outfits", [0, -1, 1.5, True, "2"])
def test_a_number_of_outfits_that_is_none(outfits):
    with pytest.raises(ValueError, match="outfits=.*sets of clothes"): make_world("tiny", 0, outfits=outfits)


def crop_of(world, person, outfit):
    "Of one walk in one outfit."
    cam = world.cameras[0]
    path = tuple((s - 1., cam.near + 2) for s in (0., 1., 2.))
    video = P.Video("v", cam.camid, "", 10 ** 6, (P.Walk(0, 0, path, 1.2, .7),))
    alone = replace(world, people=(replace(person, pid=1),), worn={("v", 1): outfit})
    stage = P._Stage(alone, video, [5])
    x0, y0, x1, y1 = (round(float(q)) for q in stage.at[5][0].box)
    return P._cut(stage, 5, 0, x0, y0, x1 - x0, y1 - y0)


def test_clothes_are_seen_and_the_body_is_not_changed(world):
    person = random_person(stream("somebody"), 1)
    person = replace(person, outfits=wardrobe_of(stream("wardrobe"), person.shape, 2))
    worn = [crop_of(world, person, k) for k in range(3)]
    plain = crop_of(replace(world, worn=None), replace(person, outfits=()), 0)
    assert (worn[0].image == plain.image).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        far = np.abs(worn[a].image.astype(int) - worn[b].image).max(-1)
        body = np.isin(worn[a].parts, range(3, 11)) & np.isin(worn[b].parts, range(3, 11))
        neither = (worn[a].parts == 0) & (worn[b].parts == 0)
        assert np.median(far[body]) > 12 and np.median(far[neither]) <= 2
        assert (worn[a].joints == worn[b].joints).all()


@pytest.mark.slow("draws a world")
def test_tables_on_disk_keep_the_clothes(tmp_path):
    least = dict(cameras=2, cameras_per_person=2, pretrain_people=2, appearances=2, walks_per_video=2, train_people=1,
                 test_people=1, distractors=0, clip_frames=2, outfits=2, crop=(64, 32))
    world = make_world("tiny", 3, **least)
    tables = render(world, tmp_path, workers=1)
    for name, table in tables.items():
        assert (read_samples(tmp_path / f"{name}.parquet").clothes == world.tables[name].clothes).all()
        assert Image.open(tmp_path / table.path.iloc[0]).size


def test_the_clothes_changing_protocol_scores_such_a_world(world):
    "Who goes by clothes finds nobody, who goes by people everybody; every query has an answer."
    t = world.reid.assign(visibility=1.)
    t.attrs = dict(dataset="world")
    query, gallery = (t.iloc[rows].reset_index(drop=True) for rows in sides(t))
    answers = Answers(query, gallery, "clothes_changing")
    for i in range(len(query)):
        hits = gallery.iloc[answers.hits(i)]
        assert len(hits) and (hits.pid == query.pid[i]).all() and (hits.camid != query.camid[i]).all()
        assert (hits.clothes != query.clothes[i]).all()
    def one_hot(column):
        names = {name: k for k, name in enumerate(sorted({*query[column], *gallery[column]}, key=str))}
        return [np.eye(len(names))[[names[v] for v in table[column]]] for table in (query, gallery)]
    by_person = evaluate(*one_hot("pid"), query, gallery, "clothes_changing")
    by_clothes = evaluate(*one_hot("clothes"), query, gallery, "clothes_changing")
    assert by_person.mAP == 1 and not by_person.unmatched and by_clothes.mAP < .35
