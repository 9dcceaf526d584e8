"""Gaussian components with a full covariance each, or one shared by all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.distributions import InverseWishartCholesky, NormalInverseWishart
from bayesgen.models.families.base import Evaluation, Family, refuse_categories
from bayesgen.models.families.normal_inverse_wishart import (
    NormalInverseWishartBlock,
    point_message,
)
from bayesgen.models.families.quadratic import (
    Group,
    Quadratic,
    conditional_maps,
    group_rows,
    marginal_natural,
    moments,
    num_features,
)
from bayesgen.models.families.spread import conditional_scales, within_share
from bayesgen.priors import HierarchicalNormalInverseWishart, check_prior, describe

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.data import Dataset

__all__ = [
    "Gaussian",
    "check_columns",
    "column_scales",
    "full_log_prob",
    "positive_scales",
    "quadratic_scores",
]

_MEAN_PRECISION = 0.01
_LOG_2PI = math.log(2.0 * math.pi)


def column_scales(data: Dataset) -> tuple[Tensor, Tensor]:
    """Centre and scale of each column, ``(d,)`` each; constant columns get a scale as well."""
    summary = data.summary()
    # A column without any entry: its components follow the prior, on whatever scale.
    empty = summary.count == 0
    centre = summary.mean.double().masked_fill(empty, 0.0)
    scale = summary.variance.double().sqrt().masked_fill(empty, 1.0)
    vast = ~torch.isfinite(centre.square() + scale.square())
    if bool(vast.any()):
        name = data.columns[int(vast.nonzero()[0])]
        raise ValueError(
            f"column {name!r} holds numbers so large that their squares overflow; entries must "
            "stay below 1e150 in size. Divide the column by a constant."
        )
    return centre, positive_scales(centre, scale)


def positive_scales(centre: Tensor, scale: Tensor) -> Tensor:
    """The scales of columns; a constant one gets a scale that rounding at its size cannot fill."""
    smallest = 1e-6 * centre.abs().clamp_min(1.0)
    return torch.where(scale > 1e-9 * centre.abs().clamp_min(1e-300), scale, smallest)


def check_columns(
    prior: HierarchicalNormalInverseWishart, num_columns: int
) -> HierarchicalNormalInverseWishart:
    """Refuse a complete prior that is for another number of columns."""
    length = len(prior.numbers.loc)
    if length != num_columns:
        raise ValueError(
            f"prior of site 'components': loc has {length} entries, but the data have "
            f"{num_columns} columns."
        )
    return prior


def _default_scale(spread: Tensor, num_components: int) -> Tensor:
    """Square roots ``(d,)`` of the diagonal scale matrix of the default prior."""
    d = len(spread)
    # E[precision]_jj = df / scale_jj: the conditional variance expected is (within spread)^2.
    return within_share(num_components, d) * (d + 2.0) ** 0.5 * spread


def quadratic_scores(group: Group, message: Tensors, d: int) -> tuple[Tensor, Tensor]:
    """Minus half the squared distances ``(..., K, m)`` of a group, and its log determinants."""
    natural, log_det = marginal_natural(message["natural"], message["log_det"], group, d)
    return natural.to(group.features.dtype) @ group.features, log_det


def _normalised(natural: Tensor, log_det: Tensor, p: int) -> Tensor:
    """Natural parameters ``(..., F)`` of ``p`` columns with the normaliser in their constant."""
    constant = 0.5 * (log_det - p * _LOG_2PI)
    return torch.cat([natural[..., :1] + constant.unsqueeze(-1), natural[..., 1:]], dim=-1)


def full_log_prob(batch: Quadratic, message: Tensors) -> Tensor:
    """Gaussian scores ``(..., K, n)`` of a batch; the normaliser rides along in the product."""
    d = batch.num_columns
    parts: Tensor | None = None
    for group in batch.groups:
        if "normalised" in message and len(group.missing) == 0:
            natural = message["normalised"]
        else:
            natural = _normalised(
                *marginal_natural(message["natural"], message["log_det"], group, d),
                len(group.observed),
            )
        scores = natural.to(group.features.dtype) @ group.features
        if group.rows is None:
            return scores
        if parts is None:
            parts = scores.new_empty((*scores.shape[:-1], batch.num_rows))
        parts[..., group.rows] = scores
    if parts is None:
        raise ValueError("a batch without rows has no scores.")
    return parts


@dataclass(frozen=True, eq=False)
class Gaussian(Family):
    r"""Gaussian components :math:`x \mid k \sim \mathrm{N}(\mu_k, \Sigma_k)`.

    The default prior is normal-inverse-Wishart, weakly informative and scaled to the data: the
    mean's prior sits at the data's mean and is worth a hundredth of an observation; the
    covariance's has ``d + 2`` degrees of freedom and a diagonal scale matrix, such that each
    column given the others is expected to spread half as far within a component as in the data as
    a whole, and no further than ``K`` components side by side would: ``K^(-1/d)`` as far, which
    counts in one and two dimensions.

    References:
        Fraley & Raftery (2007). Bayesian regularization for normal mixture estimation and
        model-based clustering.

    Args:
        tied: One covariance for all components.
    """

    tied: bool = False
    num_components: int = 0
    offset: Tensor | None = None
    scale: Tensor | None = None
    spread: Tensor | None = None
    columns: tuple[str, ...] = ()
    given: Mapping[str, Any] | None = None

    # ------------------------------------------------------------ description
    def bind(self, data: Dataset, num_components: int, priors: Mapping[str, Any]) -> Self:
        refuse_categories(data, "a Gaussian")
        offset, scale = column_scales(data)
        d = len(offset)
        if "components" in priors and ("loc" in priors or "scale_tril" in priors):
            raise ValueError(
                "priors has both 'components' and 'loc' or 'scale_tril': give the joint prior or "
                "its parts."
            )
        if ("loc" in priors) != ("scale_tril" in priors):
            raise ValueError(
                "priors for 'loc' and 'scale_tril' come together; one of them is missing."
            )
        if "components" in priors:
            prior = priors["components"]
            check_prior(
                "components",
                prior,
                event_shape=(d, d + 1) if isinstance(prior, dist.Distribution) else None,
                allowed=(HierarchicalNormalInverseWishart,),
            )
            if isinstance(prior, dist.Distribution) and not isinstance(
                prior, NormalInverseWishart
            ):
                raise ValueError(
                    f"prior of site 'components': {type(prior).__name__} given, but full and tied "
                    "covariances "
                    "take bayesgen.distributions.NormalInverseWishart. Or give 'loc' and "
                    "'scale_tril' apart."
                )
            if isinstance(prior, HierarchicalNormalInverseWishart):
                spread = conditional_scales(data, offset, scale)
                expected = _default_scale(spread, num_components).square()
                priors = {"components": check_columns(prior.scaled(offset, expected), d)}
        for site, shape in (("loc", (d,)), ("scale_tril", (d, d))):
            if site in priors:
                check_prior(site, priors[site], event_shape=shape)
        return replace(
            self,
            num_components=num_components,
            offset=offset,
            scale=scale,
            spread=None if priors else conditional_scales(data, offset, scale),
            columns=data.columns,
            given=dict(priors),
        )

    def describe(self) -> str:
        return "Gaussian, one covariance for all" if self.tied else "Gaussian, full covariance"

    @property
    def _centre(self) -> Tensor:
        if self.offset is None:
            raise ValueError("the model is not bound to data yet: call bind(as_dataset(x)) first.")
        return self.offset

    @property
    def _d(self) -> int:
        return len(self._centre)

    @property
    def prior_sites(self) -> tuple[str, ...]:
        return ("components", "loc", "scale_tril")

    @property
    def priors(self) -> dict[str, Any]:
        if self.given:
            return dict(self.given)
        return {"components": self._default}

    @property
    def _default(self) -> NormalInverseWishart:
        df = self._d + 2.0
        assert self.spread is not None
        return NormalInverseWishart(
            self._centre,
            torch.tensor(_MEAN_PRECISION, dtype=torch.float64),
            torch.tensor(df, dtype=torch.float64),
            torch.diag(_default_scale(self.spread, self.num_components)),
        )

    @property
    def block(self) -> NormalInverseWishartBlock:
        prior = self.priors.get("components")
        assert self.scale is not None
        if isinstance(prior, HierarchicalNormalInverseWishart):
            hyper = prior.numbers
            scale, shape, rate = None, hyper.shape, hyper.rate.to(self._centre)
            loc, kappa, df = hyper.loc, float(hyper.mean_precision), float(hyper.df)
        elif isinstance(prior, NormalInverseWishart) and prior.batch_shape.numel() == 1:
            tril = prior.scale_tril.reshape(self._d, self._d).to(self._centre)
            scale, shape, rate = tril @ tril.mT, None, None
            loc, kappa, df = prior.loc.reshape(-1), float(prior.mean_precision), float(prior.df)
        else:
            shown = ", ".join(describe(prior) for prior in self.priors.values())
            raise TypeError(
                f"the prior {shown} of the components is not conjugate, so EM, VB and Gibbs "
                "cannot use it. Give priors={'components': NormalInverseWishart(...)}, or fit "
                "with NUTS or SVI."
            )
        return NormalInverseWishartBlock(
            num_components=self.num_components,
            loc=loc.to(self._centre) - self._centre,
            mean_precision=kappa,
            df=df,
            scale=scale,
            shape=shape,
            rate=rate,
            tied=self.tied,
            floor=1e-10 * self.scale**2,
        )

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        covariance = ("column", "column_2") if self.tied else ("component", "column", "column_2")
        dims: dict[str, tuple[str, ...]] = {
            "loc": ("component", "column"),
            "scale_tril": covariance,
        }
        if isinstance(self.priors.get("components"), HierarchicalNormalInverseWishart):
            dims["column_scale"] = ("column",)
        return dims

    @property
    def row_size(self) -> int:
        return num_features(self._d)

    def to_config(self) -> dict[str, Any]:
        return {
            "tied": self.tied,
            "num_components": self.num_components,
            "offset": self.offset,
            "scale": self.scale,
            "spread": self.spread,
            "columns": list(self.columns),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], priors: Mapping[str, Any]) -> Self:
        return cls(**{**config, "columns": tuple(config["columns"])}, given=dict(priors))

    def coords(self) -> dict[str, list[Any]]:
        return {"column": list(self.columns), "column_2": list(self.columns)}

    @property
    def device(self) -> torch.device:
        return self._centre.device

    def to(self, device: torch.device) -> Self:
        assert self.scale is not None
        spread = None if self.spread is None else self.spread.to(device)
        return replace(
            self, offset=self._centre.to(device), scale=self.scale.to(device), spread=spread
        )

    def invariants(self, weights: Tensor, values: Tensors) -> dict[str, Tensor]:
        loc, factor = values["loc"], values["scale_tril"]
        mean = (weights.unsqueeze(-1) * loc).sum(-2)
        delta = loc - mean.unsqueeze(-2)
        between = torch.einsum("...k,...ki,...kj->...ij", weights, delta, delta)
        inside = factor @ factor.mT
        if not self.tied:
            inside = (weights[..., None, None] * inside).sum(-3)
        return {"mean": mean, "covariance": between + inside}

    # ------------------------------------------------------------ data -> scores -> statistics
    def _centred(self, x: Tensor) -> Tensor:
        return x.double() - self._centre.to(x.device)

    def observe(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Quadratic:
        # Centred in float64 before rounding: offsets of 1e8 then cost no digits.
        return group_rows(self._centred(x), dtype)

    def collapsed(self, values: Tensors) -> Tensor:
        assert self.scale is not None
        diagonal = torch.diagonal(values["scale_tril"], dim1=-2, dim2=-1) / self.scale
        return (diagonal < 1e-4).any(-1).any(-1)

    def collapsible(self, observed: Quadratic) -> bool:
        return all(len(group.missing) == 0 for group in observed.groups)

    def ready(self, message: Tensors, dtype: torch.dtype) -> Tensors:
        normalised = _normalised(message["natural"], message["log_det"], self._d)
        return {**message, "normalised": normalised.to(dtype)}

    def evaluate(self, observed: Quadratic, message: Tensors) -> Evaluation:
        return Evaluation(full_log_prob(observed, message))

    def statistics(
        self,
        observed: Quadratic,
        responsibilities: Tensor,
        evaluation: Evaluation | None,
        message: Tensors | None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        natural = None if message is None else message["natural"]
        return {
            "moments": moments(
                observed, responsibilities, responsibilities, natural, generator=generator
            )
        }

    def inner(self, message: Tensors, statistics: Tensors) -> Tensor:
        packed = statistics["moments"]
        normaliser = 0.5 * (message["log_det"] - self._d * _LOG_2PI)
        return ((message["natural"] * packed).sum(-1) + normaliser * packed[..., 0]).sum(-1)

    def rows(self, statistics: Tensors) -> Tensor:
        return statistics["moments"][..., 0]

    def embed(self, x: Tensor) -> Tensor:
        assert self.scale is not None
        return torch.nan_to_num(self._centred(x) / self.scale.to(x.device), nan=0.0)

    # ------------------------------------------------------------ densities and draws, data's
    # units
    def _internal(self, values: Tensors) -> dict[str, Tensor]:
        factor = values["scale_tril"]
        return {
            "loc": values["loc"] - self._centre.to(values["loc"]),
            "scale_tril": factor.unsqueeze(-3) if self.tied else factor,
        }

    def export(self, values: Tensors) -> dict[str, Tensor]:
        factor = values["scale_tril"]
        out = dict(values)
        out["loc"] = values["loc"] + self._centre.to(values["loc"])
        out["scale_tril"] = factor.squeeze(-3) if self.tied else factor
        return out

    def _message(self, values: Tensors) -> dict[str, Tensor]:
        internal = self._internal(values)
        return point_message(internal["loc"], internal["scale_tril"])

    def log_prob(self, x: Tensor, values: Tensors) -> Tensor:
        return full_log_prob(self.observe(x), self._message(values))

    def log_predictive(self, x: Tensor, posterior: Tensors) -> Tensor:
        d = self._d
        kappa = posterior["mean_precision"]
        df = (posterior["df"] - d + 1.0).expand(kappa.shape)
        widen = ((kappa + 1.0) / (kappa * df)).sqrt()[..., None, None]
        factor = posterior["scale_tril"] * widen
        message = point_message(posterior["loc"], factor)
        batch = self.observe(x)
        out = x.new_empty((len(kappa), len(x)))
        for group in batch.groups:
            scores, group_log_det = quadratic_scores(group, message, d)
            p = len(group.observed)
            constant = (
                torch.lgamma(0.5 * (df + p))
                - torch.lgamma(0.5 * df)
                - 0.5 * p * torch.log(math.pi * df)
                + 0.5 * group_log_det
            )
            distance = (-2.0 * scores).clamp_min(0.0)
            log_density = constant.unsqueeze(-1) - 0.5 * (df + p).unsqueeze(-1) * torch.log1p(
                distance / df.unsqueeze(-1)
            )
            rows = slice(None) if group.rows is None else group.rows
            out[:, rows] = log_density.to(out.dtype)
        return out

    def conditional(
        self, x: Tensor, observed: Tensor, values: Tensors
    ) -> torch.distributions.Distribution:
        every = torch.arange(self._d, device=x.device)
        group = Group(None, every[observed], every[~observed], x.new_empty(0))
        maps = conditional_maps(self._message(values)["natural"], group, self._d)
        given = self._centred(x)[:, group.observed]
        loc = torch.einsum("...kmp,np->...nkm", maps.slope, given) + maps.offset.unsqueeze(-3)
        factor = torch.linalg.cholesky(maps.covariance).unsqueeze(-4)
        return torch.distributions.MultivariateNormal(
            loc + self._centre[group.missing], scale_tril=factor.expand(*loc.shape, loc.shape[-1])
        )

    def draw(self, values: Tensors, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        index = torch.arange(len(labels), device=labels.device)
        loc = values["loc"][index, labels]
        factor = values["scale_tril"] if self.tied else values["scale_tril"][index, labels]
        noise = rng.standard_normal(loc.shape, generator, dtype=loc.dtype, device=loc.device)
        return loc + (factor @ noise.unsqueeze(-1)).squeeze(-1)

    # ------------------------------------------------------------ the Pyro program
    def program(self, plate: Any, prefix: str = "") -> dict[str, Tensor]:
        priors, values = self.priors, {}
        if "loc" in priors:
            return self._program_by_site(priors, plate, prefix)
        prior = priors["components"]
        if isinstance(prior, HierarchicalNormalInverseWishart):
            hyper = prior.numbers
            shape = torch.full_like(hyper.rate, hyper.shape)
            scale = pyro.sample(prefix + "column_scale", dist.Gamma(shape, hyper.rate).to_event(1))
            values["column_scale"] = scale
            prior = NormalInverseWishart(
                hyper.loc,
                torch.as_tensor(hyper.mean_precision, dtype=scale.dtype),
                torch.as_tensor(hyper.df, dtype=scale.dtype),
                torch.diag_embed(scale.sqrt()),
            )
        elif not isinstance(prior, NormalInverseWishart):
            prior = prior()
        covariance: InverseWishartCholesky = prior.scale_tril_marginal()
        if self.tied:
            factor = pyro.sample(prefix + "scale_tril", covariance)
            with plate:
                loc = pyro.sample(prefix + "loc", prior.loc_given(factor))
        else:
            with plate:
                factor = pyro.sample(prefix + "scale_tril", covariance)
                loc = pyro.sample(prefix + "loc", prior.loc_given(factor))
        return {**values, "loc": loc, "scale_tril": factor}

    @staticmethod
    def _program_by_site(priors: Mapping[str, Any], plate: Any, prefix: str) -> dict[str, Tensor]:
        values = {}
        with plate:
            for site, event_dim in (("loc", 1), ("scale_tril", 2)):
                prior = priors[site]
                law = prior if isinstance(prior, dist.Distribution) else prior()
                missing = event_dim - len(law.event_shape)
                values[site] = pyro.sample(
                    prefix + site, law.to_event(missing) if missing > 0 else law
                )
        return values
