"Named data sets: their facts, where they lie, lists held against the disk, who is searched where; and no score that hangs on numbers."
import shutil, warnings
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.io import loadmat, savemat
from cion_nb.data.datasets import read_cuhk03np, read_ltcc, read_mars, read_prcc, read_viper
from cion_nb.retrieval.protocols import ranked
from cion_nb.retrieval.evaluate import evaluate, evaluate_distances, rank
from cion_nb.data.facts import DATASETS, facts_of
from cion_nb.retrieval.inspection import pair_distances
from cion_nb.retrieval.protocols import by_camera, evaluate_single_shot, sides
from cion_nb.core.samples import make_samples, read_samples, write_samples
from cion_nb.data.datasets import read_market1501, read_msmt17
from cion_nb.data.check import check
from test_evaluate import cosine

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def put(root, *names):
    for name in names:
        path = Path(root) / name; path.parent.mkdir(parents=True, exist_ok=True); Image.new("RGB", (4, 8)).save(path)
    return Path(root)


def quiet(f, *args, **kw):
    with warnings.catch_warnings(): warnings.simplefilter("ignore"); return f(*args, **kw)


def warned(f, *args, **kw):
    with warnings.catch_warnings(record=True) as caught: warnings.simplefilter("always"); out = f(*args, **kw)
    return out, [str(w.message) for w in caught]


# ---- no score hangs on how people, cameras and tracklets are numbered --------------------------------------------------------

def scores(q, g, query, gallery, distractors):
    "Every evaluator's numbers."
    single = evaluate_single_shot(q, g, query, gallery, repeats=3, distractors=distractors)
    one, given = evaluate(q, g, query, gallery), evaluate_distances(cosine(q, g), query, gallery)
    listed, pairs, cameras = rank(q, g, query, gallery, k=5), pair_distances(q, g, query, gallery, bins=50), by_camera(q, g, query, gallery)
    return [one.AP, one.cmc, given.AP, single.cmc, single.per_repeat, listed.verdict.tolist(), pairs.right, pairs.wrong, np.sort(cameras.mAP), np.sort(cameras.queries)]


@given(st.integers(0, 2**32 - 1), st.sampled_from(["permuted", "from 0", "far"]))
@settings(max_examples=8, deadline=None)
def test_renumbering_changes_no_score(seed, how):
    "Person 0, distractors, junk and unknown cameras among them; ties too."
    rng = np.random.default_rng(seed)
    query, gallery = (make_samples([f"{side}{i}" for i in range(n)], rng.integers(low, 8, n), rng.integers(-1, 3, n)) for side, n, low in (("q", 14, 1), ("g", 70, -1)))
    q, g = rng.choice([-1., 1.], (14, 6)).astype(np.float32), rng.choice([-1., 1.], (70, 6)).astype(np.float32)
    people, cameras = dict(permuted=(rng.permutation(8), rng.permutation(3)), far=(10**6 + 7 * rng.permutation(8), 900 + np.arange(3)))[how] if how != "from 0" else (np.roll(np.arange(8), 1), np.arange(3)[::-1])
    def again(t): return t.assign(pid=np.where(t.pid < 0, -1, people[t.pid]), camid=np.where(t.camid < 0, -1, cameras[t.camid]))
    if not quiet(lambda: any((gallery.pid == p).any() for p in query.pid)): return
    for distractors, renamed in (((), ()), (0, [int(people[0])])):
        try: expected = quiet(scores, q, g, query, gallery, distractors)
        except ValueError as e: assert "Nothing is left" in str(e); return
        for a, b in zip(expected, quiet(scores, q, g, again(query), again(gallery), renamed)): np.testing.assert_array_equal(a, b)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_renumbered_tracklets_score_the_same(seed):
    "Means, ties and draws do not follow a tracklet's number."
    rng = np.random.default_rng(seed); n = 24
    t = make_samples([str(i) for i in range(3 * n)], np.repeat(rng.integers(0, 5, n), 3), np.repeat(rng.integers(0, 3, n), 3), tracklet=np.repeat(np.arange(n), 3), video="v", split=np.repeat(["query", "gallery", "gallery"], n))
    x = rng.choice([-1., 1.], (3 * n, 4)).astype(np.float32); out = []
    for number in (np.arange(n), rng.permutation(n), 500 - 3 * np.arange(n)):
        f, table = ranked(x, t.assign(tracklet=number[t.tracklet]), "mars"); a, b = sides(table, "mars")
        try: out.append((quiet(evaluate, f[a], f[b], table.iloc[a], table.iloc[b]).AP, quiet(evaluate_single_shot, f[a], f[b], table.iloc[a], table.iloc[b], repeats=2).cmc))
        except ValueError as e: assert "Nothing is left" in str(e); return
    for other in out[1:]:
        for a, b in zip(out[0], other): np.testing.assert_array_equal(a, b)


