"""Detectors end to end, and detections of others: classes, kinds, damaged lines."""
import urllib.error

import numpy as np
import pandas as pd
import pytest
from examples import three_people, written
from street import ColourDetector, H, W

from cion_nb.data import tracking as T
from cion_nb.data.detectors import create_detector, MotDetections, OnnxDetector, TorchvisionDetector
from cion_nb.data.tracking_scores import read_mot, tracking_scores

pytest.importorskip("trackers", reason="needs the extra [track]")


# ---------------------------------------------------------------- detections and their video

def det_file(path, truth, **values):
    return written(path, truth.assign(**({"id": -1, "score": .9} | values)))


@pytest.mark.parametrize("change,says", [
    (lambda t: t.assign(w=t["x"] + t["w"], h=t["y"] + t["h"]), "left, top, right, bottom"),
    (lambda t: t.assign(x=t["x"] + 1000), "outside of the picture"),
    (lambda t: t.assign(x=t["x"] / W, y=t["y"] / H, w=t["w"] / W, h=t["h"] / H), "fractions"),
    (lambda t: t.assign(frame=t["frame"] + 500), "another video"),
    (lambda t: t.assign(score=.01), "below min_score")])
def test_detections_of_another_kind_are_refused(street, tmp_path, change, says):
    file = written(tmp_path / "det.txt", change(street[1].assign(id=-1, score=.9)))
    with pytest.raises(T.NothingLeft, match=says): T.track(street[0], tmp_path / "out", str(file), min_height=20)
    assert not (tmp_path / "out/samples.parquet").exists() and not (tmp_path / "out/crops").exists()


def test_what_is_left_out_is_counted(street, tmp_path):
    truth = street[1]
    late = truth[truth["frame"] >= 80].assign(frame=lambda t: t["frame"] + 20)
    weak = truth[truth["frame"] % 10 == 0].assign(score=.02, id=9)
    file = written(tmp_path / "det.txt", pd.concat(
        [truth.assign(score=.9), late.assign(score=.9), weak, truth[:5].assign(score=.9)]).assign(id=-1))
    with pytest.warns(UserWarning) as caught: samples = T.track(street[0], tmp_path / "out", str(file), min_height=20)
    said, counts = " ".join(str(w.message) for w in caught), samples.attrs["counts"]
    assert f"{len(late)} detections lie in frames that the video lacks" in said and "5 same box twice" in said
    assert counts["in_missing_frames"] == len(late) and counts["below_score"] == len(weak)
    assert counts["file_same_box_twice"] == 5
    assert counts["detections"] == counts["tracked"] + counts["untracked"]
    assert counts["tracked"] == counts["crops"] + counts["too_small"] + counts["outside"]
    assert counts["file_in_file"] == counts["detections"] + counts["below_score"] + len(late) + 5
    early = det_file(tmp_path / "early.txt", truth[truth["frame"] < 30])
    with pytest.warns(UserWarning, match="end in frame 30 of 90"):
        T.track(street[0], tmp_path / "e", str(early), min_height=20)


def test_classes_of_a_detections_file_are_asked_for(tmp_path):
    file = det_file(tmp_path / "det.txt", three_people(lambda i: i))
    with pytest.raises(ValueError, match=r"classes 1 .30 boxes.*MotDetections"): create_detector(str(file))
    detector = MotDetections(file, classes=1)
    assert detector.counts["other_classes"] == 60 and len(detector.detect([0])[0][0]) == 1
    with pytest.raises(ValueError, match="no box is of classes 8"): MotDetections(file, classes=8)
    assert MotDetections(written(tmp_path / "zero.txt", three_people(), first=0),
                         first_frame=0).detect([29])[0][0].shape == (3, 4)
    (tmp_path / "empty.txt").write_text("")
    with pytest.warns(UserWarning, match="holds no box"): MotDetections(tmp_path / "empty.txt")


# ---------------------------------------------------------------- detectors

def yolox_file(path, batch, size=64, hit=None):
    """An ONNX file whose output is the same for any picture: one person of log size 1 in cell `hit` of the stride-8
    grid.
    """
    onnx = pytest.importorskip("onnx")
    from onnx import helper as h, numpy_helper, TensorProto as P
    cells = (size // 8) ** 2 + (size // 16) ** 2 + (size // 32) ** 2
    raw = np.zeros((1, cells, 7), np.float32)
    if hit is not None:
        raw[0, hit] = [0.5, 0.25, 1, 2, 0.9, 0.1, 0.8]
        raw[0, hit + 1] = [-0.5, 0.25, 1, 2, 0.8, 0.1, 0.8]     # nearly the same box from the next cell: suppressed
    nodes = [h.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0), h.make_node("Mul", ["m", "zero"], ["z"]),
             h.make_node("Reshape", ["z", "shape"], ["r"]), h.make_node("Add", ["raw", "r"], ["y"])]
    init = [numpy_helper.from_array(a, n) for a, n in ((np.array([1, 2, 3]), "axes"), (np.zeros(1, np.float32), "zero"),
                                                       (np.array([-1, 1, 1]), "shape"), (raw, "raw"))]
    graph = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", P.FLOAT, [batch, 3, size, size])],
                         [h.make_tensor_value_info("y", P.FLOAT, [batch, cells, 7])], init)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("batch", [1, 4, "n"])
