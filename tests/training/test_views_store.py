"""The store of images behind the views: replacements, threads, its memory limit, worker processes."""
import io
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from examples import picture
from PIL import Image

from cion_nb.core.samples import make_samples
from cion_nb.training import views
from cion_nb.training.views import ImageStore

torch.set_num_threads(1)


# ── the image store ──
def files(root, n, h=24, w=12):
    for k in range(n):
        Image.fromarray(picture(h + k % 3, w, k).permute(1, 2, 0).contiguous().numpy()).save(root / f"{k}.png")
    return [f"{k}.png" for k in range(n)]


@pytest.mark.parametrize("memory", [2**30, 0])
@pytest.mark.parametrize("size", [None, (20, 10)])
def test_store_replaces_within_the_identity(tmp_path, memory, size):
    names = files(tmp_path, 9)
    table = make_samples(names, pid=[0, 0, 0, 1, 1, 1, 2, 2, -1])
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "5.png").unlink()
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    (tmp_path / "6.png").write_bytes(b"junk")
    (tmp_path / "7.png").write_bytes(b"junk")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        store = ImageStore(table, tmp_path, size=size, memory=memory)
        images = store[[0, 1, 2, 3, 4, 5, 8]]
        with pytest.raises(ValueError, match=r"identity 2 has no readable image \(row 6: 6.png"): store[6]
    assert store.in_memory == bool(memory)
    assert store.nbytes == (sum(i.nbytes for i in store._images if i is not None) if memory else 0)
    # the next of the identity, cyclic
    assert torch.equal(images[1], images[2]) and torch.equal(images[3], images[4]) and torch.equal(images[5], images[4])
    assert store.unreadable.row.tolist() == [1, 3, 5, 6, 7] and store.readable.sum() == 4
    # once each
    assert len([w for w in said if "replaced by another image of identity" in str(w.message)]) == 5
    assert torch.equal(store[4], images[4]) and images[0].dtype == torch.uint8
    assert (size is None or images[0].shape == (3, *size))
    table_ok = table[store.readable]
    assert len(ImageStore(table_ok, tmp_path)) == 4
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again[[1]][0], images[1])


def test_threads_that_meet_one_unreadable_row_warn_once(tmp_path, monkeypatch):
    (tmp_path / "junk.png").write_bytes(b"junk")
    names = ["junk.png", *files(tmp_path, 2)]
    together, real = threading.Barrier(4), views.open_image
    def meet(path):
        if path.name == "junk.png": together.wait(10)
        return real(path)
    monkeypatch.setattr(views, "open_image", meet)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        images = ImageStore(make_samples(names, pid=[0, 0, 0]), tmp_path, memory=0, size=(20, 10),
                            threads=4)[[0, 0, 0, 0]]
    assert len([w for w in said if "replaced by another image" in str(w.message)]) == 1
    assert all(torch.equal(i, images[0]) for i in images)


def test_store_keeps_its_memory_limit(tmp_path):
    names = files(tmp_path, 6)
    one = 3 * 24 * 12
    assert not ImageStore(make_samples(names), tmp_path, memory=2 * one).in_memory
    full = ImageStore(make_samples(names), tmp_path, memory=100 * one)
    assert full.in_memory and full.nbytes <= 100 * one and len(full) == 6
    disk = ImageStore(make_samples(names), tmp_path, memory=0, threads=2)
    assert all(torch.equal(a, b) for a, b in zip(disk[np.arange(6)], full[np.arange(6)]))
    assert ImageStore(make_samples([]), tmp_path)[[]] == []
    jpeg = io.BytesIO()
    Image.new("L", (12, 24), 128).save(jpeg, "JPEG")
    (tmp_path / "grey.jpg").write_bytes(jpeg.getvalue())
    assert ImageStore(make_samples("grey.jpg"), tmp_path)[0].shape == (3, 24, 12)


@pytest.mark.slow("starts processes")
def test_store_in_worker_processes(tmp_path):
    "A store that has already used its threads still works in a forked DataLoader worker."
    store = ImageStore(make_samples(files(tmp_path, 6)), tmp_path, memory=0)
    store[[0, 1]]
    class Rows(torch.utils.data.Dataset):
        def __len__(self): return 3
        def __getitem__(self, k): return store[[2 * k, 2 * k + 1]][1]
    loaded = list(torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=1, timeout=60))
    assert all(torch.equal(a, store[2 * k + 1]) for k, a in enumerate(loaded))
