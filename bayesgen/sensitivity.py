"""How much does the answer hang on the prior, how much on the data? Power-scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen.arviz_groups import labels
from bayesgen.capabilities import Pointwise, Scored, Symmetric, require
from bayesgen.predictive import log_prior
from bayesgen.psis import smooth

if TYPE_CHECKING:
    import pandas as pd

    from bayesgen.fit import Fit

__all__ = ["Sensitivity", "cumulative_distance", "power_scaled_weights", "sensitivity"]

_ALPHA = 1.01
_LIMIT = 0.05
_K_HAT = 0.7
_MAX_ENTRIES = 64


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Sensitivity of each quantity to prior and likelihood; ``print`` it."""

    table: pd.DataFrame
    """By quantity: ``prior``, ``likelihood``, ``diagnosis``."""
    sites: tuple[str, ...]
    """Sites whose priors were scaled."""
    k_hat: Mapping[str, float]
    """Pareto shape of the weights of ``prior`` and ``likelihood``."""
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"power-scaling sensitivity (of note from {_LIMIT}); prior of {', '.join(self.sites)}"
        ]
        lines.append(self.table.to_string(float_format=lambda value: f"{value:.3f}"))
        return "\n".join([*lines, *(f"  ! {warning}" for warning in self.warnings)])

    __repr__ = __str__


def sensitivity(
    fit: Fit, *, sites: Sequence[str] | None = None, alpha: float = _ALPHA
) -> Sensitivity:
    r"""Power-scaling sensitivity of the posterior, without refitting.

    The posterior under :math:`p(\theta)^\alpha\, p(y \mid \theta)`, and under
    :math:`p(\theta)\, p(y \mid \theta)^\alpha`, is found by Pareto-smoothed importance weights of
    the draws. Its distance from the posterior, by the cumulative Jensen-Shannon distance of each
    marginal, is divided by :math:`\log_2 \alpha`: a derivative in doublings of the strength.

    * prior below 0.05: the data rule;
    * prior and likelihood above: prior and data pull in different directions, or share the say;
    * prior above, likelihood below: the prior rules, the data say little.

    References:
        Kallioinen, Paananen, Bürkner, Vehtari (2024), Detecting and diagnosing prior and
        likelihood sensitivity with power-scaling.
        Nguyen, Vreeken (2015), Non-parametric Jensen-Shannon divergence.

    Args:
        fit: A fit with draws, of a plain program or of a model with a Pyro program.
        sites: Sites whose priors are scaled. By default those that depend on no other site, or
            only on sites of the same plates: of a hierarchical model the top. Of a non-centred
            model, noise with a value for each row of data is left out; other noise cannot be told
            from coefficients, and ``warnings`` names it.
        alpha: Power, above 1; its inverse is used as well.

    Raises:
        TypeError: The model has no Pyro program, or no log density of its data.
        ValueError: Unknown sites, or too few draws.

    Example:
        >>> from bayesgen.toys import UnitMixture, pretend
        >>> found = sensitivity(pretend(UnitMixture(1), [[0.0], [0.5], [1.0]]))
        >>> found.table.loc["mean[0]", "diagnosis"]
        ''
    """
    import pandas as pd

    if not alpha > 1.0:
        raise ValueError(f"alpha={alpha}, but it must be above 1, such as {_ALPHA}.")
    if fit.num_chains * fit.num_draws < 100:
        raise ValueError("power-scaling reweights draws, and needs at least 100 of them.")
    priors = log_prior(fit)
    chosen, said = _top(fit, priors) if sites is None else (tuple(sites), [])
    unknown = [name for name in chosen if name not in priors]
    if unknown:
        raise ValueError(f"there is no latent site {unknown[0]!r}; known are {', '.join(priors)}.")
    scaled = {
        "prior": torch.stack([priors[name] for name in chosen]).sum(0).flatten(),
        "likelihood": _total_likelihood(fit).flatten(),
    }
    values = _quantities(fit)
    columns: dict[str, dict[str, float]] = {}
    shapes = {}
    for which, log_density in scaled.items():
        below, k_below = power_scaled_weights(log_density, 1 / alpha)
        above, k_above = power_scaled_weights(log_density, alpha)
        shapes[which] = max(k_below, k_above)
        columns[which] = {
            name: (cumulative_distance(x, below) + cumulative_distance(x, above))
            / (2 * math.log2(alpha))
            for name, x in values.items()
        }
    table = pd.DataFrame(columns)
    table["diagnosis"] = [
        _diagnosis(p, y) for p, y in zip(table["prior"], table["likelihood"], strict=True)
    ]
    said += [
        f"k-hat of the {which} weights is {k:.2f}, above {_K_HAT}: use an alpha nearer to 1."
        for which, k in shapes.items()
        if k > _K_HAT
    ]
    return Sensitivity(table, chosen, shapes, tuple(said))


def _diagnosis(prior: float, likelihood: float) -> str:
    if prior < _LIMIT:
        return ""
    if likelihood < _LIMIT:
        return "strong prior or weak data"
    return "prior-data conflict possible"


