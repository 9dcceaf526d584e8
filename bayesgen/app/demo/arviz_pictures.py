"""ArviZ's own pictures of label-invariant quantities, with ArviZ 0.2x and 1.x."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bayesgen.arviz_groups import import_arviz, is_datatree

__all__ = ["KINDS", "draw"]

KINDS = ("trace", "forest", "rank")
_FOREST = {"combined": True, "r_hat": True, "ess": True, "textsize": 11}
_NEW_NAMES = {"trace": "plot_trace_dist", "forest": "plot_forest", "rank": "plot_rank"}


def draw(data: Any, kind: str, names: Sequence[str], path: Path) -> None:
    """Draw one of :data:`KINDS` of the variables ``names`` of ``data`` into a PNG file.

    Args:
        data: ``fit.arviz``, perhaps a selection of it.
        kind: Which picture.
        names: Variables of the posterior.
        path: The file.
    """
    import matplotlib

    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot

    arviz = import_arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_datatree():
            plot = getattr(arviz, _NEW_NAMES[kind])(data, var_names=list(names))
            plot.savefig(path, dpi=110)
        else:
            figure = _figure(arviz, data, kind, list(names))
            figure.savefig(path, dpi=110, bbox_inches="tight")
        pyplot.close("all")


def _figure(arviz: Any, data: Any, kind: str, names: list[str]) -> Any:
    entries = sum(data.posterior[name].isel(chain=0, draw=0).size for name in names)
    settings: dict[str, dict[str, Any]] = {
        "trace": {"figsize": (9.5, 1.9 * len(names)), "compact": True},
        "forest": {**_FOREST, "figsize": (9.0, 0.9 + 0.55 * entries)},
        "rank": {"figsize": (3.4 * entries, 2.4), "kind": "bars"},
    }
    axes = getattr(arviz, f"plot_{kind}")(data, var_names=names, **settings[kind])
    figure = np.ravel(axes)[0].figure
    if kind != "forest":
        figure.tight_layout()
    return figure
