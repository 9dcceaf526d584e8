"""Engines against brute force: every labelling of a few rows, parameters integrated out by hand.

The reference below shares no code with the library: closed forms by scipy, hyperparameters and
missing entries by quadrature.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from bayesgen.distributions import NormalInverseWishart
from bayesgen.inference import VB, Gibbs
from bayesgen.inference.conjugate import split_merge
from bayesgen.models import GaussianMixture
from bayesgen.priors import (
    GammaDirichlet,
    HierarchicalNormalInverseWishart,
    StickBreaking,
    SymmetricDirichlet,
)

__all__: list[str] = []

ONE = np.array([[-2.1], [-1.7], [-0.2], [0.3], [1.9], [2.4]])
TWO = np.array([[-2.0, 1.0], [-1.5, 0.4], [0.2, -0.3], [1.8, 2.0], [2.2, 1.1], [2.9, 1.9]])
LOC, KAPPA = 0.3, 0.2


# ------------------------------------------------------------------ the reference
class Reference:
    """Exact posterior of a small mixture by enumeration."""

    def __init__(self, x, num_components, weights, *, scale=1.5, df=None, hyper=None):
        self.x, self.k, self.weights = x, num_components, weights
        n, self.d = x.shape
        self.df = self.d + 2.0 if df is None else df
        self.loc, self.hyper = np.full(self.d, LOC), hyper
        self.scales = [np.eye(self.d) * scale**2]
        self.log_mass = np.zeros(1)
        if hyper is not None:  # one column: its scale on a grid of logarithms
            shape, rate = hyper
            s = np.exp(np.linspace(-14.0, 6.0, 600))
            self.scales = [np.array([[v]]) for v in s]
            log_density = stats.gamma(shape, scale=1 / rate).logpdf(s) + np.log(s)
            self.log_mass = log_density + math.log(20.0 / 599)
        self.cache = {}
        self.labels = list(itertools.product(range(num_components), repeat=n))
        joint = [self._log_joint(z) for z in self.labels]
        self.log_evidence = special.logsumexp(joint)
        self.probability = np.exp(np.array(joint) - self.log_evidence)

    def _niw(self, rows, scale):
        """Log marginal likelihood of complete rows in one component."""
        n = len(rows)
        if n == 0:
            return 0.0
        mean = rows.mean(0)
        kappa, df = KAPPA + n, self.df + n
        centred = rows - mean
        psi = scale + centred.T @ centred
        psi = psi + KAPPA * n / kappa * np.outer(mean - self.loc, mean - self.loc)
        gammas = special.multigammaln(df / 2, self.d) - special.multigammaln(self.df / 2, self.d)
        dets = self.df / 2 * np.linalg.slogdet(scale)[1] - df / 2 * np.linalg.slogdet(psi)[1]
        return gammas + dets + self.d / 2 * (math.log(KAPPA / kappa) - n * math.log(math.pi))

    def component(self, members):
        """Log evidence of these rows for each scale, missing entries integrated numerically."""
        if members not in self.cache:
            rows = self.x[list(members)]
            holes = np.argwhere(np.isnan(rows))
            if len(holes) == 0:
                value = [self._niw(rows, scale) for scale in self.scales]
            else:
                ((i, j),) = holes
                grid = np.sinh(np.linspace(-9.0, 9.0, 1501))
                filled = []
                for v in grid:
                    full = rows.copy()
                    full[i, j] = v
                    filled.append(self._niw(full, self.scales[0]))
                log_step = np.log(np.cosh(np.arcsinh(grid)) * 18.0 / 1500)
                value = [special.logsumexp(np.array(filled) + log_step)]
            self.cache[members] = np.array(value)
        return self.cache[members]

    def _log_joint(self, z):
        total = self.log_mass.copy()
        for k in range(self.k):
            total = total + self.component(tuple(i for i, c in enumerate(z) if c == k))
        return special.logsumexp(total) + self.weights([z.count(k) for k in range(self.k)])

    def partitions(self):
        """Posterior of each partition, labels forgotten."""
        out = {}
        for z, p in zip(self.labels, self.probability, strict=True):
            out[canonical(z)] = out.get(canonical(z), 0.0) + p
        return out

    def num_occupied(self):
        counts = np.array([len(set(z)) for z in self.labels])
        return float((counts * self.probability).sum())

    def log_predictive(self, new):
        """Log predictive density of one new row: a ratio of evidences."""
        own = Reference.__new__(Reference)
        own.__dict__.update(self.__dict__)
        own.x, own.cache = np.vstack([self.x, new]), {}
        joint = [own._log_joint((*z, k)) for z in self.labels for k in range(self.k)]
        return special.logsumexp(joint) - self.log_evidence


def canonical(z):
    order = {}
    return tuple(order.setdefault(label, len(order)) for label in z)


def dirichlet(e):
    def log_mass(counts):
        k, n = len(counts), sum(counts)
        each = sum(special.gammaln(e + c) - special.gammaln(e) for c in counts)
        return special.gammaln(k * e) - special.gammaln(k * e + n) + each

    return log_mass


def gamma_dirichlet(shape, rate):
    grid = np.linspace(-25.0, 6.0, 4001)
    e = np.exp(grid)
    log_prior = stats.gamma(shape, scale=1 / rate).logpdf(e) + grid + math.log(31.0 / 4000)

    def log_mass(counts):
        return special.logsumexp(log_prior + dirichlet(e)(counts))

    return log_mass


def sticks(alpha):
    def log_mass(counts):
        total = 0.0
        for k in range(len(counts) - 1):
            after = sum(counts[k + 1 :])
            total += special.betaln(1 + counts[k], alpha + after) - special.betaln(1, alpha)
        return total

    return log_mass


def prior(d, scale=1.5):
    return NormalInverseWishart(
        torch.full((d,), LOC, dtype=torch.float64),
        torch.tensor(KAPPA, dtype=torch.float64),
        torch.tensor(d + 2.0, dtype=torch.float64),
        scale * torch.eye(d, dtype=torch.float64),
    )


def model(num_components, d, weights):
    return GaussianMixture(num_components, priors={"weights": weights, "components": prior(d)})


def test_the_reference_itself():
    """One component: the chain rule of Student-t predictives gives the same evidence."""
    reference = Reference(TWO, 1, dirichlet(1.0))
    total = 0.0
    for i in range(len(TWO)):
        seen, d = TWO[:i], 2
        kappa, df = KAPPA + i, d + 2.0 + i
        mean = seen.mean(0) if i else np.zeros(d)
        loc = (KAPPA * LOC + i * mean) / kappa
        psi = 1.5**2 * np.eye(d)
        if i:
            psi = psi + (seen - mean).T @ (seen - mean)
            psi = psi + KAPPA * i / kappa * np.outer(mean - LOC, mean - LOC)
        shape = psi * (kappa + 1) / (kappa * (df - d + 1))
        total += stats.multivariate_t(loc, shape, df=df - d + 1).logpdf(TWO[i])
    assert reference.log_evidence == pytest.approx(total, abs=1e-10)


# ------------------------------------------------------------------ variational Bayes
@pytest.mark.parametrize("x", [ONE, TWO], ids=["1d", "2d"])
@pytest.mark.parametrize(
    ("weights", "log_mass"),
    [
        (SymmetricDirichlet(0.7), dirichlet(0.7)),
        (StickBreaking(1.3), sticks(1.3)),
        (GammaDirichlet(2.0, 3.0), gamma_dirichlet(2.0, 3.0)),
    ],
    ids=["dirichlet", "sticks", "gamma"],
)
def test_elbo_is_below_the_evidence(x, weights, log_mass):
    reference = Reference(x, 2, log_mass)
    fit = VB(num_samples=2).run(model(2, x.shape[1], weights), x)
    gap = reference.log_evidence - fit.attrs["elbo"]
    assert 0.0 < gap < 3.0


def test_elbo_with_a_hole_is_below_the_evidence():
    x = TWO.copy()
    x[2, 1] = np.nan
    reference = Reference(x, 2, dirichlet(0.7))
    fit = VB(num_samples=2).run(model(2, 2, SymmetricDirichlet(0.7)), x)
    assert 0.0 < reference.log_evidence - fit.attrs["elbo"] < 3.0


# ------------------------------------------------------------------ Gibbs
def gibbs_error(reference, mixture, x, new, **settings):
    """Largest |z| over the partitions, the predictive and the occupied components."""
    engine = Gibbs(num_chains=200, num_samples=200, num_warmup=60, **settings)
    return errors(reference, engine.run(mixture, x, seed=3), x, new)


def errors(reference, fit, x, new):
    draws = {name: value[:, ::2] for name, value in fit.draws.items()}
    log_p = fit.model.encode(torch.as_tensor(x), draws).logits
    log_p = (log_p - log_p.logsumexp(-1, keepdim=True)).permute(2, 3, 0, 1)
    total = {}
    for z in reference.labels:
        chain = sum(log_p[i, k] for i, k in enumerate(z)).exp().mean(-1)
        total[canonical(z)] = total.get(canonical(z), 0.0) + chain
    worst = {}
    for partition, exact in reference.partitions().items():
        if exact > 0.01:
            worst[partition] = z_score(total[partition], exact)
    occupied = fit.sample_stats["num_occupied"].mean(-1)
    worst["occupied"] = z_score(occupied, reference.num_occupied())
    density = fit.model.log_prob(torch.as_tensor(new)[None], draws).exp().mean((1, 2))
    worst["predictive"] = z_score(density, math.exp(reference.log_predictive(new)))
    return worst


def z_score(by_chain, exact):
    error = float(by_chain.std()) / math.sqrt(len(by_chain))
    return abs(float(by_chain.mean()) - exact) / error


@pytest.mark.parametrize(
    ("weights", "log_mass", "num_moves"),
    [
        (SymmetricDirichlet(0.4), dirichlet(0.4), 0),
        (SymmetricDirichlet(0.4), dirichlet(0.4), 2),
        (StickBreaking(0.8), sticks(0.8), 2),
        (GammaDirichlet(2.0, 4.0), gamma_dirichlet(2.0, 4.0), 2),
    ],
    ids=["no moves", "dirichlet", "sticks", "gamma"],
)
def test_gibbs_finds_the_exact_posterior(weights, log_mass, num_moves):
    x = TWO[[0, 2, 3, 4, 5]]
    reference = Reference(x, 3, log_mass)
    worst = gibbs_error(
        reference, model(3, 2, weights), x, np.array([1.0, 0.5]), num_moves=num_moves
    )
    assert max(worst.values()) < 4.0, worst


def test_gibbs_in_one_dimension():
    reference = Reference(ONE, 2, dirichlet(0.4))
    worst = gibbs_error(
        reference, model(2, 1, SymmetricDirichlet(0.4)), ONE, np.array([0.5]), num_moves=1
    )
    assert max(worst.values()) < 4.0, worst


def test_gibbs_with_learned_scale():
    shape, rate = 1.5, 0.7
    reference = Reference(ONE[1:], 2, dirichlet(0.4), df=3.0, hyper=(shape, rate))
    components = HierarchicalNormalInverseWishart(
        torch.full((1,), LOC, dtype=torch.float64),
        KAPPA,
        3.0,
        shape,
        torch.full((1,), rate, dtype=torch.float64),
    )
    mixture = GaussianMixture(
        2, priors={"weights": SymmetricDirichlet(0.4), "components": components}
    )
    worst = gibbs_error(reference, mixture, ONE[1:], np.array([0.5]), num_moves=1)
    assert max(worst.values()) < 4.0, worst
    vb = VB(num_samples=2).run(mixture, ONE[1:])
    assert 0.0 < reference.log_evidence - vb.attrs["elbo"] < 3.0


def test_a_wrong_hastings_factor_is_caught(monkeypatch):
    """Forgetting how many empty slots a split may choose from biases the partitions."""
    x = TWO[[0, 2, 3, 4, 5]]
    reference = Reference(x, 3, dirichlet(0.4))
    monkeypatch.setattr(
        split_merge, "_log_slots", lambda splitting, num_empty: torch.zeros_like(num_empty)
    )
    worst = gibbs_error(
        reference,
        model(3, 2, SymmetricDirichlet(0.4)),
        x,
        np.array([1.0, 0.5]),
        num_moves=2,
    )
    assert max(worst.values()) > 6.0, worst


def test_gibbs_with_a_hole():
    """The missing entry is drawn; few chains, as each starts from a search of its own."""
    x = TWO[[0, 2, 3, 4, 5]].copy()
    x[1, 0] = np.nan
    reference = Reference(x, 2, dirichlet(0.4))
    engine = Gibbs(num_chains=8, num_samples=800, num_warmup=60)
    fit = engine.run(model(2, 2, SymmetricDirichlet(0.4)), x, seed=3)
    worst = errors(reference, fit, x, np.array([1.0, 0.5]))
    assert max(worst.values()) < 5.0, worst
