"""The bundled data sets are the published ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bayesgen import datasets
from bayesgen.data import as_dataset

SHAPES = {
    "breast_cancer": (569, 30, 2),
    "digits": (1797, 64, 10),
    "faithful": (272, 2, None),
    "galaxies": (82, 1, None),
    "iris": (150, 4, 3),
    "wine": (178, 13, 3),
}


def test_names() -> None:
    assert datasets.names() == sorted(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_load(name: str) -> None:
    rows, columns, classes = SHAPES[name]
    data = datasets.load(name)
    assert (data.num_rows, data.num_columns) == (rows, columns)
    assert set(data.kinds) == {"real"}
    assert not data.has_missing
    if classes is None:
        with pytest.raises(ValueError, match=f"{name!r} has no target"):
            datasets.load(name, with_target=True)
    else:
        again, target = datasets.load(name, with_target=True)
        assert again.fingerprint() == data.fingerprint()
        assert target.shape == (rows,)
        assert target.dtype == torch.int64
        assert target.unique().tolist() == list(range(classes))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no data set 'irises'; there are breast_cancer, digits"):
        datasets.load("irises")


def test_published_figures() -> None:
    """Old Faithful as in R's help page; the galaxies' range as in Roeder 1990."""
    faithful = datasets.load("faithful").summary()
    assert faithful.mean.tolist() == pytest.approx([3.487783, 70.897059], abs=1e-6)
    low, high = datasets.load("galaxies").extremes()
    assert (low.item(), high.item()) == (9172, 34279)


def test_bundled_files_match_the_reference(shared_data: Path) -> None:
    for name in ("faithful", "galaxies"):
        reference = as_dataset(shared_data / "classics" / f"{name}.csv").tensor()
        assert np.array_equal(reference, datasets.load(name).tensor())
