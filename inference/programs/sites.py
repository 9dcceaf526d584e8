"""Sites of a Pyro program: found once, then fed from one flat unconstrained vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transforms

from bayesgen import rng
from bayesgen.gaps import Entries, entries, imputed_name, imputing
from bayesgen.inference.programs.complaints import (
    bijection,
    check_joint_values,
    check_law,
    check_mask,
    check_observed,
    check_rows,
    check_same,
    check_site,
    check_trace,
    explained,
)
from bayesgen.inference.programs.precision import Converted
from bayesgen.replay import is_computed, is_data, quietly

__all__ = [
    "RADIUS",
    "Bounded",
    "Checked",
    "check_program",
    "Flat",
    "Given",
    "Layout",
    "Site",
    "dims_of",
    "discover",
    "enumerated",
    "is_parameter",
    "quietly",
    "rows_of",
    "seen_data",
    "shape_before",
]

RADIUS = 2.0
"""Starts lie this near to the origin on the unconstrained scale."""


@dataclass(frozen=True)
class Site:
    """One latent site with a density: where it lies in the flat vector, and its shapes."""

    name: str
    start: int
    size: int
    unconstrained: tuple[int, ...]
    shape: tuple[int, ...]
    dims: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """What one run of a program tells about it."""

    run: Callable[[], Any]
    """The program with its data."""
    sites: tuple[Site, ...]
    dims: dict[str, tuple[str, ...]]
    """Dimensions of every latent site, the computed ones included."""
    observed: dict[str, Tensor]
    observed_dims: dict[str, tuple[str, ...]]
    enumerated: dict[str, tuple[int, ...]]
    """Shapes of the discrete latent sites, which are summed out."""
    max_plate_nesting: int
    dtype: torch.dtype
    device: torch.device
    notes: tuple[str, ...] = ()
    unnamed: frozenset[str] = frozenset()
    """Sites that are no parameters of a model: see :func:`is_parameter`."""
    seen: Mapping[str, Entries | None] = field(default_factory=dict)
    """Of an observed site, the entries of its batch that its mask leaves in: the others are no
    data."""
    rows: Mapping[str, list[Any]] = field(default_factory=dict)
    """Labels of dimensions that have some entries alone: see :func:`rows_of`."""

    @property
    def num_params(self) -> int:
        """Length of the flat vector."""
        return sum(site.size for site in self.sites)


def shape_before(transform: Any, shape: torch.Size) -> torch.Size:
    """``transform.inverse_shape``, without sympy, which ``torch.broadcast_shapes`` imports."""
    if isinstance(transform, transforms.ComposeTransform):
        for part in reversed(transform.parts):
            shape = shape_before(part, shape)
        return shape
    if isinstance(transform, transforms.AffineTransform):
        parts = [v.shape for v in (transform.loc, transform.scale) if isinstance(v, Tensor)]
        return torch.Size(np.broadcast_shapes(shape, *parts))
    found: torch.Size = transform.inverse_shape(shape)
    return found


class _Start(Messenger):
    """Give every continuous latent a value in its support, whatever its prior; check each site."""

    def __init__(self, generator: torch.Generator, before: _Start | None = None) -> None:
        super().__init__()
        self.generator = generator
        self.raw: dict[str, Tensor] = {}
        self.discrete: list[str] = []
        self.before = before
        """The run before: this one takes the points on the other side of zero."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if _is_plate(msg):
            return
        name, law = msg["name"], msg["fn"]
        check_law(name, law)
        if msg["is_observed"] or name in self.raw:
            return
        check_site(msg)
        if not _has_density(law):
            self.discrete.append(name)
            return
        transform = bijection(law, name)
        shape = shape_before(transform, law.shape())
        uniform = torch.rand(shape, generator=self.generator, device=self.generator.device)
        raw = RADIUS * (2 * uniform - 1)
        before = self.before.raw.get(name) if self.before else None
        if before is not None and before.shape == shape:
            raw = -before
        self.raw[name] = raw
        msg["value"] = transform(raw)
        msg["done"] = True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        check_observed(msg)
        check_mask(msg)
        if self.before and self.before.discrete:
            check_rows(msg, self.before.discrete)


