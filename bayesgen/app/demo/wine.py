"""The demo's second half: 178 wines, 13 columns, rows with holes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import datasets, plots
from bayesgen.app.demo.background import Background
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
from bayesgen.app.demo.wine_pictures import gap_figures, gaps_drawn, labels_beside_truth
from bayesgen.app.page import Page
from bayesgen.calibration import posterior_predictive_check
from bayesgen.data import as_dataset
from bayesgen.diagnostics import agreement
from bayesgen.fit import load
from bayesgen.inference import VB
from bayesgen.models import GaussianMixture
from bayesgen.outliers import explain

if TYPE_CHECKING:
    from bayesgen.data import Dataset
    from bayesgen.fit import Fit
    from bayesgen.outliers import Outliers

__all__ = ["Wine", "invented"]

_NUM_PLANTED = 20
_SHOWN = ["alcohol", "flavanoids", "color_intensity", "proline"]
_COLUMNS = [*_SHOWN[:3], "hue", "od280/od315_of_diluted_wines", _SHOWN[3]]

_SETUP = """
wine, cultivar = datasets.load("wine", with_target=True)
wine = as_dataset(wine, columns=["alcohol", "flavanoids", "color_intensity", "hue",
                                 "od280/od315_of_diluted_wines", "proline"])
seen, kept = wine.split(140 / 178, torch.Generator().manual_seed(1))
low, high = wine.extremes()
generator = torch.Generator().manual_seed(2)
planted = low + (high - low) * torch.rand(20, 6, generator=generator, dtype=torch.float64)
new = torch.cat([kept.tensor(), planted])
"""

_CODE = {
    "clusters": """
vb = VB().run(GaussianMixture(10), seen, seed=0)
plots.labels(vb, wine)
""",
    "agreement": """
gibbs = Gibbs(thinning=3).run(GaussianMixture(10), seen, seed=0)
plots.agreement(agreement({"Gibbs": gibbs, "VB": vb}, kept), max_quantities=12)
""",
    "check": "plots.predictive_check(posterior_predictive_check(vb), max_panels=12)",
    "pairs": f"""
judged = vb.outliers(new, fdr=0.05, folds=10)
plots.pairs(vb, columns={_SHOWN}, x=new, outliers=judged)
""",
    "gaps": """
