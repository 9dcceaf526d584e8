"""What engines on a traced density share: models and plain programs in, named sites out."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Model, Program
from bayesgen.inference.programs.program import (
    FunctionModel,
    arguments,
    bound_program,
    with_density,
)
from bayesgen.inference.programs.recover import num_labels, too_many
from bayesgen.inference.programs.remembered import traced_again
from bayesgen.inference.programs.trace import Density, trace
from bayesgen.inference.run import Engine, S, Task
from bayesgen.nested import plain_ratio
from bayesgen.replay import ProgramError

__all__ = ["TracedEngine", "live_r_hat"]

_LIVE = 2**15  # numbers that the live R-hat looks at: with 2**19 it took a third of a short run


def live_r_hat(draws: Tensor, num_superchains: int = 0) -> dict[str, float]:
    """The largest R-hat so far, without ranks, for a progress bar; empty before there is one.

    Args:
        draws: Unconstrained, ``(chain, draw, D)``; thinned where they are many.
        num_superchains: Groups of a common start, whose means are compared; without them the
            halves of all chains are.
    """
    draws = draws[:, :: 1 + draws.numel() // _LIVE]
    if not num_superchains:
        half = draws.shape[1] // 2
        draws = torch.cat((draws[:, :half], draws[:, draws.shape[1] - half :]))
        num_superchains = len(draws)
    if num_superchains < 2 or draws.shape[1] < 4:
        return {}
    shape = (num_superchains, -1, *draws.shape[1:])
    return {"r_hat": float(plain_ratio(draws.reshape(shape).cpu().numpy()).max())}


@dataclass(frozen=True, eq=False)
class TracedEngine(Engine[S], ABC):
    """An engine that works on :class:`~bayesgen.inference.programs.trace.Density`.

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

    def news(self, work: Any) -> list[str]:
        """Why a program runs by Pyro's own Python: no news to wait for until the end."""
        message = work.density.message
        return [message] if self._traced and message else []

    def density_of(self, task: Task) -> Density:
        """The traced density of a task: a function's own, or that of the model's program."""
        if isinstance(task.model, FunctionModel):
            return task.model.density
        model, rows = task.model, task.data.tensor(task.dtype, task.device)
        try:
            return trace(
                lambda: model.model(rows),
                dtype=task.dtype,
                # Not the run's own generator: a resumed run must find that where it left it.
                generator=rng.make_generator(0, task.device),
                traced=self._traced,
            )
        except ProgramError as error:
            if not bool(rows.isnan().any()):
                raise
            raise ValueError(
                f"{type(self).__name__} on {type(model).__name__}: missing entries, "
                f"{int(rows.isnan().sum())} of {rows.numel()}. The Pyro program of this model "
                "takes complete rows: EM, VB and Gibbs integrate missing entries out, where the "
                "model has them; or drop those rows."
            ) from error

    @staticmethod
    def sites_of(task: Task, density: Density, vectors: Tensor) -> dict[str, Tensor]:
        """Sites ``(*lead, *shape)`` of unconstrained ``vectors (*lead, D)``: a fit's draws.

        Discrete latents, summed out so far, are drawn given the others. Of a model of ours, its
        parameters and the hyperparameters that its priors sample.
        """
        sites = density.constrain(vectors)
        num_draws = vectors[..., 0].numel()
        if num_labels(density.layout, num_draws) and not too_many(density.layout, num_draws):
            sites |= density.recover(sites, generator=task.generator)
        if isinstance(task.model, FunctionModel):
            return sites
        dims, unnamed = task.model.dims, density.layout.unnamed
        return {k: v for k, v in sites.items() if k in dims or k not in unnamed}

    @staticmethod
    def notes_of(density: Density, num_draws: int) -> list[str]:
        """What is to be said of the program, and of what ``num_draws`` draws leave out of it."""
        notes = [*density.layout.notes]
        if density.message:
            notes.append(density.message)
        if message := too_many(density.layout, num_draws):
            notes.append(message)
        return notes
