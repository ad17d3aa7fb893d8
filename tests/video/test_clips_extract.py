"""Features of tracklets: the plain definition, kills, damaged frames, memory; models of clips that leave."""
import json
import os
import signal
import subprocess
import time
import weakref

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from examples import ClipReader, Mean, SPEC, WALKS, walks, warned
from places import TESTS
from torch import nn

from cion_nb.core.samples import make_samples
from cion_nb.core.store import Features
from cion_nb.models import features as room
from cion_nb.models.architectures import InputSpec
from cion_nb.models.backbones import create_backbone
from cion_nb.models.features import embed, extract, normalise, OnnxModel, to_pixels
from cion_nb.models.leaving import export_onnx
from cion_nb.training.finetune import BNNeck
from cion_nb.training.mgn import MGN
from cion_nb.video.clips import extract_clips, FrameByFrame, restricted_random, TemporalMean, tracklet_table

torch.set_num_threads(1)


class AnyLength(ClipReader):
    any_length = True
    def forward(self, x):
        self.seen.append(x.shape[:2])
        return torch.cat([x.mean((3, 4)), x[:, :, :, 0].mean(3)], 2).tanh().mean(1)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    root = tmp_path_factory.mktemp("street")
    return root, walks(root)


def plainly(root, samples, model, T, sampling, stand_in=None):
    "The definition: tracklet by tracklet, clip by clip."
    spec, out = model.input, []
    for _, rows in samples.groupby("tracklet", sort=False):
        paths = [(stand_in or {}).get(path, path) for path in rows.path]
        F, cuts = len(paths), [(list(restricted_random(len(paths), T)), 1.)]
        if sampling == "all":
            cuts = []
            for start in range(0, F, T):
                own = min(T, F - start)
                inside = range(own) if model.any_length else restricted_random(own, T)
                cuts.append(([start + i for i in inside], own / F))
        total = 0
        for frames, weight in cuts:
            x = normalise(torch.from_numpy(np.stack([to_pixels(root / paths[i], spec) for i in frames])), spec)
            with torch.no_grad(): total = total + weight * model(x[None])[0].double().numpy()
        out.append(total / np.linalg.norm(total))
    return np.stack(out)


@pytest.mark.parametrize("sampling", ["chunks", "all"])
@pytest.mark.parametrize("kind", [ClipReader, AnyLength])
def test_rows_are_the_definition(street, tmp_path, sampling, kind):
    root, samples = street
    want = plainly(root, samples, kind(), 4, sampling)
    mixed = samples.sample(frac=1, random_state=0)
    mixed = pd.concat([mixed[mixed.tracklet == t].sort_values("frame") for t in samples.tracklet.unique()])
    for batch_size in (1, 3, 64):
        f = extract_clips(mixed, root, kind(), tmp_path / str(batch_size), sampling=sampling, batch_size=batch_size,
                          precision="float32")
        assert np.allclose(f.x, want, atol=1e-5)
    table = tracklet_table(samples)
    assert f.samples.tracklet.tolist() == table.tracklet.tolist() and f.samples.n_frames.tolist() == list(WALKS)
    assert f.samples.path.tolist() == table.path.tolist() and not len(f.unreadable)
    again = kind()
    assert np.array_equal(extract_clips(samples, root, again, tmp_path / "64", sampling=sampling,
                                        precision="float32").x, f.x) and not again.seen
    with pytest.raises(FileExistsError, match="sampling: there"):
        other = "all" if sampling == "chunks" else "chunks"
        extract_clips(samples, root, kind(), tmp_path / "64", sampling=other, precision="float32")


