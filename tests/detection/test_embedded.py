"""Any detector with any network: what `extract` gives on the same crops, every kind of model, odd boxes."""
import numpy as np
import pytest
import torch
from PIL import Image
from street import ColourDetector, H, Seeing, W, write_street
from torch import nn

from cion_nb.core.samples import make_samples
from cion_nb.core.store import read_features
from cion_nb.data import tracking as T
from cion_nb.data.detectors import MotDetections
from cion_nb.data.videos import Video
from cion_nb.detection.embedded import crops_of, EmbeddedDetector
from cion_nb.models.architectures import InputSpec
from cion_nb.models.backbones import create_backbone, save_backbone
from cion_nb.models.features import extract, model_hash, OnnxModel
from cion_nb.models.leaving import export_onnx

pytest.importorskip("trackers", reason="needs the extra [track]")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_backbone("resnet18_ibn", (64, 32))


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    path = tmp_path_factory.mktemp("street") / "street.avi"
    return path, write_street(path, n=40)


@pytest.fixture(scope="module")
def frames(street): return [picture() for n, picture in Video(street[0]).frames() if n < 6]


def written(crops, folder):
    "Crops as files without loss, and their table."
    folder.mkdir()
    for i, crop in enumerate(crops): Image.fromarray(np.ascontiguousarray(crop)).save(folder / f"{i}.png")
    return make_samples([f"{i}.png" for i in range(len(crops))])


class Boxes:
    "Boxes of odd sizes, at the edge and over it."
    settings = dict(detector="boxes")
    def detect(self, frames):
        return [(np.array([[10.4, 20.6, 60.5, 130.2], [-9, -3, 40, 99], [W - 20, 30, W + 30, H + 9.], [100, 9, 103, 99],
                           [50, 50, 130.7, 80]]), np.full(5, .9)) for _ in frames]


@pytest.mark.parametrize("spec", [dict(), dict(interpolation="bicubic"), dict(colour="BGR", scale=1., layout="NHWC")],
                         ids=lambda s: ",".join(s) or "as it is")
def test_features_are_extract_s_on_crops_without_loss(network, frames, tmp_path, spec):
    class Model(nn.Module):
        "The network, fed another way."
        embed_dim, input = network.embed_dim, InputSpec(48, 24, **spec)
        def __init__(self):
            super().__init__()
            self.network = network
        def forward(self, x):
            x = x.permute(0, 3, 1, 2) / 255 if self.input.layout == "NHWC" else x
            return self.network(nn.functional.interpolate(x, (64, 32)))
    model = Model()
    found = EmbeddedDetector(Boxes(), model, batch_size=7).detect(frames)
    plain = Boxes().detect(frames)
    assert all(np.array_equal(np.float32(a), b) and np.array_equal(np.float32(s), t)
               for (a, s), (b, t, _) in zip(plain, found))
    crops = [c for frame, (boxes, _) in zip(frames, plain) for c in crops_of(frame, boxes)]
    want = extract(written(crops, tmp_path / "crops"), tmp_path / "crops", model, tmp_path / "x", precision="float32").x
    got = np.concatenate([x for *_, x in found])
    assert got.dtype == np.float32 and np.abs(got - want).max() < 1e-5
    assert np.linalg.norm(got[0] - got[1]) > 1e-3


def test_the_crops_are_those_that_track_writes(network, street, tmp_path):
    samples = T.track(street[0], tmp_path, min_height=20, min_width=1, tracker="bytetrack", detector=Boxes(),
                      crop_quality=100)
    some = samples[samples["frame"] == 7]
    frame = next(picture() for n, picture in Video(street[0]).frames() if n == 7)
    crops = crops_of(frame, Boxes().detect([0])[0][0])
    sizes = sorted(c.shape[:2] for c in crops)
    assert sizes == sorted(zip(some["h"].astype(int), some["w"].astype(int)))
    for row in some.itertuples():
        near = [np.abs(np.asarray(T.open_image(tmp_path / row.path)).astype(int) - c).mean() for c in crops
                if c.shape[:2] == (row.h, row.w)]
        assert min(near) < 5                                               # by JPEG; moved by a pixel it is 10


