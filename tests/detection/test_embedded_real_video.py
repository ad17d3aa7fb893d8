"""Real clips: a real detector with a real extractor, its tracker beside others. Skipped without ../shared/data."""
import numpy as np
import pytest
from places import DATA

from cion_nb.core.store import read_features
from cion_nb.data.detectors import OnnxDetector
from cion_nb.data.tracking import track
from cion_nb.data.tracking_scores import tracking_scores
from cion_nb.detection.embedded import EmbeddedDetector
from cion_nb.models.architectures import InputSpec
from cion_nb.models.features import extract, OnnxModel

pytestmark = pytest.mark.skipif(not (DATA / "video").is_dir(), reason="the folder with real clips is not here")
for module in ("cv2", "trackers", "trackeval", "onnxruntime"):
    pytest.importorskip(module, reason="needs the extras [track] and [onnx]")
