"""The maximum of a likelihood where it is known: no iterations over parameters, no starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesgen.capabilities import Solvable, require
from bayesgen.data import Dataset, as_dataset
from bayesgen.inference.checks import check_choice
from bayesgen.inference.run import Engine, Info, Task

__all__ = ["ClosedForm"]

# Bytes of a batch: on a processor it stays in cache between centring and multiplying.
_BYTES, _LARGE_BYTES = 2**20, 2**26


class Solved(NamedTuple):
    """State: nothing yet, or the maximum."""

    values: dict[str, Tensor]
    log_likelihood: float
    messages: list[str]


@dataclass(frozen=True, eq=False)
class ClosedForm(Engine[Solved]):
    r"""The maximum of the likelihood in closed form.

    .. math:: \hat\theta = \arg\max_\theta \log p(x \mid \theta)

    For probabilistic PCA an eigenvalue problem of the second moments. The pass that adds them up,
    a few rows at a time, is also the one that checks and summarises the columns; rows that stream
    from disk are never held together. When there are so many columns that their second moments do
    not fit, a random subspace replaces them.

    References:
        Tipping & Bishop (1999). Probabilistic principal component analysis. Halko, Martinsson &
        Tropp (2011). Finding structure with randomness.

    Args:
        objective: ``"restricted"`` integrates the mean out of the likelihood under a flat prior:
            covariances are then divided by ``n - 1``, which is unbiased and what scikit-learn
            does. ``"likelihood"`` is the plain maximum, divided by ``n``.
        method: ``"exact"``, ``"randomised"``, or ``"auto"``: exact up to 2,000 columns.
        batch_size: Rows of a batch; None chooses batches that fit the processor's cache. A number
            asks for a pass of their own.
        device: Where to compute.

    Example:
        >>> from bayesgen import datasets
        >>> from bayesgen.inference import ClosedForm
        >>> from bayesgen.models import PPCA
        >>> fit = ClosedForm().run(PPCA(2), datasets.load("iris"))
        >>> fit.draws["loadings"].shape
        torch.Size([1, 1, 4, 2])
    """

    objective: str = "restricted"
    method: str = "auto"
    batch_size: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_choice("ClosedForm", "objective", self.objective, ("restricted", "likelihood"))
        check_choice("ClosedForm", "method", self.method, ("auto", "exact", "randomised"))
        size = self.batch_size
        if size is not None and (isinstance(size, bool) or size < 1):
            raise ValueError(f"ClosedForm: batch_size={size!r}, but it must be at least 1.")

    @property
    def capability(self) -> type:
        return Solvable

    @property
    def state_type(self) -> type[Solved]:
        return Solved

    @property
    def max_steps(self) -> int:
        """One."""
        return 1

    def task(self, model: Any, data: object, generator: torch.Generator) -> Task:
        solvable = require(model, Solvable, f"{type(self).__name__}.run")
        dataset = as_dataset(data)
        # Asked for first, products come with the summary and fingerprint, by the same pass.
        if self._takes_products(solvable, dataset):
            _ = dataset.products
        return super().task(model, dataset, generator)

    def _takes_products(self, model: Solvable, data: Dataset) -> bool:
        if self.batch_size is not None or self._device.type != "cpu":
            return False
        return model.takes_products(data.num_rows, data.num_columns, self.method)

    def prepare(self, task: Task) -> int:
        size = _BYTES if task.device.type == "cpu" else _LARGE_BYTES
        return self.batch_size or max(256, size // (8 * task.data.num_columns))

    def init(self, task: Task, work: int) -> Solved:
        return Solved({}, -torch.inf, [])

    def step(self, task: Task, work: int, state: Solved) -> tuple[Solved, Info]:
        def passes() -> Iterator[Tensor]:
            yield from task.data.batches(work, dtype=torch.float64, device=task.device)

        takes_products = self._takes_products(task.model, task.data)
        found = task.model.solve(
            passes,
            products=task.data.products if takes_products else None,
            restricted=self.objective == "restricted",
            method=self.method,
            generator=task.generator,
        )
        new = Solved(dict(found.values), found.log_likelihood, list(found.messages))
        return new, Info({"log_likelihood": found.log_likelihood}, True)

    def finish(self, task: Task, work: int, state: Solved) -> dict[str, Any]:
        return {
            "draws": {name: value[None, None] for name, value in state.values.items()},
            "attrs": {"log_likelihood": state.log_likelihood, "messages": state.messages},
        }
