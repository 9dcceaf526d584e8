"""Data that are missing in a Pyro program: rows that a mask leaves out, and those it makes latent.

``pyro.sample("y", law, obs=y, obs_mask=seen)`` is two sites. ``y_observed`` holds the data, masked
where they are missing, and ``y_unobserved`` a latent for every row, masked where they are not: a
latent without a density, which no engine can sample. :func:`imputing` leaves it the missing rows.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import Messenger, block_messengers
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Entries", "RunsForwards", "entries", "imputed_name", "imputing", "is_gap"]

_OBSERVED, _UNOBSERVED, _LAW = "_observed", "_unobserved", "_law"


class Entries(NamedTuple):
    """Some entries of a site's batch."""

    places: Tensor
    """Of the flattened batch, ``(k,)``."""
    batch: tuple[int, ...]

    def labels(self) -> list[Any]:
        """The place of each in the batch: a number, or numbers with commas."""
        if len(self.batch) < 2:
            return self.places.tolist()
        columns = torch.unravel_index(self.places.cpu(), self.batch)
        return [", ".join(map(str, place)) for place in torch.stack(columns, 1).tolist()]

    def of(self, value: Tensor, event_dim: int) -> Tensor:
        """The entries ``(*lead, k, *event)`` of values ``(*lead, *batch, *event)``."""
        first = value.ndim - event_dim - len(self.batch)
        flat = value.unsqueeze(first) if not self.batch else value
        flat = flat.flatten(first, first + max(1, len(self.batch)) - 1)
        return flat.index_select(first, self.places)

    def into(self, value: Tensor, whole: Tensor, event_dim: int) -> Tensor:
        """``whole (*batch, *event)`` with these entries in place of its own."""
        event = whole.shape[whole.ndim - event_dim :]
        rows = whole.reshape(-1, *event)
        source = torch.arange(len(rows), device=rows.device) + len(self.places)
        source[self.places] = torch.arange(len(self.places), device=rows.device)
        joined = torch.cat((value.to(rows.dtype), rows))
        return joined.index_select(0, source).reshape(whole.shape)


def entries(node: Mapping[str, Any], shape: torch.Size | None = None) -> Entries | None:
    """The entries of a site that its masks leave in; None where they leave all.

    Args:
        node: Of a trace, or a message.
        shape: Of the site's batch; that of its value by default.
    """
    law = node["fn"]
    own = law._mask if isinstance(law, dist.MaskedDistribution) else None
    masks = [mask for mask in (node["mask"], own) if mask is not None and mask is not True]
    if not masks:
        return None
    if shape is None:
        shape = node["value"].shape[: node["value"].ndim - law.event_dim]
    kept = functools.reduce(operator.and_, map(torch.as_tensor, masks))
    if bool(kept.all()) or not _fits(kept, shape):
        return None
    return _chosen(kept, shape)


def _fits(mask: Tensor, shape: torch.Size) -> bool:
    pairs = zip(reversed(mask.shape), reversed(shape), strict=False)
    return mask.ndim <= len(shape) and all(own in (1, size) for own, size in pairs)


def _chosen(mask: Tensor, shape: torch.Size) -> Entries:
    return Entries(mask.expand(shape).reshape(-1).nonzero().squeeze(-1), tuple(shape))


def is_gap(node: Mapping[str, Any]) -> bool:
    """Whether a latent site stands for missing data, as Pyro has it: one for every row."""
    masked = isinstance(node["mask"], Tensor) and not node["is_observed"]
    return masked and bool(node["name"].endswith(_UNOBSERVED))


def imputed_name(node: Mapping[str, Any]) -> str | None:
    """The latent whose density a site is, if it is one of missing data."""
    name = str(node["name"])
    return name.removesuffix(_LAW) if node["infer"].get("_imputed") else None


def imputing(program: Callable[..., Any], *, latents: bool = True) -> Callable[..., Any]:
    """A program whose missing data are latents of their own, ``NAME_unobserved (k, *event)``.

    Args:
        program: Any Pyro program.
        latents: False leaves the latents as Pyro has them, for a guide that is written for them.
    """
    known: dict[Any, Entries] = {}

    def imputed(*args: Any, **kwargs: Any) -> Any:
        with _Imputing(latents, known):
            return program(*args, **kwargs)

    return imputed


