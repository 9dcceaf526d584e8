"""Robust PCA: rows or cells with scales of their own, so that an outlier costs no more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Continued, Tensors, Weighted
from bayesgen.conjugate import Local
from bayesgen.distributions import PartialLowRankMultivariateStudentT, PartialMultivariateStudentT
from bayesgen.distributions._low_rank import LowRankForm, low_rank_form
from bayesgen.models.families.degrees_of_freedom import DegreesOfFreedom, default_df_prior
from bayesgen.models.linear.base import LinearModel, scale_tril_of
from bayesgen.models.linear.cell_laws import CellConditional, CellLatents, CellRows
from bayesgen.models.linear.cells import Cells, draw_cells, draw_latents, draw_scales, expect_cells
from bayesgen.models.linear.latent_integral import TOLERANCE
from bayesgen.models.linear.robust import RobustBlock
from bayesgen.models.linear.rows import Rows, Sums

__all__ = ["RobustPCA"]

_SCALES = ("rows", "cells")


@final
@dataclass(frozen=True, eq=False)
class RobustPCA(LinearModel, Continued, Weighted):
    r"""Probabilistic PCA with Student-t rows, or cells, missing entries integrated out.

    .. math::
        u_i \sim \mathrm{Gamma}(\nu/2, \nu/2), \quad
        z_i \mid u_i \sim \mathrm{N}(0, I_q / u_i), \quad
        x_i \mid z_i, u_i \sim \mathrm{N}(W z_i + \mu, \sigma^2 I_d / u_i),

    so that :math:`x_i \sim t_\nu(\mu, W W^\top + \sigma^2 I_d)`. A row far from the others gets a
    small scale :math:`u_i` and counts for little: it costs its own row, and not the mean or the
    directions. The degrees of freedom are learned; large ones are plain PPCA. All is exact.

    With ``scales="cells"`` every cell has a scale, and every column its degrees of freedom:

    .. math::
        z_i \sim \mathrm{N}(0, I_q), \quad
        u_{ij} \sim \mathrm{Gamma}(\nu_j/2, \nu_j/2), \quad
        x_{ij} \mid z_i, u_{ij} \sim \mathrm{N}(w_j^\top z_i + \mu_j, \sigma^2 / u_{ij}),

    so that a bad cell costs itself, and its row's other cells count in full. Then

    * the density of a row has no closed form. :meth:`log_prob`, :meth:`encode` and
      :meth:`condition` come from weighted points of its latent, added until the standard error is
      0.01 nats (:meth:`log_prob_error` has it); where 131,072 leave 0.02 a
      warning says so;
    * EM maximises a lower bound of the likelihood, that of the best normal latents and Gamma
      scales independent of them; VB's bound is theirs as well. Gibbs and NUTS are exact;
    * ``noise_scale`` and the covariance are those of cells of scale one.

    Priors and defaults are those of :class:`~bayesgen.models.ppca.PPCA`, scaled by medians and
    median absolute deviations instead of means and standard deviations, with ``"df"`` any
    distribution of one positive number, by default ``Gamma(2, 0.1)``; EM, VB and Gibbs cut it to
    0.1 ... 1000. ``noise_scale`` and the loadings are those of a row of scale one: the covariance
    is :math:`\nu / (\nu - 2)` times as large, where it exists.

    References:
        Archambeau, Delannay & Verleysen (2006). Robust probabilistic projections. Juárez & Steel
        (2010). Model-based clustering of non-Gaussian panel data based on skew-t distributions.
        Luttinen, Ilin & Karhunen (2012). Bayesian robust PCA of incomplete data.

    Args:
        latent_dim: Number of latents ``q``, below the number of columns.
        priors: By site: ``"loadings"``, ``"loc"``, ``"noise_scale"``, ``"df"``.
        df: Degrees of freedom; None when they are learned.
        scales: What has a scale of its own: ``"rows"`` or ``"cells"``.

    Raises:
        ValueError: What :class:`~bayesgen.models.ppca.PPCA` refuses; ``df`` not positive, or with
            a prior though it is fixed; other ``scales``.

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
    scales: str = "rows"

    @property
    def is_shared(self) -> bool:
        return True

    @property
    def is_robust(self) -> bool:
        return True

    @property
    def is_cellwise(self) -> bool:
        return self.scales == "cells"

    @property
    def learns_df(self) -> bool:
        return self.df is None

    def __post_init__(self) -> None:
        if self.scales not in _SCALES:
            raise ValueError(
                f"RobustPCA: scales={self.scales!r}, but it must be one of {', '.join(_SCALES)}."
            )
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
        each = "\n  a scale for each cell" if self.is_cellwise else ""
        return super().__repr__() + each + fixed

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        df = ("column",) if self.is_cellwise else ()
        own: dict[str, tuple[str, ...]] = {} if self.df is not None else {"df": df}
        dims = {"scatter" if k == "covariance" else k: v for k, v in super().dims.items()}
        return {**dims, **own}

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Of cells, the standard error at which the estimate of a log density is good enough."""
        return {"log_prob_tolerance": TOLERANCE} if self.is_cellwise else {}

    def invariants(self, draws: Tensors) -> dict[str, Tensor]:
        """As for PPCA, with ``scatter`` for the covariance: that of rows or cells of scale one."""
        found = super().invariants(draws)
        return {"scatter" if k == "covariance" else k: v for k, v in found.items()}

    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), "df": self.df, "scales": self.scales}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        # Fits that were saved before there were cells do not name them.
        scales = config.get("scales", _SCALES[0])
        return replace(super().from_config(config), df=config["df"], scales=scales)

    # ------------------------------------------------------------ densities and draws
    def _df(self, values: Tensors) -> Tensor:
        """Degrees of freedom, ``(...)``; of cells ``(..., d)``."""
        if self.df is None:
            return values["df"]
        loc = values["loc"]
        return torch.full_like(loc if self.is_cellwise else loc[..., 0], float(self.df))

    def _observe(self, values: Tensors, batch: Tensor) -> None:
        if not self.is_cellwise:
            super()._observe(values, batch)
            return
        # Cells' scales are integrated out; the latents, which then have no closed form, are sites.
        zero = torch.zeros_like(batch[..., :1]).expand(*batch.shape[:-1], self.latent_dim)
        latents = pyro.sample("latents", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
        signal = values["loc"] + latents @ values["loadings"].mT
        law = dist.StudentT(self._df(values), signal, values["noise_scale"].unsqueeze(-1))
        missing = batch.isnan()
        if bool(missing.any()):
            law, batch = law.mask(~missing), torch.where(missing, 0.0, batch)
        pyro.sample("x", law.to_event(1), obs=batch)

    def _cells(self, x: Tensor, draws: Tensors) -> CellRows:
        return CellRows(x, draws["loc"], draws["loadings"], draws["noise_scale"], self._df(draws))

    def log_prob(self, x: Tensor, draws: Tensors) -> Tensor:
        if not self.is_cellwise:
            return super().log_prob(x, draws)
        return self._cells(x, draws).log_prob()[0]

    @property
    def is_estimated(self) -> bool:
        return self.is_cellwise

    def log_prob_error(self, x: Tensor, draws: Tensors) -> Tensor:
        """Standard error ``(*draw, n)`` of :meth:`log_prob`, in nats: zero with scales of rows."""
        if not self.is_cellwise:
            return torch.zeros_like(super().log_prob(x, draws))
        return self._cells(x, draws).log_prob()[1]

    def cell_weights(self, x: Tensor, draws: Tensors) -> Tensor:
        r"""Expected scales of the cells of rows, :math:`E[u_{ij} \mid x_i]`, ``(*draw, n, d)``.

        About one for a cell that fits, near zero for one that does not, ``NaN`` for one that is
        missing. With scales of rows all cells of a row have the row's.
        """
        if self.is_cellwise:
            return self._cells(x, draws).moments()[2]
        shift = x - draws["loc"].unsqueeze(-2)
        found = low_rank_form(shift, x.isnan(), draws["loadings"], self._noise(draws))
        weight = self._widen(found, self._df(draws))[1].square().reciprocal().unsqueeze(-1)
        return weight.expand(shift.shape).masked_fill(x.isnan(), torch.nan)

    def _observation(self, values: Tensors) -> PartialLowRankMultivariateStudentT:
        return PartialLowRankMultivariateStudentT(
            self._df(values),
            values["loc"],
            values["loadings"],
            self._noise(values).square(),
            validate_args=False,
        )

    def _sample_latents(self, draws: Tensors, *, generator: torch.Generator) -> Tensor:
        if self.is_cellwise:
            return super()._sample_latents(draws, generator=generator)
        df = self._df(draws)
        scale = (rng.chi2(df, generator) / df).sqrt().unsqueeze(-1)
        return super()._sample_latents(draws, generator=generator) / scale

    def sample(self, draws: Tensors, *, generator: torch.Generator) -> Tensor:
        if self.is_cellwise:
            signal, df = self.sample_signal(draws, generator=generator), self._df(draws)
            noise = rng.standard_normal(signal.shape, generator, signal.dtype, signal.device)
            noise = noise / (rng.chi2(df, generator) / df).sqrt().to(noise)
            return signal + self._noise(draws) * noise
        # Latent and noise share a row's scale: both are normal before it divides them.
        return self._observation(draws).sample(generator=generator)

    @staticmethod
    def _widen(found: LowRankForm, df: Tensor) -> tuple[Tensor, Tensor]:
        """Degrees of freedom and root scale ``(..., n)`` given the observed entries."""
        df = df.unsqueeze(-1)
        more = df + found.form.size
        return more, ((df + found.form.square) / more).sqrt()

    def encode(self, x: Tensor, draws: Tensors) -> PartialMultivariateStudentT | CellLatents:
        """Student-t: each observed entry adds a degree of freedom, an odd row widens it.

        With scales of cells, the law that weighted points stand for.
        """
        if self.is_cellwise:
            return CellLatents(self._cells(x, draws))
        shift = x - draws["loc"].unsqueeze(-2)
        found = low_rank_form(shift, x.isnan(), draws["loadings"], self._noise(draws))
        more, widen = self._widen(found, self._df(draws))
        tril = scale_tril_of(found.precision_tril) * widen[..., None, None]
        return PartialMultivariateStudentT(more, found.loc, tril, validate_args=False)

    def condition(
        self, x: Tensor, observed: Tensor, draws: Tensors
    ) -> PartialLowRankMultivariateStudentT | CellConditional:
        if self.is_cellwise:
            shown = torch.where(observed, x, torch.nan)
            return CellConditional(self._cells(shown, draws), observed)
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
            degrees = DegreesOfFreedom.fixed(float(self.df), device)
        else:
            degrees = DegreesOfFreedom.learned(self._df_prior(), device)
        return RobustBlock(self._block, degrees, self.is_cellwise)

    def _df_prior(self) -> torch.distributions.Distribution:
        """The prior of one number: engines on conjugate blocks take one for all columns."""
        prior = self.priors.get("df", default_df_prior(torch.ones((), dtype=torch.float64)))
        is_law = isinstance(prior, torch.distributions.Distribution)
        if not is_law or prior.batch_shape:
            what = "one for each column" if is_law else "a callable"
            raise TypeError(
                f"the prior of 'df' is {what}, so EM, VB and Gibbs cannot use it. Give a "
                "distribution of one number such as Gamma(2, 0.1), or fit with NUTS or SVI."
            )
        return prior

    @property
    def blocks(self) -> Mapping[str, RobustBlock]:
        return {"loadings": self._robust}

    def export(self, values: Mapping[str, Tensors]) -> dict[str, Tensor]:
        out = super().export(values)
        out.pop("stretch", None)
        if "df" in out and not self.is_cellwise:
            out["df"] = out["df"].squeeze(-1)
        return out

    # ------------------------------------------------------------ Continued
    @property
    def continues(self) -> bool:
        return self.is_cellwise

    @property
    def num_passes(self) -> int:
        return 2 if self.is_cellwise and self.learns_df else 1

    def local_after(
        self,
        observed: Rows,
        messages: Mapping[str, Tensors],
        left: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Local:
        """What is left are scales ``(..., b, d)``, or latents ``(..., b, q)``, which are fewer."""
        message = messages["loadings"]
        if left is not None and left.shape[-1] == self.latent_dim:
            assert generator is not None
            return _local(draw_scales(observed, message, left, generator=generator))
        if left is not None and "stretch" in message:
            left = left * message["stretch"].unsqueeze(-1).to(left.dtype)
        if generator is None:
            return _local(expect_cells(observed, message, left))
        draw = draw_latents if self.learns_df else draw_cells
        return _local(draw(observed, message, left, generator=generator))

    def local(
        self,
        observed: Sums | Rows,
        messages: Mapping[str, Tensors],
        *,
        generator: torch.Generator | None = None,
    ) -> Local:
        if not self.is_cellwise:
            return super().local(observed, messages, generator=generator)
        assert isinstance(observed, Rows)
        message = messages["loadings"]
        if generator is None:
            return _local(expect_cells(observed, message))
        return _local(draw_cells(observed, message, None, generator=generator))


def _local(cells: Cells) -> Local:
    return Local({"loadings": cells.found.statistics}, cells.found.bound, {"left": cells.left})
