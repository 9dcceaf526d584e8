"""What engines on a traced density share: models and plain programs in, named sites out."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Model, Program
from bayesgen.inference.program import FunctionModel, arguments, bound_program, with_density
from bayesgen.inference.remembered import traced_again
from bayesgen.inference.run import Engine, S, Task
from bayesgen.inference.trace import Density, trace

__all__ = ["TracedEngine"]

_MAX_DISCRETE = 2**25  # labels of all draws together: 256 MiB


@dataclass(frozen=True, eq=False)
class TracedEngine(Engine[S], ABC):
    """An engine that works on :class:`~bayesgen.inference.trace.Density`.

    It runs on a model with the capability ``Program`` and on any function that calls
    ``pyro.sample``. Its settings may hold ``trace``, ``dtype`` and ``device``.
    """

    @property
    def capability(self) -> type:
        return Program

    @property
    def _traced(self) -> bool:
        return bool(getattr(self, "trace", True))

    def task(self, model: Any, data: object, generator: torch.Generator) -> Task:
        """A model with the capability ``Program``, or any function that calls ``pyro.sample``."""
        if isinstance(model, Model) or not callable(model):
            return super().task(model, data, generator)
        call = arguments(model, data, dtype=self._dtype, device=self._device)
        density = traced_again(
            model,
            bound_program(model, call),
            call.fingerprint(),
            dtype=self._dtype,
            generator=generator,
            traced=self._traced,
        )
        adapter = FunctionModel(model, density, with_density(call, density))
        return Task(
            adapter,
            adapter.arguments,
            generator,
            self._device,
            self._dtype,
            density.fingerprint(),
        )

    def density_of(self, task: Task) -> Density:
        """The traced density of a task: a function's own, or that of the model's program."""
        if isinstance(task.model, FunctionModel):
            return task.model.density
        model, rows = task.model, task.data.tensor(task.dtype, task.device)
        return trace(
            lambda: model.model(rows),
            dtype=task.dtype,
            # Not the run's own generator: a resumed run must find that where it left it.
            generator=rng.make_generator(0, task.device),
            traced=self._traced,
        )

    @staticmethod
    def sites_of(task: Task, density: Density, vectors: Tensor) -> dict[str, Tensor]:
        """Sites ``(*lead, *shape)`` of unconstrained ``vectors (*lead, D)``: a fit's draws.

        Discrete latents, summed out so far, are drawn given the others.
        """
        sites = density.constrain(vectors)
        count = vectors[..., 0].numel() * sum(map(math.prod, density.layout.enumerated.values()))
        if 0 < count <= _MAX_DISCRETE:
            sites |= density.recover(sites, generator=task.generator)
        if isinstance(task.model, FunctionModel):
            return sites
        return {name: value for name, value in sites.items() if name in task.model.dims}
