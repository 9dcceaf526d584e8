"""Runs optimiser steps: in generated C++; or eagerly, then by Inductor once that pays."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesgen.inference.compiled.cost import Cost
from bayesgen.inference.compiled.emit import Unsupported
from bayesgen.inference.compiled.graph import capture, compile_graph, simplify
from bayesgen.inference.compiled.native import compiler
from bayesgen.inference.variational.native import NativeUpdate
from bayesgen.inference.variational.step import Feed, Update

__all__ = ["Machine", "Plan", "Steps"]

_COPIES = 4  # steps in one compiled call
_MAX_OPERATIONS = 4000  # of one compiled call; more take minutes
_NATIVE, _NATIVE_STATEMENT = 1.0, 4e-3  # seconds to write and compile C++, and for each statement
_NATIVE_STEP = 1e-5  # seconds of a call of it
_MAX_PRODUCTS = 1e6  # multiplications of a step in matrix products, which a library does better
_SLOW_STEP = 1e-3  # seconds: beyond it, what a call costs is nothing


class Steps(NamedTuple):
    """What ``count`` steps read, each ``(count, ...)``, and the data that indices point into."""

    scalars: Tensor
    normals: Tensor
    uniforms: Tensor
    indices: tuple[Tensor, ...]
    data: tuple[Tensor, ...]

    def part(self, start: int, stop: int) -> Steps:
        """Some of the steps."""
        return Steps(
            self.scalars[start:stop],
            self.normals[start:stop],
            self.uniforms[start:stop],
            tuple(index[start:stop] for index in self.indices),
            self.data,
        )

    @property
    def length(self) -> int:
        """How many there are."""
        return len(self.scalars)


class Plan(NamedTuple):
    """From which step on to run compiled, and why."""

    switch: int | None
    copies: int
    reason: str


Moving = tuple[Tensor, ...]
"""Parameters, their average, and the optimiser's slots."""


def _flat(moving: Moving, steps: Steps) -> tuple[Tensor, ...]:
    noise = (steps.scalars, steps.normals, steps.uniforms)
    return (*noise, *moving, *steps.indices, *steps.data)


