"""Priors of the linear models by site: checked when given, scaled to the data by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from bayesgen.distributions import HorseshoePrecision, RootInverseGamma
from bayesgen.models.families.degrees_of_freedom import default_df_prior
from bayesgen.models.families.factorised import column_prior
from bayesgen.models.families.gaussian import column_scales as scales_of
from bayesgen.models.families.gaussian import positive_scales
from bayesgen.models.linear.block import LoadingsBlock
from bayesgen.models.linear.medians import find_spread
from bayesgen.models.linear.relevance import Relevance
from bayesgen.priors import describe

if TYPE_CHECKING:
    from bayesgen.data import Dataset

__all__ = [
    "Scales",
    "conjugate_block",
    "default_priors",
    "find_scales",
    "given_priors",
    "prior_sites",
    "sample_sites",
]

# The mean's prior is this many standard deviations wide; the noise's is worth one observation that
# guesses a thousandth of the standard deviation, so that it never outweighs small noise.
_WIDE, _NOISE = 10.0, 1e-3
_FLOOR = 1e-10
# Prior variance of the loadings of a direction that is off, in variances of a column.
_SPIKE = 3e-4


@dataclass(frozen=True, eq=False)
class Scales:
    """Where the columns lie and how far they spread.

    Args:
        offset: Means, or medians, ``(d,)``.
        scale: Standard deviations that priors go by, ``(d,)``: of each column, or the same for all
            where the noise is shared.
    """

    offset: Tensor
    scale: Tensor


def find_scales(data: Dataset, *, shared: bool, robust: bool = False) -> Scales:
    """Offsets and scales of the columns of ``data``; positive for constant and empty ones too.

    ``robust`` ones are medians and median absolute deviations: one cell far out would make the
    priors as wide as itself, and the noise's no longer weak.
    """
    offset, scale = scales_of(data)
    voting = data.summary().count > 0
    if robust:
        found = find_spread(data)
        offset, scale = found.loc, positive_scales(found.loc, found.spread)
        # Columns of which half is equal have no robust scale: they go by the others, if any.
        sure = voting & found.is_sure
        voting = sure if bool(sure.any()) else voting
    if shared:
        used = scale[voting] if bool(voting.any()) else scale
        scale = used.square().mean().sqrt().expand(len(scale)).clone()
    return Scales(offset, scale)


def prior_sites(*, learned: bool, scaled: bool) -> tuple[str, ...]:
    """The sites that have a prior; ``scaled`` are models with degrees of freedom to learn."""
    own = ("df",) if scaled else ()
    return ("precision" if learned else "loadings", "loc", "noise_scale", *own)


def default_priors(
    scales: Scales,
    latent_dim: int,
    *,
    shared: bool,
    learned: bool,
    scaled: bool,
    cellwise: bool = False,
) -> dict[str, Distribution]:
    """Weakly informative priors in the data's units; ``cellwise`` has a ``df`` for each column."""
    offset, scale = scales.offset, scales.scale
    noise = scale[:1].reshape(()) if shared else scale
    found: dict[str, Distribution] = {}
    if learned:
        # Loadings are Student-t with two degrees of freedom, much narrower than the data: a
        # direction is off unless the data switch it on, and then its size is free.
        shape = torch.ones(latent_dim, dtype=torch.float64, device=scale.device)
        found["precision"] = dist.Gamma(shape, _SPIKE * shape * scale.square().mean())
    else:
        wide = scale.unsqueeze(-1).expand(-1, latent_dim)
        found["loadings"] = dist.Normal(torch.zeros_like(wide), wide)
    found["loc"] = dist.Normal(offset, _WIDE * scale)
    half = torch.full_like(noise, 0.5)
    found["noise_scale"] = RootInverseGamma(half, half * (_NOISE * noise).square())
    if scaled:
        found["df"] = default_df_prior(scale if cellwise else scale[0])
    return found


