r"""How many components the rows occupy: the law of the number of clusters under a prior.

A prior on the weights of ``num_components`` components is a prior on the number of components that
``num_rows`` rows occupy, written :math:`K_+`, and that is the number a user has an opinion about.
This module turns one into the other, exactly wherever a recursion exists:

* symmetric Dirichlet: given :math:`K_+ = k` after ``m`` rows, the next row opens a new component
  with probability :math:`(K - k) a / (m + K a)`, which depends on ``k`` alone, so :math:`K_+` is a
  Markov chain and its distribution follows from ``num_rows`` bidiagonal steps;
* Dirichlet with a Gamma hyperprior on the common concentration: the same, by the trapezoid rule in
  the logarithm of the concentration;
* truncated stick-breaking: stick by stick, the number of rows left over is a Markov chain whose
  beta-binomial transition is separable, so one cumulative sum a stick is enough.

All terms are positive, so nothing cancels at any size.

References:
    Antoniak (1974), Mixtures of Dirichlet processes with applications to Bayesian nonparametric
    problems.
    Ishwaran, James (2001), Gibbs sampling methods for stick-breaking priors.
    Greve, Grün, Malsiner-Walli, Frühwirth-Schnatter (2022), Spying on the prior of the number of
    data clusters and the partition distribution in Bayesian cluster analysis.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "check_sizes",
    "dirichlet_clusters",
    "expected_clusters",
    "gamma_dirichlet_clusters",
    "gamma_nodes",
    "sampled_clusters",
    "stick_breaking_clusters",
]


def dirichlet_clusters(
    concentration: float | Tensor, *, num_rows: int, num_components: int
) -> Tensor:
    r"""Distribution of the number of occupied components under a symmetric Dirichlet prior.

    .. math::
        \Pr(K_+ = k \mid m + 1) = \Pr(k \mid m)\frac{m + k a}{m + K a}
            + \Pr(k - 1 \mid m)\frac{(K - k + 1) a}{m + K a}

    After enough rows the remaining product of commuting matrices :math:`I + G / (m + K a)` is one
    matrix exponential, so the cost stops growing with ``num_rows``.

    Args:
        concentration: Dirichlet parameter of *every* component, ``a > 0``; a float or ``(...)``.
        num_rows: Rows of the data set.
        num_components: Components of the mixture, ``K``.

    Returns:
        ``(..., num_components + 1)`` probabilities of 0, 1, ..., K occupied components, float64.

    Example:
        >>> pmf = dirichlet_clusters(1.0, num_rows=2, num_components=3)
        >>> [round(p, 4) for p in pmf.tolist()]  # the second row joins the first with chance 2 / 4
        [0.0, 0.5, 0.5, 0.0]
    """
    check_sizes(num_rows, num_components)
    a = torch.as_tensor(concentration, dtype=torch.float64)
    if not bool((a > 0).all()) or not bool(torch.isfinite(a).all()):
        raise ValueError(f"concentration must be positive and finite, got {concentration}.")
    k = np.arange(num_components + 1)
    stay = np.multiply.outer(a.numpy(), k)
    leave = np.multiply.outer(a.numpy(), num_components - k)
    total = num_components * a.numpy()[..., None]
    pmf = np.zeros((*a.shape, num_components + 1))
    pmf[..., 0] = 1.0
    # Ratio 1/32 between successive terms of the series below leaves nothing after twelve of them.
    steps = min(num_rows, max(200, math.ceil(32.0 * float(total.max()))))
    for m in range(steps):
        risen = pmf * (m + stay)
        risen[..., 1:] += (pmf * leave)[..., :-1]
        pmf = risen / (m + total)
    result = torch.from_numpy(pmf)
    if steps < num_rows:
        result = _many_rows(result, a, torch.from_numpy(leave), steps, num_rows)
    return result.clamp_min(0.0) / result.clamp_min(0.0).sum(-1, keepdim=True)


def _many_rows(pmf: Tensor, a: Tensor, leave: Tensor, start: int, stop: int) -> Tensor:
    """Apply ``I + G / (m + K a)`` for ``start <= m < stop`` through the matrix logarithm."""
    num_components = pmf.shape[-1] - 1
    generator = torch.diag_embed(leave[..., :-1], offset=1) - torch.diag_embed(leave)
    total = num_components * a
    power, logarithm = generator, torch.zeros_like(generator)
    for order in range(1, 13):
        # sum over m of (m + K a)^-order, a difference of polygammas.
        if order == 1:
            series = torch.digamma(stop + total) - torch.digamma(start + total)
        else:
            first = torch.special.zeta(torch.tensor(float(order), dtype=a.dtype), start + total)
            last = torch.special.zeta(torch.tensor(float(order), dtype=a.dtype), stop + total)
            series = first - last
        logarithm = logarithm + (-1) ** (order + 1) / order * series[..., None, None] * power
        power = power @ generator
    moved: Tensor = torch.linalg.matrix_exp(logarithm)
    return (pmf.unsqueeze(-2) @ moved).squeeze(-2)


def gamma_dirichlet_clusters(
    shape: float, rate: float, *, num_rows: int, num_components: int, num_nodes: int = 192
) -> Tensor:
    r"""The same when the common concentration has a Gamma prior.

    .. math::
        \Pr(K_+ = k) = \int_0^\infty \Pr(K_+ = k \mid a)\, \mathrm{Gamma}(a; \text{shape},
        \text{rate})\, \mathrm{d}a,

    by the trapezoid rule in :math:`\log a`, which converges exponentially fast.

    Args:
        shape: Shape of the Gamma prior.
        rate: Rate of the Gamma prior, so that the mean concentration is ``shape / rate``.
        num_rows: Rows of the data set.
        num_components: Components of the mixture.
        num_nodes: Nodes of the quadrature.

    Returns:
        ``(num_components + 1,)`` probabilities.
    """
    check_sizes(num_rows, num_components)
    nodes, weights, below = gamma_nodes(shape, rate, num_nodes)
    pmf = weights @ dirichlet_clusters(nodes, num_rows=num_rows, num_components=num_components)
    pmf[1] += below  # concentrations too small to matter put every row in one component
    return pmf / pmf.sum()


def gamma_nodes(shape: float, rate: float, num_nodes: int) -> tuple[Tensor, Tensor, float]:
    """Nodes evenly spaced in the logarithm, to integrate a function against a Gamma law.

    Returns:
        Nodes and their probabilities, each ``(num_nodes,)``, and the mass that lies below them
        all.
    """
    from scipy.stats import gamma

    if not (shape > 0 and rate > 0 and math.isfinite(shape) and math.isfinite(rate)):
        raise ValueError(f"shape and rate must be positive and finite, got {shape} and {rate}.")
    law = gamma(shape, scale=1.0 / rate)
    lowest = max(float(law.ppf(1e-13)), 1e-16)
    highest = max(float(law.isf(1e-13)), 10 * lowest)
    log_nodes = np.linspace(math.log(lowest), math.log(highest), num_nodes)
    nodes = np.exp(log_nodes)
    weights = law.pdf(nodes) * nodes * (log_nodes[1] - log_nodes[0])
    weights[[0, -1]] /= 2.0
    below = float(law.cdf(lowest))
    weights *= (1.0 - below) / max(weights.sum(), 1e-300)
    return torch.from_numpy(nodes), torch.from_numpy(weights), below


def stick_breaking_clusters(concentration: float, *, num_rows: int, num_components: int) -> Tensor:
    r"""The same under a stick-breaking prior truncated at ``num_components`` sticks.

    With :math:`v_k \sim \mathrm{Beta}(1, \alpha)` and :math:`v_K = 1`, a stick that meets ``m``
    rows leaves ``r`` of them for the next with probability

    .. math::
        \alpha\,\frac{m!}{\Gamma(m + 1 + \alpha)}\cdot\frac{\Gamma(r + \alpha)}{r!},
        \qquad 0 \le r \le m,

    a product of a function of ``m`` and one of ``r``. When the truncation does not bind this is
    Antoniak's distribution for the Dirichlet process.

    Args:
        concentration: Dirichlet process concentration, ``alpha > 0``.
        num_rows: Rows of the data set.
        num_components: Number of sticks.

    Returns:
        ``(num_components + 1,)`` probabilities.
    """
    check_sizes(num_rows, num_components)
    log_met, log_left, log_none = _stick_terms(concentration, num_rows)
    # state[k, m]: log probability that k components are occupied so far and m rows are left.
    state = torch.full((num_components + 1, num_rows + 1), -torch.inf, dtype=torch.float64)
    state[0, num_rows] = 0.0
    for _ in range(num_components - 1):
        # Sum over all m > r, from the top; one place up because the stick takes at least one row.
        above = (state + log_met).flip(-1).logcumsumexp(-1).flip(-1)
        taken = torch.full_like(state, -torch.inf)
        taken[1:, :-1] = above[:-1, 1:] + log_left[:-1]
        state = torch.logaddexp(state + log_none, taken)
    pmf = state[:, 0].exp()
    pmf[1:] += state[:-1, 1:].exp().sum(-1)  # the last stick takes all that is left
    return pmf / pmf.sum()


def _stick_terms(concentration: float, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log transition by parts: of the rows met, of those left, and of taking none."""
    alpha = float(concentration)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"concentration must be positive and finite, got {concentration}.")
    m = torch.arange(num_rows + 1, dtype=torch.float64)
    log_met = math.log(alpha) + torch.lgamma(m + 1) - torch.lgamma(m + 1 + alpha)
    log_left = torch.lgamma(m + alpha) - torch.lgamma(m + 1)
    return log_met, log_left, math.log(alpha) - torch.log(alpha + m)


