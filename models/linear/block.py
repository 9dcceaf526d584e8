r"""The conjugate block of loadings, mean and noise, and of the relevance of each direction.

A linear-Gaussian model is a regression of every column on the latents and a constant,

.. math::
    x_{ij} \mid z_i \sim \mathrm{N}(\lambda_j^\top (z_i, 1), 1/\tau_j), \quad
    \lambda_j \sim \mathrm{N}(m_j, \mathrm{diag}(p_j)^{-1}), \quad
    \tau_j \sim \mathrm{Gamma}(a, b_j),

with one :math:`\tau` for all columns or one each. With automatic relevance determination the prior
precision of the loadings of direction :math:`k` is :math:`\alpha_k \sim \mathrm{Gamma}(c, r)` in
every column. Loadings, noise and relevance are updated in this order, each given the others.

References:
    Bishop (1999). Variational principal components. Liu, Rubin & Wu (1998). Parameter expansion to
    accelerate EM: the PX-EM algorithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.conjugate import Block
from bayesgen.distributions._low_rank import pack, pack_outer, unpack
from bayesgen.models.linear.expansion import expand_latents, rotate_latents
from bayesgen.models.linear.relevance import Relevance, gamma_kl, gamma_log_prob

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["LoadingsBlock"]

_LOG_2PI = math.log(2.0 * math.pi)
_RIDGE = 1e-12


class _Law(NamedTuple):
    """Normal laws of the augmented loadings of each column."""

    loc: Tensor
    """``(..., d, q + 1)``."""
    tril: Tensor
    """Cholesky factors of the precisions, ``(..., d, q + 1, q + 1)``."""


@dataclass(frozen=True, eq=False)
class LoadingsBlock(Block):
    """Loadings, mean and noise of all columns, relative to the model's offset.

    Sites: ``loadings (d, q)``, ``loc (d,)``, ``variance`` of the noise ``(1,)`` or ``(d,)``, and
    ``precision (q,)`` of the directions when their relevance is learned. Statistics are those of
    :class:`~bayesgen.models.linear.latents.Latents`.

    Args:
        loc: Prior means :math:`m_j` of loadings and mean, ``(d, q + 1)``.
        precision: Their prior precisions :math:`p_j`, ``(d, q + 1)``; of the loadings they are not
            read when the relevance is learned.
        shape: :math:`a` of the noise's precision, ``(1,)`` for one noise, ``(d,)`` for one a
            column.
        rate: :math:`b`, the same.
        relevance: Prior of the directions' precisions; None when they are fixed.
        floor: Least variance of the noise in maximum likelihood, which may have no maximum else;
            of the shape of ``rate``.
    """

    loc: Tensor
    precision: Tensor
    shape: Tensor
    rate: Tensor
    relevance: Relevance | None
    floor: Tensor

    @property
    def sites(self) -> tuple[str, ...]:
        learned = () if self.relevance is None else ("precision",)
        return ("loadings", "loc", "variance", *learned)

    @property
    def _d(self) -> int:
        return self.loc.shape[0]

    @property
    def _size(self) -> int:
        return self.loc.shape[1]

    def _by_noise(self, columns: Tensor) -> Tensor:
        """Sums ``(..., d)`` over the columns that share a noise."""
        return columns.sum(-1, keepdim=True) if len(self.rate) == 1 else columns

    # ------------------------------------------------------------ the regression
    def _prior_precision(self, relevance: Tensor | None) -> Tensor:
        """``(..., d, q + 1)`` given the directions' precisions ``(..., q)``."""
        if relevance is None:
            return self.precision
        columns = relevance.unsqueeze(-2).expand(*relevance.shape[:-1], self._d, -1)
        mean = self.precision[:, -1:].expand(*relevance.shape[:-1], -1, -1)
        return torch.cat([columns, mean], -1)

    def _regress(self, statistics: Tensors, tau: Tensor, prior: Tensor) -> _Law:
        """Loadings given the noise's precision ``(..., 1 or d)``."""
        weight = tau.unsqueeze(-1)
        gram = weight.unsqueeze(-1) * unpack(statistics["second"], self._size)
        tril = torch.linalg.cholesky(gram + torch.diag_embed(prior))
        right = weight * statistics["cross"] + prior * self.loc
        return _Law(torch.cholesky_solve(right.unsqueeze(-1), tril).squeeze(-1), tril)

    def _least_squares(self, statistics: Tensors) -> Tensor:
        """Loadings without a prior; zero where nothing was observed."""
        gram = unpack(statistics["second"], self._size)
        ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        ridge = ridge.clamp_min(torch.finfo(gram.dtype).tiny ** 0.5)
        tril = torch.linalg.cholesky(gram + torch.diag_embed(ridge.expand(gram.shape[:-1])))
        tril = tril.expand(*statistics["cross"].shape, self._size)
        return torch.cholesky_solve(statistics["cross"].unsqueeze(-1), tril).squeeze(-1)

    def _residual(self, statistics: Tensors, loadings: Tensor, second: Tensor) -> Tensor:
        """Expected sum of squared residuals of each column, ``(..., d)``."""
        gram = unpack(statistics["second"], self._size)
        fitted = (gram * second).sum((-2, -1))
        crossed = (loadings * statistics["cross"]).sum(-1)
        return (statistics["square"] - 2.0 * crossed + fitted).clamp_min(0.0)

    def _at(self, statistics: Tensors, loadings: Tensor) -> Tensor:
        outer = loadings.unsqueeze(-1) * loadings.unsqueeze(-2)
        return self._residual(statistics, loadings, outer)

    def _first(self, statistics: Tensors) -> tuple[Tensor, Tensor | None]:
        """A first guess of the noise's and the directions' precisions, from least squares."""
        loadings = self._least_squares(statistics)
        tau = self._noise_mode(statistics, self._at(statistics, loadings))
        return tau, self._relevance_guess(loadings)

    def _noise_mode(self, statistics: Tensors, residual: Tensor) -> Tensor:
        """The mode of the noise's precision, in the basis of its logarithm."""
        half = 0.5 * self._by_noise(statistics["count"])
        return (self.shape + half) / (self.rate + 0.5 * self._by_noise(residual))

    def _relevance_guess(self, loadings: Tensor) -> Tensor | None:
        if self.relevance is None:
            return None
        square = loadings[..., :-1].square().sum(-2)
        first = self._d / square.clamp_min(torch.finfo(square.dtype).tiny)
        return self.relevance.mode(first, square, self._d)

    def _relevance_mode(self, loadings: Tensor, previous: Tensor | None) -> Tensor | None:
        if self.relevance is None:
            return None
        if previous is None:
            return self._relevance_guess(loadings)
        return self.relevance.mode(previous, loadings[..., :-1].square().sum(-2), self._d)

    # ------------------------------------------------------------ variational Bayes
    @staticmethod
    def _covariance(tril: Tensor) -> Tensor:
        return torch.cholesky_inverse(tril)

    def _second(self, posterior: Tensors) -> Tensor:
        loc = posterior["loc"]
        spread = self._covariance(posterior["precision_tril"])
        return spread + loc.unsqueeze(-1) * loc.unsqueeze(-2)

    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        relevance: Tensor | None
        if previous is None:
            tau, relevance = self._first(statistics)
        else:
            tau = previous["concentration"] / previous["rate"]
            relevance = self._expected_relevance(previous)
        law = self._regress(statistics, tau, self._prior_precision(relevance))
        posterior = {"loc": law.loc, "precision_tril": law.tril}
        second = self._second(posterior)
        residual = self._by_noise(self._residual(statistics, law.loc, second))
        posterior["concentration"] = self.shape + 0.5 * self._by_noise(statistics["count"])
        posterior["rate"] = self.rate + 0.5 * residual
        if self.relevance is not None:
            square = second.diagonal(dim1=-2, dim2=-1)[..., :-1].sum(-2)
            posterior |= self.relevance.update(previous, square, self._d)
        return posterior

    def _expected_relevance(self, posterior: Tensors) -> Tensor | None:
        return None if self.relevance is None else self.relevance.expected(posterior)

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        shape, rate = posterior["concentration"], posterior["rate"]
        second = pack(self._second(posterior))
        return self._message(
            posterior["loc"], second, shape / rate, torch.digamma(shape) - rate.log()
        )

    def _message(
        self, loc: Tensor, second: Tensor, tau: Tensor, log_tau: Tensor
    ) -> dict[str, Tensor]:
        columns = loc.shape[:-1]
        return {
            "gram": tau.unsqueeze(-1) * second,
            "linear": tau.unsqueeze(-1) * loc,
            "precision": tau.expand(columns),
            "log_precision": log_tau.expand(columns),
        }

    def kl(self, posterior: Tensors) -> Tensor:
        loc, tril = posterior["loc"], posterior["precision_tril"]
        relevance = self._expected_relevance(posterior)
        prior = self._prior_precision(relevance)
        log_prior = prior.log()
        kl = gamma_kl(posterior["concentration"], posterior["rate"], self.shape, self.rate).sum(-1)
        if self.relevance is not None:
            log_alpha = self.relevance.expected_log(posterior)
            log_prior = torch.cat(
                [
                    log_alpha.unsqueeze(-2).expand(*prior.shape[:-1], -1),
                    log_prior[..., -1:],
                ],
                -1,
            )
            kl = kl + self.relevance.kl(posterior)
        spread = self._covariance(tril).diagonal(dim1=-2, dim2=-1)
        quadratic = prior * (spread + (loc - self.loc).square())
        log_det = 2.0 * tril.diagonal(dim1=-2, dim2=-1).log()
        return kl + 0.5 * (quadratic - 1.0 + log_det - log_prior).sum((-2, -1))

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        def repeat(name: str) -> Tensor:
            value = posterior[name]
            return value.expand(num_samples, *value.shape)

        law = _Law(repeat("loc"), repeat("precision_tril"))
        tau = rng.gamma(repeat("concentration"), generator) / repeat("rate")
        relevance = None
        if self.relevance is not None:
            names = ("relevance_concentration", "relevance_rate")
            repeated = {name: repeat(name) for name in names}
            relevance = self.relevance.draw_posterior(repeated, generator=generator)
        return self._values(self._draw_loadings(law, generator), tau, relevance)

    @staticmethod
    def _draw_loadings(law: _Law, generator: torch.Generator) -> Tensor:
        loc = law.loc
        noise = rng.standard_normal(loc.shape, generator, dtype=loc.dtype, device=loc.device)
        step = torch.linalg.solve_triangular(law.tril.mT, noise.unsqueeze(-1), upper=True)
        return loc + step.squeeze(-1)

    def _values(
        self, loadings: Tensor, tau: Tensor, relevance: Tensor | None
    ) -> dict[str, Tensor]:
        values = {
            "loadings": loadings[..., :-1],
            "loc": loadings[..., -1],
            "variance": tau.reciprocal(),
        }
        return values if relevance is None else {**values, "precision": relevance}

    # ------------------------------------------------------------ EM
    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        """Loadings given the noise, then the noise, each at its mode.

        The mode is in the basis of the logarithms of ``variance`` and ``precision``. Maximum
        likelihood lets the latents' covariance float, and takes its root into the loadings, which
        saves most of EM's steps.
        """
        if flat:
            return self._maximise_flat(statistics)
        relevance: Tensor | None
        if previous is None:
            tau, relevance = self._first(statistics)
        else:
            tau, relevance = previous["variance"].reciprocal(), previous.get("precision")
        law = self._regress(statistics, tau, self._prior_precision(relevance))
        tau = self._noise_mode(statistics, self._at(statistics, law.loc))
        return self._values(law.loc, tau, self._relevance_mode(law.loc, relevance))

    def _maximise_flat(self, statistics: Tensors) -> dict[str, Tensor]:
        loadings = self._least_squares(statistics)
        count = self._by_noise(statistics["count"])
        residual = self._by_noise(self._at(statistics, loadings))
        # A column without any entry has no likelihood: its noise stays at the prior's guess.
        guess = self.rate / self.shape
        variance = torch.where(count > 0, residual / count.clamp_min(1.0), guess)
        variance = torch.maximum(variance, self.floor)
        expanded = self._expand(statistics["latent"], loadings)
        return self._values(expanded, variance.reciprocal(), self._relevance_guess(expanded))

    def _expand(self, latent: Tensor, loadings: Tensor) -> Tensor:
        """Loadings of standard latents, from those of latents with any mean and covariance."""
        q = self._size - 1
        moments = unpack(latent, self._size)
        rows = moments[..., -1:, -1:]
        mean = moments[..., :q, -1:] / rows
        covariance = moments[..., :q, :q] / rows - mean @ mean.mT
        root, info = torch.linalg.cholesky_ex(covariance)
        weights = loadings[..., :q]
        loc = loadings[..., q:] + weights @ mean
        expanded = torch.cat([weights @ root, loc], -1)
        return torch.where((info == 0)[..., None, None], expanded, loadings)

    def log_prior(self, values: Tensors) -> Tensor:
        augmented = self._augment(values)
        prior = self._prior_precision(values.get("precision"))
        square = prior * (augmented - self.loc).square()
        total = 0.5 * (prior.log() - _LOG_2PI - square).sum((-2, -1))
        total = total + self.log_noise_prior(values)
        if self.relevance is None:
            return total
        return total + self.relevance.log_prior(values["precision"])

    def log_noise_prior(self, values: Tensors) -> Tensor:
        """Log prior density of the logarithms of the noise's variances, ``(...)``."""
        tau = values["variance"].reciprocal()
        return gamma_log_prob(tau, self.shape, self.rate).sum(-1)

    # ------------------------------------------------------------ Gibbs
    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        relevance: Tensor | None
        if previous is None:
            tau, relevance = self._first(statistics)
        else:
            tau = previous["variance"].reciprocal()
            statistics, relevance = self._move_latents(statistics, previous, generator)
        law = self._regress(statistics, tau, self._prior_precision(relevance))
        loadings = self._draw_loadings(law, generator)
        residual = self._by_noise(self._at(statistics, loadings))
        shape = self.shape + 0.5 * self._by_noise(statistics["count"])
        tau = rng.gamma(shape, generator) / (self.rate + 0.5 * residual)
        if self.relevance is not None:
            assert relevance is not None
            square = loadings[..., :-1].square().sum(-2)
            rate = self.relevance.draw_rate(relevance, generator=generator)
            relevance = self.relevance.draw(rate, square, self._d, generator=generator)
        return self._values(loadings, tau, relevance)

    def _move_latents(
        self, statistics: Tensors, values: Tensors, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Moves of the latents that plain Gibbs is slow in, and the directions' precisions."""
        augmented, relevance, law = self._augment(values), values.get("precision"), self.relevance
        if law is not None:
            assert relevance is not None
            rate = law.draw_rate(relevance, generator=generator)
            statistics, augmented = rotate_latents(
                statistics,
                augmented,
                lambda square: law.log_marginal(rate, square, self._d),
                generator=generator,
            )
            square = augmented[..., :-1].square().sum(-2)
            relevance = law.draw(rate, square, self._d, generator=generator)
        prior = self._prior_precision(relevance)

        def log_prior(loadings: Tensor) -> Tensor:
            return -0.5 * (prior * (loadings - self.loc).square()).sum((-2, -1))

        order = prior[..., :-1].mean(-2).argsort(-1)
        moved = expand_latents(statistics, augmented, log_prior, order, generator=generator)
        return moved, relevance

    @staticmethod
    def _augment(values: Tensors) -> Tensor:
        return torch.cat([values["loadings"], values["loc"].unsqueeze(-1)], -1)

    def natural(self, values: Tensors) -> dict[str, Tensor]:
        augmented = self._augment(values)
        tau = values["variance"].reciprocal()
        return self._message(augmented, pack_outer(augmented), tau, tau.log())
