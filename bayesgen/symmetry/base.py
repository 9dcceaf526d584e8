"""What a symmetry group is, and what aligning draws by it reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["PRESENT", "Alignment", "Symmetry", "align"]

PRESENT = 0.95  # the means of a component that is empty in more draws mix in its prior


@dataclass(frozen=True, eq=False)
class Alignment:
    """Draws after alignment, and how sure it is.

    What is counted, ``K`` times, are the components of a mixture or the latent directions of a
    factor model.

    Args:
        draws: The aligned draws, ``(chain, draw, *event)`` by site.
        elements: The group element applied to each draw: for labels the permutation ``(chain,
            draw, K)`` with ``aligned[k] = original[elements[k]]``, for rotations the orthogonal
            matrix ``(chain, draw, K, K)`` with ``aligned = original @ elements``. None when there
            was nothing to align.
        cost: ``(chain, draw)`` distance of each aligned draw from the mean, in nats over the
            anchor rows (or in squared standard deviations when parameters were compared).
        ambiguity: ``(K, K)``, for each pair how far one could as well be taken for the other: 0
            is identified, 1 is exchangeable. For labels it is the share of draws in which they
            could as well be swapped, for directions how widely the draws' own axes are scattered
            in their plane. None when there was nothing to align.
        is_ambiguous: Whether any that matter are confused.
        message: The same in one or two sentences.
        occupancy: ``(K,)`` mean share of the rows (else mean weight) of each component, or of the
            signal of each direction; decreasing.
        presence: ``(K,)`` share of the draws in which each holds any rows, or any signal.
        empty: Those of negligible occupancy. They are exchangeable by nature: their order, and
            their R-hat, mean nothing.
        confused: Pairs that are not empty and could as well be taken for each other.
        num_steps: Rounds of alignment until nothing moved.
    """

    draws: dict[str, Tensor]
    elements: Tensor | None = None
    cost: Tensor | None = None
    ambiguity: Tensor | None = None
    is_ambiguous: bool = False
    message: str = "the model has no symmetry: nothing to align"
    occupancy: Tensor | None = None
    presence: Tensor | None = None
    empty: tuple[int, ...] = ()
    confused: tuple[tuple[int, int], ...] = ()
    num_steps: int = 0

    @property
    def identified(self) -> tuple[int, ...]:
        """Those that live in nearly every draw and are not confused with another."""
        if self.presence is None:
            return ()
        taken = {k for pair in self.confused for k in pair} | set(self.empty)
        here = (self.presence >= PRESENT).tolist()
        return tuple(k for k, present in enumerate(here) if present and k not in taken)


class Symmetry(ABC):
    """A group acting on the draws of some sites."""

    @property
    @abstractmethod
    def sites(self) -> tuple[str, ...]:
        """The sites it acts on."""

    @property
    @abstractmethod
    def dim(self) -> str:
        """Name of the event dimension that counts what the group confuses."""

    @abstractmethod
    def random(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
        """Uniformly random elements of the group, ``(*shape, ...)``."""

    @abstractmethod
    def apply(self, draws: Tensors, elements: Tensor) -> dict[str, Tensor]:
        """Move each draw by its group element; sites that the group leaves alone pass through."""

    @abstractmethod
    def align(
        self,
        draws: Tensors,
        *,
        responsibilities: Tensor | None = None,
        log_density: Tensor | None = None,
        max_steps: int = 50,
    ) -> Alignment:
        """Align the draws with each other; see :func:`align`."""


def align(
    draws: Tensors,
    symmetry: Symmetry,
    *,
    responsibilities: Tensor | None = None,
    log_density: Tensor | None = None,
    max_steps: int = 50,
) -> Alignment:
    """Move every draw by the group element that brings it closest to the others.

    How is the group's affair: labels by Stephens' algorithm, see
    :class:`~bayesgen.symmetry.LabelPermutation`; loadings by generalised Procrustes, see
    :class:`~bayesgen.symmetry.Rotation`.

    Args:
        draws: ``(chain, draw, *event)`` by site.
        symmetry: The group.
        responsibilities: ``(chain, draw, n, K)`` of a few hundred anchor rows, for labels.
        log_density: ``(chain, draw)``; its maximum is the first reference.
        max_steps: Rounds at most.

    Raises:
        ValueError: Sites missing, or of the wrong shape.
    """
    if not draws:
        raise ValueError("draws is empty: there is nothing to align.")
    if responsibilities is not None and responsibilities.ndim != 4:
        raise ValueError(
            f"responsibilities have shape {tuple(responsibilities.shape)}, but "
            "(chain, draw, n, K) is needed."
        )
    return symmetry.align(
        draws, responsibilities=responsibilities, log_density=log_density, max_steps=max_steps
    )
