"""After the optimisation: draws from the guide, the bound with its error, importance weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import Tensor, fx, nn

from bayesgen import rng
from bayesgen.inference.compiled.graph import capture, simplify
from bayesgen.inference.programs.flat import starting_in_the_support
from bayesgen.inference.programs.sites import dims_of, quietly
from bayesgen.inference.variational.noise import Branches, Drawn, Fed, Hidden, Tape
from bayesgen.inference.variational.objectives import OBJECTIVES, Traces
from bayesgen.inference.variational.pair import Pair
from bayesgen.inference.variational.step import draw_noise
from bayesgen.replay import is_computed

__all__ = ["Draws", "local_sites", "mean_and_error", "sampler", "settled"]

_CHUNK = 2**22  # numbers held at once


class Draws(NamedTuple):
    """Draws from a guide."""

    values: dict[str, Tensor]
    """``(num_samples, *shape)`` by site, deterministic ones of the model included."""
    log_weights: Tensor
    """``log p(z, y) - log q(z)`` of each draw, ``(num_samples,)``: its mean is the bound."""
    is_point: bool
    """Whether the guide is a point, and one draw says all."""
    sometimes: tuple[str, ...] = ()
    """Sites that some runs of the program have and others lack; no values of them are kept."""


def local_sites(traces: Traces, plate: str | None) -> set[str]:
    """Latents of single rows: in a plate of which a run sees a part, or in the plate so named."""
    found = set()
    for name, node in traces.model.nodes.items():
        for frame in node.get("cond_indep_stack", ()):
            part = frame.full_size is not None and frame.full_size > frame.size
            if part or frame.name == plate:
                found.add(name)
    return found


def _wanted(traces: Traces, left_out: set[str]) -> list[str]:
    names = []
    for name, node in traces.model.nodes.items():
        if node["type"] != "sample" or name in left_out or poutine.util.site_is_subsample(node):
            continue
        latent = not node["is_observed"] or is_computed(node)
        summed = not node["is_observed"] and name not in traces.guide.nodes
        if latent and not summed and node["value"].ndim == len(dims_of(node)):
            names.append(name)
    return names


def settled(pair: Pair, flat: Tensor, tensors: Sequence[Tensor]) -> Pair:
    """The pair with the guide that it ends in: Laplace's, once the mode is found."""
    guide = pair.guide
    if not isinstance(guide, AutoLaplaceApproximation):
        return pair
    # Pyro's store names it after the guide's class.
    loc = next(v for k, v in pair.named(flat).items() if k.rpartition(".")[2] == "loc")
    args, kwargs = pair.call.arguments(tensors)
    quiet = rng.fork(rng.make_generator(0, pair.device))  # Pyro runs the model there
    with quiet, pair.using(flat), torch.enable_grad(), starting_in_the_support():
        # A parameter of its own: the Hessian is taken with respect to it.
        guide.loc = nn.Parameter(loc.detach().clone())
        try:
            final = guide.laplace_approximation(*args, **kwargs, **pair.extra)
        except RuntimeError as error:
            if "positive-definite" not in str(error):
                raise
            raise ValueError(
                "SVI: AutoLaplaceApproximation ended where the log density is not concave, so "
                "this is no mode. Raise num_steps or learning_rate, or use AutoMultivariateNormal."
            ) from error
    return dataclasses.replace(pair, guide=final)


Sampler = Callable[[Tensor, int, torch.Generator], Draws]


