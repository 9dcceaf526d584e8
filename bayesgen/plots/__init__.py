"""Pictures that ArviZ does not draw. Each returns the axes or the figure it drew on.

Single pictures take ``ax=`` and make fresh axes without it; save them by
``ax.figure.savefig(path)``. Figures are made outside pyplot: no window opens, no display is
needed, nothing has to be closed.
"""

from __future__ import annotations

from bayesgen.plots.chains import chains, draw_pairs, energy
from bayesgen.plots.checks import (
    agreement,
    occupied,
    p_values,
    predictive_check,
    prior_exploration,
    ranks,
    reasons,
    trace,
)
from bayesgen.plots.densities import components, density, labels, pairs, responsibilities
from bayesgen.plots.graph import graph_svg
from bayesgen.plots.latents import biplot, latent_map, loadings, scree
from bayesgen.plots.predictive import predictive

__all__ = [
    "agreement",
    "biplot",
    "chains",
    "components",
    "density",
    "draw_pairs",
    "energy",
    "graph_svg",
    "labels",
    "latent_map",
    "loadings",
    "occupied",
    "p_values",
    "pairs",
    "predictive",
    "predictive_check",
    "prior_exploration",
    "ranks",
    "reasons",
    "responsibilities",
    "scree",
    "trace",
]
