"""Gaussian components whose columns are independent: a variance a column, or one for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bayesgen import rng
from bayesgen.distributions import NormalInverseGamma
from bayesgen.models.families.base import refuse_categories
from bayesgen.models.families.factorised import (
    Batch,
    Factorised,
    Layout,
    by_component,
    column_prior,
    mean_and_covariance,
    per_row,
    sample_site,
    stack_features,
)
from bayesgen.models.families.gaussian import check_columns, column_scales
from bayesgen.models.families.normal_inverse_gamma import (
    NormalInverseGammaBlock,
    diagonal_natural,
)
from bayesgen.models.families.spread import within_share
from bayesgen.priors import HierarchicalNormalInverseWishart, HyperNumbers, describe

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.data import Dataset

__all__ = ["DiagonalGaussian"]


@dataclass(frozen=True, eq=False)
class DiagonalGaussian(Factorised):
    r"""Gaussian components with independent columns, missing entries dropped exactly.

    .. math::
        v_{kj} \sim \mathrm{InverseGamma}(a, b_j), \quad
        \mu_{kj} \mid v_{kj} \sim \mathrm{N}(m_j, v_{kj}/\kappa), \quad
        x_j \mid k \sim \mathrm{N}(\mu_{kj}, v_{kj})

    The default prior is weakly informative and scaled to the data, in one dimension the same as
    that of :class:`~bayesgen.models.families.gaussian.Gaussian`: the mean's prior sits at the
    data's mean and is worth a hundredth of an observation, the variance's has ``a = 3/2`` and
    expects a component to spread half as far as the data as a whole, and no further than ``K``
    components side by side would (``K^(-1/d)`` as far).

    Priors: ``"components"`` is a :class:`~bayesgen.distributions.NormalInverseGamma` of batch
    ``(d,)`` or ``()``, or a :class:`~bayesgen.priors.HierarchicalNormalInverseWishart`, of which
    the marginals of the covariance's diagonal are taken,
    :math:`v_{kj} \mid s_j \sim \mathrm{InverseGamma}((\nu-d+1)/2, s_j/2)`. Or ``"loc"`` and
    ``"variance"`` apart, for NUTS and SVI.

    References:
        Fraley & Raftery (2007). Bayesian regularization for normal mixture estimation and
        model-based clustering.

    Args:
        spherical: One variance for all columns of a component.

    Example:
        >>> from bayesgen.models import Mixture
        >>> Mixture(DiagonalGaussian(spherical=True), num_components=3).num_components
        3
    """

    spherical: bool = False
    offset: Tensor | None = None
    scale: Tensor | None = None

    # ------------------------------------------------------------ description
    def bind(self, data: Dataset, num_components: int, priors: Mapping[str, Any]) -> Self:
        refuse_categories(data, "a Gaussian")
        offset, scale = column_scales(data)
        if self.spherical:
            scale = scale.square().mean().sqrt().expand_as(scale).clone()
        return replace(
            self,
            num_components=num_components,
            columns=data.columns,
            offset=offset,
            scale=scale,
            given=self._checked(self._scaled(priors, num_components, offset, scale), len(offset)),
        )

    @staticmethod
    def _scaled(
        priors: Mapping[str, Any], num_components: int, offset: Tensor, scale: Tensor
    ) -> Mapping[str, Any]:
        """The priors, with what a hierarchical one leaves open scaled to the data."""
        prior = priors.get("components")
        if not isinstance(prior, HierarchicalNormalInverseWishart):
            return priors
        # The diagonal of an inverse-Wishart with 3 + d - 1 degrees of freedom has 3 of its own.
        expected = 3.0 * (within_share(num_components, len(offset)) * scale).square()
        return {**priors, "components": prior.scaled(offset, expected)}

    def describe(self) -> str:
        return f"Gaussian, {'spherical' if self.spherical else 'diagonal'} covariance"

    def _checked(self, priors: Mapping[str, Any], d: int) -> dict[str, Any]:
        given = dict(priors)
        apart = [site for site in ("loc", "variance") if site in given]
        if apart and "components" in given:
            raise ValueError(
                "priors has both 'components' and 'loc' or 'variance': give the joint prior or "
                "its parts."
            )
        if len(apart) == 1:
            raise ValueError(
                "priors for 'loc' and 'variance' come together; one of them is missing."
            )
        if apart:
            shape = () if self.spherical else (d,)
            given["loc"] = column_prior("loc", given["loc"], (d,))
            given["variance"] = column_prior(
                "variance", given["variance"], shape, support=constraints.positive
            )
        elif "components" in given:
            given["components"] = self._checked_joint(given["components"], d)
        return given

    def _checked_joint(self, prior: Any, d: int) -> Any:
        hierarchical = HierarchicalNormalInverseWishart
        prior = column_prior("components", prior, (d, 2), allowed=(hierarchical,))
        shared: tuple[Tensor, ...] = ()
        if isinstance(prior, hierarchical):
            shared = (check_columns(prior, d).numbers.rate,)
        elif isinstance(prior, NormalInverseGamma):
            shared = (prior.concentration, prior.rate)
        elif isinstance(prior, torch.distributions.Distribution):
            raise ValueError(
                f"prior of site 'components': {type(prior).__name__} given, but diagonal and "
                "spherical covariances take bayesgen.distributions.NormalInverseGamma. Or give "
                "'loc' and 'variance' apart."
            )
        if self.spherical and any(bool((part != part.flatten()[0]).any()) for part in shared):
            raise ValueError(
                "prior of site 'components': a spherical covariance has one variance for all "
                "columns, so its concentration and rate must be the same in every column."
            )
        return prior

    @property
    def _centre(self) -> Tensor:
        if self.offset is None:
            raise ValueError("the model is not bound to data yet: call bind(as_dataset(x)) first.")
        return self.offset

    @property
    def prior_sites(self) -> tuple[str, ...]:
        return ("components", "loc", "variance")

    @property
    def priors(self) -> dict[str, Any]:
        return dict(self.given) if self.given else {"components": self._default}

    @property
    def _default(self) -> NormalInverseGamma:
        centre = self._centre
        assert self.scale is not None
        within = within_share(self.num_components, self._d)
        # E[1 / variance] = 1.5 / rate: the variance expected is (within scale)^2.
        return NormalInverseGamma(centre, 0.01, 1.5, 1.5 * (within * self.scale).square())

    @property
    def block(self) -> NormalInverseGammaBlock:
        prior, centre = self.priors.get("components"), self._centre
        c = 1 if self.spherical else self._d
        assert self.scale is not None
        rate = hyper_shape = hyper_rate = None
        if isinstance(prior, HierarchicalNormalInverseWishart):
            hyper = prior.numbers
            loc = hyper.loc
            hyper_shape, hyper_rate = float(hyper.shape), hyper.rate.to(centre)[:c]
            kappa = torch.full_like(centre, float(hyper.mean_precision))
            concentration = torch.full_like(centre, _half_df(hyper))[:c]
        elif isinstance(prior, NormalInverseGamma):
            loc = prior.loc
            kappa = self._by_column(prior.mean_precision)
            concentration = self._by_column(prior.concentration)[:c]
            rate = self._by_column(prior.rate)[:c]
        else:
            shown = ", ".join(describe(prior) for prior in self.priors.values())
            raise TypeError(
                f"the prior {shown} of the components is not conjugate, so EM, VB and Gibbs "
                "cannot use it. Give priors={'components': NormalInverseGamma(...)}, or fit with "
                "NUTS or SVI."
            )
        return NormalInverseGammaBlock(
            num_components=self.num_components,
            loc=self._by_column(loc) - centre,
            mean_precision=kappa,
            concentration=concentration,
            rate=rate,
            hyper_shape=hyper_shape,
            hyper_rate=hyper_rate,
            floor=1e-10 * self.scale.square()[:c],
        )

    def _by_column(self, value: Tensor) -> Tensor:
        return value.reshape(-1)[-self._d :].to(self._centre)

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        variance = ("component",) if self.spherical else ("component", "column")
        dims: dict[str, tuple[str, ...]] = {"loc": ("component", "column"), "variance": variance}
        if isinstance(self.priors.get("components"), HierarchicalNormalInverseWishart):
            dims["column_scale"] = () if self.spherical else ("column",)
        return dims

    @property
    def row_size(self) -> int:
        return 1 + 3 * self._d

    def to_config(self) -> dict[str, Any]:
        return {
            "spherical": self.spherical,
            "num_components": self.num_components,
            "columns": list(self.columns),
            "offset": self.offset,
            "scale": self.scale,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], priors: Mapping[str, Any]) -> Self:
        family = cls(**{**config, "columns": tuple(config["columns"])})
        return replace(family, given=family._checked(priors, len(family.columns)))

    @property
    def device(self) -> torch.device:
        return self._centre.device

    def to(self, device: torch.device) -> Self:
        assert self.scale is not None
        return replace(self, offset=self._centre.to(device), scale=self.scale.to(device))

    def invariants(self, weights: Tensor, values: Tensors) -> dict[str, Tensor]:
        inside = self._internal(values)["variance"].expand_as(values["loc"])
        return mean_and_covariance(weights, values["loc"], inside)

    # ------------------------------------------------------------ data -> scores -> statistics
    @property
    def _layout(self) -> Layout:
        return Layout(1, self._d)

    def _centred(self, x: Tensor) -> Tensor:
        return x.double() - self._centre.to(x.device)

    def observe(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Batch:
        # Centred in float64 before rounding: offsets of 1e8 then cost no digits.
        return stack_features(self._centred(x).to(dtype), torch.positive, torch.square)

    def collapsed(self, values: Tensors) -> Tensor:
        assert self.scale is not None
        spread = values["variance"] / self.scale.square()
        return (spread < 1e-8).any(-1).any(-1)

    def _natural(self, values: Tensors) -> Tensor:
        internal = self._internal(values)
        precision = 1.0 / internal["variance"]
        return diagonal_natural(internal["loc"], precision, torch.log(precision))

    def embed(self, x: Tensor) -> Tensor:
        assert self.scale is not None
        return torch.nan_to_num(self._centred(x) / self.scale.to(x.device), nan=0.0)

    # ------------------------------------------------------------ densities and draws
    def _internal(self, values: Tensors) -> dict[str, Tensor]:
        variance = values["variance"]
        return {
            "loc": values["loc"] - self._centre.to(values["loc"]),
            "variance": variance.unsqueeze(-1) if self.spherical else variance,
        }

    def export(self, values: Tensors) -> dict[str, Tensor]:
        out = dict(values)
        out["loc"] = values["loc"] + self._centre.to(values["loc"])
        if self.spherical:
            for site in ("variance", "column_scale"):
                if site in values:
                    out[site] = values[site].squeeze(-1)
        return out

    def log_predictive(self, x: Tensor, posterior: Tensors) -> Tensor:
        """Student-t: a product of one per column, or one of all columns that share a variance."""
        a, kappa = posterior["concentration"], posterior["mean_precision"]
        spread = posterior["rate"] / a * (kappa + 1.0) / kappa
        centred = self._centred(x)
        seen = ~torch.isnan(centred)
        total = x.new_zeros((kappa.shape[0], len(x)), dtype=torch.float64)
        distance, log_scale, count = torch.zeros_like(total), torch.zeros_like(total), total
        for j in range(self._d):
            delta = centred[:, j].double().nan_to_num() - posterior["loc"][:, j, None]
            distance = distance + (delta.square() / spread[:, j, None]) * seen[:, j]
            log_scale = log_scale + 0.5 * spread[:, j, None].log() * seen[:, j]
            count = count + seen[:, j]
            if not self.spherical:
                total = total + _student(a[:, j, None], count, distance, log_scale)
                distance, log_scale, count = (torch.zeros_like(total) for _ in range(3))
        if self.spherical:
            total = _student(a, count, distance, log_scale)
        return total.to(x.dtype)

    def conditional(
        self, x: Tensor, observed: Tensor, values: Tensors
    ) -> torch.distributions.Distribution:
        missing = ~observed
        loc = values["loc"][..., missing]
        variance = self._internal(values)["variance"].expand_as(values["loc"])
        scale = variance[..., missing].sqrt()
        normal = torch.distributions.Normal(per_row(loc, len(x)), per_row(scale, len(x)))
        return torch.distributions.Independent(normal, 1)

    def draw(self, values: Tensors, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        loc, variance = (by_component(values, site, labels) for site in ("loc", "variance"))
        noise = rng.standard_normal(loc.shape, generator, dtype=loc.dtype, device=loc.device)
        return loc + noise * (variance.unsqueeze(-1) if self.spherical else variance).sqrt()

    # ------------------------------------------------------------ the Pyro program
    def program(self, plate: Any, prefix: str = "") -> dict[str, Tensor]:
        priors, values = self.priors, {}
        if "loc" in priors:
            return {
                "loc": sample_site(prefix + "loc", priors["loc"], 1, plate),
                "variance": sample_site(
                    prefix + "variance", priors["variance"], 0 if self.spherical else 1, plate
                ),
            }
        prior = priors["components"]
        if isinstance(prior, HierarchicalNormalInverseWishart):
            hyper = prior.numbers
            rate = hyper.rate[0] if self.spherical else hyper.rate
            gamma = dist.Gamma(torch.full_like(rate, float(hyper.shape)), rate)
            law = gamma if self.spherical else gamma.to_event(1)
            scale = pyro.sample(prefix + "column_scale", law)
            values["column_scale"] = scale
            half = 0.5 * scale.unsqueeze(-1) if self.spherical else 0.5 * scale
            kappa = float(hyper.mean_precision)
            prior = NormalInverseGamma(hyper.loc, kappa, _half_df(hyper), half)
        elif not isinstance(prior, NormalInverseGamma):
            prior = prior()
        marginal = prior.variance_marginal()
        with plate:
            if self.spherical:
                law = dist.InverseGamma(marginal.concentration[..., 0], marginal.rate[..., 0])
                variance = pyro.sample(prefix + "variance", law)
                loc = pyro.sample(
                    prefix + "loc", prior.loc_given(variance.unsqueeze(-1)).to_event(1)
                )
            else:
                variance = pyro.sample(prefix + "variance", marginal.to_event(1))
                loc = pyro.sample(prefix + "loc", prior.loc_given(variance).to_event(1))
        return {**values, "loc": loc, "variance": variance}


def _half_df(prior: HyperNumbers) -> float:
    """Concentration of the variances on the diagonal of the inverse-Wishart."""
    return 0.5 * (float(prior.df) - len(prior.loc) + 1.0)


def _student(a: Tensor, count: Tensor, distance: Tensor, log_scale: Tensor) -> Tensor:
    """Student-t of ``count`` entries with ``2a`` degrees of freedom; zero where there are none."""
    half = 0.5 * count
    return (
        torch.lgamma(a + half)
        - torch.lgamma(a)
        - half * torch.log(2.0 * math.pi * a)
        - log_scale
        - (a + half) * torch.log1p(distance / (2.0 * a))
    )