class Checked(Messenger):
    """Check every site as it is met, whatever gives the latents their values."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not _is_plate(msg):
            check_law(msg["name"], msg["fn"])

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        check_observed(msg)
        check_mask(msg)


class Bounded(Messenger):
    """Stop a sum over discrete latents before it fills the memory."""

    def __init__(self, nesting: int) -> None:
        super().__init__()
        self.nesting = nesting

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        check_joint_values(msg, self.nesting)


class Flat(Messenger):
    """Feed the latents of a program from a flat vector, and add up the log Jacobians.

    The transform is read from the site as it is met, so that a support may depend on other sites.
    """

    def __init__(self, sites: tuple[Site, ...], vector: Tensor) -> None:
        super().__init__()
        # One split, whose gradient is one concatenation; slices would cost an addition each.
        parts = vector.split([site.size for site in sites])
        self.raw = {
            site.name: part.reshape(site.unconstrained)
            for site, part in zip(sites, parts, strict=True)
        }
        self.log_det: Tensor | float = 0.0
        self.met: list[str] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        raw = self.raw.get(msg["name"])
        if raw is None:
            if not (msg["is_observed"] or _is_plate(msg) or msg["fn"].support.is_discrete):
                check_same(self.raw, [*self.raw, msg["name"]])
            return
        self.met.append(msg["name"])
        transform = bijection(msg["fn"], msg["name"])
        msg["value"] = transform(raw)
        msg["done"] = True
        self.log_det = self.log_det + transform.log_abs_det_jacobian(raw, msg["value"]).sum()

    def check(self) -> None:
        """Refuse a program that has left out one of its sites."""
        check_same(self.raw, self.met)


class Given(Messenger):
    """Feed the latents of a program with constrained values, one after the other in a vector."""

    def __init__(self, sites: tuple[Site, ...], vector: Tensor) -> None:
        super().__init__()
        sizes = [math.prod(site.shape) for site in sites]
        self.values = {
            site.name: part.reshape(site.shape)
            for site, part in zip(sites, vector.split(sizes), strict=True)
        }

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


def _is_plate(msg: dict[str, Any]) -> bool:
    return bool(poutine.util.site_is_subsample(msg))


def _has_density(law: Any) -> bool:
    return not bool(law.support.is_discrete)


def discover(
    run: Callable[[], Any],
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Layout:
    """Run the program, with random values in the supports, and say what is in it.

    Twice, at opposite points: what holds at one alone is no fixed density.

    Raises:
        ValueError: A program that no gradient-based sampler can run, with what to do about it.
    """
    run = Converted(dtype)(imputing(run))
    with rng.fork(generator), quietly(dtype, validate=True), explained():
        starter = _Start(generator)
        with torch.no_grad(), starter:
            trace = poutine.trace(run).get_trace()
        again = _Start(generator, starter)
        notes = check_trace(trace, starter.raw)
        with torch.no_grad(), again:
            check_same(trace.nodes, poutine.trace(run).get_trace().nodes)
    sites, start = [], 0
    dims: dict[str, tuple[str, ...]] = {}
    observed, observed_dims, discrete, seen = {}, {}, {}, {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or _is_plate(node):
            continue
        value = node["value"]
        if name in starter.raw:
            shape = starter.raw[name].shape
            sites.append(
                Site(name, start, shape.numel(), tuple(shape), tuple(value.shape), dims_of(node))
            )
            start += shape.numel()
            dims[name] = dims_of(node)
        elif not node["is_observed"]:
            discrete[name] = tuple(value.shape)
            dims[name] = dims_of(node)
        elif is_computed(node):
            dims[name] = dims_of(node)
        elif is_data(node):
            values, names = seen_data(node)
            if values.numel():
                seen[name] = entries(node)
                observed[name], observed_dims[name] = values, names
    frames = [f for n in trace.nodes.values() for f in n.get("cond_indep_stack", ())]
    nesting = max((-f.dim for f in frames if f.vectorized), default=0)
    layout = Layout(
        run,
        tuple(sites),
        dims,
        observed,
        observed_dims,
        discrete,
        nesting,
        dtype,
        generator.device,
        notes,
        frozenset(k for k in dims if not is_parameter(trace.nodes[k])),
        seen,
        rows_of(trace.nodes),
    )
    if discrete:
        _rehearse(layout, starter.raw)
    return layout


def seen_data(node: dict[str, Any]) -> tuple[Tensor, tuple[str, ...]]:
    """The data of an observed site, those that are masked left out, and their dimensions."""
    name, value, dims = node["name"], node["value"], dims_of(node)
    kept = entries(node)
    if kept is None:
        return value, dims
    event_dim = node["fn"].event_dim
    plates = any(frame.vectorized for frame in node["cond_indep_stack"])
    rows = f"{name}_row" if plates else f"{name}_dim_0"
    return kept.of(value, event_dim), (rows, *dims[value.ndim - event_dim :])


def rows_of(nodes: Mapping[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """Where the entries that masks leave in, and the imputed ones, lie in their batch."""
    found = {}
    for node in nodes.values():
        if node["type"] != "sample" or _is_plate(node) or not node["is_observed"]:
            continue
        kept, latent = entries(node), imputed_name(node)
        if latent and kept is not None:
            found[f"{latent}_dim_0"] = kept.labels()
        elif is_data(node) and kept is not None:
            found[seen_data(node)[1][0]] = kept.labels()
    return found


def check_program(
    run: Callable[[], Any], *, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """What :func:`discover` checks of sites, where parameters and subsamples are welcome.

    Raises:
        ValueError: A program with sites that no automatic guide can follow, with what to do.
    """
    with rng.fork(generator), quietly(dtype, validate=True), explained(), torch.no_grad():
        starter = _Start(generator)
        with starter:
            nodes = poutine.trace(run).get_trace().nodes
        with _Start(generator, starter):
            check_same(nodes, poutine.trace(run).get_trace().nodes)


def _rehearse(layout: Layout, raw: dict[str, Tensor]) -> None:
    """Sum out the discrete latents once, so that what prevents it is explained."""
    parts = [raw[site.name].reshape(-1).to(layout.dtype) for site in layout.sites]
    with torch.no_grad(), quietly(layout.dtype), explained():
        with Flat(layout.sites, torch.cat(parts)), Bounded(layout.max_plate_nesting):
            nodes = poutine.trace(enumerated(layout)).get_trace()
        TraceEinsumEvaluator(nodes, True, layout.max_plate_nesting).log_prob(nodes)


def is_parameter(node: dict[str, Any]) -> bool:
    """Whether a latent of a model is global, such as a hyperparameter, and no step to another.

    Names of such steps begin with an underscore.
    """
    local = any(frame.name == "data" for frame in node.get("cond_indep_stack", ()))
    return not local and not node["name"].startswith("_")


def dims_of(node: dict[str, Any]) -> tuple[str, ...]:
    """A name for every dimension of a site's value: its plates, then its own."""
    value, name = node["value"], node["name"]
    event = len(node["fn"].event_shape)
    if node["infer"].get("_deterministic"):  # Pyro counts all of its dimensions as its own
        depth = max((-f.dim for f in node["cond_indep_stack"] if f.vectorized), default=0)
        event = max(0, value.ndim - depth)
    names = [f"{name}_dim_{k}" for k in range(value.ndim)]
    for frame in node["cond_indep_stack"]:
        where = value.ndim - event + frame.dim if frame.vectorized else -1
        if 0 <= where < value.ndim and value.shape[where] == frame.size:
            names[where] = frame.name
    return tuple(names)


def enumerated(layout: Layout) -> Callable[[], Any]:
    """The program with its discrete latents enumerated in parallel."""
    run = config_enumerate(layout.run, "parallel")
    enum: Callable[[], Any] = poutine.enum(run, first_available_dim=-1 - layout.max_plate_nesting)
    return enum