def given_priors(
    priors: Mapping[str, Any],
    num_columns: int,
    latent_dim: int,
    *,
    shared: bool,
    cellwise: bool = False,
) -> dict[str, Any]:
    """The given priors, checked against the sites they are for, and expanded to them."""
    shapes: dict[str, tuple[tuple[int, ...], constraints.Constraint]] = {
        "loadings": ((num_columns, latent_dim), constraints.real),
        "precision": ((latent_dim,), constraints.positive),
        "loc": ((num_columns,), constraints.real),
        "noise_scale": (() if shared else (num_columns,), constraints.positive),
        "df": ((num_columns,) if cellwise else (), constraints.positive),
    }
    found = {}
    for site, prior in priors.items():
        shape, support = shapes[site]
        checked = column_prior(site, prior, shape, support=support)
        if isinstance(checked, Distribution):
            own = tuple(checked.batch_shape + checked.event_shape)
            if own != shape:
                raise ValueError(
                    f"prior of site '{site}': {type(checked).__name__} has shape {own}, but the "
                    f"site needs {shape}."
                )
        found[site] = checked
    return found


def sample_sites(
    priors: Mapping[str, Any],
    num_columns: int,
    latent_dim: int,
    *,
    shared: bool,
    cellwise: bool = False,
) -> dict[str, Tensor]:
    """The Pyro statements of the parameters, in the data's units."""
    values: dict[str, Tensor] = {}

    def sample(site: str, prior: Any, event_dim: int) -> None:
        law: dist.TorchDistribution = prior if isinstance(prior, Distribution) else prior()
        missing = event_dim - len(law.event_shape)
        values[site] = pyro.sample(site, law.to_event(missing) if missing > 0 else law)

    if "precision" in priors:
        sample("precision", priors["precision"], 1)
        wide = values["precision"].rsqrt().unsqueeze(-2)
        wide = wide.expand(*wide.shape[:-2], num_columns, latent_dim)
        sample("loadings", dist.Normal(torch.zeros_like(wide), wide), 2)
    else:
        sample("loadings", priors["loadings"], 2)
    sample("loc", priors["loc"], 1)
    sample("noise_scale", priors["noise_scale"], 0 if shared else 1)
    if "df" in priors:
        sample("df", priors["df"], int(cellwise))
    return values


_CONJUGATE: dict[str, tuple[type[Distribution], ...]] = {
    "loadings": (dist.Normal,),
    "precision": (dist.Gamma, HorseshoePrecision),
    "loc": (dist.Normal,),
    "noise_scale": (RootInverseGamma,),
}


def _relevance(prior: Distribution, like: Tensor) -> Relevance:
    if isinstance(prior, HorseshoePrecision):
        scale = prior.scale.to(like)
        return Relevance(torch.full_like(scale, 0.5), scale.square().reciprocal(), True)
    assert isinstance(prior, dist.Gamma)
    return Relevance(prior.concentration.to(like), prior.rate.to(like))


def conjugate_block(priors: Mapping[str, Any], scales: Scales, latent_dim: int) -> LoadingsBlock:
    """The block under these priors, relative to the offset.

    Raises:
        TypeError: A prior is not conjugate.
    """
    for site, prior in priors.items():
        if not isinstance(prior, _CONJUGATE[site]):
            raise TypeError(
                f"the prior of '{site}', {describe(prior)}, is not conjugate, so EM, VB and Gibbs "
                f"cannot use it. Give a {' or '.join(c.__name__ for c in _CONJUGATE[site])}, "
                "or fit with NUTS or SVI."
            )
    offset, noise, mean = scales.offset, priors["noise_scale"], priors["loc"]
    zeros = offset.new_zeros((len(offset), latent_dim))
    relevance = None
    if "precision" in priors:
        relevance = _relevance(priors["precision"], offset)
        loc, precision = zeros, torch.ones_like(zeros)
    else:
        loc = priors["loadings"].loc.to(offset)
        precision = priors["loadings"].scale.to(offset).square().reciprocal()
    shift = (mean.loc.to(offset) - offset).unsqueeze(-1)
    width = mean.scale.to(offset).square().reciprocal().unsqueeze(-1)
    rate = noise.rate.to(offset).reshape(-1)
    floor = _FLOOR * scales.scale.square()
    return LoadingsBlock(
        torch.cat([loc, shift], -1),
        torch.cat([precision, width], -1),
        noise.concentration.to(offset).reshape(-1),
        rate,
        relevance,
        floor[: len(rate)],
    )
