"""Probabilistic PCA and factor analysis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayesgen.capabilities import Solution, Solvable
from bayesgen.models.linear.base import LinearModel
from bayesgen.models.linear.rows import Sums, pool, sum_rows
from bayesgen.models.linear.spectrum import (
    Spectrum,
    exact_spectrum,
    probabilistic,
    randomised_spectrum,
)

__all__ = ["PPCA", "FactorAnalysis"]

_METHODS = ("auto", "exact", "randomised")
_LARGE, _SMALL = 2000, 2**18


def _is_exact(num_rows: int, num_columns: int, method: str) -> bool:
    """Whether all eigenvalues are computed, not those of a random subspace."""
    fits = num_rows < num_columns or num_columns <= _LARGE
    return method == "exact" or (method == "auto" and fits)


@final
@dataclass(frozen=True, eq=False, repr=False)
class PPCA(LinearModel, Solvable):
    r"""Probabilistic principal component analysis, missing entries integrated out exactly.

    .. math::
        z_i \sim \mathrm{N}(0, I_q), \qquad
        x_i \mid z_i \sim \mathrm{N}(W z_i + \mu, \sigma^2 I_d), \qquad
        x_i \sim \mathrm{N}(\mu, W W^\top + \sigma^2 I_d)

    The columns of ``W`` span the principal subspace; the likelihood leaves their rotation open.
    Its maximum is known in closed form (engine
    :class:`~bayesgen.inference.closed_form.ClosedForm`); EM finds it with missing entries too, and
    VB, Gibbs, SVI and NUTS the posterior under the priors.

    Default priors, with ``s`` the root mean variance of the columns: each loading ``N(0, s^2)``,
    the mean ``N(sample mean, (10 s)^2)``, the noise's variance inverse-gamma, worth one
    observation of a thousandth of ``s``.

    References:
        Tipping & Bishop (1999). Probabilistic principal component analysis. JRSS B 61.

    Args:
        latent_dim: Number of latents ``q``, below the number of columns.
        priors: By site: ``"loadings"`` ``(d, q)``, ``"loc"`` ``(d,)``, ``"noise_scale"`` ``()``.
            EM, VB and Gibbs need ``Normal``, ``Normal`` and
            :class:`~bayesgen.distributions.RootInverseGamma`.

    Raises:
        ValueError: ``latent_dim`` below 1 or not below the number of columns; an unknown site, or
            a prior that does not fit.

    Example:
        >>> from bayesgen import datasets
        >>> from bayesgen.inference import EM
        >>> from bayesgen.models import PPCA
        >>> fit = EM(objective="likelihood").run(PPCA(2), datasets.load("iris"), seed=0)
        >>> fit.log_prob([[5.1, 3.5, 1.4, float("nan")]])
        tensor([-2.2682], dtype=torch.float64)
    """

    @property
    def is_shared(self) -> bool:
        return True

    def takes_products(self, num_rows: int, num_columns: int, method: str) -> bool:
        # Squaring the rows halves the digits of small eigenvalues: small data are spared that.
        is_small = num_rows < num_columns or num_rows * num_columns <= _SMALL
        return not is_small and _is_exact(num_rows, num_columns, method)

    def solve(
        self,
        passes: Callable[[], Iterable[Tensor]],
        *,
        products: Tensor | None,
        restricted: bool,
        method: str,
        generator: torch.Generator,
    ) -> Solution:
        bound, d = self._bound, len(self._bound.columns)
        if method not in _METHODS:
            raise ValueError(f"method={method!r}, but it must be one of {', '.join(_METHODS)}.")
        if not bound.is_complete:
            raise ValueError(
                "the closed form needs complete rows, but some entries are missing; use "
                "EM(objective='likelihood'), which integrates them out."
            )
        offset = bound.scales.offset
        if products is not None:
            count = products.new_tensor(float(bound.num_rows))
            loc = torch.zeros_like(offset)
            spectrum = exact_spectrum(products, count, self.latent_dim, is_root=False)
        elif _is_exact(bound.num_rows, d, method):
            is_root = not self.takes_products(bound.num_rows, d, method)
            spectrum, loc, count = self._exact(passes, is_root=is_root)
        else:
            spectrum, loc, count = self._randomised(passes, generator)
        unbiased = count / (count - 1.0) if restricted and count > 1.0 else 1.0
        values, vectors, rest = spectrum
        spectrum = Spectrum(values * unbiased, vectors, rest * unbiased)
        floor = self._block.floor[0]
        loadings, variance = probabilistic(spectrum, d, floor)
        inside = torch.maximum(spectrum.values, variance)
        log_det = inside.log().sum() + (d - self.latent_dim) * variance.log()
        trace = ((spectrum.values / inside).sum() + spectrum.rest / variance) / unbiased
        log_likelihood = -0.5 * count * (d * math.log(2.0 * math.pi) + log_det + trace)
        messages: tuple[str, ...] = ()
        if bool(variance <= floor):
            messages = (
                "the latents explain the rows without any noise, where the likelihood has no "
                "maximum; use a smaller latent_dim, or EM(objective='posterior').",
            )
        found = {"loadings": loadings, "loc": loc + offset, "noise_scale": variance.sqrt()}
        return Solution(found, float(log_likelihood), messages)

    def _exact(
        self, passes: Callable[[], Iterable[Tensor]], *, is_root: bool
    ) -> tuple[Spectrum, Tensor, Tensor]:
        offset = self._bound.scales.offset
        total: Sums | None = None
        for rows in passes():
            here = sum_rows(rows - offset, rows.dtype, is_root=is_root)
            total = here if total is None else pool(total, here)
        assert total is not None
        loc = total.total / total.count
        # The offset is the mean up to rounding: what is left of it is taken out of the moments.
        matrix = (
            total.matrix - loc
            if total.is_root
            else total.matrix - total.count * loc.unsqueeze(-1) * loc
        )
        spectrum = exact_spectrum(matrix, total.count, self.latent_dim, is_root=total.is_root)
        return spectrum, loc, total.count

    def _randomised(
        self, passes: Callable[[], Iterable[Tensor]], generator: torch.Generator
    ) -> tuple[Spectrum, Tensor, Tensor]:
        offset = self._bound.scales.offset
        count, square = torch.zeros_like(offset[0]), torch.zeros_like(offset[0])
        total = torch.zeros_like(offset)
        for rows in passes():
            centred = rows - offset
            count, square = count + len(rows), square + centred.square().sum()
            total = total + centred.sum(0)
        loc = total / count
        spread = square / count - loc.square().sum()
        spectrum = randomised_spectrum(
            passes, offset + loc, spread, count, self.latent_dim, generator=generator
        )
        return spectrum, loc, count


@final
@dataclass(frozen=True, eq=False, repr=False)
class FactorAnalysis(LinearModel):
    r"""Factor analysis: as :class:`PPCA`, but each column has a noise of its own.

    .. math::
        z_i \sim \mathrm{N}(0, I_q), \qquad
        x_i \mid z_i \sim \mathrm{N}(W z_i + \mu, \mathrm{diag}(\psi_1^2, \dots, \psi_d^2))

    Rescaling a column rescales its loadings and noise, and changes nothing else. Default priors
    are those of :class:`PPCA` with the standard deviation of each column in the place of ``s``.

    References:
        Rubin & Thayer (1982). EM algorithms for ML factor analysis. Liu, Rubin & Wu (1998).
        Parameter expansion to accelerate EM: the PX-EM algorithm.

    Args:
        latent_dim: Number of factors ``q``, below the number of columns.
        priors: By site: ``"loadings"`` ``(d, q)``, ``"loc"`` ``(d,)``, ``"noise_scale"`` ``(d,)``.
            EM, VB and Gibbs need ``Normal``, ``Normal`` and
            :class:`~bayesgen.distributions.RootInverseGamma`.

    Raises:
        ValueError: What :class:`PPCA` refuses.

    Example:
        >>> from bayesgen.models import FactorAnalysis
        >>> FactorAnalysis(3).latent_dim
        3
    """

    @property
    def is_shared(self) -> bool:
        return False
