"""Single-gallery-shot, clothes-changing, camera by camera, thresholds, maps of where a network looks, the gallery: against plain versions."""
import warnings
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from cion_nb.retrieval import evaluate as E
from cion_nb.models.architectures import ARCHITECTURES
from cion_nb.models.backbones import create_backbone
from cion_nb.data.datasets import READERS
from cion_nb.retrieval.protocols import tracklet_features
from cion_nb.retrieval.evaluate import evaluate
from cion_nb.retrieval.gallery import Gallery
from cion_nb.retrieval.inspection import activation_map, by_person, hardest, pair_distances
from cion_nb.retrieval.protocols import by_camera, draw_keys, evaluate_single_shot
from cion_nb.core.samples import make_samples
from test_evaluate import cosine, tables


def quiet(f, *args, **kw):
    with warnings.catch_warnings(): warnings.simplefilter("ignore"); return f(*args, **kw)


def single_shot_oracle(d, query, gallery, keys, protocol):
    "Ranks (repeats, queries), 0 without a match, from the words: remove, draw one image of each person, sort."
    out, ids = np.zeros((len(keys), len(query)), int), list(zip(gallery.pid.tolist(), gallery.camid.tolist()))
    for r, key in enumerate(keys):
        for i, (pid, cam) in enumerate(zip(query.pid.tolist(), query.camid.tolist())):
            left = [j for j, (p, c) in enumerate(ids) if p != -1 and not (protocol == "market" and p == pid and c == cam != -1)]
            if pid == -1 or not any(ids[j][0] == pid for j in left): continue
            drawn = [j for j in left if ids[j][0] == 0]
            for p in {ids[j][0] for j in left} - {0}: drawn.append(min((j for j in left if ids[j][0] == p), key=lambda j: key[j]))
            out[r, i] = 1 + [ids[j][0] for j in sorted(drawn, key=lambda j: (d[i, j], j))].index(pid)
    return out


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(2, 60), st.sampled_from(["market", "no_camera"]), st.sampled_from([1, 4096, 1 << 30]))
@settings(max_examples=80, deadline=None)
def test_single_shot_is_its_definition(seed, n_query, n_gallery, protocol, memory):
    "Junk, distractors, unknown cameras, ties of signs, small blocks."
    rng = np.random.default_rng(seed)
    query, gallery = tables(rng, n_query, n_gallery)
    q, g = (rng.choice([-1., 1.], (n, 5)).astype(np.float32) for n in (n_query, n_gallery))
    ranks = single_shot_oracle(cosine(q, g), query, gallery, draw_keys(n_gallery, 3, seed), protocol); has = ranks[0] > 0
    if not has.any():
        with pytest.raises(ValueError, match="Nothing is left"): quiet(evaluate_single_shot, q, g, query, gallery, protocol=protocol, distractors=0)
        return
    found = quiet(evaluate_single_shot, q, g, query, gallery, repeats=3, seed=seed, protocol=protocol, memory=memory, distractors=0)
    np.testing.assert_allclose(found.per_repeat.mAP, (1 / ranks[:, has]).mean(1)); np.testing.assert_allclose(found.per_repeat.rank1, (ranks[:, has] == 1).mean(1))
    np.testing.assert_allclose(found.cmc, [(ranks[:, has] <= k).mean() for k in range(1, len(found.cmc) + 1)]); assert found.n_query == has.sum() and len(found.unmatched) == (~has).sum()


