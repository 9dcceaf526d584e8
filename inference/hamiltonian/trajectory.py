r"""The no-U-turn sampler as a state machine: one call moves every chain by one leapfrog step.

Each chain stands somewhere in its own binary tree. A chain whose trajectory ends draws a new
momentum
in the same call and goes on, so that no chain waits for another. With the leaves of a subtree
numbered
from zero, the momenta needed for its U-turn checks are held at ``max_depth`` checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "STATISTICS",
    "Metric",
    "Trajectories",
    "advance",
    "launch",
    "machine",
    "relaunch",
    "tables",
]

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]
STATISTICS = (
    "lp",
    "energy",
    "tree_depth",
    "acceptance_rate",
    "n_steps",
    "diverging",
    "step_size",
    "max_energy_error",
)
"""What is recorded of each trajectory, after its position and gradient."""

_DIVERGENCE = 1000.0


class Metric(NamedTuple):
    r"""How trajectories move, diagonal plus low rank.

    .. math:: M^{-1} = S \big(1 + B (\Lambda - 1) B^\top\big) S, \qquad S = \mathrm{diag}(\sqrt m)
    """

    step_size: Tensor
    """``()``; a chain takes it up as it starts a trajectory."""
    inverse_mass: Tensor
    """``(D,)``, the variances ``m``."""
    basis: Tensor
    """``(D, r)``, orthonormal columns."""
    stretch: Tensor
    """``(2, r)``: eigenvalues minus one, and their inverse square roots minus one."""
    max_depth: Tensor
    """``()``, doublings after which a trajectory ends."""

    def velocity(self, momentum: Tensor) -> Tensor:
        """``M^-1 p`` of momenta ``(..., D)``."""
        velocity = self.inverse_mass * momentum
        if self.basis.shape[1] == 0:
            return velocity
        root = self.inverse_mass.sqrt()
        inner = ((root * momentum) @ self.basis) * self.stretch[0]
        return velocity + root * (inner @ self.basis.mT)

    def momentum(self, normal: Tensor) -> Tensor:
        """Momenta ``(..., D)`` of covariance ``M`` from standard normal numbers."""
        if self.basis.shape[1]:
            normal = normal + ((normal @ self.basis) * self.stretch[1]) @ self.basis.mT
        return normal * self.inverse_mass.rsqrt()


class Trajectories(NamedTuple):
    """Where every chain stands in its tree; ``c`` chains of ``D`` coordinates."""

    ends: Tensor
    """``(c, 2, 4, D)``: left and right end, each position, momentum, gradient, velocity."""
    points: Tensor
    """``(c, 2, 2, D)``: proposals of the tree and of the subtree, each position and gradient."""
    sums: Tensor
    """``(c, 2, D)``: sum of the momenta in the tree and in the subtree."""
    checks: Tensor
    """``(c, 2, max_depth, D)``: velocities at the checkpoints, and half-open sums of momenta."""
    numbers: Tensor
    """``(c, 14)``: see :data:`_NUMBERS`."""


_NUMBERS = (
    "step_size",
    "depth",
    "leaf",
    "side",
    "log_weight_tree",
    "log_weight_subtree",
    "energy_start",
    "sum_accept",
    "num_steps",
    "worst_error",
    "lp_tree",
    "energy_tree",
    "lp_subtree",
    "energy_subtree",
)


def tables(max_depth: int, device: torch.device) -> Tensor:
    """``(2 ** max_depth, 2)``: first and last checkpoint that a leaf compares itself with.

    An even leaf compares with none (first > last) and is stored at the last.
    """
    leaves = torch.arange(2**max_depth)
    bits = sum((leaves >> (k + 1)) & 1 for k in range(max_depth))
    ones = torch.zeros_like(leaves)
    running = torch.ones_like(leaves, dtype=torch.bool)
    for k in range(max_depth):
        running = running & ((leaves >> k) & 1).bool()
        ones = ones + running
    last = torch.as_tensor(bits)
    return torch.stack((last - ones + 1, last), -1).to(device)


def launch(
    position: Tensor,
    lp: Tensor,
    gradient: Tensor,
    metric: Metric,
    normal: Tensor,
    uniform: Tensor,
    max_depth: int,
) -> Trajectories:
    """Start trajectories at ``position (c, D)``, with ``normal (c, D)`` and ``uniform (c,)``."""
    c, d = position.shape
    momentum = metric.momentum(normal)
    end = torch.stack((position, momentum, gradient, metric.velocity(momentum)), 1)
    point = torch.stack((position, gradient), 1)
    energy = 0.5 * normal.square().sum(-1) - lp
    zero = torch.zeros_like(lp)
    numbers = torch.stack(
        (
            metric.step_size.expand(c),
            zero,
            zero,
            (uniform < 0.5).to(lp.dtype),
            zero,
            zero - torch.inf,
            energy,
            zero,
            zero,
            zero,
            lp,
            energy,
            lp,
            energy,
        ),
        1,
    )
    return Trajectories(
        torch.stack((end, end), 1),
        torch.stack((point, point), 1),
        torch.stack((momentum, torch.zeros_like(momentum)), 1),
        position.new_zeros(c, 2, max_depth, d),
        numbers,
    )


def relaunch(state: Trajectories, metric: Metric, normal: Tensor, uniform: Tensor) -> Trajectories:
    """Start anew from the last draws, for a metric that has changed; for warm-up only."""
    position, gradient = state.points[:, 0].unbind(1)
    lp = state.numbers[:, _NUMBERS.index("lp_tree")]
    return launch(position, lp, gradient, metric, normal, uniform, state.checks.shape[2])


def _turning(left: Tensor, right: Tensor, span: Tensor) -> Tensor:
    """Whether either end's velocity is against the span, a sum of momenta over the (sub)tree."""
    return torch.minimum((left * span).sum(-1), (right * span).sum(-1)) <= 0


