"""Discrete latents drawn back, given the parameters sampled while they were summed out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bayesgen import rng
from bayesgen.inference.compiled.graph import capture
from bayesgen.inference.programs.sites import Given, Layout, enumerated, quietly

__all__ = ["num_labels", "recover", "too_many"]

_CHUNK = 2**23  # numbers of all factors that are held at a time
_MAX_LABELS = 2**25  # of all draws together: 256 MiB


def num_labels(layout: Layout, num_draws: int) -> int:
    """Of the discrete latents in all draws together."""
    return num_draws * sum(map(math.prod, layout.enumerated.values()))


def too_many(layout: Layout, num_draws: int) -> str:
    """Why discrete latents are not drawn back; empty where they are, or where there are none."""
    if (count := num_labels(layout, num_draws)) <= _MAX_LABELS:
        return ""
    names = ", ".join(f"'{name}'" for name in layout.enumerated)
    return (
        f"the discrete latents {names} were summed out and not drawn back: {num_draws:,} "
        f"draws would hold {count:,} labels, more than the {_MAX_LABELS:,} kept. Lower "
        "num_samples or num_chains to have them."
    )


def recover(layout: Layout, vectors: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
    r"""Draw the discrete latents from their exact joint posterior given the continuous ones.

    .. math:: z \sim p(z \mid \theta, y)

    for each draw :math:`\theta`: forward sums, then samples backwards, through plates and
    ``pyro.markov`` chains alike; traced once, then run for all draws together, in chunks.

    Args:
        layout: Of the program.
        vectors: Constrained values of the continuous sites, one after the other, ``(m, size)``.
        generator: For the draws.

    Returns:
        Integers ``(m, *shape)`` by discrete site, and the ``pyro.deterministic`` values that
        depend on them.
    """
    with torch.no_grad(), quietly(layout.dtype), rng.fork(generator):
        factors, dependent = _measure(layout, vectors[0])
        chunk = max(1, _CHUNK // max(1, factors))
        drawn = _in_chunks(lambda v: _sampled(layout, v), vectors, chunk)
        if dependent:
            names, sizes = list(drawn), [math.prod(s) for s in layout.enumerated.values()]
            whole = torch.cat([drawn[n].flatten(1).to(vectors.dtype) for n in names], 1)
            whole = torch.cat([vectors, whole], 1)

            def values(row: Tensor) -> dict[str, Tensor]:
                vector, *labels = row.split([vectors.shape[1], *sizes])
                fixed = dict(zip(names, labels, strict=True))
                return _dependent(layout, vector, fixed, dependent)

            drawn |= _in_chunks(values, whole, chunk)
    return drawn


def _in_chunks(
    function: Callable[[Tensor], dict[str, Tensor]], vectors: Tensor, chunk: int
) -> dict[str, Tensor]:
    """A function of one vector at many; one by one where it cannot be traced."""
    names: list[str] = []

    def one(vector: Tensor) -> tuple[Tensor, ...]:
        found = function(vector)
        names[:] = list(found)
        return tuple(found.values())

    try:
        # Not simplified: what depends on no input may be random here.
        graph = capture(one, vectors[0].contiguous())
        many = torch.func.vmap(graph, randomness="different")
        rows = [many(part) for part in vectors.split(chunk)]
        values = [torch.cat(column) for column in zip(*rows, strict=True)]
    except Exception:  # whatever a user's program may raise while tensors hold no values
        values = [torch.stack(column) for column in zip(*map(one, vectors), strict=True)]
    return dict(zip(names, values, strict=True))


def _enumerated_trace(layout: Layout, vector: Tensor) -> Any:
    with Given(layout.sites, vector):
        return poutine.trace(enumerated(layout)).get_trace()


def _sampled(layout: Layout, vector: Tensor) -> dict[str, Tensor]:
    """One joint value of the discrete sites."""
    trace = prune_subsample_sites(_enumerated_trace(layout, vector))
    trace.compute_log_prob()
    trace.pack_tensors()

    def read() -> dict[str, Tensor]:
        """Stands for the program, which need not run again: its discrete values alone."""
        unit, infer = pyro.distributions.Categorical(torch.ones(1)), {"enumerate": "parallel"}
        return {name: pyro.sample(name, unit, infer=dict(infer)) for name in layout.enumerated}

    values = _sample_posterior_from_trace(read, trace, 1, False)
    return {n: values[n].expand(shape).long() for n, shape in layout.enumerated.items()}


def _dependent(
    layout: Layout, vector: Tensor, labels: Mapping[str, Tensor], names: list[str]
) -> dict[str, Tensor]:
    """Deterministic values, given every latent."""
    kinds = layout.enumerated
    fixed = {n: v.reshape(kinds[n]).to(layout.dtype) for n, v in labels.items()}
    with Given(layout.sites, vector), _Fixed(fixed):
        nodes = poutine.trace(layout.run).get_trace().nodes
    return {name: nodes[name]["value"].clone() for name in names}


class _Fixed(Messenger):
    """Give discrete sites their values, in the dtype that they have when drawn."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values:
            like = msg["fn"].enumerate_support(expand=False)
            msg["value"] = self.values[msg["name"]].to(like.dtype)
            msg["done"] = True


def _measure(layout: Layout, vector: Tensor) -> tuple[int, list[str]]:
    """Entries of all factors of one draw, and the deterministic values that depend on labels."""
    trace = _enumerated_trace(layout, vector)
    trace.compute_log_prob()
    nodes = {k: n for k, n in trace.nodes.items() if n["type"] == "sample"}
    known = {*(site.name for site in layout.sites), *layout.enumerated}
    dependent = [
        name
        for name, dims in layout.dims.items()
        if name not in known and nodes[name]["value"].ndim != len(dims)
    ]
    return sum(n["log_prob"].numel() for n in nodes.values() if "log_prob" in n), dependent