def test_nobody_is_a_fact_of_the_data_set(tmp_path):
    gallery, query = make_samples(list("abcde"), [0, 0, 0, 5, 6], 2, split="gallery"), make_samples(list("xy"), [5, 6], 1, split="query")
    x, q = np.eye(5), np.ones((2, 5))
    def images(t, **kw): return evaluate_single_shot(q, x, query, t, repeats=2, **kw).n_people
    assert images(gallery) == 3 and images(gallery, distractors=0) == 5 and images(gallery, distractors=[0, 7]) == 5
    for name, n in (("market1501", 5), ("mars", 5), ("world", 5), ("msmt17", 3), ("viper", 3), ("folder", 3)):
        gallery.attrs = dict(dataset=name); kept = read_samples(write_samples(gallery, tmp_path / "t.parquet"))
        assert images(kept) == n and images(kept, distractors=()) == 3
    with pytest.raises(ValueError, match=r"2 queries are distractors \(pid 5\).*say distractors="): evaluate_single_shot(q, x, query.assign(pid=5), gallery, distractors=5)


# ---- where a data set lies ----------------------------------------------------------------------------------------------------

MARKET = ["bounding_box_train/0002_c1s1_000451_03.jpg", "query/0001_c1s1_001051_00.jpg", "bounding_box_test/0001_c2s1_001051_00.jpg", "bounding_box_test/0000_c2s1_001051_00.jpg", "bounding_box_test/-1_c2s1_001051_00.jpg"]
LAYOUTS = {
    "market1501": (read_market1501, "Market-1501-v15.09.15", MARKET, "query"),
    "cuhk03np": (lambda root: read_cuhk03np(root, "labeled"), "cuhk03-np", [f"labeled/{f}/000{i}_c1_{i}.png" for i, f in enumerate(("bounding_box_train", "query", "bounding_box_test"))], "labeled/query"),
    "viper": (read_viper, "VIPeR", [f"{c}/{p:03d}_0.bmp" for p in range(4) for c in ("cam_a", "cam_b")], "cam_b"),
    "prcc": (lambda root: read_prcc(root, "other"), "prcc", ["rgb/train/001/A_1.jpg", *(f"rgb/test/{c}/002/1.jpg" for c in "ABC")], "rgb/test/C"),
    "ltcc": (read_ltcc, "LTCC_ReID", [f"{f}/001_1_c{i}_000001.png" for i, f in enumerate(("train", "query", "test"))], "test"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_data_set_is_found_one_level_off_and_two_copies_are_refused(tmp_path, capsys, name):
    reader, folder, files, _ = LAYOUTS[name]
    for above in ("a", f"b/{folder}", f"c/{folder}/{folder}", f"d/data/{folder}"): put(tmp_path / above, *files)
    tables = [quiet(reader, tmp_path / at) for at in ("a", "b", f"b/{folder}", "c", f"c/{folder}", f"c/{folder}/{folder}", "d", "d/data")]
    for at, t in zip(("a", "b", f"b/{folder}", "c", f"c/{folder}", f"c/{folder}/{folder}", "d", "d/data"), tables):
        assert all((tmp_path / at / p).is_file() for p in t.path) and t.drop(columns="path").equals(tables[0].drop(columns="path"))
    assert capsys.readouterr().out == ""                                        # there was no choice
    put(tmp_path / f"b/{folder}/{folder}", *files)                              # flat and nested: the outer one, and said
    assert not quiet(reader, tmp_path / "b").path.str.startswith(f"{folder}/{folder}").any() and "taken from" in capsys.readouterr().out
    put(tmp_path / f"d/data/{folder} copy", *files)
    for at in ("d/data", "d"):
        with pytest.raises(ValueError, match=f"lies in 2 places under .*{folder} copy.*choose one: root="): reader(tmp_path / at)
    inside = tmp_path / "a" / files[0].split("/")[0]
    with pytest.raises(FileNotFoundError, match=f"lies inside the data set: pass root=.*{tmp_path / 'a'}'"): reader(inside)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_part_of_a_data_set_is_no_data_set(tmp_path, name):
    reader, _, files, part = LAYOUTS[name]
    table, said = warned(reader, put(tmp_path, *files))
    assert [s.split(" (")[0] for s in said] == [f"{facts_of(table).title}: not the published set"]
    assert any(p.startswith("train: ") and "published are" in p for p in check(table).problems)
    shutil.rmtree(tmp_path / part); (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match=f"{part} holds no image"): reader(tmp_path)
    (tmp_path / part).rmdir()
    with pytest.raises(FileNotFoundError, match=f"lacks {part}"): reader(tmp_path)


def test_another_data_set_in_the_same_layout_is_refused(tmp_path):
    put(tmp_path / "other", "bounding_box_train/0001_c2_f0046182.jpg", "query/0005_c2_f0046985.jpg", "bounding_box_test/0005_c1_f0046985.jpg")
    with pytest.raises(ValueError, match="other/bounding_box_train/0001_c2_f0046182.jpg: not named like .*take out"): read_market1501(tmp_path)
    put(tmp_path / "Market-1501", *MARKET); assert len(quiet(read_market1501, tmp_path)) == 4      # the one that bears the name


def msmt(home, version, ends="jpg", mark=""):
    train, test = dict(V1=("train", "test"), V2=("mask_train_v2", "mask_test_v2"))[version]
    for name, folder in dict(train=train, val=train, query=test, gallery=test).items():
        i = ["train", "val", "query", "gallery"].index(name); file = f"000{i % 2}/000{i % 2}_00{i}_0{i + 1}_0303morning_0015_0"
        put(home / folder, f"{file}.{ends}"); (home / f"list_{name}.txt").write_bytes((mark + file.replace("/", "\\" if mark else "/") + f".jpg {i % 2}\r\n").encode())
    return home


def test_msmt17_versions_side_by_side(tmp_path, capsys):
    msmt(tmp_path / "MSMT17_V1", "V1"); msmt(tmp_path / "MSMT17_V2" / "MSMT17_V2", "V2", mark="\ufeff")
    with pytest.raises(ValueError, match="V1 and V2; choose one by version='V1' or 'V2': .*MSMT17_V1, .*MSMT17_V2"): read_msmt17(tmp_path)
    one, two = (quiet(read_msmt17, tmp_path, version=v) for v in ("V1", "V2"))
    assert one.path[0].startswith("MSMT17_V1/train/") and two.path[0].startswith("MSMT17_V2/MSMT17_V2/mask_train_v2/0000/") and one.pid.equals(two.pid)
    assert all((tmp_path / p).is_file() for t in (one, two) for p in t.path) and (two.attrs["version"], two.attrs["unlisted"]) == ("V2", 0)
    with pytest.raises(ValueError, match="MSMT17_V1 holds MSMT17 V1, not V2"): read_msmt17(tmp_path / "MSMT17_V1", version="V2")
    with pytest.raises(ValueError, match="choose V1 or V2"): read_msmt17(tmp_path, version="v3")
    with pytest.raises(FileNotFoundError, match="lies inside the data set: pass root=.*MSMT17_V1'"): read_msmt17(tmp_path / "MSMT17_V1" / "train")
    shutil.copytree(tmp_path / "MSMT17_V1", tmp_path / "msmt17-small")
    with pytest.raises(ValueError, match="MSMT17 V1 lies in 2 places"): read_msmt17(tmp_path, version="V1")
    msmt(tmp_path / "x" / "MSMT17_V2", "V1")
    assert any("is MSMT17 V1 by its folders" in text for text in warned(read_msmt17, tmp_path / "x")[1])


def test_msmt17_lists_against_the_disk(tmp_path):
    home = msmt(tmp_path / "MSMT17", "V1"); put(home, "train/0009/0009_000_01_0303morning_0015_0.jpg", "test/a.png")
    table, said = warned(read_msmt17, home)
    assert table.attrs["unlisted"] == 2 and any("2 images are in no list and left out: test/a.png" in s for s in said) and "2 images on disk in no list, left out" in check(table).notes
    with pytest.raises(FileNotFoundError, match="4 of 4 listed images.*4 are there with another ending"): read_msmt17(msmt(tmp_path / "b" / "MSMT17", "V1", ends="jpeg"))
    for prefix in ("./", "test/", "./test/"):
        (home / "list_query.txt").write_text(f"{prefix}0000/0000_002_03_0303morning_0015_0.jpg 0\n")
        assert quiet(read_msmt17, home).path.tolist() == table.path.tolist()
    (home / "list_query.txt").write_text("\n")
    with pytest.raises(ValueError, match="list_query.txt lists no image"): read_msmt17(home)


# ---- MARS -----------------------------------------------------------------------------------------------------------------------

TRACKS = [("00-1", 1), ("0000", 1), ("0000", 2), ("0002", 1), ("0002", 2), ("0002", 1), ("0004", 1), ("0004", 2), ("0006", 3)]
QUERIES = (4, 5, 7, 9)                         # 1-based rows; person 2 by two of them, and persons 4 and 6


def mars(home, lists_of_train=True):
    "Three images a tracklet; person 2 has two tracklets in camera 1."
    names, info, count = [], [], {}
    for p, c in TRACKS:
        n = count[p, c] = count.get((p, c), 0) + 1
        info.append([len(names) + 1, len(names) + 3, int(p.replace("00-1", "-1")), c]); names += [f"{p}C{c}T{n:04d}F00{f}.jpg" for f in (1, 2, 3)]
    train = [f"{p}C{c}T0001F001.jpg" for p in ("0001", "0003") for c in (1, 2)]
    put(home, *(f"bbox_test/{n[:4]}/{n}" for n in names), *(f"bbox_train/{n[:4]}/{n}" for n in train))
    (home / "info").mkdir(); (home / "info/test_name.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(names).encode())
    savemat(home / "info/tracks_test_info.mat", dict(track_test_info=np.array(info, float))); savemat(home / "info/query_IDX.mat", dict(query_IDX=np.array([QUERIES], float)))
    if lists_of_train:
        (home / "info/train_name.txt").write_text("\n".join(train)); savemat(home / "info/tracks_train_info.mat", dict(track_train_info=np.array([[i + 1, i + 1, int(n[:4]), int(n[5])] for i, n in enumerate(train)], float)))
    return home


def test_mars_is_scored_by_its_official_protocol(tmp_path):
    "Ranks by hand: queries stay in the gallery, same person and camera go, junk is not there, distractors are in the way."
    table = quiet(read_mars, mars(tmp_path / "MARS").parent)
    assert table.groupby("split").tracklet.nunique().to_dict() == dict(train=4, query=4, gallery=4) and table.tracklet.nunique() == 12
    assert (table.attrs["junk"], table.attrs["junk_tracklets"], table.attrs["unlisted"]) == (3, 1, 0) and {0} <= set(table.pid) and -1 not in set(table.pid)
    assert table.drop(columns="path").equals(quiet(read_mars, mars(tmp_path / "b" / "mars-v160809", lists_of_train=False)).drop(columns="path"))
    x = np.random.default_rng(0).normal(size=(len(table), 6)).astype(np.float32); x /= np.linalg.norm(x, axis=1, keepdims=True)
    f, t = ranked(x, table); q, g = sides(t)
    assert (t.split == "query").sum() == len(q) == 4 and len(g) == 8 and set(q) <= set(g)
    score, APs = quiet(evaluate, f[q], f[g], t.iloc[q], t.iloc[g]), []
    mean = {i: x[(table.tracklet == i).to_numpy()].mean(0) for i in t.tracklet}; who = t.set_index("tracklet")
    for i in t.tracklet[q]:
        left = [j for j in t.tracklet[g] if not (who.pid[j] == who.pid[i] and who.camid[j] == who.camid[i])]
        left.sort(key=lambda j: -mean[i] @ mean[j] / np.linalg.norm(mean[i]) / np.linalg.norm(mean[j]))
        right = [k for k, j in enumerate(left, 1) if who.pid[j] == who.pid[i]]
        APs.append(np.mean([n / k for n, k in enumerate(right, 1)]) if right else np.nan)
    np.testing.assert_allclose(score.AP, APs); assert len(score.unmatched) == 1 and score.n_gallery == 8
    assert "3 queries have no match in another camera; people: 6" in check(table).problems[-1]       # images; person 6 alone
    table.attrs = {}
    assert "6 queries have no match in another camera; people: 2, 6" in check(table).problems[-1]    # without the fact, person 2's other camera is lost


def test_score_and_fine_tuning_agree_on_mars(tmp_path, monkeypatch):
    from cion_nb.models.backbones import create_backbone
    from cion_nb.training.finetune import test_model as tested
    from cion_nb.core.settings import recipe
    from cion_nb.companion.score import score
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs")); home = mars(tmp_path / "MARS")
    for i, p in enumerate(sorted(home.rglob("*.jpg"))): Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 32, 3), dtype=np.uint8)).save(p)
    model = create_backbone("resnet10_tiny", (64, 32)).eval()
    one = quiet(score, model, "mars", str(tmp_path)); r = recipe("finetune", "tiny", data="mars", data_root=str(tmp_path)); two = quiet(tested, model, r, tmp_path / "f")
    assert (one.n_gallery, len(one.per_query), len(one.unmatched)) == (8, 4, 1) and two.asdict() == one.asdict()
    shot = quiet(score, model, "mars", str(tmp_path), draws=2); assert shot.n_people == 3 + 2     # three people, two distractors
    assert quiet(score, model, "mars", str(tmp_path), draws=2, distractors=()).n_people == 4
    as_images = quiet(score, model, "mars", str(tmp_path), tracklets=False); assert (as_images.n_gallery, len(as_images.per_query)) == (24, 12)


