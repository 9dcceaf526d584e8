"""From what a user says - a name, a class, an instance, a function - to a guide that runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from bayesgen.gaps import imputing
from bayesgen.inference.programs.precision import Converted

__all__ = ["AUTOGUIDES", "describe", "is_automatic", "make_guide"]

AUTOGUIDES = (
    "AutoNormal",
    "AutoDiagonalNormal",
    "AutoMultivariateNormal",
    "AutoLowRankMultivariateNormal",
    "AutoDelta",
    "AutoLaplaceApproximation",
    "AutoIAFNormal",
    "AutoStructured",
    "FlowGuide",
)
"""Guides that are made from the model alone: Pyro's, and our flows."""


def describe(guide: Any) -> str | None:
    """A guide in words that are the same in every process."""
    if guide is None or isinstance(guide, str):
        return guide
    if isinstance(guide, partial):
        options = ", ".join(f"{k}={v!r}" for k, v in sorted(guide.keywords.items()))
        return f"{describe(guide.func)}({options})"
    if isinstance(guide, nn.Module):
        return type(guide).__name__
    return str(getattr(guide, "__qualname__", type(guide).__name__))


def check_guide(guide: Any) -> None:
    """Refuse what cannot be a guide."""
    if isinstance(guide, str) and guide not in AUTOGUIDES:
        raise ValueError(
            f"SVI: guide={guide!r}, but a name must be one of {', '.join(AUTOGUIDES)}."
        )
    if guide is not None and not isinstance(guide, str) and not callable(guide):
        raise TypeError(
            f"SVI: guide is a {type(guide).__name__}, but it must be a function with pyro.sample "
            "statements, a module, an autoguide (name, class, or instance), or None."
        )


def make_guide(
    guide: Any,
    model: Callable[..., Any],
    discrete: Sequence[str],
    start: Mapping[str, Tensor] | None,
    dtype: torch.dtype,
) -> Callable[..., Any]:
    """The guide as a callable of the model's arguments, nothing shared between runs.

    Args:
        guide: Name, class, ``functools.partial`` of a class, instance or function.
        model: The Pyro program.
        discrete: Its discrete latents, which guides made from the model leave alone.
        start: Values of the latents where a guide made by name or class begins.
        dtype: Of the values that the model sees in the guide's first run of it.
    """
    if guide == "FlowGuide":
        from bayesgen.inference.variational.flow_guide import FlowGuide

        guide = FlowGuide
    if isinstance(guide, str):
        guide = getattr(autoguide, guide)
    if _is_class(guide):
        shown = Converted(dtype)(model)
        shown = poutine.block(shown, hide=list(discrete)) if discrete else shown
        options: dict[str, Any] = {}
        if start is not None and "init_loc_fn" not in getattr(guide, "keywords", {}):
            values = {k: v.detach() for k, v in start.items()}
            options["init_loc_fn"] = autoguide.initialization.init_to_value(values=values)
        return guide(shown, **options)
    if isinstance(guide, AutoGuide):
        return _copied(guide, dtype)
    return guide


def _copied(guide: AutoGuide, dtype: torch.dtype) -> AutoGuide:
    """A run begins where the instance stands, and leaves it there; its model is ours to adapt.

    Copying makes Pyro's guides forget their model, the original too; both are told again.
    """
    parts = [m for m in guide.modules() if isinstance(m, AutoGuide)]
    known = [(m._model, m.master) for m in parts]
    new = copy.deepcopy(guide)
    fresh = [m for m in new.modules() if isinstance(m, AutoGuide)]
    for part, other, (model, master) in zip(parts, fresh, known, strict=True):
        part._model, part.master = model, master
        other._model = (Converted(dtype)(imputing(model[0])),)
    return new


def is_automatic(guide: Any) -> bool:
    """Whether a guide is made from the model."""
    return isinstance(guide, str | AutoGuide) or _is_class(guide)


def _is_class(guide: Any) -> bool:
    inner = guide.func if isinstance(guide, partial) else guide
    return isinstance(inner, type) and issubclass(inner, AutoGuide)