@pytest.mark.slow("tracks a video and extracts its crops")
def test_one_pass_gives_what_track_and_extract_give(network, street, tmp_path):
    detector = EmbeddedDetector(ColourDetector(), network)
    samples = T.track(street[0], tmp_path / "one", detector, "embedding", min_height=20, features=True)
    store = read_features(tmp_path / "one/features")
    later = extract(samples, tmp_path / "one", network, tmp_path / "later")
    cosine = (np.float32(store.x) * np.float32(later.x)).sum(1)
    assert len(store) == len(samples) > 100 and cosine.min() > .97        # JPEG is between them


def test_every_kind_of_model(network, frames, tmp_path):
    file = save_backbone(network, tmp_path / "run/backbone.safetensors")
    onnx = tmp_path / "b.onnx"
    export_onnx(network, onnx)
    want = EmbeddedDetector(Boxes(), network).detect(frames[:1])[0][2]
    for model in (file, str(file), tmp_path / "run", onnx, OnnxModel(onnx)):
        detector = EmbeddedDetector(Boxes(), model)
        np.testing.assert_allclose(detector.detect(frames[:1])[0][2], want, atol=2e-4)
        assert detector.embed_dim == want.shape[1]


def test_boxes_of_a_file_go_by_the_frame_s_number(network, street, tmp_path):
    truth = street[1].assign(frame=street[1]["frame"] + 1, id=-1)
    truth.to_csv(tmp_path / "det.txt", header=False, index=False)
    detector = EmbeddedDetector(str(tmp_path / "det.txt"), network)
    boxes, held, x = T.detect(street[0], detector, tmp_path / "cache", stride=3)
    plain, _ = T.detect(street[0], MotDetections(tmp_path / "det.txt"), tmp_path / "plain", stride=3)
    assert boxes.equals(plain) and len(x) == len(boxes) and held == 40
    samples = T.track(street[0], tmp_path / "out", detector, "embedding", min_height=20, features=True)
    assert samples.attrs["counts"]["file_in_file"] == len(truth) and samples["tracklet"].nunique() == 4
    truth.assign(frame=truth["frame"] + 500).to_csv(tmp_path / "other.txt", header=False, index=False)
    with pytest.raises(T.NothingLeft, match="lie in frames that .* lacks"):
        T.track(street[0], tmp_path / "other", EmbeddedDetector(tmp_path / "other.txt", network), "embedding")


# ---------------------------------------------------------------- fingerprints and odd input

def test_settings_tell_networks_and_detectors_apart(network):
    torch.manual_seed(1)
    other = create_backbone("resnet18_ibn", (64, 32))
    settings = [EmbeddedDetector(d, m).settings for d, m in ((Boxes(), network), (Boxes(), other),
                                                             (ColourDetector(), network))]
    assert len({str(s) for s in settings}) == 3 and settings[0]["model"] == model_hash(network)
    assert EmbeddedDetector(Boxes(), network, batch_size=3).settings == settings[0]
    moved = create_backbone("resnet18_ibn", (96, 32))
    moved.load_state_dict(network.state_dict())
    assert EmbeddedDetector(Boxes(), moved).settings != settings[0]


def test_boxes_of_low_score_are_left_out(network, frames):
    class Scored(Boxes):
        def detect(self, frames): return [(b, np.array([.05, .9, .1, .3, np.nan])) for b, _ in super().detect(frames)]
    (boxes, scores, x), = EmbeddedDetector(Scored(), network).detect(frames[:1])
    (all_boxes, _, all_x), = EmbeddedDetector(Boxes(), network).detect(frames[:1])
    assert np.array_equal(boxes, all_boxes[1:]) and len(scores) == 4
    np.testing.assert_allclose(x, all_x[1:], atol=1e-5)
    assert len(EmbeddedDetector(Scored(), network, min_score=.3).detect(frames[:1])[0][2]) == 3
    assert EmbeddedDetector(Scored(), network, min_score=.3).settings != EmbeddedDetector(Scored(), network).settings


