"""A guide after its run: more draws, their importance weights, encodings of new rows, a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Model
from bayesgen.data import as_dataset
from bayesgen.inference.programs.complaints import explained
from bayesgen.inference.programs.program import arguments
from bayesgen.inference.variational.draws import Draws, sampler, settled
from bayesgen.inference.variational.guide_density import guide_log_prob
from bayesgen.inference.variational.guides import AUTOGUIDES
from bayesgen.inference.variational.minibatch import begin
from bayesgen.inference.variational.setup import (
    Setup,
    from_function,
    make_setup,
    model_setup,
)
from bayesgen.psis import k_hat
from bayesgen.storage import flatten, read_folder, unflatten, write_folder

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["Batches", "Recipe", "TrainedGuide", "prepared"]


@dataclass(frozen=True)
class Recipe:
    """How a pair of model and guide was made: all but code and data.

    Args:
        guide: The guide in words; by its name where that makes it.
        objective: Name of the bound.
        batch_size: Rows of a minibatch.
        dtype: ``"float32"`` or ``"float64"``.
        generator: State of the run's generator before it: initial values and masks of flows.
        full: Whether draws see all rows.
        traced: Whether they are traced.
        left_out: Local latents that are not kept.
    """

    guide: str | None
    objective: str
    batch_size: int | None
    dtype: str
    generator: Any = field(repr=False)
    full: bool = True
    traced: bool = True
    left_out: tuple[str, ...] = ()


def prepared(model: Any, data: Any, guide: Any, recipe: Recipe, device: torch.device) -> Setup:
    """Model, guide and data, met as in the run that the recipe is of."""
    dtype = getattr(torch, recipe.dtype)
    generator = rng.make_generator(0, device)
    _set(generator, recipe)
    same: dict[str, Any] = {"objective": recipe.objective, "dtype": dtype, "generator": generator}
    if isinstance(model, Model):
        return model_setup(model, as_dataset(data), guide, recipe.batch_size, **same)
    call = arguments(model, data, dtype=dtype, device=device)
    source = from_function(model, call.args, call.kwargs, guide, recipe.batch_size)
    return make_setup(source, start=None, **same)


def _set(generator: torch.Generator, recipe: Recipe) -> None:
    """Back to where the run's generator was, unless that was one of another kind of device."""
    if len(recipe.generator) == len(rng.get_state(generator)):
        rng.set_state(generator, recipe.generator)
    elif recipe.guide in _DRAWN:
        raise ValueError(
            f"the masks of {recipe.guide} were drawn on another kind of device than "
            f"{generator.device}, where they would differ: keep the fit there, or run SVI here."
        )


_DRAWN = ("AutoIAFNormal", "FlowGuide")


class Batches:
    """Tensors and indices of one evaluation: all rows, or the next minibatch."""

    def __init__(self, setup: Setup, full: bool, generator: torch.Generator) -> None:
        self.setup, self.full, self.generator = setup, full, generator
        orders = len(setup.orders) + (setup.stream is not None)
        self.places = [begin(generator) for _ in range(0 if full else orders)]

    def __call__(self) -> tuple[Tensor, ...]:
        setup, generator = self.setup, self.generator
        data = setup.pair.call.tensors
        if self.full:
            return data
        indices, places, waiting = [], [], list(self.places)
        if setup.stream is not None:
            rows, place = setup.stream.take(waiting.pop(0), 1, generator)
            data = (rows,)
            indices.append(torch.arange(len(rows), device=rows.device))
            places.append(place)
        for order, place in zip(setup.orders, waiting, strict=True):
            index, new = order.take(place, 1, generator)
            indices.append(index[0])
            places.append(new)
        self.places = places
        return setup.feed.batch(indices, data)


