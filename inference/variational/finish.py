"""From the last parameters to the parts of a fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Guided
from bayesgen.inference.programs.flat import flat_sites
from bayesgen.inference.programs.recover import too_many
from bayesgen.inference.programs.sites import is_parameter
from bayesgen.inference.variational.draws import (
    Draws,
    local_sites,
    mean_and_error,
    sampler,
    settled,
)
from bayesgen.inference.variational.minibatch import begin
from bayesgen.inference.variational.pair import Pair
from bayesgen.inference.variational.setup import Setup
from bayesgen.inference.variational.trained import TrainedProgram
from bayesgen.inference.variational.trained_guide import Batches, Recipe, TrainedGuide
from bayesgen.psis import k_hat

if TYPE_CHECKING:
    from bayesgen.inference.run import Task

__all__ = ["End", "finish"]

_FULL = 2**25  # rows scored over all draws for importance weights
_COMPARED = 100  # draws by which the average is compared with the last iterate


class End(NamedTuple):
    """What the end of a run needs to know of it."""

    task: Task
    setup: Setup
    traced: bool
    params: Tensor
    average: Tensor
    num_samples: int
    local_latents: bool
    recipe: Recipe


def finish(end: End) -> dict[str, Any]:
    """Draws, statistics and attributes of the fit."""
    pair, generator = end.setup.pair, end.task.generator
    full = _sees_all(end)
    plate = "data" if isinstance(end.task.model, Guided) else None
    left_out = set() if end.local_latents and full else local_sites(pair.traces, plate)
    batch = Batches(end.setup, full, generator)
    draw = sampler(pair, batch, left_out=left_out, full=full, traced=end.traced)
    flat, averaged = _better(draw, end)
    final = settled(pair, flat, batch())
    if final is not pair:
        draw = sampler(final, batch, left_out=left_out, full=full, traced=end.traced)
    drawn = draw(flat, end.num_samples, generator)
    elbo, error = mean_and_error(drawn.log_weights.double())
    shape, why = _k_hat(pair, drawn, full)
    attrs: dict[str, Any] = {
        "elbo": elbo,
        "elbo_error": error,
        "k_hat": shape,
        "objective": pair.objective,
        "averaged": averaged,
        "num_params": pair.num_params,
        "is_traced": end.traced,
        "messages": [*why, *_sometimes(drawn), *_unbounded(pair)],
    }
    model = end.task.model
    if isinstance(model, TrainedProgram):
        model = dataclasses.replace(model, params=flat, sites_vary=bool(drawn.sometimes))
        labels, notes = _drawn_back(model, drawn.values, full, generator)
        drawn = drawn._replace(values={**drawn.values, **labels})
        attrs["messages"] += notes
    values = _kept(end, pair, drawn, flat)
    recipe = dataclasses.replace(
        end.recipe, full=full, traced=end.traced, left_out=tuple(sorted(left_out))
    )
    guide = TrainedGuide(recipe, flat, lambda: end.setup)
    parts: dict[str, Any] = {"model": model, "draws": values, "attrs": attrs, "guide": guide}
    if not drawn.is_point and full and drawn.values:
        parts["sample_stats"] = {"log_weight": drawn.log_weights[None]}
    return parts


def _sometimes(drawn: Draws) -> list[str]:
    if not drawn.sometimes:
        return []
    names = ", ".join(map(repr, drawn.sometimes))
    return [
        f"not every run of the program has the sites {names}: they are trained, and are not among "
        "the draws."
    ]


def _unbounded(pair: Pair) -> list[str]:
    names = ", ".join(map(repr, flat_sites(pair.traces.model.nodes)))
    if not names:
        return []
    return [
        f"flat priors ({names}) have no normalising constant: the ELBO bounds no evidence, and "
        "says nothing beside that of another model. It serves to compare guides of this one."
    ]


def _summed_out(pair: Pair) -> list[str]:
    """Discrete latents of a program that the guide lacks."""
    return [
        name
        for name, node in pair.traces.model.nodes.items()
        if node["type"] == "sample"
        and not node["is_observed"]
        and name not in pair.traces.guide.nodes
        and not site_is_subsample(node)
    ]


def _drawn_back(
    model: TrainedProgram, values: Mapping[str, Tensor], full: bool, generator: torch.Generator
) -> tuple[dict[str, Tensor], list[str]]:
    """Discrete latents given the others, or why there are none."""
    names = _summed_out(model.pair)
    if not names:
        return {}, []
    said = "discrete latents were summed out and are not among the draws: "
    said += f"{', '.join(map(repr, names))}. To draw them takes "
    if not full:
        why = "all rows, and here they are too many, or chosen by the program itself."
        return {}, [said + why]
    layout = model.density.layout
    if missing := [site.name for site in layout.sites if site.name not in values]:
        return {}, [f"{said}{', '.join(map(repr, missing))}: use local_latents=True."]
    if message := too_many(layout, len(next(iter(values.values())))):
        return {}, [message]
    return model.density.recover(values, generator=generator), []


def _sees_all(end: End) -> bool:
    """Whether all rows can be scored for every draw."""
    setup = end.setup
    if setup.stream is not None or setup.pair.plates:
        return False
    return not setup.orders or setup.pair.call.num_rows * end.num_samples <= _FULL


def _better(draw: Any, end: End) -> tuple[Tensor, bool]:
    """The average of the iterates, unless the bound of the last one is clearly higher."""
    seed = begin(end.task.generator)["seed"]
    bounds = []
    for flat in (end.average, end.params):
        generator = rng.make_generator(seed, end.setup.pair.device)
        bounds.append(draw(flat, _COMPARED, generator).log_weights.double())
    # Of the same noise, so that the difference is far less noisy than either.
    gain, error = mean_and_error(bounds[1] - bounds[0])
    averaged = gain <= 2 * error
    return (end.average if averaged else end.params), averaged


def _k_hat(pair: Pair, drawn: Draws, full: bool) -> tuple[float | None, list[str]]:
    if drawn.is_point:
        return None, ["the guide is a point: one draw, and no measure of uncertainty."]
    if not full:
        return None, [
            "k-hat was not computed: the importance weights of a draw need all rows, and here "
            "they are too many, streamed, or chosen by the program itself."
        ]
    return k_hat(drawn.log_weights), []


def _kept(end: End, pair: Pair, drawn: Draws, flat: Tensor) -> dict[str, Tensor]:
    """Draws ``(1, num_samples, *shape)``; without any latent, the parameters as a point."""
    values = {name: value[None] for name, value in drawn.values.items()}
    if not isinstance(end.task.model, TrainedProgram):
        dims, nodes = end.task.model.dims, pair.traces.model.nodes
        values = {k: v for k, v in values.items() if k in dims or is_parameter(nodes[k])}
    if values:
        return values
    return {name: v[None, None] for name, v in pair.constrained(flat).items()}
