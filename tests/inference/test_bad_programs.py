"""Bad programs get help: the site, what it has, what to do, the line. The messages are exact."""

from __future__ import annotations

import inspect
import itertools
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from bayesgen.inference import NUTS, SVI, ManyChains
from bayesgen.inference.programs.complaints import ProgramError, explained
from bayesgen.inference.programs.sites import discover
from bayesgen.inference.programs.trace import trace
from bayesgen.models import GaussianMixture
from bayesgen.rng import make_generator

__all__: list[str] = []

Y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
X32 = torch.ones(3, 2, dtype=torch.float32)
NETWORK = torch.nn.Linear(1, 1, dtype=torch.float64)
RUNS = itertools.count()
RUN = {"num_chains": 2, "num_samples": 4, "num_warmup": 4}


def loc():
    return pyro.sample("loc", dist.Normal(0.0, 1.0))


def observe(law):
    with pyro.plate("data", 3):
        pyro.sample("y", law, obs=Y)


# ---------------------------------------------------------------- latents
def nothing_latent():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=Y[0])


def a_parameter():
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("y", dist.Normal(loc(), scale), obs=Y[0])


def a_module():
    network = pyro.module("network", NETWORK)
    pyro.sample("y", dist.Normal(network(loc().reshape(1)), 1.0), obs=Y[:1])


def endless_discrete():
    count = pyro.sample("count", dist.Poisson(3.0))  # HERE
    pyro.sample("y", dist.Normal(count, 1.0), obs=Y[0])


def no_bijection():
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))  # HERE


def a_prior_off_the_support():
    scale = pyro.sample("scale", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, scale), obs=Y[0])  # HERE


def a_fixed_value_off_the_support():
    pyro.sample("y", dist.Normal(loc(), -1.0), obs=Y[0])  # HERE


def a_class():
    pyro.sample("loc", dist.Normal)  # HERE


def a_number():
    pyro.sample("loc", 3.0)  # HERE


def torchs_distribution():
    pyro.sample("loc", torch.distributions.Normal(0.0, 1.0))  # HERE


# ---------------------------------------------------------------- names and plates
def name_twice():
    pyro.sample("loc", dist.Normal(loc(), 1.0))  # HERE


def plate_twice():
    with pyro.plate("data", 3), pyro.plate("data", 3):  # HERE
        pyro.sample("x", dist.Normal(0.0, 1.0))


def plates_that_collide():
    with pyro.plate("a", 3, dim=-1), pyro.plate("b", 3, dim=-1):  # HERE
        pyro.sample("x", dist.Normal(0.0, 1.0))


def subsampled():
    mean = loc()
    with pyro.plate("data", 3, subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y[rows])


def plate_of_another_size():
    mean = loc()
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(mean * torch.ones(3), 1.0), obs=Y)  # HERE


def data_of_another_size():
    mean = loc()
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)  # HERE


def label_without_plate():
    label = pyro.sample("label", dist.Bernoulli(torch.full((3,), 0.5)))  # HERE
    observe(dist.Normal(loc() + label, 1.0))


def latents_without_plate():
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0))  # HERE
    with pyro.plate("data", 3):
        label = pyro.sample("label", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(loc[label], 1.0), obs=Y)


def a_mask_of_another_shape():
    mean = loc()
    with pyro.plate("data", 3), poutine.mask(mask=torch.ones(3, 2, dtype=torch.bool)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)  # HERE


def data_without_plate():
    label = pyro.sample("label", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(loc() + label, 1.0), obs=Y)  # HERE


# ---------------------------------------------------------------- data
def missing_values():
    pyro.sample("y", dist.Normal(loc(), 1.0), obs=torch.tensor(torch.nan))  # HERE


def outside_support():
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Exponential(rate), obs=Y - 2.0)  # HERE


def shapes_that_cross():
    law = dist.Normal(loc() * torch.ones(3), 1.0).to_event(1)
    pyro.sample("y", law, obs=Y.unsqueeze(-1))  # HERE


