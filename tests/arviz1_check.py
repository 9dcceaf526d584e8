"""The ArviZ layer under ArviZ 1.x, where there is no torch: ``python3.12 tests/arviz1_check.py``.

Loads ``bayesgen/arviz_groups.py`` by path, since ``import bayesgen`` needs torch for the rest.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np


def load_layer():
    path = Path(__file__).resolve().parent.parent / "bayesgen" / "arviz_groups.py"
    spec = importlib.util.spec_from_file_location("arviz_groups", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example():
    """Groups of a two-component fit to 30 rows of 2 columns."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2))
    groups = {
        "posterior": {
            "weights": rng.dirichlet([5.0, 5.0], size=(2, 200)),
            "loc": rng.normal(size=(2, 200, 2, 2)),
            "num_occupied": np.full((2, 200), 2.0),
        },
        "sample_stats": {"lp": rng.normal(size=(2, 200))},
        "log_likelihood": {"x": -0.5 + 0.1 * rng.normal(size=(2, 200, 30))},
        "posterior_predictive": {"x": rng.normal(size=(2, 10, 30, 2))},
        "observed_data": {"x": x},
    }
    coords = {"component": [0, 1], "column": ["a", "b"], "row": list(range(30)), "spare": [1]}
    dims = {"weights": ["component"], "loc": ["component", "column"], "x": ["row", "column"]}
    return groups, coords, dims


def check(layer):
    az = layer.import_arviz()
    groups, coords, dims = example()
    attrs = {"engine": "VB", "settings": {"num_starts": 3}, "converged": True, "seed": None}
    data = layer.convert(groups, coords=coords, dims=dims, attrs=attrs)
    assert type(data).__name__ == ("DataTree" if layer.is_datatree() else "InferenceData")
    assert data["posterior"]["loc"].dims == ("chain", "draw", "component", "column")
    assert list(data["posterior"]["loc"].coords["column"].values) == ["a", "b"]
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "row")
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "row", "column")
    assert data["posterior_predictive"]["x"].shape == (2, 10, 30, 2)
    assert data["observed_data"]["x"].dims == ("row", "column")
    assert "spare" not in data["posterior"].coords
    assert data.attrs["engine"] == "VB"
    assert data["posterior"].attrs["settings"] == '{"num_starts": 3}'
    np.testing.assert_array_equal(data["observed_data"]["x"].values, groups["observed_data"]["x"])
    loo = az.loo(data)
    assert np.isfinite(loo.elpd if layer.is_datatree() else loo.elpd_loo)
    table = layer.summarise(data)
    assert "weights[0]" in table.index
    assert "loc[1, b]" in table.index
    assert {"mean", "sd", "ess_bulk", "r_hat"} <= set(table.columns)
    assert str(table.dtypes["mean"]) == "float64", "numbers, not rounded text"
    for bad, what in (
        ({"nonsense": {}}, "unknown groups"),
        ({"posterior": {"loc": np.zeros((2, 3, 2))}}, "event shape"),
        ({"posterior": {"weights": np.zeros((2, 3, 5))}}, "labels"),
    ):
        try:
            layer.convert(bad, coords=coords, dims=dims)
        except ValueError as error:
            assert what in str(error), error  # noqa: PT017 (this file runs without pytest)
        else:
            raise AssertionError(f"{bad} was accepted")
    return str(az.__version__)


if __name__ == "__main__":
    print("ArviZ", check(load_layer()), "python", sys.version.split()[0], "ok")
