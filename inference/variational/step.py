"""The whole step of variational inference - bound, gradient, optimiser - as one graph."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from bayesgen import rng
from bayesgen.fingerprint import tensor_bytes
from bayesgen.inference.compiled.graph import capture, simplify
from bayesgen.inference.programs.complaints import ProgramError, cause, explained
from bayesgen.inference.programs.sites import quietly
from bayesgen.inference.programs.summed import is_summed
from bayesgen.inference.variational.noise import (
    Branches,
    Drawn,
    Hidden,
    NoiseSize,
    Read,
    Tape,
)
from bayesgen.inference.variational.optimizers import Optimizer, clip
from bayesgen.inference.variational.pair import Pair

__all__ = [
    "SLOWLY",
    "Bound",
    "Feed",
    "Traced",
    "Update",
    "branch_words",
    "draw_noise",
    "make_update",
    "particles",
    "particles_by_pyro",
    "trace_pair",
]

_aten = torch.ops.aten
_WATCHED_RUNS = 64  # draws at which the branches of a new graph are watched


class _Branched(ProgramError):
    """A branch that the graph took is not always taken."""

    def __init__(self, one: Sequence[Read], other: Sequence[Read]) -> None:
        pairs = zip(one, other, strict=False)
        changed = [first[0] for first, second in pairs if first != second]
        super().__init__(branch_words(changed[:1]))


def branch_words(lines: Sequence[str]) -> str:
    """What is said of a program that branches, at one of some lines, on what it draws."""
    at = " or ".join(dict.fromkeys(filter(None, lines)))
    return (
        f"the value of a latent, or of what is computed from it, decides what runs"
        f"{f' at {at}' if at else ''}. Choose by torch.where, and it can be traced."
    )


class Traced(NamedTuple):
    """The gradient of one particle, without Pyro where that was possible."""

    graph: fx.GraphModule | None
    noise: NoiseSize
    message: str = ""
    """Why there is no graph, with the line."""
    lines: tuple[str, ...] = ()
    """Lines of the program that branch on a number, which the graph watches."""

    def fingerprint(self) -> str:
        """A hash of the graph and its constants."""
        digest = hashlib.sha256(self.message.encode())
        if self.graph is not None:
            digest.update(self.graph.code.encode())
            for name, value in sorted(self.graph.named_buffers()):
                digest.update(name.encode() + tensor_bytes(value))
        return digest.hexdigest()


def trace_pair(
    pair: Pair,
    data: tuple[Tensor, ...],
    *,
    is_fixed: bool,
    generator: torch.Generator,
    traced: bool = True,
) -> Traced:
    """The gradient of one particle as a graph of ``(params, normals, uniforms, *data)``.

    Args:
        pair: Model and guide.
        data: Tensors of the call and indices of the plates, of one minibatch.
        is_fixed: Whether all steps see these data: then shapes may depend on their values.
        generator: For the values at which it is traced.
        traced: False keeps Pyro's own Python, for comparison.
    """
    if not traced:
        return Traced(None, NoiseSize(0, 0), "tracing was switched off")
    message = ""
    # Sums over rows that stay the same are computed once only where the data are constants.
    summed = any(is_summed(node) for node in pair.traces.model.nodes.values())
    for fixed in ((True, False) if summed else (False, True)) if is_fixed else (False,):
        try:
            return _traced(pair, data, fixed, generator)
        except Exception as error:
            message = message or _why(error)
    with rng.fork(generator), explained():  # what Pyro cannot run either
        pair.gradient_now(pair.start(), *data)
    return Traced(None, NoiseSize(0, 0), message)


def _traced(
    pair: Pair, data: tuple[Tensor, ...], fixed: bool, generator: torch.Generator
) -> Traced:
    flat = pair.start()
    (noise, first), (other, second) = (_noise(pair, flat, data, generator) for _ in range(2))
    if noise != other:
        if first == second:
            raise ProgramError("runs differ in the random numbers that they take")
        raise _Branched(first, second)
    example = (flat, *draw_noise(noise, (), pair, generator), *data)

    seen: list[Read] = []

    def gradient(
        flat: Tensor, normals: Tensor, uniforms: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        seen.clear()  # it may be called again
        return pair.watched(seen, flat, normals, uniforms, *(data if fixed else given))

    graph = _graph(pair, gradient, example, fixed)
    _check(pair, graph, example, noise, seen, generator)
    return Traced(graph, noise, lines=tuple(dict.fromkeys(line for line, _ in seen)))


def _noise(
    pair: Pair, flat: Tensor, data: tuple[Tensor, ...], generator: torch.Generator
) -> tuple[NoiseSize, list[Read]]:
    """What one run takes, and the numbers that it reads."""
    source, seen = Drawn(generator), list[Read]()
    with Branches(seen), Tape(source):
        pair.gradient_now(flat, *data)
    return source.size, seen


def draw_noise(
    noise: NoiseSize, lead: tuple[int, ...], pair: Pair, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Standard normals and uniforms of many runs, ``(*lead, size)`` each."""
    normals = rng.standard_normal((*lead, noise.num_normals), generator, pair.dtype)
    uniforms = torch.rand(
        (*lead, noise.num_uniforms), generator=generator, dtype=pair.dtype, device=pair.device
    )
    return normals, uniforms


def _graph(
    pair: Pair,
    function: Callable[..., tuple[Tensor, ...]],
    example: tuple[Tensor, ...],
    fixed: bool,
) -> fx.GraphModule:
    with quietly(pair.dtype):
        graph = simplify(capture(function, *example, data_apart=fixed), *example)
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise ProgramError(f"it writes into a tensor of its own ({node.target})")
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Hidden(f"{node.target} draws random numbers of its own")
    return graph


