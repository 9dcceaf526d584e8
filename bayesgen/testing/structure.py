"""Checks of a model's description, latents, conditionals, symmetry and Pyro program."""

from __future__ import annotations

import json
import math

import torch

from bayesgen import rng
from bayesgen.capabilities import Conditional, Encoder, Program, Scored, Symmetric
from bayesgen.replay import is_data
from bayesgen.testing.cases import ModelCase, close, scored

__all__ = [
    "check_condition",
    "check_config",
    "check_description",
    "check_encode",
    "check_program",
    "check_symmetry",
]

_ESTIMATE = 0.1  # nats by which two estimates of one density may differ


def check_description(case: ModelCase) -> None:
    """Bound; ``dims`` and ``coords`` name every site's event as large as it is."""
    model = case.model
    assert model.is_bound, "the model says that it is not bound"
    coords = model.coords()
    for site, value in case.draws.items():
        event = tuple(value.shape[1:])
        assert site in model.dims, f"dims lack the site '{site}'"
        names = model.dims[site]
        assert len(names) == len(event), f"site '{site}': event {event}, but dims {names}"
        assert len(set(names)) == len(names), f"site '{site}': dims repeat: {names}"
        for name, size in zip(names, event, strict=True):
            labels = coords.get(name)
            assert labels is None or len(labels) == size, (
                f"site '{site}': {size} along '{name}', but {len(labels or [])} labels in coords"
            )


def check_config(case: ModelCase) -> None:
    """``to_config`` is JSON and tensors; the model read back has densities equal bit by bit."""
    from bayesgen.storage import flatten, unflatten

    tensors, config = flatten(case.model.to_config())
    copies = {name: value.detach().clone() for name, value in tensors.items()}
    again = type(case.model).from_config(unflatten(copies, json.loads(json.dumps(config))))
    again = again.to(next(iter(case.draws.values())).device)
    assert again.is_bound, "the reloaded model is not bound"
    assert dict(again.dims) == dict(case.model.dims), "dims differ after a reload"
    assert dict(again.coords()) == dict(case.model.coords()), "coords differ after a reload"
    if isinstance(again, Scored):
        left = scored(case).log_prob(case.x, case.draws)
        right = again.log_prob(case.x, case.draws)
        assert torch.equal(left, right), "log_prob is not equal bit by bit after a reload"


def check_encode(case: ModelCase) -> None:
    """Latents have the batch shape ``(*draw, n)``; labels' probabilities sum to one."""
    assert isinstance(case.model, Encoder)
    x = case.x.clone()
    x[0] = torch.nan
    latent = case.model.encode(x, case.draws)
    assert tuple(latent.batch_shape) == (case.num_draws, len(x)), f"batch {latent.batch_shape}"
    if isinstance(latent, torch.distributions.Categorical):
        total = latent.probs.sum(-1)
        close(total, torch.ones_like(total), "probabilities do not sum to one")


def check_condition(case: ModelCase) -> None:
    """The conditional density is the ratio of the joint and the marginal."""
    assert isinstance(case.model, Conditional)
    model, x, d = scored(case), case.x, case.data.num_columns
    joint = model.log_prob(x, case.draws)
    patterns = {(), (0,), (d - 1,), tuple(range(1, d)), tuple(range(0, d, 2))}
    for known in sorted(pattern for pattern in patterns if len(pattern) < d):
        observed = torch.zeros(d, dtype=torch.bool, device=x.device)
        observed[list(known)] = True
        shown = torch.where(observed, x, torch.nan)
        distribution = case.model.condition(shown, observed, case.draws)
        assert tuple(distribution.batch_shape) == (case.num_draws, len(x)), (
            f"given columns {known}: batch shape {tuple(distribution.batch_shape)}"
        )
        given = distribution.log_prob(x[:, ~observed])
        marginal = model.log_prob(shown, case.draws)
        close(given + marginal, joint, f"given columns {known}", 1e-6)
        assert distribution.mean.shape[-1] == d - len(known), "mean of the missing columns"


def check_symmetry(case: ModelCase) -> None:
    """The group changes neither densities nor invariants; weights stay weights."""
    assert isinstance(case.model, Symmetric)
    symmetry = case.model.symmetry
    draws = {name: value[None] for name, value in case.draws.items()}
    elements = symmetry.random((1, case.num_draws), generator=rng.make_generator(0))
    moved = symmetry.apply(draws, elements.to(next(iter(draws.values())).device))
    if isinstance(case.model, Scored):
        left, right = case.model.log_prob(case.x, draws), case.model.log_prob(case.x, moved)
        if case.model.is_estimated:
            error = float((left - right).abs().max())
            assert error < _ESTIMATE, f"the group changes the estimate by {error:.3g} nats"
        else:
            close(left, right, "the group changes log_prob")
    here, there = case.model.invariants(draws), case.model.invariants(moved)
    assert set(here).isdisjoint(draws), f"invariants {sorted(set(here) & set(draws))} name sites"
    for name, value in here.items():
        assert value.shape[:2] == (1, case.num_draws), f"'{name}' is {tuple(value.shape)}"
        close(value, there[name], f"'{name}' is no invariant")


def check_program(case: ModelCase) -> None:
    """The Pyro program's likelihood is ``log_prob``, and scales with ``num_rows``."""
    import pyro
    from pyro import poutine

    assert isinstance(case.model, Program)
    x = case.x
    with rng.fork(rng.make_generator(0)):
        trace = poutine.trace(case.model.model).get_trace(x)
    trace.compute_log_prob()
    seen = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    values = {name: seen[name]["value"].detach()[None] for name in case.draws if name in seen}
    missing = sorted(set(case.draws) - set(values))
    assert not missing, f"the program's trace has no sites {missing}"
    likelihood = sum(node["log_prob_sum"] for node in seen.values() if is_data(node))
    close(
        torch.as_tensor(likelihood).detach(),
        scored(case).log_prob(x, values).sum(),
        "the program's likelihood is not log_prob",
    )
    prior = float(trace.log_prob_sum()) - float(likelihood)
    assert math.isfinite(prior), "the program's prior density is not finite"
    held = {name: node["value"] for name, node in seen.items() if not node["is_observed"]}
    with rng.fork(rng.make_generator(0)):
        scaled = poutine.trace(poutine.condition(case.model.model, data=held)).get_trace(
            x, num_rows=10 * len(x)
        )
    grown = float(scaled.log_prob_sum()) - prior
    assert math.isclose(grown, 10 * float(likelihood), rel_tol=1e-6), (
        f"with num_rows ten times as many the likelihood is {grown:.6g}, not ten times "
        f"{float(likelihood):.6g}: put the rows inside plate('data', num_rows, ...)"
    )
    assert not list(pyro.get_param_store().keys()), "Pyro's global parameter store is not empty"
