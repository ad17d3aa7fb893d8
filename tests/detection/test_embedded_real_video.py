"""Real clips: a real detector with a real extractor, its tracker beside others. Skipped without ../shared/data."""
import numpy as np
import pytest
from places import DATA

from cion_nb.core.store import read_features
from cion_nb.data.detectors import OnnxDetector, read_mot
from cion_nb.data.tracking import track
from cion_nb.data.tracking_scores import tracking_scores
from cion_nb.data.videos import Video
from cion_nb.detection.embedded import EmbeddedDetector
from cion_nb.models.architectures import InputSpec
from cion_nb.models.features import extract, OnnxModel

pytestmark = pytest.mark.skipif(not (DATA / "video").is_dir(), reason="the folder with real clips is not here")
cv2 = pytest.importorskip("cv2", reason="needs the extra [track]")
for module in ("trackers", "trackeval", "onnxruntime"):
    pytest.importorskip(module, reason="needs the extras [track] and [onnx]")

BOTSORT = dict(tracker="botsort", tracker_settings=dict(enable_cmc=False))       # chosen on the TUD clips


@pytest.fixture(scope="module")
def detector():
    spec = InputSpec(256, 128, "NHWC", "BGR", 1.0, (0, 0, 0), (1, 1, 1))
    extractor = OnnxModel(DATA / "weights/person-reidentification-retail-0287.onnx", spec)
    return EmbeddedDetector(OnnxDetector(DATA / "weights/yolox_nano_416.onnx"), extractor)


@pytest.mark.slow("real images and clips")
def test_pets_at_defaults_beside_botsort_and_overlap_alone(detector, tmp_path):
    """The first 200 frames, so that this stays a test. All settings are FairMOT's and the supplement's; none was chosen
    on this clip. The identities are better than BoT-SORT's; switches are more, since a person who is lost and found
    again by her looks counts twice."""
    truth = read_mot(DATA / "video/PETS09-S2L1/gt/gt.txt").query("frame < 200")
    video = cv2.VideoWriter(str(tmp_path / "part.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 10, (768, 576))    # lossless
    for n, picture in Video(DATA / "video/PETS09-S2L1/vtest.avi").frames(stop=200): video.write(picture())
    video.release()
    runs = dict(looks=dict(tracker="embedding"), overlap=dict(tracker="embedding", tracker_settings=dict(appearance=0)),
                botsort=BOTSORT)
    found = {name: tracking_scores(track(tmp_path / "part.avi", tmp_path / "out", detector, **run), truth)
             for name, run in runs.items()}
    for name, s in found.items(): print(name, {k: round(v, 3) for k, v in s.items()})
    looks, overlap, botsort = found["looks"], found["overlap"], found["botsort"]
    assert looks["IDF1"] > botsort["IDF1"] + .02 and looks["HOTA"] > botsort["HOTA"] + .01
    assert looks["MOTA"] > botsort["MOTA"] - .01
    assert looks["IDF1"] > overlap["IDF1"] + .05 and looks["switches"] < overlap["switches"] / 2


@pytest.mark.slow("real images and clips")
def test_features_of_one_pass_are_those_of_the_written_crops(detector, tmp_path):
    film = DATA / "video/TUD-Campus/TUD-Campus.mp4"
    samples = track(film, tmp_path / "one", detector, "embedding", features=True)
    store = read_features(tmp_path / "one/features")
    later = extract(samples, tmp_path / "one", detector.model, tmp_path / "later")
    cosine = (np.float32(store.x) * np.float32(later.x)).sum(1)
    assert len(store) == len(samples) > 200 and store.samples.equals(samples) and np.median(cosine) > .99
