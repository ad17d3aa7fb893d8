"""A world of eleven thousand tracklets on disk, for tests of shards and kills."""
import pytest

from cion_nb.core.samples import write_samples
from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities.denoise import denoise


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Eleven thousand tracklets on disk, in sixteen parts."
    folder = tmp_path_factory.mktemp("world")
    x, samples = feature_world(11_000, dim=32, images=16, seed=7, path=folder / "features.npy")
    write_samples(samples, folder / "samples.parquet")
    return folder, x, samples, denoise(x, samples, measure=False)
