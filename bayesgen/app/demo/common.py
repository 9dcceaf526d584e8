"""What both data sets of the demo share: two engines, their verdict, planted outliers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen.app.demo.arviz_pictures import KINDS, draw
from bayesgen.app.output import rows_frame, write_frame
from bayesgen.app.page import Mark, Page
from bayesgen.arviz_groups import import_arviz, is_datatree

if TYPE_CHECKING:
    from bayesgen.data import Dataset
    from bayesgen.fit import Fit
    from bayesgen.outliers import Outliers

__all__ = [
    "FDR",
    "arviz_pictures",
    "chains",
    "OUTLIER_HEAD",
    "clusters",
    "found_words",
    "outlier_row",
    "save_rows",
    "trust",
]

FDR = 0.05
_R_HAT = 1.05


def save_rows(folder: Path, name: str, data: Dataset | Tensor, like: Dataset) -> None:
    """Rows as a CSV file that the commands on the page use."""
    (folder / "data").mkdir(exist_ok=True)
    rows = data if isinstance(data, Tensor) else data.tensor()
    write_frame(rows_frame(rows, like.schema), str(folder / "data" / f"{name}.csv"))


def clusters(vb: Fit, gibbs: Fit) -> str:
    """How many clusters each engine finds."""
    counts = gibbs.sample_stats["num_occupied"].flatten().long()
    shares = torch.bincount(counts).double() / len(counts)
    told = ", ".join(f"{k} ({shares[k]:.0%})" for k in range(len(shares)) if shares[k] > 0.02)
    return f"VB {vb.attrs['num_occupied']}; Gibbs {told}"


def chains(gibbs: Fit) -> str:
    """R-hat of the log density, and what the summary holds against the chains."""
    r_hat = float(import_arviz().rhat(gibbs.sample_stats["log_likelihood"].cpu().numpy()))
    told, words = gibbs.summary(), f"R-hat of the log density is {r_hat:.3f}"
    if told.is_converged:
        return Mark(f"yes: {words}, and no other above 1.01", good=True)
    problem = gibbs.verdict().failures[0].message
    if r_hat < _R_HAT:
        return f"nearly: {words}; {problem}"
    return Mark(f"no: {words}; {problem}", good=False)


def trust(vb: Fit, gibbs: Fit, x: Tensor) -> str:
    """The difference of the two predictive densities on rows neither has seen."""
    difference = (vb.log_prob(x) - gibbs.log_prob(x)).mean()
    return f"{float(difference):+.3f} nats a row on {len(x)} rows held out"


OUTLIER_HEAD = ("rows judged", "planted", "planted and found", "false alarms", "false share")


def outlier_row(verdict: Outliers, num_planted: int) -> tuple[int, int, int, int, str]:
    """The line below :data:`OUTLIER_HEAD`; planted rows come last."""
    called = verdict.is_outlier
    found = int(called[-num_planted:].sum())
    false = int(called[:-num_planted].sum())
    return len(called), num_planted, found, false, f"{false / max(1, found + false):.0%}"


def found_words(verdict: Outliers, num_planted: int) -> str:
    """The same in words."""
    judged, planted, found, false, _ = outlier_row(verdict, num_planted)
    alarms = f"{false} false alarm{'s' * (false != 1)} among {judged - planted} real rows"
    return Mark(f"{found} of {planted} planted rows found, {alarms}", good=found > planted / 2)


def arviz_pictures(
    page: Page, name: str, gibbs: Fit, column: str, kinds: Sequence[str] = KINDS
) -> None:
    """ArviZ's pictures of quantities that relabelling leaves alone, of one column."""
    captions = {
        "trace": "ArviZ, trace: four chains (line styles) of quantities that no relabelling "
        "changes: the effective number of clusters, and the mixture's mean and variance of "
        f"'{column}'; good chains lie on top of each other and wander fast.",
        "forest": "ArviZ, forest: posterior intervals of the same quantities"
        + ("." if is_datatree() else ", their effective sample sizes, and R-hat, near 1 at best."),
        "rank": "ArviZ, ranks: the draws of each chain ranked among all; flat bars mean that "
        "every chain sees the same posterior.",
    }
    free, at = gibbs.invariants, gibbs.columns.index(column)
    values = {
        "effective clusters": free["num_effective"],
        f"mean of {column}": free["mean"][..., at],
        f"variance of {column}": free["covariance"][..., at, at],
    }
    for kind in kinds:
        assert page.folder is not None
        draw(values, kind, page.folder / f"{name}_{kind}.png")
        one = f"gibbs.arviz.sel(column={column!r}, column_2={column!r})"
        code = f'az.plot_{kind}({one}, var_names=["num_effective", "mean", "covariance"])'
        page.image(f"{name}_{kind}", captions[kind], code)
