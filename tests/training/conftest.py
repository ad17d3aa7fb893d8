"""Fixtures of the tests of training."""
import pytest
from job_runs import ends, job


@pytest.fixture(scope="module")
def through_folder(tmp_path_factory):
    "An uninterrupted run."
    folder = tmp_path_factory.mktemp("through")
    job(folder)
    return folder


@pytest.fixture(scope="module")
def through(through_folder): return ends(through_folder)