rows, columns = torch.arange(178)[:, None], torch.arange(6)
holes = (rows % 3 == 0) & (columns % 4 == rows // 3 % 4)
holed = wine.tensor().masked_fill(holes, torch.nan)
filled = VB().run(GaussianMixture(10), holed, seed=0).impute(holed, num_samples=100).mean(0)
scale = wine.summary().variance.sqrt()
((filled - wine.tensor()) / scale)[holes].square().mean().sqrt()
""",
    "shell": """
bayesgen fit GaussianMixture data/wine_holes.csv --set num_components=10 --out runs/holes
bayesgen impute runs/holes data/wine_holes.csv --out wine_filled.csv
""",
}


def invented(data: Dataset, count: int, generator: torch.Generator) -> Tensor:
    """Rows with each entry drawn evenly from the range of its column."""
    low, high = data.extremes()
    shape = (count, data.num_columns)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


class Wine:
    """Wine: fits, pictures, verdict.

    Args:
        folder: Where everything goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        whole, self.cultivar = datasets.load("wine", with_target=True)
        self.data = as_dataset(whole, columns=_COLUMNS)
        self.seen, self.kept = self.data.split(140 / 178, torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        self.new = torch.cat([self.kept.tensor(), invented(self.data, _NUM_PLANTED, generator)])
        rows, columns = torch.arange(self.data.num_rows)[:, None], torch.arange(6)
        self.holes = (rows % 3 == 0) & (columns % 4 == rows // 3 % 4)
        self.copies: Tensor
        self.vb: Fit
        self.gibbs: Fit
        self.judged: Outliers
        self.sampling: Background

    def begin(self) -> None:
        """Start Gibbs sampling by our own command line, on the second core."""
        save_rows(self.folder, "wine_seen", self.seen, self.data)
        save_rows(self.folder, "wine_new", self.new, self.data)
        (self.folder / "runs").mkdir(exist_ok=True)
        self.sampling = Background(
            *["fit", "GaussianMixture", str(self.folder / "data" / "wine_seen.csv")],
            *["--kind", "real", "--set", "num_components=10", "--engine", "gibbs", "--force"],
            *["--engine-set", "thinning=3"],
            *["--out", str(self.folder / "runs" / "wine-gibbs")],
        )

    def steps(self, page: Page) -> list[tuple[str, Callable[[], None]]]:
        """What to do, in order."""
        return [
            ("wine: variational Bayes and Gibbs", self.fit),
            ("wine: clusters", lambda: self.clusters(page)),
            ("wine: do the engines agree?", lambda: self.engines(page)),
            ("wine: outliers", lambda: self.outliers(page)),
            ("wine: filling holes", lambda: self.gaps(page)),
        ]

    def fit(self) -> None:
        """Both engines from 10 components."""
        self.vb = VB().run(GaussianMixture(10), self.seen, seed=0)
        self.vb.save(self.folder / "runs" / "wine-vb")
        self.judged = self.vb.outliers(self.new, fdr=FDR, folds=10)
        self.sampling.wait()
        self.gibbs = load(self.folder / "runs" / "wine-gibbs")

    def clusters(self, page: Page) -> None:
        """Found components beside the cultivars, which the fit was not told."""
        page.section(
            "Wine",
            "Chemical analyses of 178 bottles, 6 of the 13 columns. The bottles come from three "
            "cultivars, which the fit is not told. Of the rows, 140 are fitted, 38 kept aside.",
        )
        page.snippet(_SETUP, label="the code that all pictures below start from")
        page.picture(
            labels_beside_truth(self.vb, self.data.tensor(), self.cultivar),
            "wine_clusters",
            "Left: the clusters that the fit finds, faint where it is unsure. Right: the "
            f"cultivars. The two partitions agree to {self._rand():.2f} (adjusted Rand index: 1 "
            "is perfect, 0 is chance).",
            _CODE["clusters"],
        )
        page.picture(
            plots.trace(self.vb, name="elbo"),
            "wine_elbo",
            "The lower bound of the evidence that variational Bayes climbs. It never falls; late "
            "leaps are split, merge and delete moves that found a better number of clusters.",
            'plots.trace(vb, name="elbo")',
        )

    def _rand(self) -> float:
        from sklearn.metrics import adjusted_rand_score

        return float(adjusted_rand_score(self.cultivar, self.vb.predict(self.data)))

    def engines(self, page: Page) -> None:
        """Agreement, chains, replicated data."""
        page.picture(
            plots.agreement(
                agreement({"Gibbs": self.gibbs, "VB": self.vb}, self.kept), max_quantities=12
            ),
            "wine_agreement",
            "Means and 90 % intervals by both engines, in posterior standard deviations of Gibbs.",
            _CODE["agreement"],
        )
        arviz_pictures(page, "wine", self.gibbs, "alcohol", ["rank"])
        check = posterior_predictive_check(self.vb)
        page.picture(
            plots.predictive_check(check, max_panels=12),
            "wine_check",
            f"The 12 statistics of the data that fit worst, of {len(check.observed)}, among those "
            "of 200 replicated data sets; of so many, one or two may be orange by chance.",
            _CODE["check"],
        )

    def outliers(self, page: Page) -> None:
        """Invented rows: every entry ordinary, the combination not."""
        page.section(
            "Wine: bottles that do not belong",
            "Of the 58 rows judged, 20 never were: every entry lies within the range of its "
            "column, so that no single column gives them away.",
        )
        page.table(OUTLIER_HEAD, [outlier_row(self.judged, _NUM_PLANTED)])
        page.picture(
            plots.pairs(self.vb, columns=_SHOWN, x=self.new, outliers=self.judged),
            "wine_pairs",
            "The rows that were judged in four of the columns: marginal densities on the "
            "diagonal, densities and labels below it, outliers ringed.",
            _CODE["pairs"],
        )
        worst = int(self.judged.scores[-_NUM_PLANTED:].argmin()) + self.kept.num_rows
        page.picture(
            plots.reasons(explain(self.vb, self.new), self.vb.columns, row=worst),
            "wine_reasons",
            "Why the strangest row is strange: how surprising each entry is given the others, "
            "beyond what is usual for its column.",
            f"plots.reasons(explain(vb, new), vb.columns, row={worst})",
        )

    def gaps(self, page: Page) -> None:
        """Holes in training rows, filled."""
        page.section(
            "Wine: what stood in the holes?",
            "Every third bottle loses one of four panels of measurements. The mixture is fitted "
            "to what is left, holes integrated out exactly, and fills them from the rest of each "
            "row.",
        )
        truth = self.data.tensor()
        holed = truth.masked_fill(self.holes, torch.nan)
        fit = VB().run(GaussianMixture(10), holed, seed=0)
        self.copies = fit.impute(holed, num_samples=100, seed=0)
        save_rows(self.folder, "wine_holes", holed, self.data)
        page.picture(
            gaps_drawn(truth, self.holes, self.copies),
            "wine_imputed",
            "Each deleted entry against its reconstruction with a 90 % interval: "
            f"{self._gap_words()}.",
            _CODE["gaps"],
        )
        page.snippet(_CODE["shell"], label="the same from a shell", is_shell=True)

    def _gap_words(self) -> str:
        error, naive, coverage = gap_figures(self.data.tensor(), self.holes, self.copies)
        return (
            f"error {error:.2f} standard deviations (filling in column means: {naive:.2f}); "
            f"{coverage:.0%} of the 90 % intervals hold the truth"
        )

    def verdict(self) -> dict[str, str]:
        """Cells of the table on top of the page."""
        return {
            "clusters, from 10 components": clusters(self.vb, self.gibbs)
            + f". The 3 cultivars, not told, are recovered to {self._rand():.2f} (Rand index)",
            "VB against Gibbs": trust(self.vb, self.gibbs, self.kept.tensor()),
            "Gibbs' chains mixed": chains(self.gibbs),
            "outliers at FDR 5 %": found_words(self.judged, _NUM_PLANTED),
            "holes filled": self._gap_words(),
        }
