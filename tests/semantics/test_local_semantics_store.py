"""Masks once to disk: resumed to the byte, never mixed up with those of other images."""
import pickle

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from cion_nb.companion.commands import main
from cion_nb.core.runs import BusyRun
from cion_nb.core.samples import make_samples
from cion_nb.semantics import local_semantics as L
from cion_nb.semantics.local_semantics import local_crops, PartSource, PartStore, to_masks, WorldParts, write_parts


class ByBrightness(PartSource):
    "Four grey levels are the four labels; it counts, and stops when it is told to."
    settings = dict(source="brightness")
    def __init__(self, stop_after=10 ** 9): self.asked, self.stop_after = [], stop_after

    def parts(self, images, samples=None):
        assert len(images) == len(samples) and len({image.shape for image in images}) == 1
        self.asked += samples.path.tolist()
        if len(self.asked) > self.stop_after: raise KeyboardInterrupt
        return to_masks(np.minimum(images[..., 0] // 50, 4).astype(np.uint8))


@pytest.fixture
def pictures(tmp_path):
    "Forty images of three sizes, as PNG, and their table."
    rng, root = np.random.default_rng(0), tmp_path / "images"
    root.mkdir()
    for i in range(40):
        h, w = ((20, 10), (24, 12), (9, 30))[i % 3]
        Image.fromarray(rng.integers(0, 5, (h, w), np.uint8) * 50 + 20).save(root / f"{i:02d}.png")
    return root, make_samples([f"{i:02d}.png" for i in range(40)], pid=np.arange(40) // 4)


def labels_of(root, samples):
    return [np.minimum(np.asarray(Image.open(root / p)) // 50, 4) for p in samples.path]


def content(folder):
    "All of a store but its zip, which keeps the time, and that by its arrays."
    with np.load(folder / "index.npz") as index: arrays = {k: index[k].tolist() for k in index}
    return arrays, {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".bin", ".json", ".parquet")}


def test_label_maps_come_back_at_their_size_in_any_order(pictures, tmp_path):
    root, samples = pictures
    store = write_parts(samples, root, ByBrightness(), tmp_path / "parts", batch_size=4, piece=7)
    truth = labels_of(root, samples)
    assert len(store) == 40 and store.found.all() and not len(store.unreadable)
    assert all((a == b).all() and a.dtype == np.uint8 for a, b in zip(store[range(40)], truth))
    assert all((a == truth[i]).all() for a, i in zip(store[[31, 4, 4]], (31, 4, 4))) and (store[-1] == truth[-1]).all()
    images = [torch.from_numpy(np.array(Image.open(root / p).convert("RGB"))).permute(2, 0, 1) for p in samples.path]
    rows = [3, 38, 11]
    for a, b in zip(store.crops([images[i] for i in rows], rows, (16, 8)),
                    local_crops([images[i] for i in rows], [truth[i] for i in rows], (16, 8))): assert (a == b).all()
    with pytest.raises(ValueError, match="3 images and 2 rows"): store.crops(images[:3], [0, 1])
    with pytest.raises(ValueError, match="they need its size"): store.crops(images[:2], [1, 0])
    again = pickle.loads(pickle.dumps(store))
    assert (again[5] == truth[5]).all() and len(pickle.dumps(store)) < 40_000


@pytest.mark.parametrize("stop", [1, 9, 26])
def test_a_stopped_store_goes_on_where_it_was(pictures, tmp_path, stop):
    root, samples = pictures
    write_parts(samples, root, ByBrightness(), tmp_path / "whole", batch_size=3, piece=8)
    first = ByBrightness(stop)
    with pytest.raises(KeyboardInterrupt): write_parts(samples, root, first, tmp_path / "parts", batch_size=3, piece=8)
    with pytest.raises(FileNotFoundError, match="unfinished store"): PartStore.open(tmp_path / "parts")
    second = ByBrightness()
    write_parts(samples, root, second, tmp_path / "parts", batch_size=3, piece=8)
    assert len(second.asked) == 40 - stop // 8 * 8, "whole pieces are kept"
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert not (tmp_path / "parts" / "pieces").exists()
    third = ByBrightness()
    write_parts(samples, root, third, tmp_path / "parts", batch_size=3, piece=8)
    assert third.asked == []


def test_a_stop_before_the_last_file_costs_nothing(pictures, tmp_path, monkeypatch):
    root, samples = pictures
    written = L.write_json
    def stop(path, value):
        if path.name == "parts.json": raise KeyboardInterrupt
        return written(path, value)
    monkeypatch.setattr(L, "write_json", stop)
    with pytest.raises(KeyboardInterrupt): write_parts(samples, root, ByBrightness(), tmp_path / "parts", piece=8)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="unfinished store"): PartStore.open(tmp_path / "parts")
    again = ByBrightness()
    write_parts(samples, root, again, tmp_path / "parts", piece=8)
    write_parts(samples, root, ByBrightness(), tmp_path / "whole", piece=8)
    assert again.asked == [] and content(tmp_path / "parts") == content(tmp_path / "whole")


def test_another_request_is_refused(pictures, tmp_path):
    root, samples = pictures
    out = tmp_path / "parts"
    write_parts(samples, root, ByBrightness(), out)
    other = ByBrightness()
    other.settings = dict(source="other")
    for changed, word in ((dict(source=other), "source: there brightness, asked for other"),
                          (dict(size=(8, 4)), "size: there None"), (dict(samples=samples[:30]), "images: there 40")):
        asked = dict(samples=samples, root=root, source=ByBrightness(), out=out) | changed
        with pytest.raises(FileExistsError, match=word): write_parts(**asked)
    store = write_parts(samples[:30], root, other, out, resume=False)
    assert len(store) == 30 and store.request["source"] == "other"
    with pytest.raises(KeyboardInterrupt): write_parts(samples, root, ByBrightness(20), tmp_path / "half", piece=8)
    with pytest.raises(FileExistsError, match="source"): write_parts(samples, root, other, tmp_path / "half", piece=8)


def test_a_store_of_other_images_is_refused(pictures, tmp_path):
    root, samples = pictures
    store = write_parts(samples, root, ByBrightness(), tmp_path / "parts")
    assert store.check(samples, root) is store
    with pytest.raises(ValueError, match="is of 40 images, not 30"): store.check(samples[:30])
    swapped = samples.iloc[[1, 0, *range(2, 40)]].reset_index(drop=True)
    with pytest.raises(ValueError, match="row 0 is 00.png, not 01.png"): store.check(swapped)
    Image.new("L", (10, 20), 99).save(root / "07.png")
    with pytest.raises(ValueError, match="07.png has changed since"): store.check(samples, root)
    with pytest.raises(ValueError, match="07.png has changed since"):
        write_parts(samples, root, ByBrightness(), tmp_path / "parts")
    assert (write_parts(samples, root, ByBrightness(), tmp_path / "parts", resume=False)[7] == 1).all()


def test_pieces_of_images_that_changed_are_made_anew(pictures, tmp_path):
    root, samples = pictures
    with pytest.raises(KeyboardInterrupt): write_parts(samples, root, ByBrightness(20), tmp_path / "parts", piece=8)
    Image.new("L", (10, 20), 99).save(root / "08.png")                              # the first of the second piece
    again = ByBrightness()
    store = write_parts(samples, root, again, tmp_path / "parts", piece=8)
    assert (store[8] == 1).all() and len(again.asked) == 32 and "00.png" not in again.asked


def test_rows_of_another_table(pictures, tmp_path):
    root, samples = pictures
    store = write_parts(samples, root, ByBrightness(), tmp_path / "parts")
    chosen = samples.iloc[[30, 2, 2, 17]].reset_index(drop=True).assign(tracklet=5)
    own, truth = store.of(chosen), labels_of(root, chosen)
    assert len(own) == 4 and all((a == b).all() for a, b in zip(own[range(4)], truth)) and own.check(chosen, root)
    assert (own.pixels == [[(x == a).sum() for a in (1, 2, 3)] for x in truth]).all()
    stranger = make_samples(["00.png", "x.png", "y.png"])
    with pytest.raises(ValueError, match="no masks of 2 images, the first: x.png"): store.of(stranger)


def test_images_that_cannot_be_read_have_no_parts(pictures, tmp_path, capsys):
    root, samples = pictures
    (root / "03.png").write_bytes(b"no image")
    (root / "11.png").unlink()
    store = write_parts(samples, root, ByBrightness(), tmp_path / "parts")
    assert store.unreadable.path.tolist() == ["03.png", "11.png"] and "no such file" in store.unreadable.reason[1]
    assert "2 of 40 images could not be read and have no parts; first: 03.png" in capsys.readouterr().out
    assert np.flatnonzero(~store.found).tolist() == [3, 11] and store[3].shape == (0, 0)
    crops, weight = store.crops([torch.zeros(3, 9, 30, dtype=torch.uint8)], [11])   # another image stands in for it
    assert not weight.any() and crops.isfinite().all()
    for name in samples.path: (root / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="none of the 40 images could be read, first: .*Is root=.* right"):
        write_parts(samples, root, ByBrightness(), tmp_path / "none")
    with pytest.raises(ValueError, match="the table is empty"):
        write_parts(samples[:0], root, ByBrightness(), tmp_path / "none")


def test_maps_of_a_stored_size(pictures, tmp_path):
    root, samples = pictures
    store = write_parts(samples, root, ByBrightness(), tmp_path / "parts", size=(16, 8))
    for own, label in zip(store[range(40)], labels_of(root, samples)):
        assert (own == np.asarray(Image.fromarray(label).resize((8, 16), Image.NEAREST))).all()


def test_masks_of_a_wrong_source_are_not_written(pictures, tmp_path):
    root, samples = pictures
    class Wrong(ByBrightness):
        def parts(self, images, samples=None):
            masks, person = super().parts(images, samples)
            return masks[:, :, 1:], person
    with pytest.raises(ValueError, match="as many, of their size"):
        write_parts(samples, root, Wrong(), tmp_path / "parts")
    with pytest.raises(FileNotFoundError): PartStore.open(tmp_path / "parts")


def test_two_writers_do_not_meet(pictures, tmp_path):
    root, samples = pictures
    (tmp_path / "parts").mkdir()
    with FileLock(tmp_path / "parts" / ".lock"), pytest.raises(BusyRun, match="another process writes parts"):
        write_parts(samples, root, ByBrightness(), tmp_path / "parts")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError): write_parts(samples, root, ByBrightness(), tmp_path / "file")


@pytest.mark.slow("draws a world")
def test_the_command_writes_a_store(drawn, tmp_path, capsys):
    root, samples = drawn
    table, out = str(root / "reid.parquet"), tmp_path / "parts"
    assert not main(["parts", table, "--source", "world", "--out", str(out), "--check"]) and not out.exists()
    assert not main(["parts", table, "--source", "world", "--out", str(out), "--set", "batch_size=5"])
    assert f"PartStore({len(samples)} images" in capsys.readouterr().out
    masks, person = to_masks(np.stack(PartStore.open(out).check(samples, root)[range(len(samples))]))
    truth = WorldParts(root).parts(np.zeros((len(samples), 128, 64, 3), np.uint8), samples)
    assert (masks == truth[0]).all() and (person == truth[1]).all()
    for words, said in ((["--source", "pose.onnx"], "pose.onnx: name a pose-landmark .tflite"),
                        (["--source", "none.tflite"], "no pose network at"),
                        (["--source", "world", "--set", "batchsize=3"], "batch_size")):
        assert main(["parts", table, "--out", str(tmp_path / "x"), *words]) and said in capsys.readouterr().err
