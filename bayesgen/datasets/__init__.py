"""Small real data sets, bundled or from scikit-learn: nothing is fetched."""

from __future__ import annotations

from importlib import resources
from typing import Literal, overload

import torch
from torch import Tensor

from bayesgen.data import Dataset, as_dataset

__all__ = ["load", "names"]

_BUNDLED = ("faithful", "galaxies")
_SKLEARN = ("breast_cancer", "digits", "iris", "wine")


def names() -> list[str]:
    """Names that :func:`load` knows.

    Example:
        >>> names()
        ['breast_cancer', 'digits', 'faithful', 'galaxies', 'iris', 'wine']
    """
    return sorted(_BUNDLED + _SKLEARN)


@overload
def load(name: str, *, with_target: Literal[False] = False) -> Dataset: ...
@overload
def load(name: str, *, with_target: Literal[True]) -> tuple[Dataset, Tensor]: ...
def load(name: str, *, with_target: bool = False) -> Dataset | tuple[Dataset, Tensor]:
    """Load a data set by name; every column is real.

    ========================  ==========  ====================================================
    name                      rows, cols  what
    ========================  ==========  ====================================================
    ``faithful``              272, 2      eruptions of Old Faithful and waiting times, minutes
    ``galaxies``              82, 1       velocities of galaxies in Corona Borealis, km/s
    ``iris``                  150, 4      sizes of iris flowers, cm; target: species
    ``wine``                  178, 13     chemical analysis of wines; target: cultivar
    ``breast_cancer``         569, 30     cell nuclei of breast masses; target: benign
    ``digits``                1797, 64    8 x 8 pixels of handwritten digits, 0-16; target
    ========================  ==========  ====================================================

    References:
        Azzalini, Bowman 1990, A look at some data on the Old Faithful geyser.
        Roeder 1990, Density estimation with confidence sets exemplified by superclusters and voids
        in the galaxies.
        Pedregosa et al. 2011, Scikit-learn: machine learning in Python.

    Args:
        name: One of :func:`names`.
        with_target: Whether to return the class labels ``(n,)``, ``int64``, too.

    Raises:
        ValueError: If there is no such data set, or it has no target.
        ImportError: If scikit-learn is needed and absent.

    Example:
        >>> load("faithful")
        Dataset(272 x 2, in memory: eruptions real, waiting real)
    """
    if name in _BUNDLED:
        if with_target:
            raise ValueError(f"the data set {name!r} has no target; use with_target=False.")
        with resources.as_file(resources.files(__name__) / f"{name}.csv") as path:
            return as_dataset(path, kinds="real")
    if name not in _SKLEARN:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(names())}.")
    data, target = _load_sklearn(name)
    return (data, target) if with_target else data


def _load_sklearn(name: str) -> tuple[Dataset, Tensor]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f"the data set {name!r} comes with scikit-learn; pip install scikit-learn."
        ) from error
    loaders = {
        "breast_cancer": datasets.load_breast_cancer,
        "digits": datasets.load_digits,
        "iris": datasets.load_iris,
        "wine": datasets.load_wine,
    }
    bunch = loaders[name]()
    columns = [
        str(column).replace(" (cm)", "").replace(" ", "_") for column in bunch.feature_names
    ]
    data = as_dataset(bunch.data, columns=columns, kinds="real")
    return data, torch.as_tensor(bunch.target).to(torch.int64)