@final
@dataclass(frozen=True, eq=False)
class TrainedGuide:
    """What variational inference has trained, held by ``fit.guide``.

    Args:
        recipe: How it was made.
        params: Trained parameters, flat and unconstrained.
        make: Meets model, guide and data again.
    """

    recipe: Recipe
    params: Tensor = field(repr=False)
    make: Callable[[], Setup] = field(repr=False)

    @cached_property
    def setup(self) -> Setup:
        """Model, guide and data.

        Raises:
            ValueError: Another guide than the one trained.
        """
        found = self.make()
        if found.pair.num_params != len(self.params):
            raise ValueError(
                f"this guide has {found.pair.num_params} parameters, but {len(self.params)} were "
                "trained: pass the guide, the model and the data of the run."
            )
        return found

    # ------------------------------------------------------------ draws
    def draw(self, num_samples: int = 1000, *, seed: int = 0) -> Draws:
        """Draws ``values[site] (num_samples, *shape)`` with their ``log_weights``.

        Args:
            num_samples: How many.
            seed: Same seed, same draws; a guide read from a file gives the same bits.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}, but it must be at least 1.")
        setup, recipe = self.setup, self.recipe
        generator = rng.make_generator(seed, setup.pair.device)
        batch = Batches(setup, recipe.full, generator)
        final = settled(setup.pair, self.params, batch())
        draw = sampler(
            final, batch, left_out=set(recipe.left_out), full=recipe.full, traced=recipe.traced
        )
        return draw(self.params, num_samples, generator)

    def sample(self, num_samples: int = 1000, *, seed: int = 0) -> dict[str, Tensor]:
        """More draws by site, ``(num_samples, *shape)``; see :meth:`draw`."""
        return self.draw(num_samples, seed=seed).values

    def k_hat(self, num_samples: int = 1000, *, seed: int = 0) -> float:
        """Pareto shape of the importance weights of new draws.

        Raises:
            ValueError: A point, or weights that a minibatch alone would give.
        """
        drawn = self.draw(num_samples, seed=seed)
        if drawn.is_point or not self.recipe.full:
            raise ValueError(
                "k-hat takes importance weights: of a point, or where draws do not see all rows, "
                "there are none."
            )
        return k_hat(drawn.log_weights)

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """``log q`` at given latents ``values[site] (n, *shape)``, as ``(n,)``, one by one.

        Raises:
            ValueError: A site that is missing, unknown or of another shape.
            TypeError: A guide without a density there (a point), or that sees minibatches.
        """
        setup = self.setup
        if setup.pair.plates or setup.stream is not None:
            raise TypeError(
                "this guide sees a random part of the rows at every step: it has no one density."
            )
        final = settled(setup.pair, self.params, setup.pair.call.tensors)
        return guide_log_prob(final, self.params, values)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What was trained, by name, as the program sees it: of the guide, and of the model."""
        return self.setup.pair.constrained(self.params)

    # ------------------------------------------------------------ new rows
    def encode(self, *data: Any, num_samples: int = 100, seed: int = 0) -> dict[str, Tensor]:
        """Means of the latents of new rows under an amortised guide, ``(n, *shape)`` by site.

        Latents in plates, where the guide has any: others are of no single row.

        Args:
            data: What the guide is called with, in place of the training data.
            num_samples: Draws that are averaged where a mean is not known.
            seed: Of these.

        Raises:
            TypeError: A guide with parameters of each row: it has none for new rows.
        """
        pair = self.setup.pair
        if isinstance(pair.guide, AutoGuide):
            raise TypeError(
                f"{self.recipe.guide} is not amortised: its parameters are of the training rows. "
                "Give SVI a guide that computes them from the rows by a network."
            )
        call = arguments(pair.guide, data, dtype=pair.dtype, device=pair.device)
        generator = rng.make_generator(seed, pair.device)
        with torch.no_grad(), pair.using(self.params), rng.fork(generator), explained():
            first, *others = (
                poutine.trace(pair.guide).get_trace(*call.args, **call.kwargs).nodes
                for _ in range(num_samples)
            )
            sites = [
                name
                for name, node in first.items()
                if node["type"] == "sample" and not poutine.util.site_is_subsample(node)
            ]
            local = [k for k in sites if any(f.vectorized for f in first[k]["cond_indep_stack"])]
            return {
                name: _mean(first[name], [nodes[name]["value"] for nodes in (first, *others)])
                for name in local or sites
            }

    # ------------------------------------------------------------ files
    def to_config(self) -> dict[str, Any]:
        """Nested dicts of JSON values and tensors: no code, no data."""
        return {"recipe": dataclasses.asdict(self.recipe), "params": self.params}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], model: Any, data: Any, guide: Any = None
    ) -> TrainedGuide:
        """The inverse of :meth:`to_config`, given the code and the data of the run.

        Args:
            config: What was saved.
            model: The model, or the Pyro function.
            data: The training data.
            guide: The guide, where it is not one of Pyro's by name or the model's own.
        """
        saved = dict(config["recipe"])
        recipe = Recipe(**{**saved, "left_out": tuple(saved["left_out"])})
        params = config["params"]

        def make() -> Setup:
            if data is None:
                raise ValueError(
                    "this guide was saved without the training data: give them, "
                    "fit.guide.given(model, data)."
                )
            known = guide
            if known is None and recipe.guide is not None:
                known = recipe.guide if recipe.guide in AUTOGUIDES else None
                if known is None:
                    raise ValueError(
                        f"the guide {recipe.guide} is code, which no file holds: give it, "
                        "fit.guide.given(model, data, guide)."
                    )
            return prepared(model, data, known, recipe, params.device)

        return cls(recipe, params, make)

    def given(self, model: Any, data: Any, guide: Any = None) -> TrainedGuide:
        """The same parameters with the code and data that a file does not hold."""
        return self.from_config(self.to_config(), model, data, guide)

    def moved(self, model: Any, data: Any, device: torch.device) -> TrainedGuide:
        """The same parameters on another device, where the model is already.

        Raises:
            ValueError: On use, a guide that is code: see :meth:`given`.
        """
        if device == self.params.device:
            return self
        return replace(self, params=self.params.to(device)).given(model, data)

    def save(self, path: str | PathLike[str]) -> None:
        """Save into a folder, atomically: safetensors and JSON."""
        tensors, config = flatten({"trained_guide": self.to_config()})
        write_folder(path, tensors=tensors, config=config)

    @classmethod
    def load(
        cls, path: str | PathLike[str], model: Any, data: Any, guide: Any = None
    ) -> TrainedGuide:
        """The inverse of :meth:`save`; see :meth:`from_config`."""
        tensors, config, _ = read_folder(path)
        if not isinstance(config, dict) or "trained_guide" not in config:
            raise ValueError(f"{path} holds no trained guide; it was saved by something else.")
        # A fresh copy is aligned in memory as any other: sums come out bit by bit.
        saved = unflatten({name: value.clone() for name, value in tensors.items()}, config)
        return cls.from_config(saved["trained_guide"], model, data, guide)


def _mean(node: Mapping[str, Any], values: list[Tensor]) -> Tensor:
    """Of a site: its distribution's, else that of its draws."""
    try:
        found: Tensor = node["fn"].mean
    except NotImplementedError:
        found = torch.stack([v.to(torch.get_default_dtype()) for v in values]).mean(0)
    return found.expand(node["value"].shape)