def _check(
    pair: Pair,
    graph: fx.GraphModule,
    example: tuple[Tensor, ...],
    noise: NoiseSize,
    seen: Sequence[Read],
    generator: torch.Generator,
) -> None:
    """The graph elsewhere than where it was traced, against Pyro."""
    flat, data = example[0], example[3:]
    for _ in range(_WATCHED_RUNS if seen else 0):
        drawn = draw_noise(noise, (), pair, generator)
        if bool(graph(flat, *drawn, *data)[2]):
            now: list[Read] = []
            pair.watched(now, flat, *drawn, *data)
            raise _Branched(seen, now)
    flat = flat + 0.05 * rng.standard_normal(flat.shape, generator, flat.dtype)
    normals, uniforms = draw_noise(noise, (), pair, generator)
    found = graph(flat, normals, uniforms, *data)
    now = []
    wanted = pair.watched(now, flat, normals, uniforms, *data)
    if bool(found[2]):
        raise _Branched(seen, now)
    for one, other in zip(found[:2], wanted[:2], strict=True):
        scale = 1 + other.abs().max() if other.numel() else 1.0
        tolerance = (1e-3 if pair.dtype == torch.float32 else 1e-6) * scale
        if bool(((one - other).abs() > tolerance).any()):
            raise ProgramError("the graph disagrees with Pyro's own evaluation")


def _why(error: Exception) -> str:
    if isinstance(error, _Branched):
        return f"{SLOWLY}: {error}"
    return f"{SLOWLY}: {cause(error)}"


SLOWLY = "model and guide could not be traced and run by Pyro's own Python, many times slower"


# ---------------------------------------------------------------- the update
Update = Callable[..., tuple[Any, ...]]
"""``(scalars, normals, uniforms, params, average, *slots, *indices, *data)`` to numbers ``(3,)``
and new parameters, average and slots."""


Bound = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""``(params, normals (K, ...), uniforms (K, ...), *data)`` to a bound, its gradient, and whether
a branch has changed."""


def particles(gradient: Bound, num_particles: int, alpha: float | None) -> Bound:
    """The bound of several particles, all in one call.

    Args:
        gradient: Of one particle.
        num_particles: Their number ``K``.
        alpha: Order of Rényi's bound; None averages.
    """

    def single(
        flat: Tensor, normals: Tensor, uniforms: Tensor, *data: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return gradient(flat, normals[0], uniforms[0], *data)

    def many(
        flat: Tensor, normals: Tensor, uniforms: Tensor, *data: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        in_dims = (None, 0, 0, *(None for _ in data))
        mapped = torch.func.vmap(gradient, in_dims)
        values, gradients, violated = mapped(flat, normals, uniforms, *data)
        return *_combined(values, gradients, alpha), violated.amax()

    return single if num_particles == 1 else many


def particles_by_pyro(
    pair: Pair, num_particles: int, alpha: float | None, generator: torch.Generator
) -> Bound:
    """The same by Pyro's own Python, one particle after the other."""

    def many(
        flat: Tensor, normals: Tensor, uniforms: Tensor, *data: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        for _ in range(num_particles):
            with rng.fork(generator):
                found.append(pair.gradient_now(flat, *data))
        values, gradients = (torch.stack(v) for v in zip(*found, strict=True))
        return *_combined(values, gradients, alpha), torch.zeros_like(values[0])

    return many


def _combined(values: Tensor, gradients: Tensor, alpha: float | None) -> tuple[Tensor, Tensor]:
    if alpha is None:
        return values.mean(), gradients.mean(0)
    powers = (1.0 - alpha) * values
    bound = (powers.logsumexp(0) - math.log(len(values))) / (1.0 - alpha)
    return bound, torch.softmax(powers, 0) @ gradients


class Feed(NamedTuple):
    """How a minibatch reaches model and guide."""

    rows: tuple[bool, ...]
    """Which data tensors are gathered by the first index."""
    plates: tuple[int, ...]
    """The index that each of the pair's plates is told."""
    num_indices: int

    def batch(self, indices: Sequence[Tensor], data: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Tensors of the call and indices of the plates, of one minibatch."""
        cut = [v[indices[0]] if row else v for v, row in zip(data, self.rows, strict=True)]
        return (*cut, *(indices[k] for k in self.plates))


def make_update(
    bound: Bound,
    optimizer: Optimizer,
    max_norm: float | None,
    feed: Feed,
) -> Update:
    """One optimiser step.

    Args:
        bound: Of several particles.
        optimizer: How parameters move.
        max_norm: Longest gradient.
        feed: How a minibatch reaches the bound.
    """
    names = optimizer.slots

    def update(
        scalars: Tensor,
        normals: Tensor,
        uniforms: Tensor,
        params: Tensor,
        average: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        slots = dict(zip(names, rest[: len(names)], strict=True))
        rest = rest[len(names) :]
        indices, data = rest[: feed.num_indices], rest[feed.num_indices :]
        value, gradient, violated = bound(params, normals, uniforms, *feed.batch(indices, data))
        norm = torch.linalg.vector_norm(gradient)
        rate, first, second, share = scalars.unbind(-1)
        params, slots = optimizer.update(
            params, clip(gradient, norm, max_norm), slots, rate, first, second
        )
        average = average + share * (params - average)
        return (torch.stack([value, norm, violated]), params, average, *(slots[n] for n in names))

    return update
