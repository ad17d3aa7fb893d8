"""The feature store: faults, kills, bad input, and real pixels."""
import builtins
import json
import os
import shutil
import signal
import subprocess
import time
import warnings

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from examples import Mean, names, SPEC
from hypothesis import given, HealthCheck, settings, strategies as st
from PIL import Image
from places import DATA, TESTS
from torch import nn

from cion_nb.core.images import UnreadableImage
from cion_nb.core.samples import make_samples
from cion_nb.core.store import Features, read_features
from cion_nb.models import features as room
from cion_nb.models.architectures import InputSpec
from cion_nb.models.backbones import create_backbone
from cion_nb.models.features import embed, extract, normalise, OnnxModel, to_pixels


def expected(path, spec=SPEC):
    image = Image.open(path).convert("RGB").resize((spec.width, spec.height), Image.Resampling.BILINEAR)
    x = (np.asarray(image) / 255.0 - np.array(spec.mean)) / np.array(spec.std)
    y = np.concatenate([x.mean((0, 1)), x[0].mean(0)])
    return y / np.linalg.norm(y)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "40 readable images, and every kind of unreadable one."
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for n in range(40):
        Image.fromarray(rng.integers(0, 255, (20 + n, 10 + n % 7, 3), dtype=np.uint8)).save(
            root / f"{n:02}.{'jpg' if n % 2 else 'png'}")
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("not an image")
    (root / "cut.jpg").write_bytes((root / "39.jpg").read_bytes()[:-300])
    (root / "folder.jpg").mkdir()
    return root


BAD = ["empty.jpg", "text.jpg", "cut.jpg", "folder.jpg", "missing.jpg"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(names(12) + BAD), min_size=1, max_size=30).filter(lambda l: set(l) - set(BAD)),
       st.integers(1, 9), st.integers(1, 5), st.sampled_from(["float16", "float32"]))
def test_rows_belong_to_their_samples(pictures, tmp_path, paths, batch_size, workers, precision):
    "Any mixture of good, bad and repeated images, any batch size and thread count: the rows are the definition's."
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    samples = make_samples(paths, pid=np.arange(len(paths)), frame=np.arange(len(paths)))
    f = extract(samples, pictures, Mean(), tmp_path / "s", batch_size=batch_size, workers=workers, precision=precision)
    good = [i for i, p in enumerate(paths) if p not in BAD]
    assert f.samples.frame.tolist() == good and f.samples.path.tolist() == [paths[i] for i in good]
    assert f.unreadable.path.tolist() == [p for p in paths if p in BAD]
    assert np.allclose(f.x.astype(np.float64), [expected(pictures / paths[i]) for i in good],
                       atol=1e-3 if precision == "float16" else 1e-5)
    assert f.x.dtype == precision and isinstance(f.x, np.memmap) and len(f) == len(good)
    assert np.array_equal(np.load(tmp_path / "s" / "features.npy"), f.x)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        ".lock", "features.json", "features.npy", "samples.parquet", "unreadable.parquet"]


def test_threads_change_nothing_and_batches_next_to_nothing(pictures, tmp_path):
    model, samples = create_backbone("resnet10_tiny", (64, 32)), make_samples(names())
    one = extract(samples, pictures, model, tmp_path / "a", batch_size=16, workers=1, precision="float32")
    many = extract(samples, pictures, model, tmp_path / "b", batch_size=16, workers=6, precision="float32")
    other = extract(samples, pictures, model, tmp_path / "c", batch_size=7, precision="float32")
    assert np.array_equal(one.x, many.x) and np.allclose(one.x, other.x, atol=1e-5)
    assert np.allclose(embed(model, [pictures / n for n in names()]), one.x, atol=1e-5)
    assert model.training, "the model's mode is put back"


def test_flip_is_the_mean_with_the_mirror(pictures, tmp_path):
    model = create_backbone("resnet10_tiny", (64, 32)).eval()
    f = extract(make_samples(names(6)), pictures, model, tmp_path / "f", flip=True, precision="float32")
    x = normalise(torch.from_numpy(np.stack([to_pixels(pictures / n, model.input) for n in names(6)])), model.input)
    with torch.inference_mode(): y = nn.functional.normalize(model(x) + model(x.flip(3)), dim=1)
    assert np.allclose(f.x, y.numpy(), atol=1e-5)


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from examples import Mean, names
from cion_nb.models.features import extract
from cion_nb.core.samples import make_samples
class Slow(Mean):
    def forward(self, x): time.sleep(0.05); return super().forward(x)
