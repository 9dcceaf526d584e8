"""The block and the conditional distribution of a product of families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from bayesgen.conjugate import MarginalBlock

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["JointColumns", "ProductBlock", "merge", "part_of"]


def part_of(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Entries whose key begins with ``name_``, without that beginning."""
    prefix = f"{name}_"
    return {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)}


def merge(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The inverse of :func:`part_of`, over all parts."""
    return {f"{name}_{key}": value for name, part in parts.items() for key, value in part.items()}


@dataclass(frozen=True)
class ProductBlock(MarginalBlock):
    """Independent blocks side by side, the keys of each with its name before.

    Args:
        blocks: By name.
    """

    blocks: Mapping[str, MarginalBlock]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(
            f"{name}_{site}" for name, block in self.blocks.items() for site in block.sites
        )

    @staticmethod
    def _previous(previous: Tensors | None, name: str) -> Tensors | None:
        return None if previous is None else part_of(previous, name)

    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        return merge(
            {
                name: block.update(part_of(statistics, name), self._previous(previous, name))
                for name, block in self.blocks.items()
            }
        )

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        return merge(
            {name: block.message(part_of(posterior, name)) for name, block in self.blocks.items()}
        )

    def kl(self, posterior: Tensors) -> Tensor:
        parts = [block.kl(part_of(posterior, name)) for name, block in self.blocks.items()]
        return torch.stack(parts).sum(0)

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return merge(
            {
                name: block.sample(part_of(posterior, name), num_samples, generator=generator)
                for name, block in self.blocks.items()
            }
        )

    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        return merge(
            {
                name: block.maximise(
                    part_of(statistics, name), self._previous(previous, name), flat=flat
                )
                for name, block in self.blocks.items()
            }
        )

    def log_prior(self, values: Tensors) -> Tensor:
        parts = [block.log_prior(part_of(values, name)) for name, block in self.blocks.items()]
        return torch.stack(parts).sum(0)

    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return merge(
            {
                name: block.draw(
                    part_of(statistics, name),
                    self._previous(previous, name),
                    generator=generator,
                )
                for name, block in self.blocks.items()
            }
        )

    def natural(self, values: Tensors) -> dict[str, Tensor]:
        return merge(
            {name: block.natural(part_of(values, name)) for name, block in self.blocks.items()}
        )

    def log_evidence(self, statistics: Tensors, values: Tensors) -> Tensor:
        parts = [
            block.log_evidence(part_of(statistics, name), part_of(values, name))
            for name, block in self.blocks.items()
        ]
        # A block that ties its components has one evidence for all of them.
        least = min(part.ndim for part in parts)
        return torch.stack([part.sum(-1) if part.ndim > least else part for part in parts]).sum(0)


class JointColumns(Distribution):
    """Independent distributions of some columns each, put together in one event.

    Args:
        parts: Distributions of one batch shape and events ``(m_i,)``.
        positions: Where the columns of each part stand in the joint event.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, parts: Sequence[Distribution], positions: Sequence[Tensor]) -> None:
        self._parts = list(zip(parts, positions, strict=True))
        size = sum(len(index) for index in positions)
        super().__init__(parts[0].batch_shape, torch.Size((size,)), validate_args=False)

    def _join(self, values: Sequence[Tensor]) -> Tensor:
        shape = (*values[0].shape[:-1], *self.event_shape)
        joined = torch.empty(shape, dtype=torch.float64, device=values[0].device)
        for value, (_, index) in zip(values, self._parts, strict=True):
            joined[..., index] = value.to(joined.dtype)
        return joined

    @property
    def mean(self) -> Tensor:
        return self._join([part.mean for part, _ in self._parts])

    @property
    def variance(self) -> Tensor:
        return self._join([part.variance for part, _ in self._parts])

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        return self._join([part.sample(shape) for part, _ in self._parts])

    def log_prob(self, value: Tensor) -> Tensor:
        parts = [part.log_prob(value[..., index]) for part, index in self._parts]
        return torch.stack(torch.broadcast_tensors(*parts)).sum(0)
