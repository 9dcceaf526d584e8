"""The density of a trained guide at values of the latents that somebody gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoGuide,
    AutoGuideList,
    AutoNormal,
)
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

from bayesgen import rng
from bayesgen.inference.programs.complaints import explained
from bayesgen.inference.variational.pair import Pair

__all__ = ["guide_log_prob"]


def guide_log_prob(pair: Pair, params: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """``log q`` of each row of ``values[site] (n, *shape)``, as ``(n,)``.

    Args:
        pair: Model and guide.
        params: Of the guide.
        values: Every latent that the guide samples, on its support.

    Raises:
        ValueError: A site that is missing, unknown or of another shape.
        TypeError: A guide that is a point, or has more noise than latents.
    """
    nodes = pair.traces.guide.nodes
    _check(nodes, values)
    args, kwargs = pair.call.arguments(pair.call.tensors)
    found = []
    with torch.no_grad(), pair.using(params), rng.fork(rng.make_generator(0, pair.device)):
        for k in range(len(next(iter(values.values())))):
            row = {name: v[k].to(pair.device, pair.dtype) for name, v in values.items()}
            data = {**row, **_auxiliary(pair.guide, row)}
            conditioned = poutine.condition(pair.guide, data=data)
            with explained():
                trace = poutine.trace(conditioned).get_trace(*args, **kwargs, **pair.extra)
            found.append(prune_subsample_sites(trace).log_prob_sum())
    return torch.stack(found)


def _check(nodes: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    wanted = {
        name: tuple(node["value"].shape)
        for name, node in nodes.items()
        if node["type"] == "sample"
        and not node["infer"].get("is_auxiliary")
        and not poutine.util.site_is_subsample(node)
    }
    if set(values) != set(wanted):
        raise ValueError(f"values are of {sorted(values)}, but the guide has {sorted(wanted)}.")
    rows = {len(value) for value in values.values()}
    for name, value in values.items():
        if tuple(value.shape[1:]) != wanted[name] or len(rows) > 1:
            raise ValueError(
                f"values of {name!r} have shape {tuple(value.shape)}, but must have (n, "
                f"{', '.join(map(str, wanted[name]))}) with the same n at every site."
            )


def _auxiliary(guide: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of the noise from which a guide of Pyro's makes those of the latents."""
    if isinstance(guide, AutoGuideList):
        return {name: v for part in guide for name, v in _auxiliary(part, values).items()}
    if not isinstance(guide, AutoGuide):
        return {}
    if isinstance(guide, AutoNormal | AutoContinuous):
        inner = {}
        for name, node in guide.prototype_trace.iter_stochastic_nodes():
            inner[name] = biject_to(node["fn"].support).inv(values[name])  # as Pyro's guides do
        if isinstance(guide, AutoNormal):
            return {f"{name}_unconstrained": value for name, value in inner.items()}
        packed = torch.cat([value.reshape(-1) for value in inner.values()])
        return {f"_{guide._pyro_name}_latent": packed}
    reason = "is a point" if isinstance(guide, AutoDelta) else "has no density at given values"
    raise TypeError(
        f"{type(guide).__name__} {reason}: use AutoNormal, AutoMultivariateNormal or another "
        "guide whose noise can be told from the latents."
    )