def sampler(
    pair: Pair,
    batch: Callable[[], tuple[Tensor, ...]],
    *,
    left_out: set[str],
    full: bool,
    traced: bool,
) -> Sampler:
    """A function of parameters, a number of draws and a generator.

    Args:
        pair: Model and guide.
        batch: Tensors of the call and indices of the plates; called for each draw.
        left_out: Sites that are not kept.
        full: Whether every batch is all rows, the same.
        traced: Whether the pair can be traced.
    """
    names: list[str] = []
    first = batch()
    graphs: list[fx.GraphModule] = []
    objective = "trace" if pair.objective == "mean_field" else pair.objective

    def evaluate(flat: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), pair.using(flat):
            traces = pair.run(*pair.parted(data), full=full)
            elbo, _ = OBJECTIVES[objective](traces)
            names[:] = _wanted(traces, left_out)
            return elbo, *(traces.model.nodes[n]["value"].clone() for n in names)

    def fed(flat: Tensor, normals: Tensor, uniforms: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        branches = Branches()
        with branches, Tape(Fed(normals, uniforms)):
            elbo, *values = evaluate(flat, *data)
            return branches.violated(elbo), elbo, *values

    def draw(flat: Tensor, num_samples: int, generator: torch.Generator) -> Draws:
        source = Drawn(generator)
        try:
            with Tape(source):
                example = evaluate(flat, *first)
        except Hidden:
            return _by_pyro(names, evaluate, flat, batch, num_samples, generator)
        if source.size == (0, 0):
            return _packed(names, [tuple(v[None] for v in example)], True)
        if not traced:
            return _by_pyro(names, evaluate, flat, batch, num_samples, generator)
        if not graphs:
            inputs = (flat, *draw_noise(source.size, (), pair, generator), *first)
            with quietly(pair.dtype):
                graphs.append(_captured(fed, inputs, full))
        held = sum(v.numel() for v in (*example, *first)) + sum(source.size)
        size = max(1, min(num_samples, _CHUNK // (8 * held)))
        parts = []
        for start in range(0, num_samples, size):
            now = min(size, num_samples - start)
            noise = draw_noise(source.size, (now,), pair, generator)
            data = first
            if not full:
                batches = [batch() for _ in range(now)]
                data = tuple(torch.stack(v) for v in zip(*batches, strict=True))
            axis = None if full else 0
            many = torch.func.vmap(graphs[0], (None, 0, 0, *(axis for _ in data)))
            with torch.no_grad():
                violated, *found = many(flat, *noise, *data)
            if bool(violated.any()):  # a branch that depends on what is drawn
                return _by_pyro(names, evaluate, flat, batch, num_samples, generator)
            parts.append(tuple(found))
        return _packed(names, parts, False)

    return draw


def _captured(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], full: bool
) -> fx.GraphModule:
    """The graph; where all draws see the same rows, shapes may depend on their values."""
    try:
        return simplify(capture(function, *inputs), *inputs)
    except Exception:
        if not full:
            raise

    def held(flat: Tensor, normals: Tensor, uniforms: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return function(flat, normals, uniforms, *inputs[3:])

    return simplify(capture(held, *inputs, data_apart=True), *inputs)


def _by_pyro(
    names: list[str],
    evaluate: Callable[..., tuple[Tensor, ...]],
    flat: Tensor,
    batch: Callable[[], tuple[Tensor, ...]],
    num_samples: int,
    generator: torch.Generator,
) -> Draws:
    weights, rows = [], []
    for _ in range(num_samples):
        with rng.fork(generator):
            weight, *values = evaluate(flat, *batch())
        weights.append(weight)
        rows.append(dict(zip(names, values, strict=True)))
    met = dict.fromkeys(name for row in rows for name in row)
    always = [name for name in met if all(name in row for row in rows)]
    parts = (torch.stack(weights), *(torch.stack([row[n] for row in rows]) for n in always))
    sometimes = tuple(name for name in met if name not in always)
    return _packed(always, [parts], False)._replace(sometimes=sometimes)


def _packed(names: Sequence[str], parts: Sequence[tuple[Tensor, ...]], is_point: bool) -> Draws:
    joined: list[Any] = [torch.cat(v) for v in zip(*parts, strict=True)]
    return Draws(dict(zip(names, joined[1:], strict=True)), joined[0], is_point)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))