def test_draws_are_fair():
    "Each of a person's images is drawn equally often."
    gallery = make_samples(list("abcdef"), [1, 1, 1, 2, 2, 3], [0] * 6); from cion_nb.retrieval.protocols import _drawn
    rows, person = _drawn(gallery.pid.to_numpy(), draw_keys(6, 6000))
    assert person.tolist() == [1, 2, 3] and (rows[:, 2] == 5).all()
    for column, n in ((0, 3), (1, 2)): np.testing.assert_allclose(np.unique(rows[:, column], return_counts=True)[1] / 6000, 1 / n, atol=.03)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_clothes_changing_is_its_definition(seed):
    "Removed: the same person in the same camera, or in the same known clothes."
    rng = np.random.default_rng(seed); query, gallery = tables(rng, 9, 50)
    for t in (query, gallery): t["clothes"] = pd.array([None if rng.random() < .15 else f"{p}_{rng.integers(3)}" for p in t.pid], dtype="string")
    q, g = rng.normal(size=(9, 6)).astype(np.float32), rng.normal(size=(50, 6)).astype(np.float32); d = cosine(q, g); APs = []
    for i in range(9):
        pid, cam, worn = query.pid[i], query.camid[i], query.clothes[i]
        kept = [j for j in np.argsort(d[i], kind="stable") if gallery.pid[j] != -1 and not (gallery.pid[j] == pid and (gallery.camid[j] == cam != -1 or (worn is not pd.NA and gallery.clothes[j] is not pd.NA and gallery.clothes[j] == worn)))]
        right = [k for k, j in enumerate(kept, 1) if gallery.pid[j] == pid != -1]
        APs.append(np.mean([n / k for n, k in enumerate(right, 1)]) if right else np.nan)
    if np.isnan(APs).all(): return
    score = quiet(evaluate, q, g, query, gallery, protocol="clothes_changing")
    np.testing.assert_allclose(score.AP, APs, atol=1e-6)


def test_clothes_need_their_column():
    t = make_samples(["a", "b"], [1, 1], [0, 1])
    with pytest.raises(ValueError, match="no column clothes"): evaluate(np.eye(2), np.eye(2), t, t, protocol="clothes_changing")


@pytest.mark.parametrize("seed", range(4))
def test_cameras_one_by_one(seed):
    rng = np.random.default_rng(seed); query, gallery = tables(rng, 30, 90); q, g = rng.normal(size=(30, 8)), rng.normal(size=(90, 8))
    found = quiet(by_camera, q, g, query, gallery); assert len(found) == query.camid.nunique() * gallery.camid.nunique()
    for row in found.itertuples():
        here, there = (query.camid == row.query_camera).to_numpy(), (gallery.camid == row.gallery_camera).to_numpy()
        a, b = query[here].reset_index(drop=True), gallery[there].reset_index(drop=True)
        if not E.Answers(a, b, "market").counts.any(): assert row.queries == 0 and np.isnan(row.mAP); continue
        own = quiet(evaluate, q[here], g[there], a, b)
        assert row.queries == own.AP.size - np.isnan(own.AP).sum() and row.mAP == pytest.approx(own.mAP) and row.rank1 == pytest.approx(own.rank1)


@pytest.mark.parametrize("protocol", ["market", "no_camera"])
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_pair_distances_count_every_pair_once(protocol, memory):
    rng = np.random.default_rng(0); query, gallery = tables(rng, 25, 80); q, g = rng.normal(size=(25, 8)), rng.normal(size=(80, 8)); d = cosine(q, g)
    same = (query.pid.to_numpy()[:, None] == gallery.pid.to_numpy()) & (query.pid.to_numpy()[:, None] >= 0)
    out = (gallery.pid.to_numpy() == -1)[None] | (query.pid.to_numpy() < 0)[:, None]
    if protocol == "market": out = out | same & (query.camid.to_numpy()[:, None] == gallery.camid.to_numpy()) & (query.camid.to_numpy()[:, None] >= 0)
    pairs = quiet(pair_distances, q, g, query, gallery, protocol, memory=memory)
    assert pairs.right.sum() == (same & ~out).sum() and pairs.wrong.sum() == (~same & ~out).sum()
    for t in (.5, 1., 1.5): assert pairs.at(t) == (pytest.approx((d[same & ~out] < t).mean(), abs=.02), pytest.approx((d[~same & ~out] < t).mean(), abs=2e-3))
    for rate in (.01, .1, .5):
        t = pairs.threshold(rate); assert pairs.at(t)[1] <= rate, "never more false matches than were allowed"
        assert (d[~same & ~out] < t + 2e-4).mean() > rate - 1 / pairs.wrong.sum() - 1e-3, "and no lower threshold than needed"