def shapes_that_differ():
    law = dist.Normal(loc() * torch.ones(4), 1.0).to_event(1)
    pyro.sample("y", law, obs=Y)  # HERE


def numpy_data():
    pyro.sample("y", dist.Normal(loc(), 1.0), obs=np.array(1.0))  # HERE


def a_list_of_data():
    pyro.sample("y", dist.Normal(loc(), 1.0), obs=[1.0, 2.0])  # HERE


def data_of_another_dtype():
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    observe(dist.Normal(X32 @ beta, 1.0))  # HERE


def an_error_of_its_own():
    pyro.sample("y", dist.Normal(loc(), {}["scale"]), obs=Y[0])  # HERE


# ---------------------------------------------------------------- control flow
def sites_that_come_and_go():
    if next(RUNS) % 2:
        loc()
    pyro.sample("mean", dist.Normal(0.0, 1.0))


def sites_that_depend_on_values():
    if loc() > 0:
        pyro.sample("more", dist.Normal(0.0, 1.0))


def a_branch_on_a_coin():
    coin, mean = pyro.sample("coin", dist.Bernoulli(0.5)), loc()
    if coin:  # HERE
        mean = mean + 1
    pyro.sample("y", dist.Normal(mean, 1.0), obs=Y[0])


def a_sum_of_many_labels():
    loc()
    total = torch.tensor(0.0)
    for t in range(30):
        law = dist.Bernoulli(1 / (2 + total))
        total = total + pyro.sample(f"label_{t}", law)  # HERE


# ---------------------------------------------------------------- starts
def infinite_at_the_start():
    pyro.sample("y", dist.Normal(loc() * 1e200, 1.0), obs=Y[0])


def nan_at_the_start():
    pyro.factor("bad", (-loc().abs() - 1.0).log())  # HERE


def no_slope_at_the_start():
    pyro.factor("bad", 0.0 * (0.0 * loc()).sqrt())