class Machine:
    """Advances parameters by any number of steps.

    A run whose length is not known beforehand compiles when its eager steps have cost what
    compiling costs (by the model of :mod:`bayesgen.inference.compiled.cost`): never more than
    twice the cost of knowing. A resumed run switches at the same step, so that its numbers are
    the same.

    Args:
        update: One step.
        apart: The same, told its minibatch itself.
        feed: How a minibatch is cut out of the data.
        num_moving: Vectors that a step replaces: parameters, average, slots.
        num_indices: Index tensors of a step.
        cost: Of one step; None where it is Pyro's own Python and cannot be compiled.
        compile: True, False or ``"auto"``.
        max_steps: Steps of the whole run at most.
    """

    def __init__(
        self,
        update: Update,
        apart: Update,
        feed: Feed,
        *,
        num_moving: int,
        num_indices: int,
        cost: Cost | None,
        compile: str | bool,
        max_steps: int,
    ) -> None:
        self._update, self._cost = update, cost
        self._num_moving, self._num_indices = num_moving, num_indices
        self._compile, self._max_steps = compile, max_steps
        self._apart, self._feed = apart, feed
        self._native: NativeUpdate | None = None
        self._plan: Plan | None = None
        self._compiled: Callable[..., Any] | None = None
        self._shapes: list[torch.Size] = []
        self.seconds: float | None = None

    @property
    def reason(self) -> str:
        """What was chosen, and why."""
        return self._plan.reason if self._plan is not None else "no step was made"

    @property
    def is_compiled(self) -> bool:
        """Whether steps run compiled by now."""
        return self._compiled is not None or self._native is not None

    def run(self, done: int, moving: Moving, steps: Steps) -> tuple[Tensor, Moving]:
        """Numbers ``(count, 3)`` of some steps, and what moved."""
        with torch.no_grad():
            plan = self._planned(moving, steps)
            if self._native is not None:
                noise = (steps.scalars, steps.normals, steps.uniforms)
                return self._native.run(moving, noise, steps.indices, steps.data)
            start, parts = 0, []
            if plan.switch is not None and done >= plan.switch:
                compiled = self._built(plan, moving, steps)
                if [v.shape for v in steps.data] != self._shapes:  # the end of a stream
                    compiled = None
                while compiled is not None and start + plan.copies <= steps.length:
                    now = steps.part(start, start + plan.copies)
                    numbers, *new = compiled(*_flat(moving, now))
                    moving, start = tuple(new), start + plan.copies
                    parts.append(numbers)
            one = self._several(1)
            for k in range(start, steps.length):
                numbers, *new = one(*_flat(moving, steps.part(k, k + 1)))
                moving = tuple(new)
                parts.append(numbers)
        return torch.cat(parts), moving

    # ------------------------------------------------------------ how
    def _planned(self, moving: Moving, steps: Steps) -> Plan:
        if self._plan is None:
            self._plan = self._decide(moving, steps)
        return self._plan

    def _decide(self, moving: Moving, steps: Steps) -> Plan:
        if self._cost is None:
            return Plan(None, 1, "Pyro's own Python: model and guide are not traced")
        if self._compile is False:
            return Plan(None, 1, "eager: compile=False")
        if moving[0].device.type == "cpu" and compiler() is None:
            why = "eager: there is no C++ compiler (install g++ or clang, or set CXX)"
            return Plan(None, 1, why)
        native = self._in_native(self._cost, moving, steps)
        if native is not None:
            return native
        return self._weighed(self._cost, min(steps.length, _COPIES))

    def _in_native(self, cost: Cost, moving: Moving, steps: Steps) -> Plan | None:
        """Generated C++, where it can be written and pays; such code knows no large products."""
        if cost.products > _MAX_PRODUCTS:
            return None
        start = time.perf_counter()
        now = steps.part(0, 1)
        inputs = (now.scalars[0], now.normals[0], now.uniforms[0])
        try:
            found = NativeUpdate(
                self._apart,
                self._feed,
                moving,
                (*inputs, [index[0] for index in now.indices], now.data),
            )
            build = _NATIVE + _NATIVE_STATEMENT * found.translation.statements
            each = cost.native(1) + _NATIVE_STEP
            gain = self._max_steps * (cost.eager(1) - each)
            if self._compile == "auto" and gain < build:
                return None
            found.build()
        except Unsupported:
            return None
        self._native, self.seconds = found, time.perf_counter() - start
        why = f"{cost.operations} operations, {1e6 * cost.eager(1):.0f} us eagerly"
        return Plan(None, 1, f"compiled to C++: a step of {why} and about {1e6 * each:.0f} us so")

    def _weighed(self, cost: Cost, most: int) -> Plan:
        copies = 1 if cost.compiled(1) > _SLOW_STEP else most
        while copies > 1 and copies * cost.operations > _MAX_OPERATIONS:
            copies //= 2
        build = cost.build(copies)
        each = f"a step of {cost.operations} operations, {1e6 * cost.eager(1):.0f} us eagerly and "
        each += f"{1e6 * cost.compiled(1):.0f} us compiled, {build:.0f} s to compile"
        if self._compile is True:
            return Plan(0, copies, f"compiled: compile=True ({each})")
        if cost.operations > _MAX_OPERATIONS:
            return Plan(None, 1, f"eager: {each}")
        gain = cost.eager(1) - cost.compiled(1)
        switch = int(build / gain) if gain > 0 else self._max_steps
        if (self._max_steps - switch) * gain < build:
            return Plan(None, 1, f"eager: {each}")
        return Plan(switch, copies, f"eager, compiled from step {switch} on: {each}")

    def _several(self, copies: int) -> Callable[..., tuple[Tensor, ...]]:
        def several(*flat: Tensor) -> tuple[Tensor, ...]:
            scalars, normals, uniforms, *rest = flat
            parts = []
            moving = rest[: self._num_moving]
            rest = rest[self._num_moving :]
            indices, data = rest[: self._num_indices], rest[self._num_indices :]
            for k in range(copies):
                now = (index[k] for index in indices)
                numbers, *moving = self._update(
                    scalars[k], normals[k], uniforms[k], *moving, *now, *data
                )
                parts.append(numbers)
            return (torch.stack(parts), *moving)

        return several

    def _built(self, plan: Plan, moving: Moving, steps: Steps) -> Callable[..., Any] | None:
        if self._compiled is not None or plan.switch is None or steps.length < plan.copies:
            return self._compiled
        example = tuple(v.clone() for v in _flat(moving, steps.part(0, plan.copies)))
        self._shapes = [v.shape for v in steps.data]
        start = time.perf_counter()
        try:
            graph = simplify(capture(self._several(plan.copies), *example), *example)
            is_cpu = moving[0].device.type == "cpu"
            self._compiled = compile_graph(graph, *example, cpp_wrapper=is_cpu)
        except Exception as error:
            text = str(error).strip().splitlines()
            why = f"eager: compiling failed with {type(error).__name__}: {text[0] if text else ''}"
            self._plan = Plan(None, 1, why)
        self.seconds = time.perf_counter() - start
        return self._compiled
