r"""Trace once, run anywhere: a Pyro program as a tensor graph of its unconstrained log density.

.. math::
    \ell(u) = \log p\big(T(u), y\big) + \log \lvert \det T'(u) \rvert, \qquad
    T: \mathbb{R}^D \to \mathrm{support}

Discrete latents are summed out. After tracing no Python of Pyro runs in any inner loop.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from torch import Tensor, fx

from bayesgen import rng
from bayesgen.fingerprint import tensor_bytes
from bayesgen.inference.compiled.graph import capture, never_raising, simplify
from bayesgen.inference.compiled.products import PlainProducts
from bayesgen.inference.programs.complaints import (
    TWO_PRECISIONS,
    ProgramError,
    bijection,
    cause,
)
from bayesgen.inference.programs.marginal import pointwise
from bayesgen.inference.programs.precision import InOneDtype
from bayesgen.inference.programs.recover import recover
from bayesgen.inference.programs.sites import Flat, Given, Layout, discover, enumerated, quietly
from bayesgen.inference.programs.summed import add_up

__all__ = ["Density", "trace"]

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]
_CHUNK = 2**22  # numbers held while draws are turned back


@dataclass(frozen=True, eq=False)
class Density:
    """The log density of a program over a flat unconstrained vector, with its gradient.

    Args:
        layout: Sites, and where they lie in the vector.
        single: The traced graph of one vector: ``(D,) -> ((), (D,))``; None when it could not be
        traced.
        message: Why it could not be traced, with the line; empty when it was.
    """

    layout: Layout
    single: fx.GraphModule | None
    message: str = ""
    notes: dict[str, float] = field(default_factory=dict)
    _graphs: dict[Any, Callable[[Tensor], dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def num_params(self) -> int:
        """Length ``D`` of the vector."""
        return self.layout.num_params

    @property
    def is_traced(self) -> bool:
        """Whether gradients run without Pyro."""
        return self.single is not None

    # ------------------------------------------------------------ densities
    def pyro_log_prob(self, vector: Tensor) -> Tensor:
        """The log density of one vector ``(D,)`` by Pyro itself."""
        with self._apart():
            return _log_density(self.layout, vector)

    def _apart(self) -> AbstractContextManager[object]:
        """Random numbers that a program draws of its own leave the global generators alone."""
        return rng.fork(rng.make_generator(0, self.layout.device))

    def value_and_grad(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Log density ``(c,)`` and gradient at ``(c, D)``, for any ``c``; not the fast way."""
        with torch.no_grad():
            if self.single is not None:
                value, gradient = torch.func.vmap(self.single)(vectors)
                return value, gradient
        return self._by_pyro(vectors)

    def batched(self, num_chains: int) -> Gradient:
        """The gradient of ``num_chains`` vectors in one call, as a small eager graph."""
        if self.single is None:
            return self._by_pyro
        # Points that differ: a graph of equal ones could fold what differs between chains.
        example = self._points(num_chains)
        with quietly(self.layout.dtype):
            graph = capture(torch.func.vmap(self.single), example)
            return simplify(never_raising(graph), example)

    def _points(self, count: int) -> Tensor:
        layout = self.layout
        steps = torch.arange(count * self.num_params, dtype=layout.dtype, device=layout.device)
        return (steps * 0.7548776662466927).remainder(1.0).reshape(count, -1) - 0.5

    def _by_pyro(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        with self._apart():
            results = [_value_and_grad(self.layout, vector) for vector in vectors]
        return torch.stack([v for v, _ in results]), torch.stack([g for _, g in results])

    # ------------------------------------------------------------ draws
    def constrain(self, vectors: Tensor) -> dict[str, Tensor]:
        """Sites and deterministic values ``(*lead, *shape)`` of vectors ``(*lead, D)``."""
        return self._mapped(_values, vectors.to(self.layout.dtype))

    def log_likelihood(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log density of the observed values by site, ``(*lead, *rows)``, marginal.

        Args:
            draws: Constrained values ``(*lead, *shape)`` of at least the latent sites.
        """
        return self._mapped(_pointwise, self._joined(draws))

    def recover(
        self, draws: Mapping[str, Tensor], *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Discrete latents ``(*lead, *shape)``, drawn given the continuous ones.

        Args:
            draws: Constrained values ``(*lead, *shape)`` of at least the continuous sites.
            generator: For the draws.
        """
        vectors = self._joined(draws)
        found = recover(self.layout, vectors.flatten(0, -2), generator=generator)
        lead = vectors.shape[:-1]
        return {name: value.reshape((*lead, *value.shape[1:])) for name, value in found.items()}

    def _joined(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Constrained draws, one after the other: ``(*lead, sum of sizes)``."""
        parts = []
        for site in self.layout.sites:
            value = draws[site.name]
            parts.append(value.reshape(*value.shape[: value.ndim - len(site.shape)], -1))
        return torch.cat(parts, -1).to(self.layout.dtype)

    def _mapped(
        self, function: Callable[[Layout, Tensor], dict[str, Tensor]], vectors: Tensor
    ) -> dict[str, Tensor]:
        lead = vectors.shape[:-1]
        flat = vectors.reshape(-1, vectors.shape[-1])
        call = self._graph_of(function, flat[0].contiguous())
        size = max(1, sum(v.numel() for v in call(flat[0]).values()) + flat.shape[-1])
        many = torch.func.vmap(call) if self.is_traced else None
        parts: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for chunk in flat.split(max(1, _CHUNK // (16 * size))):
                if many is not None:
                    parts.append(many(chunk))
                else:
                    rows = [call(row) for row in chunk]
                    parts.append({k: torch.stack([r[k] for r in rows]) for k in rows[0]})
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: value.reshape((*lead, *value.shape[1:])) for name, value in joined.items()}

    def _graph_of(
        self, function: Callable[[Layout, Tensor], dict[str, Tensor]], example: Tensor
    ) -> Callable[[Tensor], dict[str, Tensor]]:
        if self.single is None:

            def slowly(vector: Tensor) -> dict[str, Tensor]:
                with self._apart():
                    return function(self.layout, vector)

            return slowly
        held = self._graphs.get(function)
        if held is not None:
            return held
        names: list[str] = []

        def values(vector: Tensor) -> tuple[Tensor, ...]:
            found = function(self.layout, vector)
            names[:] = list(found)
            return tuple(found.values())

        with quietly(self.layout.dtype):
            graph = simplify(capture(values, example), example)

        def call(vector: Tensor) -> dict[str, Tensor]:
            return dict(zip(names, graph(vector), strict=True))

        self._graphs[function] = call
        return call

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The vector ``(D,)`` of one value for each latent site."""
        return _unconstrain(self.layout, values)

    def fingerprint(self) -> str:
        """A hash of the traced graph and its constants; without one, of the sites."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.layout.sites).encode())
        if self.single is not None:
            digest.update(self.single.code.encode())
            for name, value in sorted(self.single.named_buffers()):
                digest.update(name.encode() + tensor_bytes(value))
        return digest.hexdigest()

    # ------------------------------------------------------------ blame
    def terms(self, vector: Tensor) -> dict[str, float]:
        """Log density of each site at a vector, to say which one is not finite."""
        layout = self.layout
        with torch.no_grad(), self._apart(), quietly(layout.dtype), Flat(layout.sites, vector):
            nodes = poutine.trace(layout.run).get_trace()
        found = {}
        for name, node in nodes.nodes.items():
            if node["type"] == "sample" and not poutine.util.site_is_subsample(node):
                found[name] = float(node["fn"].log_prob(node["value"]).sum())
        return found


def trace(
    run: Callable[[], Any],
    *,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator,
    traced: bool = True,
) -> Density:
    """Trace a Pyro program.

    Args:
        run: The program with its data bound, called without arguments.
        dtype: Precision; the program runs under it as default dtype.
        generator: For the values at which the program is first run; its device is where to
        compute.
        traced: False keeps Pyro's own Python, for comparison.

    Raises:
        ValueError: A program that no gradient-based sampler can run.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale), obs=torch.tensor(1.0))
        >>> density = trace(model, generator=torch.Generator().manual_seed(0))
        >>> density.num_params, density.is_traced
        (1, True)
        >>> density.constrain(torch.zeros(1, 1))
        {'scale': tensor([1.], dtype=torch.float64)}
    """
    try:
        layout = discover(run, dtype=dtype, generator=generator)
    except ProgramError as error:
        if not str(error).startswith(TWO_PRECISIONS):
            raise
        layout = discover(InOneDtype(run, dtype), dtype=dtype, generator=generator)
    density = Density(layout, None)
    if not traced:
        return Density(layout, None, "tracing was switched off")
    start = time.perf_counter()
    message = ""
    for data_apart in (False, True):
        try:
            single = _single(layout, density._points(1)[0], data_apart)
            if single is None:
                return Density(layout, None, _RANDOM)
            found = Density(layout, single, notes={"trace_seconds": time.perf_counter() - start})
            if _agrees(found):  # in one batch, for which an operator may have no rule
                return found
            message = message or _RANDOM
        except ProgramError:
            raise
        except Exception as error:
            message = message or _why(error)
    return Density(layout, None, message)


def _single(layout: Layout, example: Tensor, data_apart: bool) -> fx.GraphModule | None:
    """The graph of one vector; None if it draws random numbers."""
    # Folded under the program's default dtype: a graph may hold factories that name none.
    apart = rng.fork(rng.make_generator(0, layout.device))
    with quietly(layout.dtype), apart:
        graph = capture(
            lambda vector: _value_and_grad(layout, vector), example, data_apart=data_apart
        )
        return None if _is_random(graph) else simplify(graph, example)


_RANDOM = (
    "the program draws random numbers of its own, or branches on a value, and is no fixed "
    "density: the "
    "traced program disagrees with Pyro. It runs by Pyro's own Python, many times slower. Make "
    "every random "
    "number a pyro.sample site."
)


def _is_random(graph: fx.GraphModule) -> bool:
    return any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        for node in graph.graph.nodes
    )


def _why(error: Exception) -> str:
    return (
        "the program could not be traced and runs by Pyro's own Python, many times slower: "
        + cause(error)
    )


def _agrees(density: Density) -> bool:
    """A trace that holds numbers of its own (random or chosen by a branch) differs from Pyro."""
    points = density._points(3)[1:]
    values, _ = density.value_and_grad(points)
    with torch.no_grad():
        wanted = torch.stack([density.pyro_log_prob(point) for point in points])
    tolerance = 1e-3 if values.dtype == torch.float32 else 1e-6
    off = (values - wanted).abs() > tolerance * (1 + wanted.abs())
    return not bool((off & values.isfinite() & wanted.isfinite()).any())


# ---------------------------------------------------------------- one vector
def _log_density(layout: Layout, vector: Tensor) -> Tensor:
    with quietly(layout.dtype), PlainProducts(), Flat(layout.sites, vector) as flat:
        if not layout.enumerated:
            nodes = poutine.trace(layout.run).get_trace()
            add_up(nodes)
            total = nodes.log_prob_sum()
        else:
            nodes = poutine.trace(enumerated(layout)).get_trace()
            total = TraceEinsumEvaluator(nodes, True, layout.max_plate_nesting).log_prob(nodes)
    flat.check()
    density: Tensor = (total + flat.log_det).to(layout.dtype)
    return density


def _value_and_grad(layout: Layout, vector: Tensor) -> tuple[Tensor, Tensor]:
    leaf = vector.detach().requires_grad_(True)
    with torch.enable_grad():
        value = _log_density(layout, leaf)
        if not value.requires_grad:  # flat everywhere
            return value, torch.zeros_like(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def _values(layout: Layout, vector: Tensor) -> dict[str, Tensor]:
    with quietly(layout.dtype), Flat(layout.sites, vector):
        run = enumerated(layout) if layout.enumerated else layout.run
        nodes = poutine.trace(run).get_trace().nodes
    # Enumerated latents, and what depends on them, have one more dimension and no value here.
    return {
        name: nodes[name]["value"].clone()
        for name, dims in layout.dims.items()
        if nodes[name]["value"].ndim == len(dims)
    }


def _pointwise(layout: Layout, vector: Tensor) -> dict[str, Tensor]:
    with quietly(layout.dtype), Given(layout.sites, vector):
        run = enumerated(layout) if layout.enumerated else layout.run
        nodes = poutine.trace(run).get_trace()
        if layout.enumerated:
            return pointwise(layout, nodes)
        found = {}
        for name in layout.observed:
            law, kept = nodes.nodes[name]["fn"], layout.seen[name]
            value = law.log_prob(nodes.nodes[name]["value"])
            found[name] = value if kept is None else kept.of(value, 0)
        return found


def _unconstrain(layout: Layout, values: Mapping[str, Tensor]) -> Tensor:
    parts = []
    apart = rng.fork(rng.make_generator(0, layout.device))
    with quietly(layout.dtype), torch.no_grad(), apart:
        run = poutine.condition(layout.run, data=dict(values))
        nodes = poutine.trace(run).get_trace().nodes
    for site in layout.sites:
        if site.name not in values:
            raise ProgramError(
                f"values lack the site '{site.name}'; give {[s.name for s in layout.sites]}."
            )
        transform = bijection(nodes[site.name]["fn"], site.name)
        parts.append(transform.inv(nodes[site.name]["value"]).reshape(-1))
    return torch.cat(parts).to(layout.dtype)