@pytest.mark.parametrize("fault, kind, words", [
    (lambda h: shutil.rmtree(h / "bbox_test/0004"), FileNotFoundError, "6 of 27 listed images are not under .*bbox_test/0004/0004C1T0001F001.jpg"),
    (lambda h: [f.unlink() for f in (h / "bbox_train").rglob("*C2*")], FileNotFoundError, "2 of 4 listed images are not under"),
    (lambda h: (shutil.rmtree(h / "bbox_test"), (h / "bbox_test").mkdir()), FileNotFoundError, "27 of 27 listed"),
    (lambda h: (h / "info/query_IDX.mat").unlink(), FileNotFoundError, "query_IDX.mat is missing"),
    (lambda h: (h / "info/query_IDX.mat").write_bytes(b"MATLAB 5.0 MAT-file"), ValueError, "query_IDX.mat is no readable MATLAB file"),
    (lambda h: savemat(h / "info/query_IDX.mat", dict(IDX=[1])), ValueError, "query_IDX.mat has no query_IDX, but IDX"),
    (lambda h: savemat(h / "info/query_IDX.mat", dict(query_IDX=[[4, 10]])), ValueError, "asks for row 10 of 9 tracklets"),
    (lambda h: savemat(h / "info/query_IDX.mat", dict(query_IDX=[[2]])), ValueError, "asks for junk or distractors: bbox_test/0000"),
    (lambda h: rows(h, lambda t: t.__setitem__((3, 2), 4)), ValueError, "row 4: person 4 in camera 1, but its images are named like bbox_test/0002/0002C1"),
    (lambda h: rows(h, lambda t: t.__setitem__((3, 1), 13)), ValueError, "rows 4 and 5 both hold image 13"),
    (lambda h: rows(h, lambda t: t.__setitem__((8, 1), 99)), ValueError, "row 9: images 25 to 99 of a list of 27"),
    (lambda h: (h / "info/test_name.txt").write_text("someone.jpg"), ValueError, "test_name.txt/someone.jpg: not named like 0001C1T0001F001.jpg"),
])
def test_faults_of_mars_are_named(tmp_path, fault, kind, words):
    home = mars(tmp_path / "MARS"); fault(home)
    with pytest.raises(kind, match=words): quiet(read_mars, tmp_path)