TABLE = {
    nothing_latent: (
        "the program has no continuous latent site: every pyro.sample is observed or "
        "discrete, so there is nothing to sample. Give a parameter a prior, such as "
        "pyro.sample('loc', Normal(0, 1))."
    ),
    a_parameter: (
        "pyro.param 'scale' in the model: a sampler draws from a posterior and does not "
        "optimise. Give it a prior with pyro.sample('scale', ...), or pass a fixed tensor."
    ),
    a_module: (
        "pyro.module 'network' in the model: a sampler draws from a posterior and does not "
        "optimise weights. Call the module without pyro.module to keep its weights fixed, "
        "give them priors by pyro.nn.PyroSample, or fit by SVI."
    ),
    endless_discrete: (
        "site 'count' is a latent Poisson: discrete with endless values, so it can be "
        "neither moved along a gradient nor summed out. Observe it (obs=...), marginalise it "
        "by hand (Gamma-Poisson is a NegativeBinomial), or bound it with a Categorical."
    ),
    no_bijection: (
        "site 'direction' is a latent ProjectedNormal on Sphere, onto which no smooth "
        "one-to-one map from the real numbers is known. Sample a Cholesky factor instead "
        "(dist.LKJCholesky, bayesgen.distributions.InverseWishartCholesky) or register one "
        "with torch.distributions.biject_to.register."
    ),
    a_prior_off_the_support: (
        "scale of Normal must satisfy GreaterThan(lower_bound=0.0), but is -0.8313. Where it "
        "comes from a latent, give that a prior on this support (HalfNormal, LogNormal or "
        "Gamma for what is positive), or transform it (.exp(), torch.sigmoid)."
    ),
    a_fixed_value_off_the_support: (
        "scale of Normal must satisfy GreaterThan(lower_bound=0.0), but is -1. Where it "
        "comes from a latent, give that a prior on this support (HalfNormal, LogNormal or "
        "Gamma for what is positive), or transform it (.exp(), torch.sigmoid)."
    ),
    a_class: (
        "site 'loc' was given the class Normal, not a distribution: write dist.Normal(...) "
        "with its parameters."
    ),
    a_number: (
        "site 'loc' was given a float, but pyro.sample needs a distribution, such as "
        "dist.Normal(0.0, 1.0)."
    ),
    torchs_distribution: (
        "site 'loc' has a distribution of torch.distributions, which Pyro cannot sample. "
        "Write `import pyro.distributions as dist` and dist.Normal(...), with the same "
        "parameters."
    ),
    name_twice: (
        "the site name 'loc' is used twice: every pyro.sample and pyro.plate needs its own "
        "name. In a Python loop write f'loc_{i}', or use one pyro.plate around all of it."
    ),
    plate_twice: (
        "the site name 'data' is used twice: every pyro.sample and pyro.plate needs its own "
        "name. In a Python loop write f'data_{i}', or use one pyro.plate around all of it."
    ),
    plates_that_collide: (
        "plates 'a' and 'b' are nested and both take dimension -1. Leave out dim=, or give "
        "one of them dim=-2."
    ),
    subsampled: (
        "plate 'data' takes a random subsample of 2 of its 3 rows, and a sampler needs them "
        "all. Leave out subsample_size, or fit by SVI."
    ),
    plate_of_another_size: (
        "site 'y': plate 'data' has size 5, but the distribution has size 3 along it "
        "(dimension -1). Write pyro.plate('data', 3), or make both of size 5."
    ),
    data_of_another_size: (
        "site 'y': plate 'data' has size 5, but the observed values have size 3 along it "
        "(dimension -1). Write pyro.plate('data', 3), or make both of size 5."
    ),
    label_without_plate: (
        "discrete site 'label' has batch shape (3,) outside any plate: write `with "
        "pyro.plate('data', 3):` around it, or .to_event(1). Discrete latents (label) are "
        "summed out row by row, and plates say what a row is."
    ),
    latents_without_plate: (
        "latent site 'loc' has batch shape (2,) outside any plate: write `with "
        "pyro.plate('loc_row', 2):` around it, or .to_event(1). Discrete latents (label) are "
        "summed out row by row, and plates say what a row is."
    ),
    a_mask_of_another_shape: (
        "site 'y': the mask has shape (3, 2), but the site one entry for each of (3,). A mask "
        "says which rows count, not which columns: make it of that shape, for example "
        "mask.all(-1)."
    ),
    data_without_plate: (
        "observed site 'y' has batch shape (3,) outside any plate: write `with "
        "pyro.plate('data', 3):` around it, or .to_event(1). Discrete latents (label) are "
        "summed out row by row, and plates say what a row is."
    ),
    missing_values: (
        "site 'y': 1 of 1 observed values are NaN. Drop those rows, or make them latent with "
        "pyro.sample(..., obs=values, obs_mask=~missing)."
    ),
    outside_support: (
        "site 'y': 1 of 3 observed values lie outside the support of Exponential, "
        "GreaterThanEq(lower_bound=0.0). Transform the data, or choose a distribution that "
        "allows them."
    ),
    shapes_that_cross: (
        "site 'y': the distribution has shape (3,) and the observed values (3, 1), which "
        "broadcast to a third shape and so count values several times. Reshape one, for "
        "example values.squeeze(-1)."
    ),
    shapes_that_differ: (
        "site 'y': the distribution has shape (4,), and the observed values (3,). Make them "
        "equal: each observed value needs its own parameters, or shares those of size 1."
    ),
    numpy_data: (
        "site 'y': the observed value is a ndarray, but must be a tensor. Give run(program, "
        "data) a tensor or an array, np.asarray(values), or write "
        "obs=torch.as_tensor(np.asarray(values))."
    ),
    a_list_of_data: (
        "site 'y': the observed value is a list, but must be a tensor. Give run(program, data) "
        "a tensor or an array, np.asarray(values), or write "
        "obs=torch.as_tensor(np.asarray(values))."
    ),
    data_of_another_dtype: (
        "tensors of float32 and float64 meet. Data given to run(program, data) are converted "
        "to the engine's dtype; tensors that the program finds elsewhere are not. Pass them "
        "as data, convert them (.double()), or run with dtype=torch.float32."
    ),
    an_error_of_its_own: ("the program stopped with KeyError: 'scale'"),
    sites_that_come_and_go: (
        "the program's sites change from run to run: 'loc' is not always there. A sampler "
        "needs the same sites in every run: choose by torch.where or by a discrete latent "
        "(dist.Categorical), not by `if`."
    ),
    sites_that_depend_on_values: (
        "the program's sites change from run to run: 'more' is not always there. A sampler "
        "needs the same sites in every run: choose by torch.where or by a discrete latent "
        "(dist.Categorical), not by `if`."
    ),
    a_branch_on_a_coin: (
        "the program asks `if` of a discrete latent, which is summed over all its values at "
        "once. Choose by torch.where(latent.bool(), a, b), or by index: torch.stack([b, "
        "a])[latent]."
    ),
    a_sum_of_many_labels: (
        "site 'label_21' depends on 2,097,152 joint values of discrete latents, too many to "
        "sum over. Where each latent depends on the one before alone, loop `for t in "
        "pyro.markov(range(n))`, or use dist.DiscreteHMM; put independent ones into a plate."
    ),
    infinite_at_the_start: (
        "no starting point of finite density was found in 100 tries; not finite: 'y' (-inf). "
        "Is the data's scale far from the prior's, or a value outside the support? Rescale "
        "the data, or widen the prior."
    ),
    nan_at_the_start: (
        "pyro.factor adds NaN to the log density: an operation has left its domain, such as "
        "the logarithm of a negative number or 0 / 0."
    ),
    no_slope_at_the_start: (
        "no starting point with a finite gradient was found in 100 tries although the "
        "density is finite: an operation such as sqrt(0), 0 / 0 or a norm at zero has no "
        "derivative there."
    ),
}


