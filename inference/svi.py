"""Stochastic variational inference on any Pyro program and guide, the whole step one graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, fx

from bayesgen import rng
from bayesgen.capabilities import Model, Program
from bayesgen.inference.checks import check_choice, check_settings
from bayesgen.inference.compiled.cost import Cost, cost_of
from bayesgen.inference.programs.complaints import NOTHING_LATENT, ProgramError
from bayesgen.inference.programs.program import arguments
from bayesgen.inference.run import Engine, Info, Task
from bayesgen.inference.variational.blame import culprit
from bayesgen.inference.variational.draws import mean_and_error
from bayesgen.inference.variational.finish import End, finish
from bayesgen.inference.variational.guides import check_guide, describe
from bayesgen.inference.variational.machine import Machine, Steps
from bayesgen.inference.variational.minibatch import begin
from bayesgen.inference.variational.noise import NoiseSize
from bayesgen.inference.variational.optimizers import OPTIMIZERS, Constant, Optimizer, Schedule
from bayesgen.inference.variational.plateau import Plateau, plateau
from bayesgen.inference.variational.setup import (
    Setup,
    from_function,
    make_setup,
    model_setup,
)
from bayesgen.inference.variational.step import (
    SLOWLY,
    Bound,
    Feed,
    Traced,
    branch_words,
    draw_noise,
    make_update,
    particles,
    particles_by_pyro,
    trace_pair,
)
from bayesgen.inference.variational.trained import TrainedProgram
from bayesgen.inference.variational.trained_guide import Recipe, TrainedGuide

__all__ = ["SVI"]

_BLOCK = 48  # optimiser steps of one step of the loop
_OPTIMIZER_OPERATIONS = 25  # of the optimiser and the average
_AVERAGING = 2.0  # the average is of about the last third of the iterates
_MIN_THRESHOLD = 0.05  # nats
_WATCHED = 2000  # parameters up to which iterates are watched: networks never settle
_OBJECTIVES = ("auto", "trace", "mean_field", "enum", "renyi", "iwae")


class SVIState(NamedTuple):
    """Parameters, and all that the next step needs."""

    params: Tensor
    """Flat and unconstrained, ``(P,)``."""
    average: Tensor
    """Running average of the iterates, late ones weighing most."""
    slots: dict[str, Tensor]
    """The optimiser's vectors."""
    num_steps: int
    """Optimiser steps done."""
    places: list[dict[str, int]]
    """Where the passes over the data stand, one for each index."""
    blocks: list[float]
    """Mean of the bound over each block of steps."""
    iterates: Tensor
    """Parameters after each block, ``(blocks, P)``; ``(blocks, 0)`` where they are too many."""
    branched: int
    """The step at which the program left the path that its graph took; by Pyro since. Or zero."""


class Work(NamedTuple):
    """What a run rebuilds on resume."""

    setup: Setup
    traced: Traced
    machine: Machine
    by_pyro: Machine
    """The same steps by Pyro's own Python."""
    before: Tensor
    """State of the generator before model and guide met."""


