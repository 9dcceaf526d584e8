"""The demo's first half: Old Faithful, two columns, every picture in the plane."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bayesgen import datasets, plots, priors
from bayesgen.app.demo.common import (
    FDR,
    OUTLIER_HEAD,
    arviz_pictures,
    chains,
    clusters,
    found_words,
    outlier_row,
    save_rows,
    trust,
)
from bayesgen.app.page import Page
from bayesgen.calibration import posterior_predictive_check
from bayesgen.diagnostics import agreement
from bayesgen.inference import VB, Gibbs
from bayesgen.models import GaussianMixture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesgen.data import Dataset
    from bayesgen.fit import Fit
    from bayesgen.outliers import Outliers
    from bayesgen.prior_design import PriorExploration

__all__ = ["PLANTED", "Faithful", "hero"]

PLANTED = [
    *[(2.6, 78.0), (2.9, 86.0), (3.4, 50.0), (4.2, 58.0), (4.6, 62.0), (5.4, 60.0)],
    *[(1.3, 70.0), (1.7, 84.0), (5.6, 98.0), (2.2, 90.0), (3.9, 48.0), (4.9, 54.0)],
]
"""Eruptions that never were: some far away, most between the clusters."""

_SETUP = f"""
import arviz as az
import matplotlib.pyplot as plt
import torch
from bayesgen import datasets, plots, priors
from bayesgen.calibration import posterior_predictive_check
from bayesgen.data import as_dataset
from bayesgen.diagnostics import agreement
from bayesgen.inference import VB, Gibbs
from bayesgen.models import GaussianMixture
from bayesgen.outliers import explain

faithful = datasets.load("faithful")
seen, kept = faithful.split(222 / 272, torch.Generator().manual_seed(3))
planted = torch.tensor({PLANTED[:6]}
                       + {PLANTED[6:]},
                       dtype=torch.float64)
new = torch.cat([kept.tensor(), planted])
"""

_CODE = {
    "prior": """
given = GaussianMixture(10).bind(seen).all_priors
law = priors.explore(given["weights"], num_rows=222, num_components=10,
                     components=given["components"], scale=seen.summary().variance.sqrt())
law.plot()
priors.solve_concentration(3.0, num_rows=222, num_components=10)
""",
    "hero": """
vb = VB().run(GaussianMixture(10), seen, seed=0)
judged = vb.outliers(new, fdr=0.05, folds=10)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
plots.density(vb, ax=left)
plots.density(vb, x=vb.sample(272, seed=1), show_components=False, ax=right)
""",
    "shell": """
bayesgen fit GaussianMixture data/faithful_seen.csv --set num_components=10 --out runs/mine
bayesgen outliers runs/mine data/faithful_new.csv --fdr 0.05 --folds 10 --out outliers.csv
bayesgen sample runs/mine -n 272 --out new_eruptions.csv
""",
    "occupied": """