def sampled_clusters(
    weights: Tensor, *, num_rows: int, num_components: int, generator: torch.Generator
) -> Tensor:
    """Number of occupied components of data sets drawn with the given weights, for any prior.

    Args:
        weights: ``(num_samples, num_components)`` draws from the prior of the weights.
        num_rows: Rows of each data set.
        num_components: Components of the mixture.
        generator: Source of randomness for the counts.

    Returns:
        ``(num_samples,)`` integers between 1 and ``num_components``.
    """
    check_sizes(num_rows, num_components)
    w = weights.detach().to(torch.float64)
    if w.ndim != 2 or w.shape[-1] != num_components:
        raise ValueError(
            f"the prior of the weights gives draws of shape {tuple(w.shape[1:])}, but "
            f"num_components is {num_components}: make the two agree."
        )
    # Multinomial counts, one binomial per component given what the earlier ones left.
    left = torch.full((len(w),), float(num_rows), dtype=torch.float64)
    rest = w.flip(-1).cumsum(-1).flip(-1)
    occupied = torch.zeros(len(w), dtype=torch.int64)
    for k in range(num_components - 1):
        share = torch.where(rest[:, k] > 0, w[:, k] / rest[:, k], 0.0).clamp(0.0, 1.0)
        count = torch.binomial(left, share, generator=generator)
        occupied += count > 0
        left = left - count
    return occupied + (left > 0)


