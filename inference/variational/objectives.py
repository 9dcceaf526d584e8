r"""Evidence bounds of a model and a guide, as differentiable numbers of one particle.

.. math:: \mathcal{L} = \log p(x, z) - \log q(z), \qquad z \sim q

Each objective returns its estimate and a surrogate whose gradient is an unbiased estimate of that
of the bound; sites that cannot be reparametrised enter it by their score (REINFORCE).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bayesgen.inference.programs.summed import add_up

__all__ = ["OBJECTIVES", "Traces", "run_both"]


class Traces(NamedTuple):
    """One run of the guide, and the model replayed against it."""

    model: Any
    guide: Any


def run_both(
    model: Callable[[], Any],
    guide: Callable[[], Any],
    *,
    max_plate_nesting: int | None = None,
) -> Traces:
    """Run guide and model, with log densities of every site.

    Args:
        model: The Pyro program, without arguments.
        guide: The guide, without arguments.
        max_plate_nesting: Enumerate discrete sites in parallel beyond this many plates; None does
            not enumerate.
    """
    if max_plate_nesting is not None:
        guide = EnumMessenger(first_available_dim=-1 - max_plate_nesting)(guide)
        model = EnumMessenger()(model)
    guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    guide_trace = prune_subsample_sites(guide_trace)
    model_trace = prune_subsample_sites(model_trace)
    model_trace.compute_log_prob()
    add_up(model_trace)
    guide_trace.compute_score_parts()
    if max_plate_nesting is not None:
        model_trace.pack_tensors()
        guide_trace.pack_tensors(model_trace.plate_to_symbol)
    return Traces(model_trace, guide_trace)


def _zero(traces: Traces) -> Tensor:
    return torch.zeros(())


def _trace(traces: Traces) -> tuple[Tensor, Tensor]:
    """Monte Carlo of everything: Pyro's ``Trace_ELBO``."""
    log_r = None
    elbo = surrogate = _zero(traces)
    for site in traces.model.nodes.values():
        if site["type"] == "sample":
            elbo = elbo + site["log_prob_sum"]
            surrogate = surrogate + site["log_prob_sum"]
    for site in traces.guide.nodes.values():
        if site["type"] != "sample":
            continue
        elbo = elbo - site["log_prob_sum"]
        _, score, entropy = site["score_parts"]
        if isinstance(entropy, Tensor):
            surrogate = surrogate - entropy.sum()
        if isinstance(score, Tensor):
            log_r = log_r if log_r is not None else _compute_log_r(traces.model, traces.guide)
            reward = log_r.sum_to(site["cond_indep_stack"])
            surrogate = surrogate + (reward * score).sum()
    return elbo, surrogate


def _mean_field(traces: Traces) -> tuple[Tensor, Tensor]:
    """Kullback-Leibler divergences in closed form where there is one."""
    elbo = _zero(traces)
    for name, site in traces.model.nodes.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"]:
            elbo = elbo + site["log_prob_sum"]
            continue
        other = traces.guide.nodes[name]
        divergence = _divergence(other, site)
        if divergence is None:
            elbo = elbo + site["log_prob_sum"] - _entropy_term(other)
        else:
            elbo = elbo - divergence
    for name, site in traces.guide.nodes.items():
        if site["type"] == "sample" and name not in traces.model.nodes:
            elbo = elbo - _entropy_term(site)
    return elbo, elbo


def _divergence(guide_site: Any, model_site: Any) -> Tensor | None:
    try:
        value = torch.distributions.kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return None
    value = scale_and_mask(value, scale=guide_site["scale"], mask=guide_site["mask"])
    return value.sum() if isinstance(value, Tensor) else None


def _entropy_term(site: Any) -> Tensor:
    if isinstance(site["score_parts"].score_function, Tensor):
        raise ValueError(
            f"objective='mean_field' needs guides that can be reparametrised, but the site "
            f"'{site['name']}' is a {type(site['fn']).__name__}. Use objective='trace'."
        )
    term: Tensor = site["log_prob_sum"]
    return term


def _enum(traces: Traces) -> tuple[Tensor, Tensor]:
    """Discrete sites summed out exactly: Pyro's ``TraceEnum_ELBO``."""
    elbo = _compute_dice_elbo(traces.model, traces.guide)
    return elbo, elbo


OBJECTIVES: dict[str, Callable[[Traces], tuple[Tensor, Tensor]]] = {
    "trace": _trace,
    "mean_field": _mean_field,
    "enum": _enum,
}
"""By name: estimate of the bound and surrogate of one particle."""