class RunsForwards(Messenger):
    """A handler under which a program draws its data: what is missing is drawn as any other."""


class _Imputing(Messenger):
    """See :func:`imputing`."""

    def __init__(self, latents: bool, known: dict[Any, Entries]) -> None:
        super().__init__()
        self.latents = latents
        self.known = known  # what is missing, from the first run: a traced one cannot look
        self.data: dict[str, tuple[Tensor, Any]] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if poutine.util.site_is_subsample(msg):
            return
        if not isinstance(msg["mask"], Tensor) or imputed_name(msg):
            return
        if msg["is_observed"]:
            msg["value"] = _filled(msg)
            self.data[name] = msg["value"], msg["mask"]
            return
        base = name.removesuffix(_UNOBSERVED)
        if not self.latents or base == name or base + _OBSERVED not in self.data:
            return
        whole, mask = self.data[base + _OBSERVED]
        if any(isinstance(m, RunsForwards) for m in poutine.runtime._PYRO_STACK):
            return
        if msg["fn"].support.is_discrete or _is_part(msg) or _support(msg["fn"]) is None:
            # Of every row, and no density but its own: the rows that are not missing say nothing.
            msg["mask"] = mask | msg["mask"]
            return
        self._impute(msg, whole)

    def _impute(self, msg: dict[str, Any], whole: Tensor) -> None:
        law = msg["fn"]
        batch = torch.broadcast_shapes(
            msg["mask"].shape, whole.shape[: whole.ndim - law.event_dim]
        )
        whole = whole.expand(*batch, *law.event_shape)
        key = msg["name"], batch
        if key not in self.known:
            self.known[key] = _chosen(msg["mask"], batch)
        missing = self.known[key]
        if len(missing.places):
            shape = torch.Size((len(missing.places), *law.event_shape))
            with block_messengers(lambda m: isinstance(m, _AROUND)):
                flat = dist.ImproperUniform(_support(law), (), shape)
                whole = missing.into(pyro.sample(msg["name"], flat), whole, law.event_dim)
        # Its density stays in the plates, where discrete latents are summed out row by row.
        msg["name"] += _LAW
        msg["value"], msg["is_observed"] = whole, True
        msg["infer"] = {**msg["infer"], "_imputed": True}


_AROUND = (IndepMessenger, MaskMessenger)  # what is said of all rows


def _is_part(msg: Mapping[str, Any]) -> bool:
    """Whether a site holds some rows of a plate, other ones each time."""
    return any(f.full_size is not None and f.full_size > f.size for f in msg["cond_indep_stack"])


def _point(support: Any, shape: torch.Size) -> Tensor:
    transform = torch.distributions.biject_to(support)
    point: Tensor = transform(torch.zeros(transform.inverse_shape(shape)))
    return point


def _support(law: Any) -> Any:
    """The support of several values at once; None if its ends are parameters."""
    support = law.support
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    inner = support
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    ends = [v for v in vars(inner).values() if isinstance(v, Tensor)]
    return None if ends else constraints.independent(support, 1)


def _filled(msg: Mapping[str, Any]) -> Any:
    """The data, put right where they are masked: the slope of NaN times zero is NaN."""
    value, law, mask = msg["value"], msg["fn"], msg["mask"]
    support = _support(law)
    if not isinstance(value, Tensor) or support is None:
        return value
    batch = value.shape[: value.ndim - law.event_dim]
    if not _fits(mask, batch):
        return value
    point = value.new_zeros(law.event_shape)
    try:
        bad = ~support.base_constraint.check(value).reshape(batch)
        if not support.is_discrete:
            point = _point(support.base_constraint, law.event_shape).to(value)
    except (NotImplementedError, ValueError, RuntimeError):
        return value
    # No value is looked at: the program may be traced.
    rows = value.reshape(-1, *law.event_shape)
    first = rows.index_select(0, mask.expand(batch).reshape(-1).int().argmax(0, keepdim=True))[0]
    first = torch.where(mask.any(), first, point)
    gaps = (bad & ~mask).reshape(*batch, *[1] * law.event_dim)
    return torch.where(gaps, first, value)