def _top(fit: Fit, priors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], list[str]]:
    """Sites at the top of the hierarchy, and what to know of the choice.

    The noise of a non-centred model depends on nothing either, but is no prior of anybody's: what
    has a value for each row of observed data is left out, and standard normals are named.
    """
    graph = fit.graph()
    nodes = {site.name: site for site in graph.nodes}
    above: dict[str, set[str]] = {name: set() for name in nodes}
    rows: dict[str, set[str]] = {name: set() for name in nodes}  # plates of data that depend on it
    for name, site in nodes.items():  # parents come first
        for a, b in graph.edges:
            if b == name:
                above[b] |= above[a] | ({a} if nodes[a].kind == "latent" else set())
        if site.kind == "observed":
            for latent in above[name]:
                rows[latent] |= set(site.plates)
    top = [
        name
        for name in priors
        if nodes[name].kind == "latent"
        and all(nodes[a].plates == nodes[name].plates for a in above[name])
    ]
    chosen = [name for name in top if not rows[name] & set(nodes[name].plates)] or top
    said = []
    if left := [name for name in top if name not in chosen]:
        said.append(
            f"{_listed(left)} left out: a value for each row of data. Name them in sites=[...] to "
            "scale their priors too."
        )
    noise = [n for n in chosen if nodes[n].plates and nodes[n].law == "Normal(0, 1)"]
    if noise and len(noise) < len(chosen):
        kept = [name for name in chosen if name not in noise]
        said.append(
            f"{_listed(noise)} among the priors that are scaled: standard normal in a plate. If "
            f"this is the noise of a non-centred model, give sites={kept}."
        )
    return tuple(chosen), said


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names))} {'is' if len(names) == 1 else 'are'}"


def _total_likelihood(fit: Fit) -> Tensor:
    """Log likelihood of all data under each draw, ``(chain, draw)``."""
    if isinstance(fit.model, Pointwise):
        parts = fit.model.log_likelihood(fit.draws)
        if not parts:
            raise ValueError("the program observes nothing by obs=..., so it has no likelihood.")
        return sum(v.double().reshape(*v.shape[:2], -1).sum(-1) for v in parts.values())  # type: ignore[return-value]
    require(fit.model, Scored, "sensitivity")
    if fit.data is None:
        raise ValueError("this fit does not hold its training data.")
    return fit.log_likelihood(fit.data).double().sum(-1)


def _quantities(fit: Fit) -> dict[str, Tensor]:
    """Flat draws of everything whose sensitivity is told."""
    source = fit.invariants if isinstance(fit.model, Symmetric) else fit.draws
    found = {}
    for name, value in source.items():
        if not value.is_floating_point():
            continue
        event = tuple(value.shape[2:])
        names = labels(name, event, coords=fit.model.coords(), dims=fit.model.dims)
        flat = value.double().reshape(value.shape[0] * value.shape[1], -1)
        for k, label in enumerate(names[:_MAX_ENTRIES]):
            if float(flat[:, k].std()) > 0.0:
                found[label] = flat[:, k].cpu()
    return found


def power_scaled_weights(log_density: Tensor, alpha: float) -> tuple[Tensor, float]:
    """Weights of draws ``(s,)`` under a component raised to ``alpha``, and their Pareto shape.

    Args:
        log_density: ``(s,)`` log density of the component at the draws, in nats.
        alpha: The power.
    """
    log_weights, k = smooth((alpha - 1.0) * log_density.cpu())
    return log_weights.exp(), float(k)


def cumulative_distance(x: Tensor, weights: Tensor) -> float:
    r"""Cumulative Jensen-Shannon distance of weighted draws from unweighted ones, in [0, 1].

    .. math:: \mathrm{CJS}^2 \propto \int P \log_2 \frac{P}{(P + Q) / 2}
        + Q \log_2 \frac{Q}{(P + Q) / 2}\, dx

    over distribution functions :math:`P` and :math:`Q`, normalised by
    :math:`\int P + Q`, the larger of both directions of :math:`x`.

    Args:
        x: Draws ``(s,)``.
        weights: ``(s,)``, summing to one.
    """
    return max(_one_sided(x, weights), _one_sided(-x, weights))


def _one_sided(x: Tensor, weights: Tensor) -> float:
    order = x.argsort()
    width = x[order].diff()
    p = torch.arange(1, len(x), dtype=torch.float64) / len(x)
    q = weights[order].double().cumsum(0)[:-1]
    middle = (0.5 * (p + q)).log2()
    area = float((p * width).sum()), float((q * width).sum())
    first = torch.where(p > 0, p * (p.log2() - middle), 0.0)
    second = torch.where(q > 0, q * (q.clamp_min(1e-300).log2() - middle), 0.0)
    # The terms of the two integrals cancel: what is left is never below zero.
    divergence = float(((first + second) * width).sum()) / max(sum(area), 1e-300)
    return math.sqrt(max(0.0, divergence))