def test_worst_first():
    rng = np.random.default_rng(1); query, gallery = tables(rng, 40, 200); score = quiet(evaluate, rng.normal(size=(40, 6)), rng.normal(size=(200, 6)), query, gallery)
    worst = hardest(score, 5); assert worst.AP.tolist() == sorted(score.per_query.AP.dropna())[:5]
    people = by_person(score); assert people.mAP.is_monotonic_increasing and people.queries.sum() == score.per_query.AP.notna().sum()


SMALLEST = {a.family: name for name, a in sorted(ARCHITECTURES.items(), key=lambda item: -item[1].parameters) if a.in_paper}
@pytest.mark.parametrize("arch", sorted(SMALLEST.values()))
def test_maps_of_every_family(arch):
    "A map of the input's size, from a network that is left as it was, and that follows a lone bright patch of the image."
    model = create_backbone(arch, (128, 64)).train()
    heat = activation_map(model, np.random.default_rng(0).integers(0, 255, (128, 64, 3), dtype=np.uint8))
    assert heat.shape == (128, 64) and heat.min() == 0 and heat.max() == pytest.approx(1) and all(m.training for m in model.modules())


def test_a_map_points_at_what_it_should():
    "With a network that passes brightness on, the map is where the brightness is."
    class Bright(torch.nn.Module):
        num_features = 3
        def __init__(self): super().__init__(); self.input = create_backbone("resnet10_tiny", (64, 32)).input; self.w = torch.nn.Parameter(torch.ones(1))
        def forward_features(self, x): return torch.nn.functional.avg_pool2d(x - x.amin(), 8)
    image = np.zeros((64, 32, 3), np.uint8); image[40:56, 8:16] = 255
    y, x = np.unravel_index(activation_map(Bright(), image).argmax(), (64, 32)); assert 40 <= y < 56 and 8 <= x < 16


@pytest.mark.parametrize("seed", range(3))
def test_gallery_backends_agree_with_brute_force(seed):
    rng = np.random.default_rng(seed); x, q = rng.normal(size=(700, 24)), rng.normal(size=(33, 24)); ids = rng.integers(0, 90, 700)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
    d = 1 - unit(q) @ unit(x).T; order = np.argsort(d, 1, kind="stable")[:, :9]
    g = Gallery(x, ids)
    for backend in ("torch", *(["faiss"] if __import__("importlib").util.find_spec("faiss") else [])):
        for block in (7, 1024):
            found, distance = g.search(q, 9, backend, block=block)
            np.testing.assert_allclose(distance, np.take_along_axis(d, order, 1), atol=1e-5); np.testing.assert_array_equal(found, ids[order])
    assert g.search(np.zeros((0, 24)), 3)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="choose auto"): g.search(q, backend="annoy")
    with pytest.raises(ValueError, match=r"\(n, 24\)"): g.search(np.ones((2, 5)))


def test_a_gallery_that_was_cut_is_not_loaded(tmp_path):
    folder = Gallery(np.eye(4), [1, 2, 3, 4]).save(tmp_path / "g"); np.save(folder / "gallery.npy", np.eye(4)[:3])
    with pytest.raises(ValueError, match="gallery.json says 4 x 4"): Gallery.load(folder)
    (folder / "gallery.json").unlink()
    with pytest.raises(FileNotFoundError, match="gallery.json is missing"): Gallery.load(folder)


def test_tracklet_features_are_means_of_what_is_kept():
    rng = np.random.default_rng(0); t = make_samples([f"{i}" for i in range(300)], np.repeat(np.arange(1, 31), 10), np.repeat(np.arange(1, 31) % 3, 10), tracklet=np.repeat(rng.permutation(60), 5), video="v", split="gallery")
    x, keep = rng.normal(size=(300, 7)).astype(np.float32), rng.random(300) < .5
    for k in (None, keep):
        f, table = tracklet_features(x, t, k)
        for row, vector in zip(table.itertuples(), f):
            of = (t.tracklet == row.tracklet).to_numpy(); use = of & (keep if k is not None and (of & keep).any() else True)
            mean = x[use].mean(0); np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6); assert row.pid == t.pid[of].iloc[0]
    with pytest.raises(ValueError, match="no tracklet"): tracklet_features(x, t.assign(tracklet=-1))


def test_names_of_data_sets_open_their_readers(tmp_path):
    for name, reader in READERS.items():
        if name in ("cion_al",): continue
        with pytest.raises(FileNotFoundError, match="looked in"): reader(tmp_path)