ENGINES = {
    "NUTS": NUTS(**RUN),
    "ManyChains": ManyChains(num_chains=4, num_superchains=2, num_samples=4, num_warmup=4),
    "SVI": SVI(num_steps=48, num_samples=4),
}
# Parameters, modules and subsamples are what SVI is for: these run.
WELCOME_TO_SVI = (a_parameter, a_module, subsampled)
# SVI starts where its guide does and tries no other points, so it has words of its own for these.
SVI_TABLE = {
    infinite_at_the_start: (
        "SVI: the bound or its gradient stopped being finite at step 1. The first culprit is site "
        "'y' of the model: its log density is not finite. Start elsewhere (init_loc_fn of the "
        "autoguide), or rescale the data."
    ),
    no_slope_at_the_start: (
        "SVI: the bound or its gradient stopped being finite at step 1. Every site's log density "
        "is finite there: it is the gradient that is not; an operation such as sqrt(0), 0 / 0 or "
        "a norm at zero has no derivative."
    ),
}
PAIRS = [
    (e, p) for e in ENGINES for p in TABLE if e != "SVI" or p not in (*WELCOME_TO_SVI, *SVI_TABLE)
]


@pytest.mark.parametrize(("engine", "program"), PAIRS, ids=[f"{e}-{p.__name__}" for e, p in PAIRS])
def test_exact_messages(engine, program):
    with pytest.raises(ProgramError) as caught:
        ENGINES[engine].run(program)
    lines, first = inspect.getsourcelines(program)
    marked = [k for k, line in enumerate(lines) if line.rstrip().endswith("# HERE")]
    at = (
        f"\n  at test_bad_programs.py:{first + marked[0]}: {lines[marked[0]].strip()}"
        if marked
        else ""
    )
    wanted, found = TABLE[program], str(caught.value)
    if program is a_prior_off_the_support:  # where a run starts is an engine's own
        wanted, found = (
            re.sub(r"is -?[0-9.]+\. Where", "is -. Where", s) for s in (wanted, found)
        )
    assert found == wanted + at