gibbs = Gibbs(thinning=3).run(GaussianMixture(10), seen, seed=0)
plots.occupied(gibbs, prior=law)
""",
    "agreement": 'plots.agreement(agreement({"Gibbs": gibbs, "VB": vb}, kept))',
    "check": "posterior_predictive_check(gibbs).plot()",
}


class Faithful:
    """Old Faithful: fits, pictures, verdict.

    Args:
        folder: Where everything goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = datasets.load("faithful")
        self.seen, self.kept = self.data.split(222 / 272, torch.Generator().manual_seed(3))
        self.new = torch.cat([self.kept.tensor(), torch.tensor(PLANTED, dtype=torch.float64)])
        self.vb: Fit
        self.gibbs: Fit
        self.judged: Outliers
        self.law: PriorExploration

    def steps(self, page: Page) -> list[tuple[str, Callable[[], None]]]:
        """What to do, in order."""
        return [
            ("Old Faithful: the prior, before any data are fitted", lambda: self.prior(page)),
            ("Old Faithful: variational Bayes and Gibbs", self.fit),
            ("Old Faithful: density, outliers, new data", lambda: self.density(page)),
            ("Old Faithful: do the engines agree?", lambda: self.engines(page)),
            ("Old Faithful: does the model resemble the data?", lambda: self.check(page)),
        ]

    def fit(self) -> None:
        """Both engines from 10 components."""
        self.judge()
        self.gibbs = Gibbs(thinning=3).run(GaussianMixture(10), self.seen, seed=0)
        save_rows(self.folder, "faithful_seen", self.seen, self.data)
        save_rows(self.folder, "faithful_new", self.new, self.data)
        self.vb.save(self.folder / "runs" / "faithful-vb")
        self.gibbs.save(self.folder / "runs" / "faithful-gibbs")

    def judge(self) -> None:
        """Variational Bayes, and its verdict on new rows."""
        self.vb = VB().run(GaussianMixture(10), self.seen, seed=0)
        self.judged = self.vb.outliers(self.new, fdr=FDR, folds=10)

    def prior(self, page: Page) -> None:
        """What the default prior says, and how to say something else."""
        page.section(
            "Old Faithful",
            "272 eruptions of a geyser: how long each lasted, and how long until the next. Of "
            "these, 222 are fitted; 50 are kept aside to be judged later, with 12 planted ones.",
        )
        page.snippet(_SETUP, label="the code that all pictures below start from")
        self.law = _explore(self.seen)
        three = priors.solve_concentration(3.0, num_rows=222, num_components=10)
        page.picture(
            self.law.plot(),
            "faithful_prior",
            "Before any data are fitted: how many of the 10 components the default prior expects "
            "222 rows to occupy, and the shapes that it allows a cluster. To expect 3 clusters, "
            f"one would set the concentration to {three:.3g}.",
            _CODE["prior"],
        )

    def density(self, page: Page) -> None:
        """The picture that opens the README, and what the outlier calls rest on."""
        page.picture(
            hero(self.vb, self.judged, self.new),
            "hero",
            "Left: the posterior predictive density with its components (one ellipse for each of "
            "many posterior draws: their spread is the uncertainty), and the verdict on 62 rows "
            "that it has not seen. Right: new eruptions, drawn from the same fit.",
            _CODE["hero"],
        )
        page.table(OUTLIER_HEAD, [outlier_row(self.judged, len(PLANTED))])
        page.picture(
            plots.p_values(self.judged),
            "faithful_p_values",
            "Each row's conformal p-value, sorted: all up to the last one below the line are "
            "called. On average at most 5 % of the calls are wrong, even if the model is.",
            "plots.p_values(judged)",
        )
        page.snippet(_CODE["shell"], label="the same from a shell", is_shell=True)

    def engines(self, page: Page) -> None:
        """How each run went, and whether they say the same."""
        page.section(
            "Old Faithful: two engines, one answer?",
            "Variational Bayes climbs to the best factorised posterior; Gibbs sampling visits "
            "the exact one. They are compared in quantities that do not depend on how components "
            "are numbered.",
        )
        page.picture(
            plots.occupied(self.gibbs, prior=self.law),
            "faithful_occupied",
            "How many clusters: what the prior allowed, and what the data made of it (Gibbs).",
            _CODE["occupied"],
        )
        page.picture(
            plots.agreement(agreement({"Gibbs": self.gibbs, "VB": self.vb}, self.kept)),
            "faithful_agreement",
            "Means and 90 % intervals by both engines, in posterior standard deviations of "
            "Gibbs; VB counts clusters without an interval.",
            _CODE["agreement"],
        )
        arviz_pictures(page, "faithful", self.gibbs, "eruptions")

    def check(self, page: Page) -> None:
        """Posterior predictive checks."""
        page.section(
            "Old Faithful: does the model resemble the data?",
            "Data sets drawn from the posterior should look like the one observed.",
        )
        page.picture(
            posterior_predictive_check(self.gibbs).plot(),
            "faithful_check",
            "Statistics of the data (line) among those of 200 data sets replicated from the fit "
            "(bars); orange would mean that the model cannot produce what the data show.",
            _CODE["check"],
        )

    def verdict(self) -> dict[str, str]:
        """Cells of the table on top of the page."""
        return {
            "clusters, from 10 components": clusters(self.vb, self.gibbs),
            "VB against Gibbs": trust(self.vb, self.gibbs, self.kept.tensor()),
            "Gibbs' chains mixed": chains(self.gibbs),
            "outliers at FDR 5 %": found_words(self.judged, len(PLANTED)),
        }


def _explore(data: Dataset) -> PriorExploration:
    bound: Any = GaussianMixture(10).bind(data)
    given = bound.all_priors
    return priors.explore(
        given["weights"],
        num_rows=data.num_rows,
        num_components=10,
        components=given["components"],
        scale=data.summary().variance.sqrt(),
    )


def hero(fit: Fit, judged: Outliers, new: torch.Tensor) -> Figure:
    """The density with components and verdict beside data drawn from it: it opens the README."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    plots.density(fit, num_curves=60, ax=left)
    called = judged.is_outlier.cpu()
    mine, strange = new[~called].numpy(), new[called].numpy()
    left.plot(*mine.T, "o", mfc="white", mec="#303030", ms=4.5, label="new rows that belong")
    left.plot(
        *strange.T, "X", color="#D55E00", mec="white", ms=9, label="new rows that do not (FDR 5 %)"
    )
    left.set_title("Old Faithful: density, components, and who does not belong", fontsize=10)
    plots.density(fit, x=fit.sample(272, seed=1), show_components=False, ax=right)
    right.set_title("272 new eruptions, drawn from the same fit", fontsize=10)
    left.set(xlabel="eruption, minutes", ylabel="waiting for the next, minutes")
    right.set(xlabel="eruption, minutes", ylabel="")
    left.legend(frameon=False, fontsize=9, loc="lower right")
    return figure
