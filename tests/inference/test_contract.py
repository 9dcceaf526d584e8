"""Every engine meets the contract of `bayesgen.testing`: a new one adds a row to CASES."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bayesgen import rng
from bayesgen.data import as_dataset
from bayesgen.inference import EM, NUTS, SVI, VB, ClosedForm, Gibbs, Laplace, ManyChains
from bayesgen.models import PPCA, FactorAnalysis, GaussianMixture, Mixture, RobustPCA
from bayesgen.models.families.bernoulli import Bernoulli
from bayesgen.testing import EngineCase, engine_checks, engines

__all__: list[str] = []


def blobs(num_columns=2, num_rows=90, seed=0):
    generator = rng.make_generator(seed)
    x = rng.standard_normal((num_rows, num_columns), generator)
    return x + 8.0 * torch.arange(num_rows).remainder(2)[:, None]


def holes(x):
    gaps = torch.rand(x.shape, generator=rng.make_generator(1)) < 0.1
    return torch.where(gaps, torch.nan, x)


def binary():
    generator = rng.make_generator(0)
    return as_dataset(torch.randint(0, 2, (60, 4), generator=generator).double(), kinds="binary")


DATA = as_dataset(blobs())
HOLES = as_dataset(holes(blobs()))
GIBBS = {"num_chains": 2, "num_samples": 30, "num_warmup": 10}
NUTS_SETTINGS = {"num_chains": 1, "num_samples": 60, "num_warmup": 8}  # two steps each
MANY = {"num_chains": 4, "num_superchains": 2, "num_samples": 30, "num_warmup": 20}
SVI_SETTINGS = {"num_steps": 220, "num_samples": 20}


def make(name, engine, model=None, data=DATA, **settings):
    return EngineCase(name, engine, model or GaussianMixture(4), data, **settings)


CASES = [
    make("em", lambda: EM(num_starts=2), monotone=("objective",)),
    make("em-minibatch", lambda: EM(num_starts=1, schedule="memoised", batch_size=30)),
    make("vb", lambda: VB(), monotone=("elbo",)),
    make("vb-holes", lambda: VB(num_starts=1), data=HOLES, monotone=("elbo",)),
    make("vb-memoised", lambda: VB(num_starts=1, schedule="memoised", batch_size=30)),
    make("vb-float32", lambda: VB(num_starts=1, dtype=torch.float32)),
    make("gibbs", lambda: Gibbs(**GIBBS), resume_after=15),
    make("gibbs-cut-in-warmup", lambda: Gibbs(**GIBBS), resume_after=3),
    make("gibbs-holes", lambda: Gibbs(**GIBBS), data=HOLES),
    make("nuts", lambda: NUTS(**NUTS_SETTINGS), GaussianMixture(1), resume_after=3),
    make("many-chains", lambda: ManyChains(**MANY), GaussianMixture(1), resume_after=3),
    make("laplace", lambda: Laplace(num_samples=50), GaussianMixture(1), resume_after=2),
    make("svi", lambda: SVI(batch_size=32, **SVI_SETTINGS), GaussianMixture(1), resume_after=3),
    make("gibbs-bernoulli", lambda: Gibbs(**GIBBS), Mixture(Bernoulli(), 3), binary()),
]
CASES += [
    make("closed-form", lambda: ClosedForm(), PPCA(1), is_random=False, resume_after=0),
    make("em-ppca", lambda: EM(num_starts=1), PPCA(1), is_random=False, monotone=("objective",)),
    make(
        "em-ppca-holes",
        lambda: EM(num_starts=1, objective="likelihood"),
        PPCA(1),
        HOLES,
        is_random=False,
        monotone=("objective",),
    ),
    make("em-factors", lambda: EM(num_starts=2), FactorAnalysis(1), monotone=("objective",)),
    make("vb-ppca", lambda: VB(num_starts=1), PPCA(1), monotone=("elbo",)),
    make("vb-robust-holes", lambda: VB(num_starts=1), RobustPCA(1), HOLES, monotone=("elbo",)),
    make(
        "vb-robust-memoised",
        lambda: VB(num_starts=1, schedule="memoised", batch_size=30),
        RobustPCA(1),
        monotone=("elbo",),
    ),
    make("em-robust", lambda: EM(num_starts=2), RobustPCA(1), monotone=("objective",)),
    make(
        "vb-cells-holes",
        lambda: VB(num_starts=1, num_samples=20),
        RobustPCA(1, scales="cells"),
        HOLES,
        monotone=("elbo",),
    ),
    make(
        "vb-cells-memoised",
        lambda: VB(num_starts=1, num_samples=20, schedule="memoised", batch_size=30),
        RobustPCA(1, scales="cells"),
        monotone=("elbo",),
    ),
    make(
        "em-cells",
        lambda: EM(num_starts=2),
        RobustPCA(1, scales="cells"),
        monotone=("objective",),
    ),
    make(
        "gibbs-cells-holes",
        lambda: Gibbs(**GIBBS),
        RobustPCA(1, scales="cells"),
        HOLES,
        resume_after=15,
    ),
    make("gibbs-ppca", lambda: Gibbs(**GIBBS), PPCA(1), resume_after=15),
    make("gibbs-robust-holes", lambda: Gibbs(**GIBBS), RobustPCA(1), HOLES, resume_after=15),
]
PAIRS = [(case, check) for case in CASES for check in engine_checks(case)]


@pytest.mark.parametrize(
    ("case", "check"), PAIRS, ids=[f"{case.name}-{check.__name__}" for case, check in PAIRS]
)
def test_contract(case, check):
    check(case)


@pytest.mark.parametrize("engine", [EM(num_starts=1), VB(num_starts=1), Gibbs(**GIBBS)])
def test_one_component_has_the_sample_mean(engine):
    mean = DATA.tensor().mean(0)[None]
    case = make("one", lambda: engine, GaussianMixture(1), fixed={"loc": (mean, 0.5)})
    engines.check_fit(case)
    with pytest.raises(AssertionError, match="mean of 'loc' is off"):
        engines.check_fit(dataclasses.replace(case, fixed={"loc": (mean + 2.0, 0.5)}))


# ---------------------------------------------------------------- planted errors
@dataclasses.dataclass(frozen=True)
class Wrong:
    """An engine that passes everything on but does one thing wrong."""

    inner: Gibbs
    what: str

    def run(self, model, data, **arguments):
        if self.what == "forgets the seed":
            arguments["seed"] = int(np.random.SeedSequence().generate_state(1)[0])
        if self.what == "ignores the seed":
            arguments["seed"] = 0
        if self.what == "global generator":
            torch.rand(1)
        if self.what == "starts again":
            arguments.pop("resume", None)
        fit = self.inner.run(model, data, **arguments)
        if self.what == "not finite":
            broken = {site: value * torch.nan for site, value in fit.draws.items()}
            return dataclasses.replace(fit, draws=broken)
        if self.what == "silent":
            return dataclasses.replace(fit, attrs={})
        if self.what == "falls":
            values = fit.history["log_likelihood"]
            return dataclasses.replace(fit, history={"log_likelihood": [*values, values[-1] - 1]})
        return fit


PLANTED = [
    ("forgets the seed", engines.check_reproducible),
    ("ignores the seed", engines.check_reproducible),
    ("global generator", engines.check_globals),
    ("not finite", engines.check_fit),
    ("silent", engines.check_fit),
    ("falls", engines.check_monotone),
    ("starts again", engines.check_resume),
]


@pytest.mark.parametrize(("what", "check"), PLANTED, ids=[what for what, _ in PLANTED])
def test_a_planted_error_is_caught(what, check):
    inner = Gibbs(num_chains=1, num_samples=4, num_warmup=2)
    before = torch.get_rng_state()
    case = make("wrong", lambda: Wrong(inner, what), monotone=("log_likelihood",))
    with pytest.raises(AssertionError):
        check(case)
    torch.set_rng_state(before)