samples = make_samples(names() + ["empty.jpg"] + names(), frame=range(81))
f = extract(samples, {root!r}, Slow(), {out!r}, batch_size=4, flush_seconds=0)
print("done", len(f))
"""


@pytest.mark.slow("starts processes")
def test_killed_at_random_moments_and_resumed(pictures, tmp_path):
    "SIGKILL in a real process, three times, until one run gets through: the same bytes as without."
    def start(out):
        code = SCRIPT.format(tests=str(TESTS), root=str(pictures), out=str(out))
        return forked.start(["-c", code], stderr=subprocess.STDOUT,
                            env={**os.environ, "CION_NB_PROGRESS": "0", "OMP_NUM_THREADS": "1"})
    whole = start(tmp_path / "whole")
    marker, stood = tmp_path / "killed" / "partial.json", []
    for target in (4, 41, 70):
        process, until = start(tmp_path / "killed"), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if marker.exists() and (read := json.loads(marker.read_text())["read"]) >= target: break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stdout.read()
        stood.append(read)
    assert stood == sorted(stood) and stood[-1] < 81
    with pytest.raises(FileNotFoundError, match="unfinished extraction"): Features.open(tmp_path / "killed")
    last = start(tmp_path / "killed")
    for process in (whole, last): assert "done 80" in process.communicate(timeout=60)[0]
    for name in ("features.npy", "features.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    a, b = read_features(tmp_path / "whole"), read_features(tmp_path / "killed")
    pd.testing.assert_frame_equal(a.samples, b.samples)
    pd.testing.assert_frame_equal(a.unreadable, b.unreadable)
    assert a.samples.frame.tolist() == [i for i in range(81) if i != 40]


class Stop(BaseException): pass


@pytest.mark.parametrize("step", range(12))
def test_stopped_anywhere_while_finishing(pictures, tmp_path, monkeypatch, step):
    "Every file operation of the last phase is a place where the power can go."
    samples, calls = make_samples(names(10) + BAD), 0
    want = extract(samples, pictures, Mean(), tmp_path / "want")
    def interrupted(real):
        def call(*a, **k):
            nonlocal calls
            calls += 1
            if calls == step + 1: raise Stop
            return real(*a, **k)
        return call
    with monkeypatch.context() as m:
        for owner, name in ((room, "write_json"), (room, "write_samples"), (room.os, "replace"), (room.os, "fsync"),
                            (room.Path, "unlink")):
            m.setattr(owner, name, interrupted(getattr(owner, name)))
        try: extract(samples, pictures, Mean(), tmp_path / "s")
        except Stop: pass
    f = extract(samples, pictures, Mean(), tmp_path / "s")
    assert np.array_equal(f.x, want.x) and f.unreadable.equals(want.unreadable) and f.samples.equals(want.samples)
    assert not (tmp_path / "s" / "partial.json").exists()


@pytest.mark.parametrize("what, change", [
    ("samples", dict(samples=make_samples(names(19)))), ("samples", dict(samples=make_samples(names(20)[::-1]))),
    ("samples", dict(samples=make_samples(names(20), pid=3))), ("root", dict(root="elsewhere")),
    ("model", dict(model=Mean(scale=2.0))),
    ("input", dict(model=Mean(InputSpec(8, 4, colour="BGR")))), ("precision", dict(precision="float32")),
    ("flip", dict(flip=True)),
    ("compute", dict(compute="bfloat16"))])
@pytest.mark.parametrize("finished", [True, False])
def test_another_request_is_refused(pictures, tmp_path, what, change, finished):
    shutil.copytree(pictures, tmp_path / "elsewhere")
    asked = dict(samples=make_samples(names(20)), root=pictures, model=Mean())
    if change.get("root"): change = dict(root=tmp_path / change["root"])
    extract(**asked, out=tmp_path / "s")
    if not finished:
        request = json.loads((tmp_path / "s" / "features.json").read_text())
        (tmp_path / "s" / "features.json").unlink()
        (tmp_path / "s" / "partial.json").write_text(
            json.dumps(dict(request=request, read=20, written=20, unreadable=[])))
    with pytest.raises(FileExistsError, match=f"another request.*(?s:.*)  {what}: there .*, asked for"):
        extract(**asked | change, out=tmp_path / "s")
    assert len(extract(**asked, out=tmp_path / "s")) == 20, "what was there is untouched"
    f = extract(**asked | change, out=tmp_path / "s", resume=False)
    assert len(f) == len((asked | change)["samples"]) and len(Features.open(tmp_path / "s")) == len(f)


def test_the_same_request_is_not_computed_twice(pictures, tmp_path):
    class Counting(Mean):
        calls = 0
        def forward(self, x):
            Counting.calls += 1
            return super().forward(x)
    model = Counting()
    for batch_size in (8, 8, 5):
        extract(make_samples(names(16)), pictures, model, tmp_path / "s", batch_size=batch_size)
    assert Counting.calls == 2


def test_extra_columns_are_part_of_the_request(pictures, tmp_path):
    boxes = [np.array([i, 0, 4, 8], np.float32) for i in range(3)]
    samples = make_samples(names(3), box=boxes, score=[.1, .2, .3])
    f = extract(samples, pictures, Mean(), tmp_path / "s")
    assert np.array_equal(np.stack(f.samples.box), np.stack(boxes))
    assert len(extract(samples, pictures, Mean(), tmp_path / "s")) == 3
    with pytest.raises(FileExistsError, match="samples: there"):
        extract(make_samples(names(3), box=boxes[::-1], score=[.1, .2, .3]), pictures, Mean(), tmp_path / "s")


def test_two_processes_do_not_share_a_folder(pictures, tmp_path):
    (tmp_path / "s").mkdir()
    with room.FileLock(tmp_path / "s" / ".lock"), pytest.raises(RuntimeError, match="another process"):
        extract(make_samples(names(4)), pictures, Mean(), tmp_path / "s")


def test_unreadable_images(pictures, tmp_path, capsys):
    samples = make_samples(names(3) + BAD + names(2))
    f = extract(samples, pictures, Mean(), tmp_path / "s", batch_size=2)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "5 of 10 images could not be read" in out and "empty.jpg: zero bytes" in out
    assert dict(zip(f.unreadable.path, f.unreadable.reason))["missing.jpg"] == "no such file"
    assert (f.unreadable.reason != "").all()
    with pytest.raises(UnreadableImage, match="empty.jpg.*zero bytes"):
        extract(samples, pictures, Mean(), tmp_path / "r", on_unreadable="raise")
    with pytest.raises(UnreadableImage, match="made with on_unreadable='skip'"):
        extract(samples, pictures, Mean(), tmp_path / "s", on_unreadable="raise")
    with pytest.raises(ValueError, match="none of the 2 images.*Is root="):
        extract(make_samples(BAD[:2]), pictures, Mean(), tmp_path / "n")
    with pytest.raises(FileNotFoundError, match="holds no features"): Features.open(tmp_path / "n")
    empty = extract(make_samples([]), pictures, Mean(), tmp_path / "e")
    assert len(empty) == 0 and empty.x.shape == (0, 6) and len(Features.open(tmp_path / "e").samples) == 0


@pytest.mark.parametrize("value, what",
                         [(float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity"), (0.0, "all zeros")])
def test_features_without_direction_name_the_image(pictures, tmp_path, value, what):
    class Sick(Mean):
        seen = 0
        def forward(self, x):
            y = super().forward(x)
            for i in range(len(x)):
                if Sick.seen + i == 9: y[i] = value
            Sick.seen += len(x)
            return y
    with pytest.raises(ValueError, match=f"{what} for 1 of 4 images, first: 09.jpg"):
        extract(make_samples(names(16)), pictures, Sick(), tmp_path / "s", batch_size=4)
    assert json.loads((tmp_path / "s" / "partial.json").read_text())["read"] == 8, "the good batches are kept"


def test_bad_calls(pictures, tmp_path):
    samples = make_samples(names(3))
    for change, error, text in [(dict(precision="int8"), ValueError, "precision"),
                                (dict(on_unreadable="ignore"), ValueError, "on_unreadable"),
                                (dict(batch_size=0), ValueError, "batch_size must be a whole number, 1 or more"),
                                (dict(batch_size=2.5), ValueError, "batch_size"),
                                (dict(workers=0), ValueError, "workers"), (dict(workers=-1), ValueError, "workers"),
                                (dict(device="banana"), ValueError, "unknown device 'banana'"),
                                (dict(flush_seconds="x"), ValueError, "flush_seconds"),
                                (dict(model=nn.Identity()), TypeError, "model.input"),
                                (dict(model="resnet18"), TypeError, "pass create_backbone.NAME"),
                                (dict(compute="int8"), ValueError, "compute"),
                                (dict(samples=pd.DataFrame(dict(file=["a"]))), ValueError, "path")]:
        with pytest.raises(error, match=text):
            extract(**dict(samples=samples, root=pictures, model=Mean(), out=tmp_path / "s") | change)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            extract(samples, pictures, Mean(), tmp_path / "s", device="cuda")
    for change, text in ((dict(batch_size=0), "batch_size"), (dict(device="banana"), "unknown device")):
        with pytest.raises(ValueError, match=text): embed(Mean(), [], **change)
    class Map(Mean):
        def forward(self, x): return x
    with pytest.raises(ValueError, match="returns .n, D."): extract(samples, pictures, Map(), tmp_path / "m")


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["NCHW", "NHWC"]), st.sampled_from(["RGB", "BGR"]), st.sampled_from([1.0, 1 / 255]),
       st.tuples(*[st.floats(-1, 1)] * 3), st.tuples(*[st.floats(0.1, 2)] * 3))
def test_normalise(layout, colour, scale, mean, std):
    spec = InputSpec(5, 3, layout, colour, scale, mean, std)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 3, 3), dtype=np.uint8)
    want = np.zeros((2, 5, 3, 3))
    for c in range(3): want[..., c] = (pixels[..., c if colour == "RGB" else 2 - c] * scale - mean[c]) / std[c]
    got = normalise(torch.from_numpy(pixels), spec)
    assert got.shape[1:] == spec.shape
    assert np.allclose(got.numpy(), want if layout == "NHWC" else want.transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_every_kind_of_picture(pictures, tmp_path, mode):
    grey = Image.fromarray(np.linspace(0, 255, 800).reshape(40, 20).astype(np.uint8))
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(
        "RGB").convert(mode)
    image.save(tmp_path / f"x.{'tif' if mode in ('CMYK', 'I;16') else 'png'}")
    y = embed(Mean(), [next(tmp_path.glob("x.*"))])
    if mode != "1": assert np.allclose(y, embed(Mean(), [grey.convert("RGB")]), atol=0.02)


def onnx_file(path, inputs=((None, 8, 4, 3),), outputs=1):
    onnx = pytest.importorskip("onnx")
    from onnx import helper, TensorProto
    named = [helper.make_tensor_value_info(f"in{i}", TensorProto.FLOAT, ["n" if d is None else d for d in s])
             for i, s in enumerate(inputs)]
    nodes = [helper.make_node("ReduceMean", ["in0"], [f"out{i}"], axes=[1 + i, 2 + i], keepdims=0)
             for i in range(outputs)]
    out = [helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, None) for i in range(outputs)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", named, out), opset_imports=[helper.make_opsetid("", 13)],
                                ir_version=8), path)
    return path


def test_onnx_contract(tmp_path):
    pytest.importorskip("onnxruntime")
    spec = InputSpec(8, 4, layout="NHWC")
    for shape in [(None, 8, 4, 3), (1, 8, 4, 3), (4, 8, 4, 3), (None, None, None, 3)]:
        model, x = OnnxModel(onnx_file(tmp_path / "m.onnx", [shape]), spec), torch.rand(10, 8, 4, 3)
        assert model.embed_dim == 3 and torch.allclose(model(x), x.mean((1, 2)), atol=1e-6)
        assert model(x[:0]).shape == (0, 3)
        with pytest.raises(ValueError, match="takes .n, 8, 4, 3."): model(torch.rand(2, 3, 8, 4))
    file = onnx_file(tmp_path / "m.onnx", outputs=2)
    with pytest.raises(ValueError, match="check layout, height and width"):
        OnnxModel(file, InputSpec(8, 4), output="out0")
    with pytest.raises(ValueError, match="check layout, height and width"):
        OnnxModel(file, InputSpec(16, 4, layout="NHWC"), output="out0")
    with pytest.raises(ValueError, match=r"\['out0', 'out1'\]; name the feature"): OnnxModel(file, spec)
    assert OnnxModel(file, spec, output="out0").embed_dim == 3
    with pytest.raises(ValueError, match="has no output 'y'"): OnnxModel(file, spec, output="y")
    with pytest.raises(ValueError, match="one input"):
        OnnxModel(onnx_file(tmp_path / "two.onnx", [(1, 8, 4, 3), (1, 2)]), spec)
    with pytest.raises(FileNotFoundError, match="no ONNX file"): OnnxModel(tmp_path / "none.onnx", spec)


def test_onnx_extra_is_named(monkeypatch):
    real = builtins.__import__
    def without(name, *a, **k):
        if name.split(".")[0] == "onnxruntime": raise ImportError(name)
        return real(name, *a, **k)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "cion_nb\[onnx\]"'): OnnxModel("x.onnx", SPEC)


@pytest.mark.slow("exports networks")
def test_onnx_file_equals_its_torch_model(pictures, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = create_backbone("resnet10_tiny_ibn", (64, 32)).eval()
    torch.onnx.export(model, (torch.zeros(2, 3, 64, 32),), tmp_path / "m.onnx", dynamo=True, external_data=False,
                      verbose=False, dynamic_shapes=({0: torch.export.Dim("n")},))
    samples, onnx = make_samples(names(9)), OnnxModel(tmp_path / "m.onnx", model.input)
    a = extract(samples, pictures, model, tmp_path / "a", precision="float32")
    b = extract(samples, pictures, onnx, tmp_path / "b", precision="float32", batch_size=4)
    spread = np.abs(a.x - a.x.mean(0)).mean()
    assert np.abs(a.x - b.x).max() < 1e-3 * spread


@pytest.mark.slow("real images and clips")
def test_viper_with_a_real_extractor(tmp_path):
    "Rank-1 near 29.0 from cam_a to cam_b over all 632 ids: layout, colours and scale are right on real pixels."
    file, root = DATA / "weights" / "person-reidentification-retail-0287.onnx", DATA / "viper"
    if not (file.exists() and root.exists()): pytest.skip(f"needs VIPeR and the 0287 extractor in {DATA}")
    pytest.importorskip("onnxruntime")
    paths = sorted(str(p.relative_to(root)) for p in root.glob("cam_*/*.bmp"))
    samples = make_samples(paths, pid=[int(p[6:9]) for p in paths], camid=[int(p.startswith("cam_b")) for p in paths])
    model = OnnxModel(file, InputSpec(256, 128, layout="NHWC", colour="BGR", scale=1, mean=(0, 0, 0), std=(1, 1, 1)))
    f = extract(samples, root, model, tmp_path / "viper")
    is_a, pid, x = f.samples.camid.to_numpy() == 0, f.samples.pid.to_numpy(), np.asarray(f.x, np.float32)
    assert is_a.sum() == 632 and x.shape == (1264, 256)
    nearest = (x[is_a] @ x[~is_a].T).argmax(1)
    assert abs((pid[~is_a][nearest] == pid[is_a]).mean() - 0.290) < 0.005


def test_images_written_after_their_features_are_told(pictures, tmp_path, capsys):
    root = shutil.copytree(pictures, tmp_path / "p")
    samples = make_samples(names())
    extract(samples, root, Mean(), tmp_path / "f", workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(samples, root, Mean(), tmp_path / "f", workers=1)
    later = time.time() + 60
    os.utime(root / samples.path[2], (later, later))
    with pytest.warns(UserWarning, match=f"1 of .*written after it, first {samples.path[2]}: resume=False"):
        extract(samples, root, Mean(), tmp_path / "f", workers=1)
