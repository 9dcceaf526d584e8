"""Robust PCA: rows with scales of their own, so that an outlier costs its own row alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, final

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Tensors
from bayesgen.distributions import PartialLowRankMultivariateStudentT, PartialMultivariateStudentT
from bayesgen.distributions._low_rank import LowRankForm, low_rank_form
from bayesgen.models.families.degrees_of_freedom import DegreesOfFreedom
from bayesgen.models.linear.base import LinearModel, scale_tril_of
from bayesgen.models.linear.robust import RobustBlock

__all__ = ["RobustPCA"]


@final
@dataclass(frozen=True, eq=False)
class RobustPCA(LinearModel):
    r"""Probabilistic PCA with Student-t rows, missing entries integrated out exactly.

    .. math::
        u_i \sim \mathrm{Gamma}(\nu/2, \nu/2), \quad
        z_i \mid u_i \sim \mathrm{N}(0, I_q / u_i), \quad
        x_i \mid z_i, u_i \sim \mathrm{N}(W z_i + \mu, \sigma^2 I_d / u_i),

    so that :math:`x_i \sim t_\nu(\mu, W W^\top + \sigma^2 I_d)`. A row far from the others gets a
    small scale :math:`u_i` and counts for little: it costs its own row, and not the mean or the
    directions. The degrees of freedom are learned; large ones are plain PPCA.

    Priors and defaults are those of :class:`~bayesgen.models.ppca.PPCA`, with ``"df"`` any
    distribution of one positive number, by default ``Gamma(2, 0.1)``; EM, VB and Gibbs cut it to
    0.1 ... 1000. ``noise_scale`` and the loadings are those of a row of scale one: the covariance
    is :math:`\nu / (\nu - 2)` times as large, where it exists.

    References:
        Archambeau, Delannay & Verleysen (2006). Robust probabilistic projections. Juárez & Steel
        (2010). Model-based clustering of non-Gaussian panel data based on skew-t distributions.

    Args:
        latent_dim: Number of latents ``q``, below the number of columns.
        priors: By site: ``"loadings"``, ``"loc"``, ``"noise_scale"``, ``"df"``.
        df: Degrees of freedom; None when they are learned.

    Raises:
        ValueError: What :class:`~bayesgen.models.ppca.PPCA` refuses; ``df`` not positive, or with
            a prior though it is fixed.

    Example:
        >>> from bayesgen.inference import EM
        >>> from bayesgen.models import RobustPCA
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> x[0] = 1000.0
        >>> fit = EM(num_starts=1).run(RobustPCA(1), x, seed=0)
        >>> bool(fit.draws["loc"].abs().max() < 1.0)
        True
    """

    df: float | None = None

    @property
    def is_shared(self) -> bool:
        return True

    @property
    def is_robust(self) -> bool:
        return True

    @property
    def learns_df(self) -> bool:
        return self.df is None

    def __post_init__(self) -> None:
        if self.df is not None and not 0.0 < float(self.df) < math.inf:
            raise ValueError(
                f"RobustPCA: df={self.df!r}, but it must be a positive finite number."
            )
        if "df" in self.priors and self.df is not None:
            raise ValueError(
                f"RobustPCA(df={self.df}) is fixed, but priors has one for 'df': drop one."
            )
        super().__post_init__()

    # ------------------------------------------------------------ Model
    def __repr__(self) -> str:
        fixed = "" if self.df is None else f"\n  df = {self.df:g}"
        return super().__repr__() + fixed

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        own: dict[str, tuple[str, ...]] = {} if self.df is not None else {"df": ()}
        dims = {"scatter" if k == "covariance" else k: v for k, v in super().dims.items()}
        return {**dims, **own}

    def invariants(self, draws: Tensors) -> dict[str, Tensor]:
        """As for PPCA, with ``scatter`` for the covariance: that of a row of scale one."""
        found = super().invariants(draws)
        return {"scatter" if k == "covariance" else k: v for k, v in found.items()}

    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), "df": self.df}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return replace(super().from_config(config), df=config["df"])

    # ------------------------------------------------------------ densities and draws
    def _df(self, values: Tensors) -> Tensor:
        """Degrees of freedom, ``(...)``."""
        if self.df is None:
            return values["df"]
        return torch.full_like(values["loc"][..., 0], float(self.df))

    def _observation(self, values: Tensors) -> PartialLowRankMultivariateStudentT:
        return PartialLowRankMultivariateStudentT(
            self._df(values),
            values["loc"],
            values["loadings"],
            self._noise(values).square(),
            validate_args=False,
        )

    def _sample_latents(self, draws: Tensors, *, generator: torch.Generator) -> Tensor:
        df = self._df(draws)
        scale = (rng.chi2(df, generator) / df).sqrt().unsqueeze(-1)
        return super()._sample_latents(draws, generator=generator) / scale

    def sample(self, draws: Tensors, *, generator: torch.Generator) -> Tensor:
        # Latent and noise share a row's scale: both are normal before it divides them.
        return self._observation(draws).sample(generator=generator)

    @staticmethod
    def _widen(found: LowRankForm, df: Tensor) -> tuple[Tensor, Tensor]:
        """Degrees of freedom and root scale ``(..., n)`` given the observed entries."""
        df = df.unsqueeze(-1)
        more = df + found.form.size
        return more, ((df + found.form.square) / more).sqrt()

    def encode(self, x: Tensor, draws: Tensors) -> PartialMultivariateStudentT:
        """Student-t: each observed entry adds a degree of freedom, an odd row widens it."""
        shift = x - draws["loc"].unsqueeze(-2)
        found = low_rank_form(shift, x.isnan(), draws["loadings"], self._noise(draws))
        more, widen = self._widen(found, self._df(draws))
        tril = scale_tril_of(found.precision_tril) * widen[..., None, None]
        return PartialMultivariateStudentT(more, found.loc, tril, validate_args=False)

    def condition(
        self, x: Tensor, observed: Tensor, draws: Tensors
    ) -> PartialLowRankMultivariateStudentT:
        law, found = self._rest(x, observed, draws)
        more, widen = self._widen(found, self._df(draws))
        return PartialLowRankMultivariateStudentT(
            more,
            law.loc,
            law.cov_factor * widen[..., None, None],
            law.cov_diag * widen.square().unsqueeze(-1),
            validate_args=False,
        )

    # ------------------------------------------------------------ Conjugate
    @cached_property
    def _robust(self) -> RobustBlock:
        device = self._bound.scales.offset.device
        if self.df is not None:
            return RobustBlock(self._block, DegreesOfFreedom.fixed(float(self.df), device))
        prior = self.all_priors["df"]
        if not isinstance(prior, torch.distributions.Distribution):
            raise TypeError(
                "the prior of 'df' is a callable, so EM, VB and Gibbs cannot use it. Give a "
                "distribution such as Gamma(2, 0.1), or fit with NUTS or SVI."
            )
        return RobustBlock(self._block, DegreesOfFreedom.learned(prior, device))

    @property
    def blocks(self) -> Mapping[str, RobustBlock]:
        return {"loadings": self._robust}

    def export(self, values: Mapping[str, Tensors]) -> dict[str, Tensor]:
        out = super().export(values)
        if "df" in out:
            out["df"] = out["df"].squeeze(-1)
        return out
