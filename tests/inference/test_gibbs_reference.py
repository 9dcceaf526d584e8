"""Gibbs against NumPyro's NUTS on the same posterior, and what variational Bayes gets wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesgen.distributions import NormalInverseWishart
from bayesgen.inference import VB, Gibbs
from bayesgen.models import GaussianMixture
from bayesgen.priors import SymmetricDirichlet

__all__: list[str] = []

REFERENCE = json.loads(Path(__file__).with_name("reference_numpyro.json").read_text())
CASES = ("one dimension", "three dimensions")


def mixture(case):
    def tensor(value):
        return torch.tensor(value, dtype=torch.float64)

    components = NormalInverseWishart(
        tensor(case["loc"]),
        tensor(case["mean_precision"]),
        tensor(case["df"]),
        torch.diag(tensor(case["scale"])),
    )
    weights = SymmetricDirichlet(case["concentration"])
    return GaussianMixture(
        case["num_components"], priors={"weights": weights, "components": components}
    )


def quantities(case, fit):
    """The same label-invariant scalars as the reference's script computes, ``(chain, draw)``."""
    weights, loc, tril = (fit.draws[name] for name in ("weights", "loc", "scale_tril"))
    mean = (weights.unsqueeze(-1) * loc).sum(-2)
    delta = loc - mean.unsqueeze(-2)
    total = torch.einsum("...k,...kij->...ij", weights, tril @ tril.mT)
    total = total + torch.einsum("...k,...ki,...kj->...ij", weights, delta, delta)
    x, new = torch.tensor(case["x"]).double(), torch.tensor(case["points"]).double()
    density = fit.model.log_prob(new, fit.draws).exp()
    out = {
        "log_likelihood": fit.model.log_prob(x, fit.draws).sum(-1),
        "weights^2": weights.square().sum(-1),
        "max_weight": weights.amax(-1),
    }
    for i in range(x.shape[1]):
        out[f"mean[{i}]"] = mean[..., i]
        out[f"log_sd[{i}]"] = 0.5 * total[..., i, i].log()
        for j in range(i):
            out[f"covariance[{i},{j}]"] = total[..., i, j]
    out |= {f"density[{i}]": density[..., i] for i in range(len(new))}
    return out


def z_scores(case, fit):
    import arviz as az

    scores = {}
    for name, value in quantities(case, fit).items():
        expected = case["quantities"][name]
        mcse = float(value.std()) / math.sqrt(float(az.ess(value.numpy())))
        error = math.hypot(mcse, expected["mcse"])
        scores[name] = (float(value.mean()) - expected["mean"]) / error
    assert set(scores) == set(case["quantities"])
    return scores


@pytest.mark.parametrize("name", CASES)
def test_the_reference_converged(name):
    for key, entry in REFERENCE[name]["quantities"].items():
        assert entry["r_hat"] < 1.01, key
        assert entry["mcse"] < 0.05 * entry["sd"], key


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_moves", [0, 1])
def test_gibbs_agrees_with_numpyro(name, num_moves):
    case = REFERENCE[name]
    engine = Gibbs(num_chains=8, num_samples=700, num_warmup=100, num_moves=num_moves)
    fit = engine.run(mixture(case), np.array(case["x"]), seed=1)
    scores = z_scores(case, fit)
    assert max(map(abs, scores.values())) <= 4.0, scores


def test_a_wrong_posterior_is_caught(monkeypatch):
    """Negative control: two degrees of freedom too many in the covariances' conditional."""
    from bayesgen.models.families.normal_inverse_wishart import NormalInverseWishartBlock

    right = NormalInverseWishartBlock._conditional

    def wrong(self, *arguments, **settings):
        posterior = dict(right(self, *arguments, **settings))
        posterior["df"] = posterior["df"] + 2.0
        return posterior

    monkeypatch.setattr(NormalInverseWishartBlock, "_conditional", wrong)
    case = REFERENCE["one dimension"]
    engine = Gibbs(num_chains=8, num_samples=700, num_warmup=100, num_moves=0)
    scores = z_scores(case, engine.run(mixture(case), np.array(case["x"]), seed=1))
    assert max(map(abs, scores.values())) > 6.0, scores


@pytest.mark.parametrize(("name", "bias", "ratio"), [(CASES[0], 0.3, 0.7), (CASES[1], 0.2, 0.75)])
def test_error_of_variational_bayes(name, bias, ratio):
    """In units of the posterior's standard deviation: small shifts, spreads somewhat too small."""
    case = REFERENCE[name]
    fit = VB(num_samples=4000).run(mixture(case), np.array(case["x"]), seed=1)
    shifts, spreads = {}, {}
    for key, value in quantities(case, fit).items():
        expected = case["quantities"][key]
        shifts[key] = (float(value.mean()) - expected["mean"]) / expected["sd"]
        spreads[key] = float(value.std()) / expected["sd"]
    assert max(map(abs, shifts.values())) < bias, shifts
    assert ratio < min(spreads.values()), spreads
    assert max(spreads.values()) < 1.15, spreads
