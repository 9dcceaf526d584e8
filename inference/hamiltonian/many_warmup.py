"""What chains of ``ManyChains`` carry, and what its warm-up does to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.inference.hamiltonian.cross_chain import (
    Differences,
    Pace,
    Schedule,
    best_length,
    factor_of,
    typical,
)
from bayesgen.inference.hamiltonian.leapfrog import Leapfrog
from bayesgen.inference.programs.trace import Density
from bayesgen.inference.run import Task

__all__ = [
    "SETTLING",
    "Adaptation",
    "ManyState",
    "Work",
    "adaptation_of",
    "end_window",
    "first_pace",
    "new_length",
    "packed_of",
    "take_moves",
]

_DOUBLINGS = 30
SETTLING = (0, 1)  # windows in which each chain has a step size of its own
_SEND_HOME = (1, 2, 3, 4)  # windows after which chains that are stuck are restarted
_LATE = 3  # window after which those that still need a smaller step size are, too


class ManyState(NamedTuple):
    """State of all chains. The buffers of recorded draws are filled in place."""

    points: Tensor
    """``(2, c, D)``: positions and gradients."""
    lp: Tensor
    """``(c,)``."""
    adaptation: dict[str, Any]
    draws: Tensor
    """Unconstrained, ``(chains, num_samples, D)``."""
    sample_stats: Tensor
    """``(chains, num_samples, 6)``."""
    tick: int
    warmup_divergences: int
    num_restarted: int


class Adaptation(NamedTuple):
    """Everything that warm-up learns."""

    factor: Tensor
    """Of the metric: ``(D,)`` or ``(D, D)``."""
    pace: Pace
    own: Tensor
    """``(c,)`` logarithms of the chains' own step sizes while they settle; afterwards, in warm-up,
    of their share of the common one."""
    length: float
    """Mean time of a trajectory; its number of steps is this over the step size."""
    moves: Differences
    snapshot: Tensor
    """``(2, c, D)`` at the last taking of differences."""
    curves: Tensor
    """``(K + 1, F)``: sums of a scan, the last row what they are divided by."""


class Work(NamedTuple):
    """What a run rebuilds on resume."""

    density: Density
    leapfrog: Leapfrog

    @property
    def is_small(self) -> bool:
        """Whether torch's own operations are few and small: C++ does the rest."""
        return self.leapfrog.move is not None


def packed_of(adaptation: Adaptation) -> dict[str, Any]:
    """As nested dicts, which a checkpoint can hold."""
    packed = adaptation._asdict()
    return packed | {name: packed[name]._asdict() for name in ("pace", "moves")}


def adaptation_of(packed: Mapping[str, Any]) -> Adaptation:
    """The inverse of :func:`packed_of`."""
    nested = {"pace": Pace(**packed["pace"]), "moves": Differences(**packed["moves"])}
    return Adaptation(**{**packed, **nested})


def first_pace(task: Task, work: Work, state: ManyState, adaptation: Adaptation) -> Adaptation:
    """Every chain doubles or halves until a leapfrog step is accepted with probability 0.8."""
    own = adaptation.own.clone()
    turned, direction = torch.zeros_like(own, dtype=torch.bool), torch.zeros_like(own)
    normal = rng.standard_normal(state.points.shape[1:], task.generator, state.lp.dtype)
    energy = 0.5 * normal.square().sum(-1) - state.lp
    for _ in range(_DOUBLINGS):
        _, r, lp, _ = work.leapfrog.integrate(
            *(state.points[0], normal, state.points[1]),
            *(adaptation.factor, own.exp().unsqueeze(-1), 1),
        )
        delta = torch.nan_to_num(energy - 0.5 * r.square().sum(-1) + lp, nan=-torch.inf)
        turn = torch.where(delta.clamp(max=0.0).exp() > 0.8, 1.0, -1.0).to(own.dtype)
        turned |= direction == -turn
        direction = turn
        own = torch.where(turned, own, own + turn * math.log(2.0))
        if bool(turned.all()):
            break
    return adaptation._replace(own=own)


def take_moves(state: ManyState, adaptation: Adaptation) -> Adaptation:
    """With what typical chains have moved by since the last time."""
    moves = (state.points - adaptation.snapshot)[:, typical(state.lp)]
    return adaptation._replace(
        moves=adaptation.moves.add(moves[0], moves[1]), snapshot=state.points
    )


def new_length(work: Work, adaptation: Adaptation) -> Adaptation:
    """The path length of the scans since the last one."""
    if not len(adaptation.curves):
        return adaptation._replace(pace=adaptation.pace.forget())
    squares = adaptation.curves[-1].clamp(min=1e-30)
    steps = best_length(adaptation.curves[:-1] / squares, work.leapfrog.overhead)
    return adaptation._replace(
        length=steps * adaptation.pace.step_size,
        curves=adaptation.curves[:0],
        pace=adaptation.pace.forget(),
    )


def end_window(
    task: Task,
    state: ManyState,
    adaptation: Adaptation,
    window: int,
    schedule: Schedule,
    num_superchains: int,
) -> tuple[ManyState, Adaptation]:
    """A new metric; lost chains start again; in the last window, the settled step size."""
    if window == len(schedule.ends) - 1:
        return state, adaptation._replace(pace=adaptation.pace.settled)
    if adaptation.moves.weight >= 10:
        adaptation = adaptation._replace(
            factor=factor_of(adaptation.moves, dense=window + 1 not in SETTLING),
            moves=adaptation.moves.faded(0.2),
        )
    if window in _SEND_HOME:
        fine = typical(state.lp)
        if window >= _LATE:
            fine &= adaptation.own >= 0
        state = _restart_stuck(task, state, fine, num_superchains)
        adaptation = adaptation._replace(own=torch.where(fine, adaptation.own, 0.0))
    return state, adaptation._replace(pace=adaptation.pace.restart(), snapshot=state.points)


def _restart_stuck(task: Task, state: ManyState, fine: Tensor, num_superchains: int) -> ManyState:
    """Chains that are lost go on from one that is fine, of their own group if they can."""
    lost = (~fine).nonzero().flatten().tolist()
    num_chains = len(state.lp)
    if not lost or len(lost) > num_chains // 2:
        return state
    each, place = num_chains // num_superchains, torch.arange(num_chains)
    points, lp = state.points.clone(), state.lp.clone()
    for chain in lost:
        own = fine.cpu() & (place // each == chain // each)
        donors = (own if bool(own.any()) else fine.cpu()).nonzero().flatten()
        pick = torch.randint(len(donors), (), generator=task.generator, device=task.device)
        points[:, chain] = state.points[:, donors[int(pick)]]
        lp[chain] = state.lp[donors[int(pick)]]
    return state._replace(points=points, lp=lp, num_restarted=state.num_restarted + len(lost))