@pytest.mark.parametrize("program", list(SVI_TABLE))
def test_svi_names_what_is_not_finite_at_the_start(program):
    with pytest.raises(ValueError, match="at step 1") as caught:
        ENGINES["SVI"].run(program)
    assert str(caught.value) == SVI_TABLE[program]


@pytest.mark.parametrize("program", WELCOME_TO_SVI)
def test_svi_runs_what_samplers_refuse(program):
    fit = ENGINES["SVI"].run(program)
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    assert set(fit.draws) == {"loc"}


def label_guide(law=None):
    pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(0.0)), 1.0))


@pytest.mark.parametrize(
    "program", [label_without_plate, data_without_plate, a_branch_on_a_coin, a_sum_of_many_labels]
)
def test_svi_explains_sums_under_a_hand_written_guide_too(program):
    engine = SVI(guide=label_guide, num_steps=48, num_samples=4)
    with pytest.raises(ProgramError) as caught:
        engine.run(program)
    assert str(caught.value).split("\n")[0] == TABLE[program]


def test_tensors_on_several_devices():
    """Torch's own words, since there may be one device alone."""
    with pytest.raises(ProgramError, match="move them"), explained():
        raise RuntimeError("Expected all tensors to be on the same device, but found two devices")


def test_what_is_no_program():
    with pytest.raises(TypeError, match="needs a model with the capability Program"):
        NUTS(**RUN).run(3.0, Y)
    with pytest.raises(TypeError, match=r"Pass a tuple for several arguments"):
        NUTS(**RUN).run(lambda x: loc(), (Y, Y))


def test_rows_outside_a_plate_are_noted():
    for law in (dist.Normal(0.0, torch.ones(3)), dist.Normal(0.0, 1.0)):

        def program(law=law):
            loc()
            pyro.sample("y", law, obs=Y)

        fit = NUTS(**RUN).run(program)
        messages = fit.attrs["messages"]
        assert any("write `with pyro.plate('data', 3):` around it" in m for m in messages)


def test_hidden_randomness_is_noted_and_runs():
    def program():
        noise = torch.randn(())
        pyro.sample("y", dist.Normal(loc() + noise, 1.0), obs=Y[0])

    with pytest.warns(UserWarning, match="Make every random number"):
        fit = NUTS(**RUN).run(program)
    assert any("draws random numbers of its own" in m for m in fit.attrs["messages"])


def test_a_site_that_vanishes_later_is_found():
    """Not in the two runs that look for sites."""
    countdown = iter([True, True])

    def program():
        pyro.sample("mean", dist.Normal(0.0, 1.0))
        if next(countdown, False):
            loc()

    with pytest.raises(ProgramError, match="sites change from run to run: 'loc'"):
        trace(program, generator=make_generator(0))


def test_a_long_chain_under_markov_is_no_large_sum():
    def program():
        stay, state = pyro.sample("stay", dist.Beta(1.0, 1.0)), torch.tensor(0.0)
        for t in pyro.markov(range(40)):
            state = pyro.sample(f"state_{t}", dist.Bernoulli(0.1 + 0.8 * state * stay))
            pyro.sample(f"y_{t}", dist.Normal(state, 1.0), obs=Y[t % 3])

    layout = discover(program, dtype=torch.float64, generator=make_generator(0))
    assert len(layout.enumerated) == 40


def test_gaps_that_a_models_program_does_not_take_are_refused_in_its_words():
    rows = torch.tensor([[0.0, 1.0], [float("nan"), 2.0], [3.0, 4.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="Mixture: missing entries, 1 of 6") as caught:
        NUTS(**RUN).run(GaussianMixture(2), rows)
    assert "obs_mask" not in str(caught.value)