def rows(home, change):
    file = home / "info/tracks_test_info.mat"; t = loadmat(file)["track_test_info"]; change(t); savemat(file, dict(track_test_info=t))


def test_what_mars_leaves_out_is_counted(tmp_path):
    home = mars(tmp_path / "MARS"); whole = quiet(read_mars, tmp_path)
    put(home, "bbox_test/0002/0002C1T0001F001 - Copy.jpg", "bbox_train/0001/0001C1T0009F001.jpg"); rows(home, lambda t: t.__setitem__((8, 1), 26))
    table, said = warned(read_mars, tmp_path)
    assert table.attrs["unlisted"] == 3 and len(table) == len(whole) - 1 and "3 images on disk in no list, left out" in check(table).notes
    assert sum("in no list and left out" in s for s in said) == 2 and sum("1 listed image is in no tracklet and left out" in s for s in said) == 1
    problems = check(table).problems
    for line in ("train: 4 images, published are 509,914", "query: 4 tracklets, published are 1,980", "gallery: 4 tracklets, published are 9,330", "junk: 1 tracklets, published are 870", "in all: 30 images, published are 1,191,003"): assert line in problems


def test_facts_stand_once():
    "Every reader's data set has its facts, a licence and a home; what the field prints follows from them."
    for facts in DATASETS.values(): assert facts.title and facts.licence and facts.home and facts.protocol == "market"
    mars = DATASETS["mars"]; assert mars.queries_in_gallery and mars.tracklets["gallery"] + mars.tracklets["query"] == 11_310 and mars.total - mars.counts["train"][0] == 681_089
    assert [n for n, f in DATASETS.items() if f.queries_in_gallery] == ["mars"] and [n for n, f in DATASETS.items() if f.distractor is not None] == ["market1501", "mars", "world"]


@pytest.mark.skipif(not (DATA / "viper").is_dir(), reason="needs ../shared/data/viper")
def test_viper_is_whole_and_says_nothing():
    table, said = warned(read_viper, DATA); assert said == [] and check(table).ok and 0 in set(table.pid)
