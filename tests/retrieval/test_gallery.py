"""Galleries: backends agree with brute force, ids stay whole, damage names the file."""
import numpy as np
import pandas as pd
import pytest
import torch

from cion_nb.retrieval.evaluate import evaluate
from cion_nb.retrieval.gallery import Gallery


@pytest.mark.parametrize("seed", range(3))
def test_gallery_backends_agree_with_brute_force(seed):
    rng = np.random.default_rng(seed)
    x, q = rng.normal(size=(700, 24)), rng.normal(size=(33, 24))
    ids = rng.integers(0, 90, 700)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
    d = 1 - unit(q) @ unit(x).T
    order = np.argsort(d, 1, kind="stable")[:, :9]
    g = Gallery(x, ids)
    for backend in ("torch", *(["faiss"] if __import__("importlib").util.find_spec("faiss") else [])):
        for block in (7, 1024):
            found, distance = g.search(q, 9, backend, block=block)
            np.testing.assert_allclose(distance, np.take_along_axis(d, order, 1), atol=1e-5)
            np.testing.assert_array_equal(found, ids[order])
    assert g.search(np.zeros((0, 24)), 3)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="choose auto"): g.search(q, backend="annoy")
    with pytest.raises(ValueError, match=r"\(n, 24\)"): g.search(np.ones((2, 5)))


def test_a_gallery_that_was_cut_is_not_loaded(tmp_path):
    folder = Gallery(np.eye(4), [1, 2, 3, 4]).save(tmp_path / "g")
    np.save(folder / "gallery.npy", np.eye(4)[:3])
    with pytest.raises(ValueError, match="gallery.json says 4 x 4"): Gallery.load(folder)
    (folder / "gallery.json").unlink()
    with pytest.raises(FileNotFoundError, match="gallery.json is missing"): Gallery.load(folder)


def test_galleries_take_ids_of_tables_and_keep_ties_in_order():
    x = np.ones((40, 3), np.float32)
    for backend in ("torch", "auto"):
        assert Gallery(x, np.arange(40)).search(x[:2], 5, backend=backend)[0].tolist() == [[0, 1, 2, 3, 4]] * 2
    mixed = np.concatenate([x[:3], -x[:1], x[:30]])
    assert Gallery(mixed, np.arange(34)).search(x[:1], 6)[0].tolist() == [[0, 1, 2, 4, 5, 6]]
    for ids in (pd.Series(["a", "b"]), pd.Series(["a", "b"], dtype="string"), np.array(["a", "b"], object)):
        assert Gallery(x[:2], ids).search(x[:1], 1)[0].tolist() == [["a"]]
    assert len(Gallery(torch.ones(2, 3, dtype=torch.bfloat16), [1, 2])) == 2
    with pytest.raises(ValueError, match="at least one feature"): Gallery(np.zeros((0, 3)), [])
    with pytest.raises(ValueError, match="whole numbers or text"): Gallery(x[:2], np.array(["a", 1], object))


def test_damaged_galleries_name_the_file(tmp_path):
    import shutil
    g = Gallery(np.eye(4), list("abcd")).save(tmp_path / "g")
    for name, data, word in (("gallery.npy", (g / "gallery.npy").read_bytes()[:150], "gallery.npy is cut off"),
                             ("gallery.npy", b"", "gallery.npy is cut off"),
                             ("gallery.npy", None, "gallery.npy is missing"),
                             ("ids.parquet", b"xx", "ids.parquet is cut off"),
                             ("ids.parquet", None, "ids.parquet is missing"),
                             ("gallery.json", b"{}", "gallery.json lacks dim")):
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


@pytest.mark.parametrize("pid,word",
                         [([1.4, 2], "1.4"), ([1, np.nan], "nan"), (["a", "b"], "'a'"), ([True, False], "True")])
def test_people_are_whole_numbers(pid, word):
    from cion_nb.core.samples import make_samples
    t = make_samples(["a.jpg", "b.jpg"], 1, [1, 2])
    bad = pd.DataFrame(t).assign(pid=pid)
    with pytest.raises(ValueError, match=f"pid must hold whole numbers.*{word}"): evaluate(np.eye(2), np.eye(2), bad, t)
