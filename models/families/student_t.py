"""Student-t components: Gaussians whose rows have scales of their own, so outliers weigh less."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.conjugate import MarginalBlock
from bayesgen.models.families.base import Evaluation, Family, refuse_categories
from bayesgen.models.families.degrees_of_freedom import (
    DegreesOfFreedom,
    default_df_prior,
    log_constant,
)
from bayesgen.models.families.factorised import by_component, sample_site
from bayesgen.models.families.gaussian import Gaussian, quadratic_scores
from bayesgen.models.families.normal_inverse_wishart import NormalInverseWishartBlock
from bayesgen.models.families.quadratic import (
    Group,
    Quadratic,
    conditional_maps,
    features,
    moments,
)
from bayesgen.priors import check_prior

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.data import Dataset

__all__ = ["StudentT", "StudentTBlock"]

_LOG_2PI = math.log(2.0 * math.pi)
_START_DF = 8.0


@dataclass(frozen=True)
class StudentTBlock(MarginalBlock):
    """Location and scale matrix by the normal-inverse-Wishart block, degrees of freedom beside.

    Statistics are ``moments`` weighted by the local scales, ``count`` of the rows, and
    ``log_scale``, the sum of the logarithms of the local scales.

    Args:
        normal: The block of ``loc`` and ``scale_tril``.
        degrees: The degrees of freedom.
    """

    normal: NormalInverseWishartBlock
    degrees: DegreesOfFreedom

    @property
    def sites(self) -> tuple[str, ...]:
        return (*self.normal.sites, *(() if self.degrees.is_fixed else ("df",)))

    def _values(self, values: Tensors, df: Tensor) -> dict[str, Tensor]:
        return dict(values) if self.degrees.is_fixed else {**values, "df": df}

    def _df(self, values: Tensors) -> Tensor:
        if self.degrees.is_fixed:
            return self.degrees.grid.expand(values["loc"].shape[:-1])
        return values["df"]

    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        normal = self.normal.update(statistics, previous)
        return {**normal, **self.degrees.update(statistics)}

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        return {**self.normal.message(posterior), **self.degrees.message(posterior)}

    def kl(self, posterior: Tensors) -> Tensor:
        return self.normal.kl(posterior) + self.degrees.kl(posterior)

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        own = {name: value for name, value in posterior.items() if name != "log_df"}
        values = self.normal.sample(own, num_samples, generator=generator)
        return self._values(
            values, self.degrees.sample(posterior, num_samples, generator=generator)
        )

    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        values = self.normal.maximise(statistics, previous, flat=flat)
        return self._values(values, self.degrees.maximise(statistics, flat=flat))

    def log_prior(self, values: Tensors) -> Tensor:
        return self.normal.log_prior(values) + self.degrees.log_prior(values)

    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        values = self.normal.draw(statistics, previous, generator=generator)
        return self._values(values, self.degrees.draw(statistics, previous, generator=generator))

    def natural(self, values: Tensors) -> dict[str, Tensor]:
        return {**self.normal.natural(values), **self.degrees.natural(self._df(values))}

    def log_evidence(self, statistics: Tensors, values: Tensors) -> Tensor:
        """Of rows and local scales together; rows of ``d`` columns whose scale is ``u``."""
        rows = self.normal.log_evidence(statistics, values)
        log_scale = statistics["log_scale"].double()
        scales = self.degrees.log_evidence(statistics)
        more = scales + 0.5 * self.normal.loc.shape[0] * log_scale
        return rows + (more.sum(-1) if self.normal.tied else more)


@dataclass(frozen=True, eq=False)
class StudentT(Family):
    r"""Multivariate Student-t components, missing entries integrated out exactly.

    .. math::
        u_i \mid k \sim \mathrm{Gamma}(\nu_k/2, \nu_k/2), \quad
        x_i \mid u_i, k \sim \mathrm{N}(\mu_k, \Sigma_k / u_i)

    The local scales :math:`u_i` are integrated out of every density; given them all is conjugate,
    and a row far from every component counts for little. Location and scale matrix have the prior
    of :class:`~bayesgen.models.families.gaussian.Gaussian`; the degrees of freedom have by
    default ``Gamma(2, 0.1)`` (mode 10, mean 20), which favours heavy tails and allows Gaussian
    ones.

    There is no closed posterior predictive: the log density of new rows under a fit is the
    log-mean-exp over its draws, with their Monte Carlo error.

    Priors: ``"components"``, or ``"loc"`` and ``"scale_tril"`` apart, as for the Gaussian;
    ``"df"`` is any distribution of one positive number, cut to 0.1 ... 1000 in EM, variational
    Bayes and Gibbs.

    References:
        Peel & McLachlan (2000). Robust mixture modelling using the t distribution.
        Juárez & Steel (2010). Model-based clustering of non-Gaussian panel data based on skew-t
        distributions.

    Args:
        tied: One scale matrix for all components.
        df: Degrees of freedom of all components; None when each component learns its own.

    Raises:
        ValueError: ``df`` is not positive, or has a prior though it is fixed.

    Example:
        >>> from bayesgen.models import Mixture
        >>> Mixture(StudentT(df=4.0), num_components=3).num_components
        3
    """

    tied: bool = False
    df: float | None = None
    gaussian: Gaussian | None = None
    given: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.df is not None and not 0.0 < float(self.df) < math.inf:
            raise ValueError(f"StudentT: df={self.df!r}, but it must be a positive finite number.")

    # ------------------------------------------------------------ description
    def bind(self, data: Dataset, num_components: int, priors: Mapping[str, Any]) -> Self:
        given = dict(priors)
        if "df" in given:
            if self.df is not None:
                raise ValueError(
                    f"StudentT(df={self.df}) is fixed, but priors has one for 'df': drop one."
                )
            _check_df(given["df"])
        own = {site: prior for site, prior in given.items() if site != "df"}
        refuse_categories(data, "StudentT")
        gaussian = Gaussian(tied=self.tied).bind(data, num_components, own)
        return replace(self, gaussian=gaussian, given=given)

    def describe(self) -> str:
        matrix = "one scale matrix for all" if self.tied else "full scale matrix"
        return f"StudentT, {matrix}" + ("" if self.df is None else f", df={self.df:g}")

    @property
    def _normal(self) -> Gaussian:
        if self.gaussian is None:
            raise ValueError("the model is not bound to data yet: call bind(as_dataset(x)) first.")
        return self.gaussian

    @property
    def _d(self) -> int:
        return len(self._normal.columns)

    @property
    def prior_sites(self) -> tuple[str, ...]:
        return (*Gaussian().prior_sites, "df")

    @property
    def _df_prior(self) -> Any:
        default = default_df_prior(torch.ones((), dtype=torch.float64))
        return (self.given or {}).get("df", default)

    @property
    def priors(self) -> dict[str, Any]:
        own = self._normal.priors
        return own if self.df is not None else {**own, "df": self._df_prior}

    @property
    def block(self) -> StudentTBlock:
        device = self.device
        if self.df is not None:
            return StudentTBlock(self._normal.block, DegreesOfFreedom.fixed(self.df, device))
        prior = self._df_prior
        if not isinstance(prior, torch.distributions.Distribution):
            raise TypeError(
                "the prior of 'df' is a callable, so EM, VB and Gibbs cannot use it. Give a "
                "distribution such as Gamma(2, 0.1), or fit with NUTS or SVI."
            )
        return StudentTBlock(self._normal.block, DegreesOfFreedom.learned(prior, device))

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        own = self._normal.dims
        return own if self.df is not None else {**own, "df": ("component",)}

    @property
    def row_size(self) -> int:
        return self._normal.row_size + self._normal.num_components

    def to_config(self) -> dict[str, Any]:
        return {"tied": self.tied, "df": self.df, "gaussian": self._normal.to_config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], priors: Mapping[str, Any]) -> Self:
        own = {site: prior for site, prior in priors.items() if site != "df"}
        gaussian = Gaussian.from_config(config["gaussian"], own)
        return cls(config["tied"], config["df"], gaussian, dict(priors))

    def coords(self) -> dict[str, list[Any]]:
        return self._normal.coords()

    @property
    def device(self) -> torch.device:
        return self._normal.device

    def to(self, device: torch.device) -> Self:
        return replace(self, gaussian=self._normal.to(device))

    @property
    def invariant_dims(self) -> dict[str, tuple[str, ...]]:
        return {"location": ("column",), "scatter": ("column", "column_2")}

    def invariants(self, weights: Tensor, values: Tensors) -> dict[str, Tensor]:
        """``location`` and ``scatter``: those of the mixture if every local scale were 1.

        The mean and the covariance themselves need not exist.
        """
        own = self._normal.invariants(weights, values)
        return {"location": own["mean"], "scatter": own["covariance"]}

    # ------------------------------------------------------------ data -> scores -> statistics
    def observe(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Quadratic:
        return self._normal.observe(x, dtype)

    def collapsed(self, values: Tensors) -> Tensor:
        return self._normal.collapsed(values)

    def collapsible(self, observed: Quadratic) -> bool:
        return False

    def evaluate(self, observed: Quadratic, message: Tensors) -> Evaluation:
        d, df = observed.num_columns, message["df"]
        parts: tuple[Tensor, Tensor] | None = None
        for group in observed.groups:
            products, log_det = quadratic_scores(group, message, d)
            p, distance = len(group.observed), (-2.0 * products).clamp_min_(0.0)
            power, dtype = 0.5 * (df + p), distance.dtype
            constant = 0.5 * (log_det - p * _LOG_2PI) + message["df_constant"]
            constant = constant + torch.lgamma(power) - power * torch.log(0.5 * df)
            shrunk = torch.log1p(distance / df.unsqueeze(-1).to(dtype))
            scores = constant.unsqueeze(-1).to(dtype) - power.unsqueeze(-1).to(dtype) * shrunk
            if group.rows is None:
                return Evaluation(scores, distance)
            if parts is None:
                shape = (*scores.shape[:-1], observed.num_rows)
                parts = scores.new_empty(shape), scores.new_empty(shape)
            parts[0][..., group.rows], parts[1][..., group.rows] = scores, distance
        if parts is None:
            raise ValueError("a batch without rows has no scores.")
        return Evaluation(*parts)

    def statistics(
        self,
        observed: Quadratic,
        responsibilities: Tensor,
        evaluation: Evaluation | None,
        message: Tensors | None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        count = responsibilities.double().sum(-1)
        if evaluation is None or message is None:
            # As if the scales had followed their law: otherwise the start would look Gaussian.
            start = 0.5 * torch.tensor(_START_DF, dtype=torch.float64, device=count.device)
            log_scale = count * (torch.digamma(start) - torch.log(start))
            packed = moments(observed, responsibilities, responsibilities, None)
            return {"moments": packed, "count": count, "log_scale": log_scale}
        scale, log_scale = _local_scales(
            observed, responsibilities, evaluation, message, generator
        )
        packed = moments(
            observed,
            responsibilities * scale,
            responsibilities,
            message["natural"],
            generator=generator,
        )
        total = (responsibilities * log_scale).double().sum(-1)
        return {"moments": packed, "count": count, "log_scale": total}

    def inner(self, message: Tensors, statistics: Tensors) -> Tensor:
        packed, count, log_scale = (statistics[name] for name in ("moments", "count", "log_scale"))
        half = 0.5 * message["df"]
        constant = 0.5 * (message["log_det"] - self._d * _LOG_2PI) + message["df_constant"]
        per_component = (
            (message["natural"] * packed).sum(-1)
            + constant * count
            + (0.5 * self._d + half - 1.0) * log_scale
            - half * packed[..., 0]
        )
        return per_component.sum(-1)

    def rows(self, statistics: Tensors) -> Tensor:
        return statistics["count"]

    def embed(self, x: Tensor) -> Tensor:
        return self._normal.embed(x)

    # ------------------------------------------------------------ densities and draws
    def _df(self, values: Tensors) -> Tensor:
        if self.df is None:
            return values["df"]
        return torch.full_like(values["loc"][..., 0], float(self.df))

    def _message(self, values: Tensors) -> dict[str, Tensor]:
        df = self._df(values)
        return {**self._normal._message(values), "df": df, "df_constant": log_constant(df)}

    def export(self, values: Tensors) -> dict[str, Tensor]:
        return self._normal.export(values)

    def log_prob(self, x: Tensor, values: Tensors) -> Tensor:
        return self.evaluate(self.observe(x), self._message(values)).scores

    def log_predictive(self, x: Tensor, posterior: Tensors) -> None:
        """None: with the local scales' parameters integrated out there is no closed form."""

    def conditional(
        self, x: Tensor, observed: Tensor, values: Tensors
    ) -> torch.distributions.Distribution:
        """Student-t with a degree of freedom more for each observed column."""
        every = torch.arange(self._d, device=x.device)
        given = self._normal._centred(x)[:, observed]
        group = Group(None, every[observed], every[~observed], features(given))
        message = self._message(values)
        maps = conditional_maps(message["natural"], group, self._d)
        products, _ = quadratic_scores(group, message, self._d)
        df, more = message["df"].unsqueeze(-1), message["df"].unsqueeze(-1) + given.shape[1]
        widen = ((df + (-2.0 * products).clamp_min(0.0)) / more).sqrt().transpose(-1, -2)
        loc = torch.einsum("...kmp,np->...nkm", maps.slope, given) + maps.offset.unsqueeze(-3)
        factor = torch.linalg.cholesky(maps.covariance).unsqueeze(-4)
        return dist.MultivariateStudentT(
            more.transpose(-1, -2).expand(widen.shape),
            loc + self._normal._centre[group.missing],
            factor * widen[..., None, None],
            validate_args=False,
        )

    def draw(self, values: Tensors, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        gaussian = self._normal.draw(values, labels, generator=generator)
        loc = by_component(values, "loc", labels)
        df = by_component({"df": self._df(values)}, "df", labels)
        scale = rng.chi2(df, generator) / df
        return loc + (gaussian - loc) / scale.sqrt().unsqueeze(-1)

    # ------------------------------------------------------------ the Pyro program
    def program(self, plate: Any, prefix: str = "") -> dict[str, Tensor]:
        values = self._normal.program(plate, prefix)
        if self.df is not None:
            return values
        return {**values, "df": sample_site(prefix + "df", self._df_prior, 0, plate)}


def _check_df(prior: Any) -> None:
    check_prior("df", prior, event_shape=())
    if not isinstance(prior, torch.distributions.Distribution):
        return
    support = prior.support
    assert support is not None
    if prior.batch_shape or bool(support.check(torch.tensor(-1.0))):
        raise ValueError(
            f"prior of site 'df': {type(prior).__name__} of batch {tuple(prior.batch_shape)} and "
            f"support {support} given, but it must be one positive number, as Gamma(2, 0.1)."
        )


def _local_scales(
    observed: Quadratic,
    responsibilities: Tensor,
    evaluation: Evaluation,
    message: Tensors,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """``E[u]`` and ``E[log u]`` of rows by component, or drawn ones: ``(..., K or 1, n)``."""
    distance = evaluation.distances
    assert distance is not None
    df, d = message["df"].unsqueeze(-1), observed.num_columns
    if len(observed.groups) == 1 and observed.groups[0].rows is None:
        num_observed = torch.tensor([d], device=distance.device)
    else:
        num_observed = torch.zeros(observed.num_rows, dtype=torch.int64, device=distance.device)
        for group in observed.groups:
            num_observed[group.rows] = len(group.observed)
    if generator is None:
        # One value for each number of observed columns: digamma of every row would cost most.
        shape = 0.5 * (df + torch.arange(d + 1, device=df.device))
        rate = 0.5 * (df.to(distance.dtype) + distance)
        scale = shape[..., num_observed].to(rate.dtype) / rate
        return scale, torch.digamma(shape)[..., num_observed].to(rate.dtype) - rate.log()
    # Only the component that a row is assigned to matters.
    own_df = (responsibilities.double() * df).sum(-2, keepdim=True)
    own_distance = (responsibilities * distance).double().sum(-2, keepdim=True)
    log_gamma = rng.log_gamma_sample(0.5 * (own_df + num_observed), generator)
    log_scale = log_gamma - torch.log(0.5 * (own_df + own_distance))
    return log_scale.exp(), log_scale
