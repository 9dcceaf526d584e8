"""The contract suites accept a right model and catch planted errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from bayesgen import rng
from bayesgen.capabilities import Conditional, Encoder, Generative, Model, Scored, Symmetric
from bayesgen.data import as_dataset
from bayesgen.symmetry import LabelPermutation
from bayesgen.testing import ModelCase, densities, model_checks, structure
from bayesgen.toys import UnitMixture

__all__: list[str] = []


def make(num_columns=2, num_components=3):
    generator = rng.make_generator(1)
    x = rng.standard_normal((12, num_columns), generator)
    data = as_dataset(x)
    concentration = torch.full((4, num_components), 2.0, dtype=torch.float64)
    draws = {
        "weights": rng.log_dirichlet(concentration, generator).exp(),
        "loc": 1.5 * rng.standard_normal((4, num_components, num_columns), generator),
    }
    return ModelCase("toy", UnitMixture(num_components).bind(data), data, draws)


CASES = {"one": make(1), "two": make(2), "four": make(4, 2)}
PAIRS = [(name, check) for name, case in CASES.items() for check in model_checks(case)]


@pytest.mark.parametrize(("name", "check"), PAIRS, ids=[f"{n}-{c.__name__}" for n, c in PAIRS])
def test_the_toy_meets_the_contract(name, check, device):
    check(CASES[name].to(device))


class Broken(Model, Scored, Generative, Encoder, Conditional, Symmetric):
    """The toy with one thing wrong: every method passes through but those overridden."""

    def __init__(self, inner):
        self.inner = inner

    def bind(self, data):
        return type(self)(self.inner.bind(data))

    def to(self, device):
        return self

    is_bound = property(lambda self: True)
    dims = property(lambda self: self.inner.dims)
    symmetry = property(lambda self: self.inner.symmetry)

    def coords(self):
        return self.inner.coords()

    def to_config(self):
        return self.inner.to_config()

    @classmethod
    def from_config(cls, config):
        return cls(UnitMixture.from_config(config))

    def log_prob(self, x, draws):
        return self.inner.log_prob(x, draws)

    def sample(self, draws, *, generator):
        return self.inner.sample(draws, generator=generator)

    def encode(self, x, draws):
        return self.inner.encode(x, draws)

    def condition(self, x, observed, draws):
        return self.inner.condition(x, observed, draws)

    def invariants(self, draws):
        return self.inner.invariants(draws)


class NotNormalised(Broken):
    def log_prob(self, x, draws):
        return super().log_prob(x, draws) + 0.01


class ZeroForMissing(Broken):
    def log_prob(self, x, draws):
        return super().log_prob(x.nan_to_num(0.0), draws)


class UsesTheBatch(Broken):
    def log_prob(self, x, draws):
        return super().log_prob(x - 1e-3 * x.nan_to_num(0.0).sum(), draws)


class WideSamples(Broken):
    def sample(self, draws, *, generator):
        return 1.1 * super().sample(draws, generator=generator)


class IndependentSamples(Broken):
    def sample(self, draws, *, generator):
        rows = super().sample(draws, generator=generator)
        return torch.stack([rows[:, 0], rows[:, 1].flip(0)], -1)


class ForgetsConfig(Broken):
    def to_config(self):
        return {**super().to_config(), "columns": ["a", "b"]}


class WrongSite(Broken):
    symmetry = property(lambda self: LabelPermutation(3, {"weights": 0}))


class WrongInvariant(Broken):
    def invariants(self, draws):
        return {"first": draws["loc"][..., 0, 0]}


class ForgetsResponsibilities(Broken):
    def condition(self, x, observed, draws):
        return (
            super().condition(x, torch.zeros_like(observed), draws)
            if False
            else self._naive(x, observed, draws)
        )

    def _naive(self, x, observed, draws):
        right = super().condition(x, observed, draws)
        weights = draws["weights"].unsqueeze(-2).expand_as(right.mixture_distribution.probs)
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(weights), right.component_distribution
        )


class GlobalGenerator(Broken):
    def log_prob(self, x, draws):
        torch.rand(1)
        return super().log_prob(x, draws)


PLANTED = [
    (NotNormalised, densities.check_normalised),
    (ZeroForMissing, densities.check_missing),
    (UsesTheBatch, densities.check_rowwise),
    (WideSamples, densities.check_samples),
    (IndependentSamples, densities.check_sample_entropy),
    (ForgetsConfig, structure.check_config),
    (WrongSite, structure.check_symmetry),
    (WrongInvariant, structure.check_symmetry),
    (ForgetsResponsibilities, structure.check_condition),
    (GlobalGenerator, densities.check_pure),
]


@pytest.mark.parametrize(("broken", "check"), PLANTED, ids=[b.__name__ for b, _ in PLANTED])
def test_a_planted_error_is_caught(broken, check):
    case = CASES["two"]
    before = torch.get_rng_state()
    check(replace(case, model=Broken(case.model)))  # the wrapper itself is innocent
    with pytest.raises(AssertionError):
        check(replace(case, model=broken(case.model)))
    torch.set_rng_state(before)


@dataclass(frozen=True)
class _Unbound:
    is_bound: bool = False


def test_an_unbound_model_is_caught():
    with pytest.raises(AssertionError, match="not bound"):
        structure.check_description(replace(CASES["two"], model=_Unbound()))
