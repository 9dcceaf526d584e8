r"""The conjugate blocks of mixture weights: Dirichlet, fixed or learned, and sticks.

EM takes modes in the softmax (log-ratio) basis, where a sparse prior has an interior mode:
:math:`w_k \propto N_k + e_k`.

References:
    MacKay (1998). Choice of basis for Laplace approximation.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.conjugate import MarginalBlock

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["DirichletBlock", "GammaDirichletBlock", "StickBreakingBlock", "WeightsBlock"]

_TINY = 1e-300


class WeightsBlock(MarginalBlock):
    """A block over ``log_weights``; its statistics are the counts of the components."""

    @property
    @abstractmethod
    def exchangeable(self) -> bool:
        """Whether the prior treats all components alike."""

    @property
    def sites(self) -> tuple[str, ...]:
        return ("log_weights",)

    def natural(self, values: Tensors) -> dict[str, Tensor]:
        return {"log_weights": values["log_weights"]}

    @abstractmethod
    def log_mean(self, posterior: Tensors) -> Tensor:
        """``log E[weights]`` under the posterior, ``(..., K)``: the predictive weights."""


def _dirichlet_entropy_part(concentration: Tensor, log_weights: Tensor) -> Tensor:
    """``E[log Dirichlet(w; concentration)]`` given ``E[log w]``."""
    return (
        torch.lgamma(concentration.sum(-1))
        - torch.lgamma(concentration).sum(-1)
        + ((concentration - 1.0) * log_weights).sum(-1)
    )


def _expected_log(concentration: Tensor) -> Tensor:
    return torch.digamma(concentration) - torch.digamma(concentration.sum(-1, keepdim=True))


def _log_multinomial_evidence(count: Tensor, concentration: Tensor) -> Tensor:
    """``log p(labels | concentration)`` with the weights integrated out."""
    total = concentration.sum(-1)
    return (
        torch.lgamma(total)
        - torch.lgamma(total + count.sum(-1))
        + (torch.lgamma(concentration + count) - torch.lgamma(concentration)).sum(-1)
    )


def _softmax_mode(counts: Tensor) -> Tensor:
    # Without a prior an empty component has weight 0; its finite logarithm keeps products finite.
    positive = counts.clamp_min(_TINY)
    return torch.log(positive) - torch.log(positive.sum(-1, keepdim=True))


@dataclass(frozen=True)
class DirichletBlock(WeightsBlock):
    """``weights ~ Dirichlet(concentration)``, ``(K,)``."""

    concentration: Tensor

    @property
    def exchangeable(self) -> bool:
        return bool((self.concentration == self.concentration[0]).all())

    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        return {"dirichlet": self.concentration + statistics["count"].double()}

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        return {"log_weights": _expected_log(posterior["dirichlet"])}

    def log_mean(self, posterior: Tensors) -> Tensor:
        return _softmax_mode(posterior["dirichlet"])

    def kl(self, posterior: Tensors) -> Tensor:
        log_weights = _expected_log(posterior["dirichlet"])
        return _dirichlet_entropy_part(
            posterior["dirichlet"], log_weights
        ) - _dirichlet_entropy_part(self.concentration, log_weights)

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        concentration = posterior["dirichlet"]
        repeated = concentration.expand(num_samples, *concentration.shape)
        return {"log_weights": rng.log_dirichlet(repeated, generator)}

    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        count = statistics["count"].double()
        return {"log_weights": _softmax_mode(count if flat else count + self.concentration)}

    def log_prior(self, values: Tensors) -> Tensor:
        # One more power of the weights: the Jacobian of the softmax basis.
        return _dirichlet_entropy_part(self.concentration, values["log_weights"]) + values[
            "log_weights"
        ].sum(-1)

    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        concentration = self.concentration + statistics["count"].double()
        return {"log_weights": rng.log_dirichlet(concentration, generator)}

    def log_evidence(self, statistics: Tensors, values: Tensors) -> Tensor:
        return _log_multinomial_evidence(statistics["count"].double(), self.concentration)


@dataclass(frozen=True)
class GammaDirichletBlock(WeightsBlock):
    """Symmetric Dirichlet whose concentration has a Gamma prior.

    Variational Bayes keeps the concentration's posterior on a grid of its logarithm, so each
    update is exact coordinate ascent and the ELBO never falls; Gibbs draws it from the continuous
    conditional.

    Args:
        num_components: Number of components.
        grid: ``(g,)`` values of the concentration.
        log_grid_prior: ``(g,)`` log prior mass of the grid.
        shape: Shape of the Gamma prior.
        rate: Rate of the Gamma prior.
    """

    num_components: int
    grid: Tensor
    log_grid_prior: Tensor
    shape: float
    rate: float

    @property
    def exchangeable(self) -> bool:
        return True

    @property
    def sites(self) -> tuple[str, ...]:
        return ("log_weights", "concentration")

    def _log_grid_likelihood(self, sum_log_weights: Tensor) -> Tensor:
        """``log Dirichlet(w | e)`` on the grid, ``(..., g)``."""
        k, e = self.num_components, self.grid
        normaliser = torch.lgamma(k * e) - k * torch.lgamma(e)
        return normaliser + (e - 1.0) * sum_log_weights.unsqueeze(-1)

    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        log_grid = previous["log_grid"] if previous is not None else self.log_grid_prior
        expected = (log_grid.exp() * self.grid).sum(-1, keepdim=True)
        dirichlet = expected + statistics["count"].double()
        logits = self.log_grid_prior + self._log_grid_likelihood(_expected_log(dirichlet).sum(-1))
        return {"dirichlet": dirichlet, "log_grid": torch.log_softmax(logits, -1)}

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        return {"log_weights": _expected_log(posterior["dirichlet"])}

    def log_mean(self, posterior: Tensors) -> Tensor:
        return _softmax_mode(posterior["dirichlet"])

    def kl(self, posterior: Tensors) -> Tensor:
        log_weights = _expected_log(posterior["dirichlet"])
        mass = posterior["log_grid"].exp()
        cross = (mass * self._log_grid_likelihood(log_weights.sum(-1))).sum(-1)
        hyper = (mass * (posterior["log_grid"] - self.log_grid_prior)).sum(-1)
        return _dirichlet_entropy_part(posterior["dirichlet"], log_weights) - cross + hyper

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        dirichlet, log_grid = posterior["dirichlet"], posterior["log_grid"]
        logits = log_grid.expand(num_samples, *log_grid.shape).unsqueeze(-1)
        index = rng.categorical(logits, generator).squeeze(-1)
        repeated = dirichlet.expand(num_samples, *dirichlet.shape)
        return {
            "log_weights": rng.log_dirichlet(repeated, generator),
            "concentration": self.grid[index],
        }

    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        count = statistics["count"].double()
        if previous is not None:
            e = previous["concentration"].unsqueeze(-1)
        else:
            e = torch.as_tensor(self.shape / self.rate, dtype=torch.float64, device=count.device)
        log_weights = _softmax_mode(count if flat else count + e)
        posterior = self.log_grid_prior + self._log_grid_likelihood(log_weights.sum(-1))
        best = self.grid[posterior.argmax(-1)]
        return {"log_weights": log_weights, "concentration": best}

    def log_prior(self, values: Tensors) -> Tensor:
        e, log_weights = values["concentration"], values["log_weights"]
        nearest = (self.grid.log() - e.log().unsqueeze(-1)).abs().argmin(-1)
        spread = e.unsqueeze(-1).expand(log_weights.shape)
        return (
            _dirichlet_entropy_part(spread, log_weights)
            + log_weights.sum(-1)
            + self.log_grid_prior[nearest]
        )

    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        count = statistics["count"].double()
        if previous is None:
            shape = torch.full(
                count.shape[:-1], self.shape, dtype=count.dtype, device=count.device
            )
            log_e = rng.log_gamma_sample(shape, generator) - torch.log(torch.tensor(self.rate))
        else:
            log_e = previous["concentration"].log()
        log_e = self._metropolis(log_e, count, generator)
        concentration = log_e.exp()
        log_weights = rng.log_dirichlet(concentration.unsqueeze(-1) + count, generator)
        return {"log_weights": log_weights, "concentration": concentration}

    def _log_collapsed(self, log_e: Tensor, count: Tensor) -> Tensor:
        e = log_e.exp()
        prior = self.shape * log_e - self.rate * e
        return prior + _log_multinomial_evidence(count, e.unsqueeze(-1).expand(count.shape))

    def _metropolis(self, log_e: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
        """Random-walk steps on the log concentration, the weights integrated out."""
        current = self._log_collapsed(log_e, count)
        for step in (2.0, 1.0, 0.5, 0.25) * 2:
            noise = torch.randn(
                log_e.shape, generator=generator, dtype=log_e.dtype, device=log_e.device
            )
            proposal = log_e + step * noise
            value = self._log_collapsed(proposal, count)
            u = torch.rand(
                log_e.shape, generator=generator, dtype=log_e.dtype, device=log_e.device
            )
            accept = u.log() < value - current
            log_e, current = (
                torch.where(accept, proposal, log_e),
                torch.where(accept, value, current),
            )
        return log_e

    def log_evidence(self, statistics: Tensors, values: Tensors) -> Tensor:
        count = statistics["count"].double()
        # Under a variational posterior: at the expected concentration.
        known = "concentration" in values
        e = values["concentration"] if known else (values["log_grid"].exp() * self.grid).sum(-1)
        return _log_multinomial_evidence(count, e.unsqueeze(-1).expand(count.shape))


@dataclass(frozen=True)
class StickBreakingBlock(WeightsBlock):
    """Truncated stick-breaking, with a fixed concentration or a Gamma prior on it."""

    num_components: int
    concentration: float | None
    shape: float | None
    rate: float | None

    @property
    def exchangeable(self) -> bool:
        return False

    @property
    def sites(self) -> tuple[str, ...]:
        learned = ("concentration",) if self.concentration is None else ()
        return ("log_weights", "log_stick", "log_rest", *learned)

    def _alpha(self, previous: Tensors | None, count: Tensor) -> Tensor:
        if self.concentration is not None:
            return torch.as_tensor(self.concentration, dtype=count.dtype, device=count.device)
        if previous is not None and "concentration" in previous:
            return previous["concentration"].unsqueeze(-1)
        if previous is not None:
            return (previous["hyper_shape"] / previous["hyper_rate"]).unsqueeze(-1)
        assert self.shape is not None
        assert self.rate is not None
        return torch.as_tensor(self.shape / self.rate, dtype=count.dtype, device=count.device)

    @staticmethod
    def _tails(count: Tensor) -> tuple[Tensor, Tensor]:
        """Counts at and after each stick, ``(..., K - 1)``."""
        after = count.flip(-1).cumsum(-1).flip(-1) - count
        return count[..., :-1], after[..., :-1]

    @staticmethod
    def _assemble(log_stick: Tensor, log_rest: Tensor) -> Tensor:
        before = torch.nn.functional.pad(log_rest.cumsum(-1), (1, 0))
        return torch.nn.functional.pad(log_stick, (0, 1)) + before

    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        count = statistics["count"].double()
        at, after = self._tails(count)
        posterior = {"stick_a": 1.0 + at, "stick_b": self._alpha(previous, count) + after}
        if self.concentration is None:
            assert self.shape is not None
            assert self.rate is not None
            rest = self._expected(posterior)[1]
            total = rest.sum(-1)
            posterior["hyper_shape"] = torch.full_like(total, self.shape + self.num_components - 1)
            posterior["hyper_rate"] = self.rate - total
        return posterior

    @staticmethod
    def _expected(posterior: Tensors) -> tuple[Tensor, Tensor]:
        a, b = posterior["stick_a"], posterior["stick_b"]
        total = torch.digamma(a + b)
        return torch.digamma(a) - total, torch.digamma(b) - total

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        return {"log_weights": self._assemble(*self._expected(posterior))}

    def log_mean(self, posterior: Tensors) -> Tensor:
        a, b = posterior["stick_a"], posterior["stick_b"]
        total = torch.log(a + b)
        return self._assemble(torch.log(a) - total, torch.log(b) - total)

    def kl(self, posterior: Tensors) -> Tensor:
        a, b = posterior["stick_a"], posterior["stick_b"]
        log_stick, log_rest = self._expected(posterior)
        entropy = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
        entropy = entropy + (a - 1.0) * log_stick + (b - 1.0) * log_rest
        if self.concentration is not None:
            alpha = torch.as_tensor(self.concentration, dtype=a.dtype, device=a.device)
            prior = torch.log(alpha) + (alpha - 1.0) * log_rest
            return (entropy - prior).sum(-1)
        assert self.shape is not None
        assert self.rate is not None
        s, r = posterior["hyper_shape"], posterior["hyper_rate"]
        expected_log = (torch.digamma(s) - torch.log(r)).unsqueeze(-1)
        prior = expected_log + ((s / r).unsqueeze(-1) - 1.0) * log_rest
        q = torch.distributions.Gamma(s, r)
        p = torch.distributions.Gamma(
            torch.full_like(s, self.shape), torch.full_like(s, self.rate)
        )
        return (entropy - prior).sum(-1) + torch.distributions.kl_divergence(q, p)

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        repeated = {k: v.expand(num_samples, *v.shape) for k, v in posterior.items()}
        values = self._values(
            *rng.log_beta_sample(repeated["stick_a"], repeated["stick_b"], generator)
        )
        if self.concentration is None:
            values["concentration"] = (
                rng.gamma(repeated["hyper_shape"], generator) / repeated["hyper_rate"]
            )
        return values

    def _values(self, log_stick: Tensor, log_rest: Tensor) -> dict[str, Tensor]:
        return {
            "log_weights": self._assemble(log_stick, log_rest),
            "log_stick": log_stick,
            "log_rest": log_rest,
        }

    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        count = statistics["count"].double()
        at, after = self._tails(count)
        a, b = (at, after) if flat else (1.0 + at, self._alpha(previous, count) + after)
        a, b = a.clamp_min(_TINY), b.clamp_min(_TINY)
        total = torch.log(a + b)
        values = self._values(torch.log(a) - total, torch.log(b) - total)
        if self.concentration is None:
            assert self.shape is not None
            assert self.rate is not None
            rate = self.rate - values["log_rest"].sum(-1)
            values["concentration"] = (self.shape + self.num_components - 1) / rate
        return values

    def log_prior(self, values: Tensors) -> Tensor:
        log_stick, log_rest = values["log_stick"], values["log_rest"]
        alpha = self._alpha(values, log_rest)
        sticks = (torch.log(alpha) + alpha * log_rest + log_stick).sum(-1)
        if self.concentration is not None:
            return sticks
        assert self.shape is not None
        assert self.rate is not None
        e = values["concentration"]
        gamma = torch.distributions.Gamma(
            torch.full_like(e, self.shape), torch.full_like(e, self.rate)
        )
        return sticks + gamma.log_prob(e) + torch.log(e)

    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        count = statistics["count"].double()
        if previous is None and self.concentration is None:
            assert self.shape is not None
            assert self.rate is not None
            shape = torch.full(
                count.shape[:-1], self.shape, dtype=count.dtype, device=count.device
            )
            previous = {"concentration": rng.gamma(shape, generator) / self.rate}
        at, after = self._tails(count)
        b = (self._alpha(previous, count) + after).expand(at.shape)
        values = self._values(*rng.log_beta_sample(1.0 + at, b, generator))
        if self.concentration is None:
            assert self.shape is not None
            assert self.rate is not None
            rate = self.rate - values["log_rest"].sum(-1)
            shape = torch.full_like(rate, self.shape + self.num_components - 1)
            values["concentration"] = rng.gamma(shape, generator) / rate
        return values

    def log_evidence(self, statistics: Tensors, values: Tensors) -> Tensor:
        count = statistics["count"].double()
        at, after = self._tails(count)
        alpha = self._alpha(values, count)
        a, b = 1.0 + at, alpha + after
        beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        return (beta + torch.log(alpha)).sum(-1)