@final
@dataclass(frozen=True, eq=False)
class SVI(Engine[SVIState]):
    r"""The guide with the highest evidence lower bound, by stochastic gradients.

    .. math:: \max_\phi E_{q_\phi(z)}[\log p(x, z) - \log q_\phi(z)] \le \log p(x)

    Model and guide are traced once into a graph of tensor operations - bound, gradient and
    optimiser - whose random numbers are inputs, drawn from the run's own generator; no Python of
    Pyro runs in a step. The answer is an average of the iterates, late ones weighing most, unless
    the bound of the last iterate is clearly higher. The run ends at a plateau: when the mean of
    the bound over the last third of the run does not lie significantly above that of the third
    before, the comparison could have seen a rise of ``tolerance``, and the iterates of the two
    thirds mix (R-hat below 1.1).

    The fit holds one chain of independent draws. ``attrs["k_hat"]`` is the Pareto shape of their
    importance weights: above 0.7 the guide misses part of the posterior, however well the bound
    has converged.

    References:
        Ranganath, Gerrish & Blei (2014). Black box variational inference. Kucukelbir, Tran,
        Ranganath, Gelman & Blei (2017). Automatic differentiation variational inference. Li &
        Turner (2016). Rényi divergence variational inference. Burda, Grosse & Salakhutdinov
        (2016). Importance weighted autoencoders. Dhaka, Catalina, Andersen, Magnusson, Huggins &
        Vehtari (2020). Robust, accurate stochastic optimization for variational inference. Yao,
        Vehtari, Simpson & Gelman (2018). Yes, but did it work? Evaluating variational inference.

    Args:
        guide: A function with ``pyro.sample`` statements, a module, one of Pyro's autoguides by
            name, class, ``functools.partial`` or instance; None takes the model's own guide, or
            ``"AutoNormal"``.
        objective: ``"trace"`` (Monte Carlo), ``"mean_field"`` (divergences in closed form),
            ``"enum"`` (discrete latents that the guide lacks are summed out), ``"renyi"``,
            ``"iwae"`` (importance weighted: Rényi's of order zero), or ``"auto"``: ``"enum"``
            where there are such latents, else ``"trace"``.
        alpha: Order of Rényi's bound, any number but one.
        num_particles: Draws from the guide for each step, all in one call.
        optimizer: ``"adam"``, ``"adamw"``, ``"sgd"``, ``"momentum"``, ``"rmsprop"``,
            ``"adagrad"``, or an :class:`~bayesgen.inference.variational.optimizers.Optimizer`.
        learning_rate: A number, or a :class:`~bayesgen.inference.variational.optimizers.Schedule`.
        max_norm: Longest gradient; longer ones are shortened.
        batch_size: Rows of a minibatch; None sees all rows at every step.
        num_steps: Optimiser steps at most.
        tolerance: Rise of the bound that matters, in nats a row (at least 0.05 nats in all).
        num_samples: Draws from the guide that the fit holds.
        local_latents: Whether latents of single rows are kept among the draws.
        compile: Whether steps are compiled: True, False, or ``"auto"``: by generated C++ from the
            start where that can be written and pays; else by Inductor, once the steps done have
            cost as much as compiling would, if enough of them may follow.
        trace: False runs by Pyro's own Python, to compare with.
        dtype: Default dtype of program and guide; neural networks usually want ``torch.float32``,
            small programs ``torch.float64``, for which alone there is generated C++.
        device: Where to compute.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> fit = SVI(learning_rate=0.05, num_steps=1000, num_samples=100).run(model, x)
        >>> fit.draws["loc"].shape
        torch.Size([1, 100])
    """

    guide: Any = None
    objective: str = "auto"
    alpha: float = 0.0
    num_particles: int = 1
    optimizer: str | Optimizer = "adam"
    learning_rate: float | Schedule = 0.01
    max_norm: float | None = None
    batch_size: int | None = None
    num_steps: int = 20_000
    tolerance: float = 1e-4
    num_samples: int = 1000
    local_latents: bool = False
    compile: str | bool = "auto"
    trace: bool = True
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_settings(
            "SVI",
            num_particles=self.num_particles,
            batch_size=self.batch_size,
            num_steps=self.num_steps,
            num_samples=self.num_samples,
            tolerance=self.tolerance,
        )
        check_guide(self.guide)
        check_choice("SVI", "objective", self.objective, _OBJECTIVES)
        if isinstance(self.optimizer, str):
            check_choice("SVI", "optimizer", self.optimizer, tuple(OPTIMIZERS))
        if self.compile not in (True, False, "auto"):
            raise ValueError(
                f"SVI: compile={self.compile!r}, but it must be True, False or 'auto'."
            )
        if self.max_norm is not None and not 0.0 < self.max_norm < math.inf:
            raise ValueError(f"SVI: max_norm={self.max_norm!r}, but it must be None or positive.")
        if not math.isfinite(self.alpha) or (self.objective == "renyi" and self.alpha == 1.0):
            raise ValueError(
                f"SVI: alpha={self.alpha!r}, but it must be a finite number other than one; the "
                "limit at one is objective='trace'."
            )
        if self.objective in ("renyi", "iwae") and self.num_particles < 2:
            raise ValueError(
                f"SVI: objective={self.objective!r} with num_particles=1 is the plain bound; use "
                "num_particles=8 or more."
            )
        self._schedule  # noqa: B018 - checks the learning rate

    # ------------------------------------------------------------ settings
    @property
    def _schedule(self) -> Schedule:
        rate = self.learning_rate
        return rate if isinstance(rate, Schedule) else Constant(rate)

    @property
    def _optimizer(self) -> Optimizer:
        chosen = self.optimizer
        return OPTIMIZERS[chosen] if isinstance(chosen, str) else chosen

    @property
    def _order(self) -> float | None:
        """Order of Rényi's bound, None for the plain one."""
        return {"iwae": 0.0, "renyi": self.alpha}.get(self.objective)

    @property
    def _base(self) -> str:
        """The bound of one particle."""
        return "auto" if self._order is not None else self.objective

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "guide": describe(self.guide)}

    def advice(self, step: int) -> str:
        return (
            f"no plateau of the bound within {self.num_steps} steps: raise num_steps, or "
            "learning_rate if the bound still rises, or loosen tolerance if it is noisy."
        )

    @property
    def capability(self) -> type:
        return Program

    @property
    def state_type(self) -> type[SVIState]:
        return SVIState

    @property
    def max_steps(self) -> int:
        """Blocks of 48 optimiser steps."""
        return math.ceil(self.num_steps / _BLOCK)

    # ------------------------------------------------------------ what it works on
    def task(self, model: Any, data: object, generator: torch.Generator) -> Task:
        """A model with the capability ``Program``, or any function that calls ``pyro.sample``."""
        if isinstance(model, Model) or not callable(model):
            return super().task(model, data, generator)
        given = arguments(model, data, dtype=self._dtype, device=self._device)
        before = rng.get_state(generator)
        source = from_function(model, given.args, given.kwargs, self.guide, self.batch_size)
        setup = make_setup(
            source, objective=self._base, dtype=self._dtype, start=None, generator=generator
        )
        traced = self._traced(setup, generator)
        rows = source.call.num_rows
        known = dataclasses.replace(given, num_rows=rows, program=traced.fingerprint())
        program = TrainedProgram(model, setup.pair, known, setup.pair.start())
        return _FunctionTask(
            program,
            known,
            generator,
            self._device,
            self._dtype,
            known.program,
            setup,
            traced,
            before,
        )

    def _traced(self, setup: Setup, generator: torch.Generator) -> Traced:
        return trace_pair(
            setup.pair,
            setup.example(),
            is_fixed=setup.stream is None and not setup.orders,
            generator=generator,
            traced=self.trace,
        )

    def prepare(self, task: Task) -> Work:
        if isinstance(task, _FunctionTask):
            setup, traced, before = task.setup, task.traced, task.before
        else:
            before = rng.get_state(task.generator)
            setup = model_setup(
                *(task.model, task.data, self.guide, self.batch_size),
                objective=self._base,
                dtype=task.dtype,
                generator=task.generator,
            )
            traced = self._traced(setup, task.generator)
        slow = particles_by_pyro(setup.pair, self.num_particles, self._order, task.generator)
        by_pyro = self._machine(setup, slow, None)
        if traced.graph is None:
            return Work(setup, traced, by_pyro, by_pyro, before)
        bound = particles(traced.graph, self.num_particles, self._order)
        machine = self._machine(setup, bound, self._cost(setup, traced.graph, traced.noise))
        return Work(setup, traced, machine, by_pyro, before)

    def _machine(self, setup: Setup, bound: Bound, cost: Cost | None) -> Machine:
        feed = setup.feed
        whole = Feed((False,) * len(feed.rows), (), 0)
        return Machine(
            make_update(bound, self._optimizer, self.max_norm, feed),
            make_update(bound, self._optimizer, self.max_norm, whole),
            feed,
            num_moving=2 + len(self._optimizer.slots),
            num_indices=setup.feed.num_indices,
            cost=cost,
            compile=self.compile,
            max_steps=self.num_steps,
        )

    def _cost(self, setup: Setup, graph: fx.GraphModule, noise: NoiseSize) -> Cost:
        """Of one step: the gradient of every particle, and the optimiser."""
        flat, generator = setup.pair.start(), rng.make_generator(0, setup.pair.device)
        return cost_of(
            graph,
            flat,
            *draw_noise(noise, (), setup.pair, generator),
            *setup.example(),
            copies=self.num_particles,
            operations=_OPTIMIZER_OPERATIONS,
        )

    def init(self, task: Task, work: Work) -> SVIState:
        params = work.setup.pair.start()
        if not len(params):
            if not work.setup.pair.has_latents:
                raise ProgramError(NOTHING_LATENT)
            raise ValueError(
                "SVI: the guide has no parameters, so there is nothing to optimise. Use "
                "pyro.param in it, a module, or one of the autoguides."
            )
        orders = len(work.setup.orders) + (work.setup.stream is not None)
        return SVIState(
            params,
            params.clone(),
            {name: torch.zeros_like(params) for name in self._optimizer.slots},
            0,
            [begin(task.generator) for _ in range(orders)],
            [],
            params.new_zeros((0, len(params) if len(params) <= _WATCHED else 0)),
            0,
        )

    # ------------------------------------------------------------ steps
    def step(self, task: Task, work: Work, state: SVIState) -> tuple[SVIState, Info]:
        count = min(_BLOCK, self.num_steps - state.num_steps)
        normals, uniforms = draw_noise(
            work.traced.noise, (count, self.num_particles), work.setup.pair, task.generator
        )
        indices, data, places = self._rows(task, work, state, count)
        scalars = self._scalars(state.num_steps, count, state.params)
        steps = Steps(scalars, normals, uniforms, tuple(indices), data)
        moving = (state.params, state.average, *state.slots.values())
        machine = work.by_pyro if state.branched else work.machine
        numbers, moved = machine.run(state.num_steps, moving, steps)
        if bool(numbers[:, 2].any()):  # the block again: its graph took another path
            state = state._replace(branched=state.num_steps + 1)
            machine = work.by_pyro
            numbers, moved = machine.run(state.num_steps, moving, steps)
        if not bool(numbers.isfinite().all()):
            raise ValueError(self._blame(work, machine, state.num_steps, moving, steps, numbers))
        return self._after(work, state, numbers, moved, places)

    def _scalars(self, done: int, count: int, like: Tensor) -> Tensor:
        """Learning rate, corrections of the optimiser, share of the iterate in the average."""
        rows = []
        for step in range(done + 1, done + count + 1):
            share = min(1.0, (_AVERAGING + 1.0) / (step + _AVERAGING))
            rows.append((self._schedule(step), *self._optimizer.scalars(step), share))
        return torch.tensor(rows, dtype=like.dtype, device=like.device)

    def _rows(
        self, task: Task, work: Work, state: SVIState, count: int
    ) -> tuple[list[Tensor], tuple[Tensor, ...], list[dict[str, int]]]:
        """Indices of each step, the data that they point into, and where the passes stand."""
        setup, indices, places = work.setup, [], []
        data = setup.pair.call.tensors
        waiting = list(state.places)
        if setup.stream is not None:
            rows, place = setup.stream.take(waiting.pop(0), count, task.generator)
            data = (rows,)
            places.append(place)
            indices.append(torch.arange(len(rows), device=rows.device).reshape(count, -1))
        for order, place in zip(setup.orders, waiting, strict=True):
            index, new = order.take(place, count, task.generator)
            indices.append(index)
            places.append(new)
        return indices, data, places

    def _after(
        self,
        work: Work,
        state: SVIState,
        numbers: Tensor,
        moved: tuple[Tensor, ...],
        places: list[dict[str, int]],
    ) -> tuple[SVIState, Info]:
        bounds, norms, _ = numbers.double().unbind(-1)
        params, average, *slots = moved
        elbo, error = mean_and_error(bounds)
        blocks = [*state.blocks, elbo]
        watched = params[: state.iterates.shape[1]]
        new = SVIState(
            params,
            average,
            dict(zip(state.slots, slots, strict=True)),
            state.num_steps + len(bounds),
            places,
            blocks,
            torch.cat([state.iterates, watched[None]]),
            state.branched,
        )
        values = {
            "elbo": elbo,
            "elbo_error": error,
            "gradient_norm": float(norms.mean()),
            "learning_rate": self._schedule(new.num_steps),
        }
        return new, Info(values, self._plateau(work, new).reached)

    def _plateau(self, work: Work, state: SVIState) -> Plateau:
        iterates = state.iterates if state.iterates.shape[1] else None
        return plateau(state.blocks, self._threshold(work), iterates)

    def _threshold(self, work: Work) -> float:
        rows = work.setup.pair.extra.get("num_rows", work.setup.pair.call.num_rows)
        return max(_MIN_THRESHOLD, self.tolerance * rows)

    def _blame(
        self,
        work: Work,
        machine: Machine,
        done: int,
        moving: tuple[Tensor, ...],
        steps: Steps,
        numbers: Tensor,
    ) -> str:
        """What a bound or gradient that is not finite says, after going to that step again."""
        first = int((~numbers.isfinite()).any(-1).nonzero()[0])
        for k in range(first):
            _, moving = machine.run(done + k, moving, steps.part(k, k + 1))
        batch = work.setup.feed.batch([index[first] for index in steps.indices], steps.data)
        noise = steps.normals[first], steps.uniforms[first]
        return (
            f"SVI: the bound or its gradient stopped being finite at step {done + first + 1}. "
            f"{culprit(work.setup.pair, moving[0], *noise, batch, is_first=not done + first)}"
        )

    # ------------------------------------------------------------ the end
    def finish(self, task: Task, work: Work, state: SVIState) -> dict[str, Any]:
        parts = finish(
            End(
                task,
                work.setup,
                work.traced.graph is not None and not state.branched,
                state.params,
                state.average,
                self.num_samples,
                self.local_latents,
                self._recipe(work),
            )
        )
        found = self._plateau(work, state)
        known = not math.isnan(found.rise)
        machine = work.machine
        message = [work.traced.message] if work.traced.message else []
        if state.branched:
            machine = work.by_pyro
            message = [f"step {state.branched}: {SLOWLY}: {branch_words(work.traced.lines)}"]
        parts["attrs"] |= {
            "guide": describe(work.setup.pair.guide),
            "num_optimizer_steps": state.num_steps,
            "is_compiled": machine.is_compiled,
            "speed": machine.reason,
            "compile_seconds": machine.seconds,
            "rise": found.rise if known else None,
            "rise_error": found.error if known else None,
            "iterate_r_hat": found.r_hat if known else None,
            "messages": [*message, *parts["attrs"]["messages"]],
        }
        return parts

    def news(self, work: Work) -> list[str]:
        return [work.traced.message] if self.trace and work.traced.message else []

    def _recipe(self, work: Work) -> Recipe:
        dtype = str(self.dtype).removeprefix("torch.")
        return Recipe(describe(self.guide), self._base, self.batch_size, dtype, work.before)

    @staticmethod
    def guide_from_config(config: Mapping[str, Any], model: Any, data: Any) -> TrainedGuide:
        """The guide of a saved fit: how a reload finds it."""
        return TrainedGuide.from_config(config, model, data)


@dataclass(frozen=True, eq=False)
class _FunctionTask(Task):
    """A task whose program had to be traced to be told from others."""

    setup: Any = None
    traced: Any = None
    before: Any = None
