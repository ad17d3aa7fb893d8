"""Real clips and a real detector, extractor and truth. Skipped where ../shared/data is missing."""
import numpy as np
import pytest
from places import DATA

from cion_nb.core.samples import read_folder
from cion_nb.data import tracking as T
from cion_nb.data.tracking_scores import match_truth, tracking_scores
from cion_nb.identities.denoise import denoise
from cion_nb.identities.truth import identity_scores
from cion_nb.models.architectures import InputSpec
from cion_nb.models.features import extract, OnnxModel
from cion_nb.retrieval.evaluate import evaluate

pytestmark = pytest.mark.skipif(not (DATA / "video").is_dir(), reason="the folder with real clips is not here")
for module in ("cv2", "trackers", "trackeval", "onnxruntime"):
    pytest.importorskip(module, reason="needs the extras [track] and [onnx]")

PETS = DATA / "video/PETS09-S2L1"
SETTINGS = dict(tracker="botsort", tracker_settings=dict(enable_cmc=False))      # chosen on the TUD clips


@pytest.fixture(scope="module")
def extractor():
    return OnnxModel(DATA / "weights/person-reidentification-retail-0287.onnx",
                     InputSpec(256, 128, "NHWC", "BGR", 1.0, (0, 0, 0), (1, 1, 1)))


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    out = tmp_path_factory.mktemp("pets")
    return out, T.track(PETS / "vtest.avi", out, str(DATA / "weights/yolox_nano_416.onnx"), **SETTINGS)


@pytest.mark.slow("real images and clips")
def test_pets_with_yolox_against_its_truth(pets):
    out, samples = pets
    scores = tracking_scores(samples, PETS / "gt/gt.txt")
    print({k: round(v, 3) for k, v in scores.items()})
    # 174 of the 4,650 rows are flagged "do not score"
    assert scores["truth_boxes"] == 4476 and scores["people"] == 19
    assert scores["MOTA"] > 0.75 and scores["IDF1"] > 0.6 and scores["HOTA"] > 0.45
    person = match_truth(samples, PETS / "gt/gt.txt")
    assert (person > 0).mean() > 0.93 and len(np.unique(person[person > 0])) == 19


@pytest.mark.slow("real images and clips")
def test_pets_with_public_detections(tmp_path):
    samples = T.track(PETS / "vtest.avi", tmp_path, str(PETS / "det/det.txt"), **SETTINGS)
    scores = tracking_scores(samples, PETS / "gt/gt.txt")
    print({k: round(v, 3) for k, v in scores.items()})
    assert scores["MOTA"] > 0.5 and scores["IDF1"] > 0.4 and scores["HOTA"] > 0.3


@pytest.mark.slow("real images and clips")
def test_pets_to_identities(pets, extractor, tmp_path):
    "Every tenth crop of each tracklet, so that this stays a test; the bench notebook takes all."
    out, samples = pets
    some = samples[samples.groupby("tracklet").cumcount() % 10 == 0].reset_index(drop=True)
    features = extract(some, out, extractor, tmp_path / "features")
    truth = match_truth(some, PETS / "gt/gt.txt")
    result = denoise(features.x, some)
    scores = {level: identity_scores(result.labels_after(level), truth)
              for level in ("before", "tracklet", "video", "cross")}
    for level, s in scores.items(): print(level, s)
    before, cleaned = scores["before"], scores["tracklet"]
    assert 0.75 < before.purity < 1 and 0.5 < before.f1 < 0.9
    assert cleaned.purity > before.purity                                     # Eq. 4 does what it is for
    assert scores["video"].coverage >= cleaned.coverage and scores["video"].n_identities <= before.n_identities


@pytest.mark.slow("real images and clips")
def test_a_truncated_real_clip(tmp_path):
    data = (DATA / "video/TUD-Stadtmitte/TUD-Stadtmitte.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[:len(data) // 2])                # its index is at the end
    with pytest.raises(T.UnreadableVideo, match="moov"):
        T.track(tmp_path / "cut.mp4", tmp_path / "out", str(PETS / "det/det.txt"))
    data = (PETS / "vtest.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[:len(data) // 8])
    with pytest.warns(UserWarning, match=r"\d+ of the 795 announced"):
        samples = T.track(tmp_path / "cut.avi", tmp_path / "out", str(PETS / "det/det.txt"))
    assert 0 < len(samples) and samples["frame"].max() < 120


@pytest.mark.slow("real images and clips")
def test_viper_rank_1(extractor, tmp_path):
    table = read_folder(DATA / "viper", r"cam_(?P<camid>[ab])/(?P<pid>\d{3})_.*\.bmp")
    x, a = extract(table, DATA / "viper", extractor, tmp_path / "features").x, (table["camid_name"] == "a").to_numpy()
    scores = evaluate(x[a], x[~a], table[a], table[~a])
    print(scores)
    assert a.sum() == 632 and table["pid"].nunique() == 632
    assert scores.cmc[0] == pytest.approx(0.290, abs=0.006)