def test_galleries_take_ids_of_tables_and_keep_ties_in_order():
    x = np.ones((40, 3), np.float32)
    for backend in ("torch", "auto"): assert Gallery(x, np.arange(40)).search(x[:2], 5, backend=backend)[0].tolist() == [[0, 1, 2, 3, 4]] * 2
    mixed = np.concatenate([x[:3], -x[:1], x[:30]]); assert Gallery(mixed, np.arange(34)).search(x[:1], 6)[0].tolist() == [[0, 1, 2, 4, 5, 6]]
    for ids in (pd.Series(["a", "b"]), pd.Series(["a", "b"], dtype="string"), np.array(["a", "b"], object)): assert Gallery(x[:2], ids).search(x[:1], 1)[0].tolist() == [["a"]]
    assert len(Gallery(torch.ones(2, 3, dtype=torch.bfloat16), [1, 2])) == 2
    with pytest.raises(ValueError, match="at least one feature"): Gallery(np.zeros((0, 3)), [])
    with pytest.raises(ValueError, match="whole numbers or text"): Gallery(x[:2], np.array(["a", 1], object))


def test_damaged_galleries_name_the_file(tmp_path):
    import shutil
    g = Gallery(np.eye(4), list("abcd")).save(tmp_path / "g")
    for name, data, word in (("gallery.npy", (g / "gallery.npy").read_bytes()[:150], "gallery.npy is cut off"), ("gallery.npy", b"", "gallery.npy is cut off"), ("gallery.npy", None, "gallery.npy is missing"),
                             ("ids.parquet", b"xx", "ids.parquet is cut off"), ("ids.parquet", None, "ids.parquet is missing"), ("gallery.json", b"{}", "gallery.json lacks dim")):
        bad = shutil.copytree(g, tmp_path / "bad", dirs_exist_ok=True)
        (bad / name).unlink() if data is None else (bad / name).write_bytes(data)
        with pytest.raises((ValueError, FileNotFoundError), match=word): Gallery.load(bad)
    pd.DataFrame(dict(x=range(4))).to_parquet(shutil.copytree(g, bad, dirs_exist_ok=True) / "ids.parquet")
    with pytest.raises(ValueError, match="ids.parquet is cut off, damaged, or no part"): Gallery.load(bad)


def test_ids_stay_whole_numbers():
    big = 2**53 + 1
    assert Gallery(np.eye(2), np.array([big, 5], np.uint64)).add(np.eye(2), [-1, 3]).ids.tolist() == [big, 5, -1, 3]
    with pytest.raises(ValueError, match="does not fit"): Gallery(np.eye(2), np.array([2**63, 1], np.uint64))
    with pytest.raises(ValueError, match="a list of whole numbers"): Gallery(np.eye(2), np.zeros((2, 2), int))


def test_no_map_of_what_has_no_map():
    from cion_nb.models.backbones import create_backbone
    from cion_nb.training.mgn import MGN
    with pytest.raises(ValueError, match="MGN has none"): activation_map(MGN(create_backbone("resnet18", (96, 32)), 4), np.zeros((96, 32, 3), np.uint8))


@pytest.mark.parametrize("pid,word", [([1.4, 2], "1.4"), ([1, np.nan], "nan"), (["a", "b"], "'a'"), ([True, False], "True")])
def test_people_are_whole_numbers(pid, word):
    from cion_nb.core.samples import make_samples
    t = make_samples(["a.jpg", "b.jpg"], 1, [1, 2]); bad = pd.DataFrame(t).assign(pid=pid)
    with pytest.raises(ValueError, match=f"pid must hold whole numbers.*{word}"): evaluate(np.eye(2), np.eye(2), bad, t)


def test_distractors_are_whole_numbers():
    from cion_nb.core.samples import make_samples
    t = make_samples(["a.jpg", "b.jpg"], [1, 2], 1)
    with pytest.raises(ValueError, match=r"distractors=\[99.5\]: pids are whole numbers"): evaluate_single_shot(np.eye(2), np.eye(2), t, t.assign(path=["c.jpg", "d.jpg"]), distractors=[99.5], protocol="no_camera")