def advance(
    gradient_of: Gradient,
    table: Tensor,
    state: Trajectories,
    metric: Metric,
    normal: Tensor,
    uniform: Tensor,
) -> tuple[Trajectories, Tensor]:
    r"""Move every chain by one leapfrog step; start anew where a trajectory ends.

    Args:
        gradient_of: ``(c, D) -> (c,), (c, D)``.
        table: From :func:`tables`.
        state: Where the chains stand.
        metric: Taken up by trajectories that start now.
        normal: ``(c, D)`` standard normal, for new momenta.
        uniform: ``(c, 3)`` in (0, 1): take the leaf, take the subtree, which side.

    Returns:
        The new state, and ``(c, 1 + 2 D + len(STATISTICS))``: whether the trajectory ended, then
        its
        position, gradient and statistics, which mean something only where it did.
    """
    (
        step_size,
        depth,
        leaf,
        side,
        log_tree,
        log_sub,
        energy_start,
        sum_accept,
        num_steps,
        worst,
        lp_tree,
        energy_tree,
        lp_sub,
        energy_sub,
    ) = state.numbers.unbind(1)
    log_uniform = uniform.log()
    is_right = side > 0.5

    # ---- one leapfrog step from the end that moves
    q, p, g, _ = torch.where(is_right[:, None, None], state.ends[:, 1], state.ends[:, 0]).unbind(1)
    eps = torch.where(is_right, step_size, -step_size).unsqueeze(-1)
    half = p + 0.5 * eps * g
    q = q + eps * metric.velocity(half)
    lp, g = gradient_of(q)
    p = half + 0.5 * eps * g
    v = metric.velocity(p)
    energy = 0.5 * (p * v).sum(-1) - lp
    delta = torch.nan_to_num(energy_start - energy, nan=-torch.inf)
    diverging = delta < -_DIVERGENCE
    worst = torch.where(delta.abs() > worst.abs(), -delta, worst)
    sum_accept = sum_accept + delta.clamp(max=0.0).exp()
    num_steps = num_steps + 1
    end = torch.stack((q, p, g, v), 1)
    right = is_right[:, None, None]
    left_end = torch.where(right, state.ends[:, 0], end)
    right_end = torch.where(right, end, state.ends[:, 1])

    # ---- the leaf joins its subtree
    log_sub = torch.logaddexp(log_sub, delta)
    take = log_uniform[:, 0] < delta - log_sub
    lp_sub = torch.where(take, lp, lp_sub)
    energy_sub = torch.where(take, energy, energy_sub)
    sub_point = torch.where(take[:, None, None], torch.stack((q, g), 1), state.points[:, 1])
    sub_sum = state.sums[:, 1] + p
    first, last = table[leaf.long()].unbind(-1)
    slots = torch.arange(state.checks.shape[2], device=q.device)
    here = torch.stack((v, sub_sum - 0.5 * p), 1).unsqueeze(2)
    span = here[:, 1] - state.checks[:, 1]
    asked = (slots >= first[:, None]) & (slots <= last[:, None])
    turned = (_turning(state.checks[:, 0], v.unsqueeze(1), span) & asked).any(-1)
    store = (slots == last[:, None]) & (first > last)[:, None]
    checks = torch.where(store[:, None, :, None], here, state.checks)

    # ---- a finished subtree joins the tree
    leaf = leaf + 1
    bad = turned | diverging
    merge = (leaf >= depth.exp2()) & ~bad
    take = merge & (log_uniform[:, 1] < log_sub - log_tree)
    lp_tree = torch.where(take, lp_sub, lp_tree)
    energy_tree = torch.where(take, energy_sub, energy_tree)
    point = torch.where(take[:, None, None], sub_point, state.points[:, 0])
    log_tree = torch.where(merge, torch.logaddexp(log_tree, log_sub), log_tree)
    total = torch.where(merge[:, None], state.sums[:, 0] + sub_sum, state.sums[:, 0])
    span = total - 0.5 * (left_end[:, 1] + right_end[:, 1])
    around = _turning(left_end[:, 3], right_end[:, 3], span)
    depth = depth + merge
    stop = bad | (merge & (around | (depth >= metric.max_depth)))
    record = torch.cat(
        (
            stop.to(q.dtype).unsqueeze(1),
            point.flatten(1),
            torch.stack(
                (
                    lp_tree,
                    energy_tree,
                    depth + bad,
                    sum_accept / num_steps,
                    num_steps,
                    diverging.to(q.dtype),
                    step_size,
                    worst,
                ),
                1,
            ),
        ),
        1,
    )

    # ---- the next subtree, or the next trajectory
    fresh = merge | stop
    side = torch.where(fresh, (uniform[:, 2] < 0.5).to(q.dtype), side)
    leaf = torch.where(fresh, 0.0, leaf)
    log_sub = torch.where(fresh, -torch.inf, log_sub)
    sub_sum = torch.where(fresh[:, None], 0.0, sub_sum)
    started = 0.5 * normal.square().sum(-1) - lp_tree
    momentum = metric.momentum(normal)
    start = torch.stack((point[:, 0], momentum, point[:, 1], metric.velocity(momentum)), 1)
    again = stop[:, None, None]
    zero = torch.zeros_like(lp)
    numbers = torch.where(
        stop[:, None],
        torch.stack(
            (
                metric.step_size.expand(lp.shape),
                zero,
                zero,
                side,
                zero,
                log_sub,
                started,
                zero,
                zero,
                zero,
                lp_tree,
                started,
                lp_tree,
                started,
            ),
            1,
        ),
        torch.stack(
            (
                step_size,
                depth,
                leaf,
                side,
                log_tree,
                log_sub,
                energy_start,
                sum_accept,
                num_steps,
                worst,
                lp_tree,
                energy_tree,
                lp_sub,
                energy_sub,
            ),
            1,
        ),
    )
    return (
        Trajectories(
            torch.stack(
                (torch.where(again, start, left_end), torch.where(again, start, right_end)), 1
            ),
            torch.stack((point, sub_point), 1),
            torch.stack((torch.where(stop[:, None], momentum, total), sub_sum), 1),
            checks,
            numbers,
        ),
        record,
    )


def machine(gradient_of: Gradient, table: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """:func:`advance` on plain tensors, as tracing and compiling want it."""

    def call(
        ends: Tensor,
        points: Tensor,
        sums: Tensor,
        checks: Tensor,
        numbers: Tensor,
        step_size: Tensor,
        inverse_mass: Tensor,
        basis: Tensor,
        stretch: Tensor,
        max_depth: Tensor,
        normal: Tensor,
        uniform: Tensor,
    ) -> tuple[Tensor, ...]:
        state = Trajectories(ends, points, sums, checks, numbers)
        metric = Metric(step_size, inverse_mass, basis, stretch, max_depth)
        new, record = advance(gradient_of, table, state, metric, normal, uniform)
        return (*new, record)

    return call
