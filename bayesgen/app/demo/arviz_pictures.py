"""ArviZ's own pictures of label-invariant quantities, with ArviZ 0.2x and 1.x."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bayesgen.arviz_groups import convert, import_arviz, is_datatree

__all__ = ["KINDS", "draw"]

KINDS = ("trace", "forest", "rank")
_FOREST = {"combined": True, "r_hat": True, "ess": True, "textsize": 11}
_NEW_NAMES = {"trace": "plot_trace_dist", "forest": "plot_forest", "rank": "plot_rank"}


def draw(values: Mapping[str, Tensor], kind: str, path: Path) -> None:
    """Draw one of :data:`KINDS` into a PNG file.

    Args:
        values: Draws ``(chain, draw)`` by the name that is shown.
        kind: Which picture.
        path: The file.
    """
    import matplotlib

    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot

    posterior = {name: value.double().cpu().numpy() for name, value in values.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = convert({"posterior": posterior}, coords={}, dims={})
        if is_datatree():
            getattr(import_arviz(), _NEW_NAMES[kind])(data).savefig(path, dpi=110)
        else:
            figure = _figure(data, kind, len(posterior))
            figure.savefig(path, dpi=110, bbox_inches="tight")
        pyplot.close("all")


def _figure(data: Any, kind: str, count: int) -> Any:
    settings: dict[str, dict[str, Any]] = {
        "trace": {"figsize": (9.5, 1.9 * count)},
        "forest": {**_FOREST, "figsize": (9.0, 0.9 + 0.55 * count)},
        "rank": {"figsize": (3.4 * count, 2.4), "kind": "bars"},
    }
    axes = getattr(import_arviz(), f"plot_{kind}")(data, **settings[kind])
    figure = np.ravel(axes)[0].figure
    if kind != "forest":
        figure.tight_layout()
    return figure
