"""Fixtures of the tests of models."""
import numpy as np
import pandas as pd
import pytest
from places import ZOO


@pytest.fixture(scope="module")
def zoo():
    golden = np.load(ZOO / "golden.npz")
    return pd.read_csv(ZOO / "entries.csv.xz",
                       keep_default_na=False), golden, dict(zip(golden["archs"].tolist(), golden["gains"].tolist()))