def expected_clusters(
    concentration: float, *, num_rows: int, num_components: int, kind: str = "dirichlet"
) -> float:
    r"""Expected number of occupied components, without the whole distribution.

    For the symmetric Dirichlet

    .. math::
        \mathrm{E}[K_+] = K\left(1 - \frac{\Gamma(K a)\,\Gamma(n + (K - 1) a)}
            {\Gamma((K - 1) a)\,\Gamma(n + K a)}\right),

    for stick-breaking a sum over sticks of the chance that each is met and takes a row.

    Args:
        concentration: Parameter of every component (``"dirichlet"``), or of the process
            (``"stick-breaking"``).
        num_rows: Rows of the data set.
        num_components: Components of the mixture.
        kind: ``"dirichlet"`` or ``"stick-breaking"``.

    Returns:
        The expectation, between 1 and ``min(num_rows, num_components)``.
    """
    check_sizes(num_rows, num_components)
    if num_components == 1:
        return 1.0
    if kind == "dirichlet":
        return _expected_dirichlet(float(concentration), num_rows, num_components)
    if kind == "stick-breaking":
        return _expected_sticks(float(concentration), num_rows, num_components)
    raise ValueError(f"kind must be 'dirichlet' or 'stick-breaking', got {kind!r}.")


def _expected_dirichlet(a: float, num_rows: int, num_components: int) -> float:
    from scipy.special import betaln

    # Gamma(Ka) Gamma(n + (K-1)a) / (Gamma((K-1)a) Gamma(n + Ka)) is a ratio of beta functions,
    # which
    # keeps its precision at n = 1e9 where differences of log gammas would not.
    rest = (num_components - 1) * a
    log_empty = betaln(a, rest + num_rows) - betaln(a, rest)
    return float(-num_components * np.expm1(log_empty))


def _expected_sticks(alpha: float, num_rows: int, num_components: int) -> float:
    """Sum over sticks of ``1 - E[(1 - v y)^n]``, by trapezoids in log(-log(1 - v)), log(-log y).

    ``-log(1 - v)`` is exponential and ``-log y``, with ``y`` the length left for stick ``k``, is
    Gamma(k - 1, alpha): in the logarithm both rules converge exponentially fast, at any
    ``num_rows``.
    """
    from scipy.stats import gamma

    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"concentration must be positive and finite, got {alpha}.")
    later = np.arange(1, num_components)[:, None]
    log_y = np.linspace(-42.0, math.log(40.0 + 3.0 * num_components), 500)
    x, step = np.exp(log_y), log_y[1] - log_y[0]
    empty = _stick_empty(alpha, np.exp(-x / alpha), num_rows)
    shares = (
        gamma.pdf(x, later) * x * step
    )  # (K - 1, nodes): law of -alpha log y before stick k + 1
    first = 1.0 - float(_stick_empty(alpha, np.ones(1), num_rows)[0])
    middle = 1.0 - (shares * empty).sum(-1)[:-1] / shares.sum(-1)[:-1]
    spared = np.exp(num_rows * np.log(-np.expm1(-x / alpha)))
    last = 1.0 - (shares[-1] * spared).sum() / shares[-1].sum()
    return first + float(middle.sum()) + float(last)


def _stick_empty(alpha: float, length: np.ndarray, num_rows: int) -> np.ndarray:
    """``E[(1 - v y)^n]`` for ``v ~ Beta(1, alpha)`` at each length ``y``."""
    log_x = np.linspace(-42.0, math.log(40.0), 500)
    x = np.exp(log_x)
    mass = np.exp(-x) * x
    v = -np.expm1(-x / alpha)
    with np.errstate(divide="ignore"):
        log_spared = num_rows * np.log1p(-np.minimum(np.multiply.outer(length, v), 1.0))
    result: np.ndarray = (np.exp(log_spared) * mass).sum(-1) / mass.sum()
    return result


def check_sizes(num_rows: int, num_components: int) -> None:
    """Raise ``ValueError`` unless both are positive integers."""
    for name, value in (("num_rows", num_rows), ("num_components", num_components)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
