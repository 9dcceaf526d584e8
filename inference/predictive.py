"""What a Pyro program or a model says before it has seen data: parameters, and data from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bayesgen.capabilities import Model
from bayesgen.data import as_dataset
from bayesgen.inference.checks import check_settings
from bayesgen.inference.programs.complaints import explained
from bayesgen.inference.programs.program import arguments, bound_program
from bayesgen.predictive import PriorPredictive, program_prior, sample_prior

__all__ = ["PriorPredictive", "prior_predictive"]


def prior_predictive(
    program: Callable[..., Any] | Model,
    data: object = None,
    *,
    num_samples: int = 500,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> PriorPredictive:
    r"""Draw from a program or model as if nothing had been observed.

    .. math:: \theta \sim p(\theta), \qquad \tilde y \sim p(y \mid \theta)

    All runs go at once where the program allows it.

    Args:
        program: Any callable that calls ``pyro.sample``, one from
            :func:`bayesgen.priors.with_priors`, or a model.
        data: As for an engine's ``run``; observed values give the shapes alone (and to a model
            the scale of its default priors).
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
    if isinstance(program, Model):
        rows = as_dataset(data)
        return sample_prior(
            program.bind(rows).to(where), rows, num_samples=num_samples, seed=seed, device=where
        )
    call = arguments(program, data, dtype=dtype, device=where)
    with explained():
        return program_prior(
            bound_program(program, call),
            num_samples=num_samples,
            seed=seed,
            dtype=dtype,
            device=where,
        )