def test_onnx_detector_decodes_and_suppresses(tmp_path, batch):
    detector = create_detector(str(yolox_file(tmp_path / "y.onnx", batch, hit=8 * 2 + 3)))
    detector.person = 1
    out = detector.detect([np.zeros((128, 64, 3), np.uint8)] * 5)            # scale 1/2
    centre, size = np.array([3.5, 2.25]) * 8 * 2, np.exp([1, 2]) * 8 * 2
    for boxes, scores in out:
        assert len(boxes) == 1 and np.isclose(scores[0], 0.72)
        np.testing.assert_allclose(boxes[0], [*(centre - size / 2), *(centre + size / 2)], rtol=1e-5)


def test_onnx_detector_refuses_other_files(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import helper as h, TensorProto as P
    with pytest.raises(FileNotFoundError, match="no such detector"): create_detector(str(tmp_path / "none.onnx"))
    graph = h.make_graph([h.make_node("Relu", ["x"], ["y"])], "g",
                         [h.make_tensor_value_info("x", P.FLOAT, [1, 256, 128, 3])],
                         [h.make_tensor_value_info("y", P.FLOAT, [1, 256, 128, 3])])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(ValueError, match="YOLOX-style"): OnnxDetector(tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="not YOLOX"):
        OnnxDetector(yolox_file(tmp_path / "y.onnx", 1), person=7).detect([np.zeros((64, 64, 3), np.uint8)])


def test_torchvision_detector(tmp_path, monkeypatch):
    import torch
    import torchvision
    torch.manual_seed(0)
    detector = TorchvisionDetector(weights=None, min_score=0.0)
    torch.save(detector._model.state_dict(), tmp_path / "w.pth")
    frames = [np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)] * 2
    loaded = TorchvisionDetector(weights=tmp_path / "w.pth", min_score=0.0)
    for (b, s), (b2, s2) in zip(detector.detect(frames), loaded.detect(frames)):
        assert b.shape == (len(s), 4)
        np.testing.assert_allclose(b, b2)
    assert detector.settings != loaded.settings
    def offline(*args, **kw): raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(RuntimeError, match="could not be fetched.*weights=PATH"): create_detector("torchvision")


def test_hog_runs_on_any_size(tmp_path):
    hog = create_detector("hog")
    for shape in ((240, 320, 3), (60, 40, 3)):
        (boxes, scores), = hog.detect([np.full(shape, 128, np.uint8)])
        assert boxes.shape == (len(scores), 4)


def test_mot_detections(street, tmp_path):
    truth, file = street[1], tmp_path / "det.txt"
    truth.assign(frame=truth["frame"] + 1, id=-1, score=0.9).to_csv(file, header=False, index=False)
    samples = T.track(street[0], tmp_path / "out", str(file), min_height=20)
    assert tracking_scores(samples, truth)["IDF1"] > 0.9
    assert MotDetections(file).detect([10 ** 6])[0][0].shape == (0, 4)
    truth.assign(frame=truth["frame"] + 1,
                 score=np.linspace(-2, 60, len(truth))).to_csv(file, header=False, index=False)
    with pytest.warns(UserWarning, match="stretched"): detector = MotDetections(file)
    assert 0 <= min(s.min() for _, s in detector._of.values()) and max(s.max() for _, s in detector._of.values()) <= 1
    truth.assign(frame=truth["frame"] + 1, score=-1).to_csv(file, header=False, index=False)
    assert all((s == 1).all() for _, s in MotDetections(file)._of.values())
    with pytest.raises(FileNotFoundError): MotDetections(tmp_path / "none.txt")


def test_read_mot_names_the_bad_line(tmp_path):
    (tmp_path / "a.txt").write_text("1,1,0,0,5,5,1\n\n1,2,zero,0,5,5,1\n")
    with pytest.raises(ValueError, match="line 3"): read_mot(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("0,1,0,0,5,5,1\n")
    with pytest.raises(ValueError, match="line 1.*frames from 1"): read_mot(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("")
    assert len(read_mot(tmp_path / "a.txt")) == 0
    (tmp_path / "a.txt").write_text("3 7 1 2 5 6\r\n")
    row = read_mot(tmp_path / "a.txt").iloc[0]
    assert (row["frame"], row["id"], row["score"], row["class"]) == (2, 7, 1, -1)


def test_a_detector_that_answers_nonsense_is_named(street, tmp_path):
    class Short:
        def detect(self, frames): return [(np.zeros((1, 4)), np.ones(1))] * (len(frames) - 1)
    with pytest.raises(ValueError, match="Short.detect returned"): T.track(street[0], tmp_path, Short())
    class Nan:
        def detect(self, frames):
            return [(np.array([[np.nan] * 4, [5, 5, 40, 80]]), np.array([.9, .9])) for _ in frames]
    assert T.track(street[0], tmp_path / "nan", Nan(), "bytetrack")["x"].eq(5).all()
    with pytest.raises(ValueError, match="not known"): T.track(street[0], tmp_path / "no", "yolo")
    with pytest.raises(ValueError, match="known: bytetrack"):
        T.track(street[0], tmp_path / "no", ColourDetector(), "deepsort")
    with pytest.raises(ValueError, match="its settings are"):
        T.track(street[0], tmp_path / "no", ColourDetector(), "sort", tracker_settings=dict(buffer=3))
