"""Fixtures of the tests of data."""
import pytest
from street import write_street


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    path = tmp_path_factory.mktemp("street") / "street.avi"
    return path, write_street(path)
