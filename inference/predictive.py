"""What a Pyro program says before it has seen data: draws of latents and observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import ImproperUniform, Unit
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayesgen import rng
from bayesgen.inference.checks import check_settings
from bayesgen.inference.complaints import ProgramError, explained
from bayesgen.inference.program import arguments, bound_program
from bayesgen.inference.sites import quietly

__all__ = ["PriorPredictive", "prior_predictive"]


class PriorPredictive(NamedTuple):
    """Draws ``(1, num_samples, *shape)`` by site."""

    prior: dict[str, Tensor]
    """Latent and deterministic sites."""
    predictive: dict[str, Tensor]
    """The sites that the data observe."""


def prior_predictive(
    program: Callable[..., Any],
    data: object = None,
    *,
    num_samples: int = 500,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> PriorPredictive:
    r"""Draw from a Pyro program as if nothing had been observed.

    .. math:: \theta \sim p(\theta), \qquad \tilde y \sim p(y \mid \theta)

    Args:
        program: Any callable that calls ``pyro.sample``, or one from
            :func:`bayesgen.priors.with_priors`.
        data: As for an engine's ``run``; observed values give the shapes alone.
        num_samples: Draws.
        seed: Of every random number.
        dtype: Precision of the draws; the program runs under it as default dtype.
        device: Where to compute.

    Raises:
        ValueError: A flat prior, or a ``pyro.factor``: neither can be drawn from.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> draws = prior_predictive(model, torch.zeros(3), num_samples=100)
        >>> draws.prior["loc"].shape, draws.predictive["x"].shape
        (torch.Size([1, 100]), torch.Size([1, 100, 3]))
    """
    check_settings("prior_predictive", num_samples=num_samples)
    where = torch.device(device)
    call = arguments(program, data, dtype=dtype, device=where)
    run = bound_program(program, call)
    generator = rng.make_generator(seed, where)
    prior: dict[str, list[Tensor]] = {}
    predictive: dict[str, list[Tensor]] = {}
    with rng.fork(generator), quietly(dtype), torch.no_grad(), explained():
        for _ in range(num_samples):
            with _Unobserved(dtype):
                nodes = poutine.trace(run).get_trace().nodes
            for name, node in nodes.items():
                if node["type"] != "sample" or poutine.util.site_is_subsample(node):
                    continue
                found = predictive if node["infer"].get("was_observed") else prior
                found.setdefault(name, []).append(node["value"])
    return PriorPredictive(_stacked(prior), _stacked(predictive))


def _stacked(draws: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack(values).unsqueeze(0) for name, values in draws.items()}


class _Unobserved(Messenger):
    """Forget observations; refuse what has no draws; keep one precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        law, name = msg["fn"], msg["name"]
        if poutine.util.site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        while "base_dist" in vars(law):
            law = law.base_dist
        if isinstance(law, Unit):
            raise ProgramError(
                f"pyro.factor '{name}' weighs the prior by a number, so the prior cannot be drawn "
                "from. Write it as a distribution, or give another prior by with_priors."
            )
        if isinstance(law, ImproperUniform):
            raise ProgramError(
                f"site '{name}' has a flat prior (ImproperUniform), which cannot be drawn from. "
                f"Give a proper one: with_priors(program, {{'{name}': ...}})."
            )
        if msg["is_observed"]:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
            msg["infer"] = {**msg["infer"], "was_observed": True}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["value"], Tensor) and msg["value"].is_floating_point():
            msg["value"] = msg["value"].to(self.dtype)
