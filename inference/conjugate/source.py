"""Passes over the data for conjugate models: chunked, cached when small, streamed when large."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesgen.capabilities import Continued, Partitioned, Pooled, require
from bayesgen.conjugate import Condensable, Local, add_statistics

if TYPE_CHECKING:
    from bayesgen.capabilities import Conjugate, Tensors
    from bayesgen.data import Dataset

__all__ = ["Source"]

# Bytes of one chunk: on a processor its features stay in cache between the two products, on an
# accelerator it is large enough to fill it.
_CHUNK = {"cpu": 3 * 2**20}
_LARGE_CHUNK = 2**28
# Numbers of all features together up to which they are computed once and kept; beyond that, where
# they take no more room than the rows themselves. Else what they come from is kept, if a batch can
# be condensed to that.
_KEEP = 2**22
# How many times as large as their rows kept features may be: values and a mask, say.
_TIMES = 2.1


class Source:
    """The rows of a data set as batches that a model has observed.

    Args:
        model: A bound conjugate model.
        data: The rows.
        batch_size: Rows of a batch; None chooses chunks that fit the processor's cache. A model
            that pools its rows sees all of them as one batch, of their sums.
        num_batch: Leading batch dimension of the messages that passes will carry.
        dtype: Precision of the features; statistics are merged in float64.
        device: Where to compute.
    """

    def __init__(
        self,
        model: Conjugate,
        data: Dataset,
        *,
        batch_size: int | None = None,
        num_batch: int = 1,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.data, self.dtype, self.device = model, data, dtype, torch.device(device)
        self.num_rows = data.num_rows
        if batch_size is None:
            size = _CHUNK.get(self.device.type, _LARGE_CHUNK) // dtype.itemsize
            size = _aligned(size // (model.row_size + num_batch))
            batch_size = max(256, min(size, self.num_rows))
        self._chunk = batch_size
        self._pool = model if isinstance(model, Pooled) and model.pools else None
        self._continued = model if isinstance(model, Continued) and model.continues else None
        self.batch_size = batch_size if self._pool is None else self.num_rows
        # On the processor chunks are converted one by one: float32 data are never held twice.
        self._rows: Tensor | None = None
        if data.in_memory and self.device.type != "cpu":
            self._rows = data.tensor(torch.float64, self.device)
        self._kept: list[Any] | None = None
        self._condensed = False

    @property
    def partitioned(self) -> Partitioned:
        """The model, whose components moves may split, merge and relabel."""
        return require(self.model, Partitioned, "a move between components")

    @property
    def num_passes(self) -> int:
        """Passes of one sweep of Gibbs."""
        return 1 if self._continued is None else self._continued.num_passes

    @property
    def num_batches(self) -> int:
        """Batches of one pass."""
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Observed batches, always in the same order."""
        if self._kept is not None:
            yield from (item.expanded() if self._condensed else item for item in self._kept)
            return
        if self._pool is not None:
            self._kept = [self._pooled(self._pool)]
            yield from self._kept
            return
        kept: list[Any] = []
        keep = condense = False
        for rows in self._chunks():
            observed = self.model.observe(rows, self.dtype)
            if not kept and self.data.in_memory:
                condense = not self._affordable(observed, rows)
                keep = not condense or isinstance(observed, Condensable)
            if keep:
                kept.append(observed.condensed() if condense else observed)
            yield observed
            del observed
        if keep:
            self._kept, self._condensed = kept, condense

    def _affordable(self, observed: Any, rows: Tensor) -> bool:
        """Whether the features of all rows may be kept, judged by the first batch."""
        if self.num_rows * self.model.row_size <= _KEEP:
            return True
        return _bytes(observed) <= _TIMES * rows.numel() * rows.element_size()

    def _pooled(self, model: Pooled) -> Any:
        """All rows as one observed batch, in one pass."""
        total: Any = None
        for rows in self._chunks():
            observed = model.observe(rows, self.dtype)
            total = observed if total is None else model.pool(total, observed)
        return total

    def _chunks(self) -> Iterator[Tensor]:
        if self._rows is None:
            yield from self.data.batches(self._chunk, device=self.device)
        else:
            yield from self._rows.split(self._chunk)

    def rows(self, limit: int, generator: torch.Generator) -> Tensor:
        """At most ``limit`` rows ``(m, d)`` for starts and proposals: all, or a random sample.

        The same rows whether they are in memory or streamed.
        """
        if self.num_rows <= limit:
            return torch.cat(list(self._chunks()))
        index = torch.randint(
            self.num_rows, (limit,), generator=generator, device=generator.device
        )
        index = index.unique().to(self.device)
        if self.data.in_memory:
            return self.data.subset(index).tensor(torch.float64, self.device)
        # Filled in place: small tensors kept between passing batches would scatter the heap.
        out = torch.empty((len(index), self.data.num_columns), dtype=torch.float64)
        out = out.to(self.device)
        start = filled = 0
        for batch in self._chunks():
            here = index[(index >= start) & (index < start + len(batch))]
            out[filled : filled + len(here)] = batch[here - start]
            start, filled = start + len(batch), filled + len(here)
        return out

    def rows_of(self, index: int) -> slice:
        """The rows of the batch of this number."""
        return slice(index * self.batch_size, (index + 1) * self.batch_size)

    def sweep(
        self,
        messages: Mapping[str, Tensors],
        *,
        generator: torch.Generator | None = None,
        keep_labels: bool = False,
        left: Tensor | None = None,
    ) -> Local:
        """One pass over all rows under fixed messages: summed statistics and bound.

        With ``keep_labels`` the drawn labels ``(..., n)`` come along as a latent. Of a model that
        continues its local steps ``left (..., n, k)`` is what the last pass left, and what this
        one leaves comes along.
        """
        total: dict[str, dict[str, Tensor]] | None = None
        bound: Tensor | None = None
        labels, lefts = [], []
        messages = self.model.ready(messages, self.dtype)
        for index, observed in enumerate(self):
            local = self.local(observed, messages, left, index, generator=generator)
            if self._continued is not None:
                lefts.append(local.latents["left"])
            total = add_statistics(total, local.statistics)
            bound = local.bound if bound is None else bound + local.bound
            if keep_labels:
                labels.append(local.latents["labels"])
            del observed, local  # the next batch moves into the same memory, still in cache
        if total is None or bound is None:
            raise ValueError("the data have no rows.")
        latents = {"labels": torch.cat(labels, -1)} if keep_labels else {}
        if lefts:
            latents["left"] = torch.cat(lefts, -2)
        return Local(total, bound, latents)

    def local(
        self,
        observed: Any,
        messages: Mapping[str, Tensors],
        left: Tensor | None,
        index: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Local:
        """The local step of the batch of this number, after what the last one ``left``."""
        if self._continued is None:
            return self.model.local(observed, messages, generator=generator)
        here = None if left is None else left[..., self.rows_of(index), :]
        return self._continued.local_after(observed, messages, here, generator=generator)


def _aligned(rows: int) -> int:
    """An odd multiple of 16 rows: whole lines of the cache, which do not crowd one of its sets."""
    lines = max(1, rows // 16)
    return 16 * (lines - (lines % 2 == 0))


def _bytes(observed: Any) -> float:
    """Bytes of the tensors in an observed batch, whatever tuples they are packed in."""
    if isinstance(observed, Tensor):
        return observed.numel() * observed.element_size()
    if isinstance(observed, tuple):
        return sum(_bytes(item) for item in observed)
    return 0 if observed is None or isinstance(observed, bool) else math.inf