def test_every_frame_is_encoded_once(street, tmp_path):
    "By a model of images, or one that takes clips of any length; others see the last clip filled up."
    root, samples = street
    class Counts(Mean):
        frames = 0
        def forward(self, x):
            self.frames += len(x)
            return super().forward(x)
    images = Counts()
    f = extract_clips(samples, root, images, tmp_path / "mean", n_frames=4, sampling="all", precision="float32")
    assert images.frames == sum(WALKS)
    spec, start, want = SPEC, 0, []
    for n in WALKS:
        paths, start = samples.path[start:start + n], start + n
        x = normalise(torch.from_numpy(np.stack([to_pixels(root / path, spec) for path in paths])), spec)
        want.append(nn.functional.normalize(Mean()(x).mean(0), dim=0).detach().numpy())
    assert np.allclose(f.x, want, atol=1e-5), "the plain mean over frames"
    reader = ClipReader()
    extract_clips(samples, root, reader, tmp_path / "reader", sampling="all")
    assert sum(n for n, _ in reader.seen) == sum(-(-n // 4) for n in WALKS) and {T for _, T in reader.seen} == {4}


class Dies(ClipReader):
    left = 99
    def forward(self, x):
        self.left -= 1
        if self.left < 0: raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("sampling", ["chunks", "all"])
def test_stopped_at_any_batch_and_resumed(street, tmp_path, sampling):
    root, samples = street
    ask = dict(sampling=sampling, batch_size=2, flush_seconds=0)
    whole = Dies()
    want = extract_clips(samples, root, whole, tmp_path / "whole", **ask)
    calls = 99 - whole.left
    for stop in range(calls):
        model, out = Dies(), tmp_path / str(stop)
        model.left = stop
        with pytest.raises(KeyboardInterrupt): extract_clips(samples, root, model, out, **ask)
        with pytest.raises(FileNotFoundError, match="unfinished"): Features.open(out)
        model.left = 99
        got = extract_clips(samples, root, model, out, **ask)
        assert (out / "features.npy").read_bytes() == (tmp_path / "whole" / "features.npy").read_bytes()
        pd.testing.assert_frame_equal(got.samples, want.samples)
        assert 99 - model.left <= calls


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from examples import ClipReader, walks
from pathlib import Path
from cion_nb.video.clips import extract_clips
class Slow(ClipReader):
    def forward(self, x): time.sleep(.05); return super().forward(x)
f = extract_clips(walks(Path({root!r})), {root!r}, Slow(), {out!r}, sampling="all", batch_size=2, flush_seconds=0)
print("done", len(f))
"""


@pytest.mark.slow("starts processes")
def test_killed_and_resumed(street, tmp_path):
    "SIGKILL in a real process; the next one ends with the same bytes as one that was left alone."
    def start(out):
        code = SCRIPT.format(tests=str(TESTS), root=str(street[0]), out=str(out))
        return forked.start(["-c", code], stderr=subprocess.STDOUT,
                            env={**os.environ, "CION_NB_PROGRESS": "0", "OMP_NUM_THREADS": "1"})
    whole, killed = start(tmp_path / "whole"), start(tmp_path / "killed")
    marker, until = tmp_path / "killed" / "partial.json", time.monotonic() + 100
    while killed.poll() is None and time.monotonic() < until:
        if marker.exists() and json.loads(marker.read_text())["read"] >= 2: break
        time.sleep(.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, killed.stdout.read()
    last = start(tmp_path / "killed")
    for process in (whole, last): assert "done 7" in process.communicate(timeout=100)[0]
    for name in ("features.npy", "features.json"):
        said = [(tmp_path / folder / name).read_text("latin1").replace("Slow", "") for folder in ("whole", "killed")]
        assert said[0] == said[1], name


def test_the_longest_track_is_read_in_pieces(tmp_path, monkeypatch):
    "Of 715 frames three batches at most are held."
    one = np.zeros((8, 4, 3), np.uint8)
    held, most = weakref.WeakSet(), 0
    class Held(np.ndarray):
        __hash__ = object.__hash__
        def __eq__(self, other): return self is other
    def read(path, spec):
        nonlocal most
        image = (one + int(str(path)[-7:-4]) % 250 + 1).astype(np.uint8).view(Held)
        held.add(image)
        most = max(most, len(held))
        return image
    monkeypatch.setattr(room, "to_pixels", read)
    samples = make_samples([f"{k:03}.png" for k in range(715)], tracklet=3, pid=1, frame=range(715))
    f = extract_clips(samples, tmp_path, ClipReader(), tmp_path / "s", sampling="all", batch_size=4, workers=1)
    assert len(f) == 1 and f.samples.n_frames[0] == 715 and 16 <= most <= 5 * 16


def test_unreadable_frames(street, tmp_path, capsys):
    root = tmp_path / "walks"
    root.mkdir()
    samples = walks(root)
    bad = ["0_000.png", "0_004.png", "1_000.png", "2_003.png", "2_004.png", "3_000.png", "3_001.png", "3_002.png"]
    for path in bad: (root / path).write_bytes(b"")
    stand_in = {"0_000.png": "0_001.png", "0_004.png": "0_001.png", "2_003.png": "2_005.png", "2_004.png": "2_005.png"}
    kept = ~samples.tracklet.isin([7, 21])
    for batch_size in (1, 8):
        f = extract_clips(samples, root, ClipReader(), tmp_path / f"all{batch_size}", sampling="all",
                          precision="float32", batch_size=batch_size)
        said = capsys.readouterr().out
        assert "8 frames could not be read, first: 0_000.png: zero bytes" in said
        assert "2 tracklets have none and no feature" in said
        assert np.allclose(f.x, plainly(root, samples[kept], ClipReader(), 4, "all", stand_in), atol=1e-5)
        assert f.samples.tracklet.tolist() == [0, 14, 28, 35, 42] and sorted(f.unreadable.path) == bad
    f = extract_clips(samples, root, ClipReader(), tmp_path / "chunks", precision="float32")
    assert np.allclose(f.x, plainly(root, samples[kept], ClipReader(), 4, "chunks", stand_in), atol=1e-5)
    assert "0_004.png" not in f.unreadable.path.tolist(), "nobody asked for it"
    with pytest.raises(ValueError, match="none of the 2 tracklets could be read.*Is root="):
        extract_clips(samples[~kept], root, ClipReader(), tmp_path / "none")


def test_bad_calls(street, tmp_path):
    root, samples = street
    for change, error, says in [
            (dict(sampling="some"), ValueError, "chunks, all"), (dict(chunks="half"), ValueError, "equal, ceil"),
            (dict(n_frames=8), ValueError, "n_frames=8, but this model takes clips of 4"),
            (dict(batch_size=0), ValueError, "batch_size"), (dict(model=Mean(), n_frames=2.5), ValueError, "2.5"),
            (dict(model=Mean(), n_frames=-1), ValueError, "n_frames must be .*or None for the model's.*got -1"),
            (dict(model=Mean(), n_frames=0), ValueError, "n_frames must .*got 0"),
            (dict(n_frames=0), ValueError, "n_frames must .*got 0"),
            (dict(precision="int8"), ValueError, "precision"), (dict(model="resnet18"), TypeError, "is a name"),
            (dict(samples=samples.assign(tracklet=-1)), ValueError, "no tracklet"),
            (dict(samples=samples.assign(tracklet=1)), ValueError, "tracklet 1 has 4 values of pid")]:
        with pytest.raises(error, match=says):
            extract_clips(**dict(samples=samples, root=root, model=ClipReader(), out=tmp_path / "s") | change)
    with pytest.raises(TypeError, match="extract_clips gives a row a tracklet"):
        extract(samples, root, ClipReader(), tmp_path / "s")
    with pytest.raises(ValueError, match="takes clips already, of 4"): TemporalMean(ClipReader())
    for n_frames in (0, "4"):
        with pytest.raises(ValueError, match="n_frames must be"): TemporalMean(Mean(), n_frames)
    with pytest.raises(TypeError, match="Linear does not say what it takes"): TemporalMean(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Mean is no model of clips: use it as it is"): FrameByFrame(Mean())
    for model in (ClipReader(), Mean()):
        empty = extract_clips(make_samples([]), root, model, tmp_path / type(model).__name__)
        assert len(empty) == 0 and empty.x.shape == (0, 6)
    doubled = pd.concat([samples[:6], samples[3:6]]).sort_values("frame", kind="stable")
    said = warned(extract_clips, doubled, root, Mean(), tmp_path / "doubled", sampling="all")[1]
    assert len(said) == 1 and "3 rows repeat an image of the same tracklet" in said[0]


def test_images_and_clips_are_not_taken_for_one_another():
    image = create_backbone("resnet10_tiny_ibn", (64, 32)).eval()
    mean, images, clips = TemporalMean(image, 2), torch.zeros(2, 3, 64, 32), torch.zeros(2, 2, 3, 64, 32)
    for model, given, says in [
            (image, clips, r"\(2, 2, 3, 64, 32\) is clips, and this model takes images .*; TemporalMean.model. takes"),
            (BNNeck(image, 3).eval(), clips, "is clips, and this model takes images"),
            (FrameByFrame(mean), clips, "is clips, and this model takes images"),
            (MGN(create_backbone("resnet18", (96, 48)), 3, 8).eval(), clips, "is clips"),
            (mean, images, r"\(2, 3, 64, 32\) is images, and this model takes clips .n, T, 3, height, width.$"),
            (mean, images[0], "without a batch axis"), (image, images[0, 0], "neither images nor clips")]:
        with pytest.raises(ValueError, match=says): model(given)
    array = np.zeros((64, 32, 3), np.uint8)
    said = "takes single images, not clips .3 images in a list."
    with pytest.raises(TypeError, match=said): embed(image, [[array] * 3])
    with pytest.raises(TypeError, match="takes clips of 2 images, not one ndarray"): embed(mean, [array])
    assert embed(mean, [np.stack([array] * 2)]).shape == (1, image.embed_dim), "an array of frames is a clip"


class ByCamera(Mean):
    columns, column_sizes = ("camid",), dict(camid=3)
    def forward(self, x, camid): return super().forward(x) + camid[:, None]


def test_cards_and_requests_of_image_models_are_as_before(street, tmp_path):
    root, samples = street
    f = extract(samples[:3], root, Mean(), tmp_path / "s")
    assert "frames" not in f.request["input"] and InputSpec(**f.request["input"]) == SPEC
    clips = extract_clips(samples[:6], root, ClipReader(), tmp_path / "c")
    assert clips.request["input"]["frames"] == 4 and InputSpec(**clips.request["input"]) == ClipReader().input


def test_a_model_that_takes_cameras(street, tmp_path):
    root, samples = street
    f = extract_clips(samples, root, ByCamera(), tmp_path / "c", n_frames=3, sampling="all", precision="float32")
    rows = extract(samples[samples.tracklet == 14], root, ByCamera(), tmp_path / "rows", precision="float32")
    with torch.no_grad():
        x = torch.from_numpy(np.stack([to_pixels(root / path, SPEC) for path in rows.samples.path]))
        want = ByCamera()(normalise(x, SPEC), torch.full((12,), 2)).mean(0)
    assert np.allclose(f.x[2], nn.functional.normalize(want, dim=0), atol=1e-5)


def test_a_model_of_clips_leaves_and_comes_back(street, tmp_path):
    pytest.importorskip("onnxscript")
    root, samples = street
    torch.manual_seed(0)
    image = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image.input, image.embed_dim = SPEC, 8
    model = TemporalMean(image, 3)
    report = export_onnx(model, tmp_path / "clip.onnx")
    assert report.input.frames == 3 and "float32 (n, 3, 3, 8, 4) RGB" in str(report)
    file = OnnxModel(tmp_path / "clip.onnx")
    assert file.input == report.input and file.input.frames == 3 and file.batch is None
    clips = [[root / path for path in samples.path[i:i + 3]] for i in (0, 6, 20)]
    ours = embed(model, clips, flip=True)
    assert ours.shape == (3, 8) and np.allclose(embed(file, clips, batch_size=2, flip=True), ours, atol=1e-5)
    with pytest.raises(ValueError, match="a clip of 2 images for a model of 3"): embed(file, [clips[0][:2]])
    with pytest.raises(TypeError, match="takes clips of 3 images"): embed(file, clips[0])
    with pytest.raises(ValueError, match="takes .n, 3, 3, 8, 4."): file(torch.rand(2, 3, 8, 4))
    with pytest.raises(ValueError, match="and frames of the InputSpec"): OnnxModel(file.path, InputSpec(8, 4, frames=5))
    a, b = (extract_clips(samples, root, m, tmp_path / name, precision="float32")
            for name, m in (("a", model), ("b", file)))
    assert np.allclose(a.x, b.x, atol=1e-5)


def test_two_files_of_images_are_two_requests(street, tmp_path):
    "The mean over an ONNX model's frames has no weights of its own to be told apart by."
    onnx = pytest.importorskip("onnx")
    from onnx import helper, TensorProto
    root, samples = street
    models = []
    for name in "ab":
        ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, shape)
                for end, shape in (("x", ["n", 3, 8, 4]), ("y", ["n", 3]))]
        node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
        graph = helper.make_graph([node], name, ends[:1], ends[1:])
        opset = [helper.make_opsetid("", 13)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / f"{name}.onnx")
        models.append(OnnxModel(tmp_path / f"{name}.onnx", SPEC))
    extract_clips(samples, root, models[0], tmp_path / "s", n_frames=2)
    with pytest.raises(FileExistsError, match="encoder: there"):
        extract_clips(samples, root, models[1], tmp_path / "s", n_frames=2)