def test_another_network_is_another_cache(network, street, tmp_path):
    other = create_backbone("resnet18_ibn", (64, 32))
    detector = ColourDetector()
    _, _, a = T.detect(street[0], EmbeddedDetector(detector, network), tmp_path)
    _, _, b = T.detect(street[0], EmbeddedDetector(detector, other), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and not np.array_equal(a, b) and detector.calls == 80


def test_boxes_without_a_pixel_keep_their_row_and_are_counted_as_outside(network, street, frames, tmp_path):
    class Outside(Boxes):
        def detect(self, frames):
            boxes = np.array([[20, 20, 60, 120], [W + 5, 10, W + 50, 90], [40, 40, 40, 90.], [-90, -90, -50, -9]])
            return [(boxes, np.full(4, .9)) for _ in frames]
    boxes, _, x = EmbeddedDetector(Outside(), network).detect(frames[:1])[0]
    assert len(boxes) == len(x) == 4 and np.isfinite(x).all()
    with pytest.warns(UserWarning, match="lie outside of the picture"):
        samples = T.track(street[0], tmp_path, EmbeddedDetector(Outside(), network), "embedding", features=True)
    assert samples["tracklet"].nunique() == 1 and samples.attrs["counts"]["outside"] > 0


def test_frames_without_boxes_and_gray_frames(network, frames):
    class Nobody(Boxes):
        def detect(self, frames): return [(np.zeros((0, 4)), np.zeros(0)) for _ in frames]
    (boxes, scores, x), = EmbeddedDetector(Nobody(), network).detect(frames[:1])
    assert boxes.shape == (0, 4) and scores.shape == (0,) and x.shape == (0, network.embed_dim)
    assert EmbeddedDetector(Nobody(), network).detect([]) == []
    mixed = EmbeddedDetector(ColourDetector(), network).detect([frames[0], np.full((H, W, 3), 90, np.uint8)])
    assert len(mixed[0][2]) == len(mixed[0][0]) == 4 and mixed[1][2].shape == (0, network.embed_dim)


def test_a_detector_that_embeds_gets_other_vectors(network, frames):
    (_, _, x), = EmbeddedDetector(Seeing(), network).detect(frames[:1])
    assert x.shape == (4, network.embed_dim)


def test_models_that_cannot_be_used(network, frames, tmp_path):
    class Clips(nn.Module):
        embed_dim, input = 4, InputSpec(64, 32, frames=4)
    class Cameras(nn.Module):
        embed_dim, input, columns = 4, InputSpec(64, 32), ("camid",)
    class Broken(nn.Module):
        embed_dim, input = 4, InputSpec(64, 32)
        def forward(self, x): return torch.full((len(x), 4), torch.nan)
    for model, error, message in (
            (Clips(), TypeError, "takes clips of 4 frames"), (Cameras(), TypeError, "also takes camid"),
            (nn.Identity(), TypeError, "does not say"), (tmp_path, FileNotFoundError, "holds no model"),
            (tmp_path / "gone.safetensors", FileNotFoundError, "no card")):
        with pytest.raises(error, match=message): EmbeddedDetector(Boxes(), model)
    with pytest.raises(ValueError, match="NaN or infinity for 5 of 5 images"):
        EmbeddedDetector(Boxes(), Broken()).detect(frames[:1])
    with pytest.raises(ValueError, match="batch_size"): EmbeddedDetector(Boxes(), network, batch_size=0)
    with pytest.raises(ValueError, match="detector 'yolo' is not known"): EmbeddedDetector("yolo", network)
