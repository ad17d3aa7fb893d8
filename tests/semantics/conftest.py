"""A small world, drawn once for all tests of parts."""
import pytest

from cion_nb.core.samples import read_samples
from cion_nb.data.film import make_world, render


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    "Its folder, and the table of its single images."
    root = tmp_path_factory.mktemp("parts_world")
    people = dict(pretrain_people=0, train_people=1, test_people=4, images_per_camera=3, distractors=4)
    render(make_world("tiny", 2, cameras=2, cameras_per_person=2, **people), root, workers=1)
    return root, read_samples(root / "reid.parquet")
