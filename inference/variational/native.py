"""The whole optimiser step as generated C++: many steps a call, and nothing of torch in it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bayesgen.inference.compiled.emit import Unsupported
from bayesgen.inference.compiled.graph import capture, simplify
from bayesgen.inference.compiled.native import (
    MAX_STATEMENTS,
    STEPS,
    aligned_zeros,
    compiler,
    load,
    pointer,
)
from bayesgen.inference.compiled.translate import Translation, translate
from bayesgen.inference.variational.step import Feed, Update

__all__ = ["NativeUpdate"]

_MAX_INPUTS = 5000  # of a step; beyond, products of matrices rule, and a library has better ones


class NativeUpdate:
    r"""Optimiser steps in C++, in double precision on the CPU.

    All that a step reads and writes is one vector: what moves (parameters, their average, the
    optimiser's slots), then learning rates, noise and the minibatch. Data that all steps see are
    constants of the code.

    Args:
        update: One step, told its minibatch itself.
        feed: How a minibatch is cut out of the data.
        moving: What a step replaces, as the first one finds it.
        inputs: Scalars, normals and uniforms of one step, indices of its minibatch, and the data.

    Raises:
        Unsupported: An operator without a rule, other numbers than doubles, or no C++ compiler.
    """

    def __init__(
        self,
        update: Update,
        feed: Feed,
        moving: Sequence[Tensor],
        inputs: tuple[Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]],
    ) -> None:
        scalars, normals, uniforms, indices, data = inputs
        if moving[0].device.type != "cpu" or compiler() is None or feed.plates:
            raise Unsupported(
                "no C++ compiler, not on the CPU, or a plate that takes its own rows"
            )
        self._feed, self._is_fixed = feed, not feed.num_indices
        batch = feed.batch(indices, data)
        fed = [scalars, normals, uniforms, *self._rows(batch)]
        if any(v.dtype != torch.float64 for v in (*moving, *fed)):
            raise Unsupported("other numbers than doubles")
        shapes = [v.shape for v in (*moving, *fed)]
        self._sizes = [math.prod(s) for s in shapes]
        self._num_moving = sum(self._sizes[: len(moving)])
        self.size = max(sum(self._sizes), self._num_moving + 2)
        if self.size > _MAX_INPUTS:
            raise Unsupported(f"a step reads {self.size} numbers")
        self._lengths = self._sizes[: len(moving)]
        count = len(moving)

        def step(vector: Tensor) -> tuple[Tensor, Tensor]:
            parts, at = [], 0
            for size, shape in zip(self._sizes, shapes, strict=True):
                parts.append(vector[at : at + size].reshape(shape))
                at += size
            moved, rest = parts[:count], parts[count:]
            rows = iter(rest[3:])
            seen = [next(rows) if cut else v for v, cut in self._marked(batch)]
            numbers, *new = update(rest[0], rest[1], rest[2], *moved, *seen)
            zeros = vector.new_zeros(self.size - self._num_moving - 2)
            return numbers[0], torch.cat([*new, numbers[1:], zeros])

        example = torch.cat([v.reshape(-1) for v in (*moving, *fed)])
        example = torch.cat([example, example.new_zeros(self.size - len(example))])
        graph = simplify(capture(step, example), example)
        self.translation: Translation = translate(graph, example)
        if self.translation.statements > MAX_STATEMENTS:
            raise Unsupported(f"{self.translation.statements} statements take minutes to compile")

    def _marked(self, batch: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
        """What a step sees, and whether it changes from step to step."""
        return [
            (v, row and not self._is_fixed) for v, row in zip(batch, self._feed.rows, strict=True)
        ]

    def _rows(self, batch: Sequence[Tensor]) -> list[Tensor]:
        return [v for v, moves in self._marked(batch) if moves]

    def build(self) -> None:
        """Compile."""
        self._density = load(self.translation, 1, self.size, *STEPS)
        width = self._density.width
        lanes = aligned_zeros(width * (2 * self.size + 1))
        self._x, self._g, self._lp = lanes.split([width * self.size] * 2 + [width])
        self._wide_x = self._x.reshape(self.size, width)
        self._x.zero_()
        self._arguments = (
            *(pointer(v) for v in (self._x, self._lp, self._g)),
            *self._density.constants,
            ctypes.c_long(self.size),
        )

    def run(
        self,
        moving: Sequence[Tensor],
        noise: tuple[Tensor, Tensor, Tensor],
        indices: Sequence[Tensor],
        data: Sequence[Tensor],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Numbers ``(count, 3)`` of steps, and what moved.

        Args:
            moving: What the first step finds.
            noise: Scalars, normals and uniforms, ``(count, ...)`` each.
            indices: Of the minibatches, ``(count, rows)`` each.
            data: What they point into.
        """
        count, m = len(noise[0]), self._num_moving
        fed = [v.reshape(count, -1) for v in noise]
        if not self._is_fixed:
            pairs = zip(data, self._feed.rows, strict=True)
            fed += [v[indices[0]].reshape(count, -1) for v, row in pairs if row]
        table = torch.cat(fed, 1).contiguous()
        numbers = table.new_empty(count, 3)
        held = self._wide_x[:m]
        held.copy_(torch.cat(list(moving))[:, None])
        self._density.library.steps(
            *self._arguments,
            *(ctypes.c_long(v) for v in (m, table.shape[1])),
            pointer(table),
            pointer(numbers),
            ctypes.c_long(count),
        )
        return numbers, tuple(v.clone() for v in held[:, 0].split(self._lengths))
