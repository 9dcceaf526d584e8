"""What a fit says about itself: the table, the verdict, and both in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayesgen.arviz_groups import convert, labels, summarise
from bayesgen.capabilities import Symmetric
from bayesgen.nested import nested_r_hat
from bayesgen.verdict import MIN_DRAWS

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray
    from torch import Tensor

    from bayesgen.fit import Fit

__all__ = ["Summary"]

_MAX_ENTRIES = 1_000  # rows of the table: ArviZ takes 2 ms and more for each
_SHOWN = 24


class Summary:
    """The posterior's table, and whether it can be trusted; ``str`` and ``print`` tell.

    R-hat and effective sample sizes are ArviZ's, of aligned draws and of the invariant
    quantities; empty components are exchangeable and take no part in the verdict.

    Args:
        fit: The fit.

    Example:
        >>> from bayesgen.toys import UnitMixture, pretend
        >>> summary = pretend(UnitMixture(2), [[0.0], [0.1], [5.0], [5.1]]).summary()
        >>> sorted(round(summary.table.loc[f"loc[{k}, x0]", "mean"]) for k in (0, 1))
        [0, 5]
    """

    def __init__(self, fit: Fit) -> None:
        self.fit = fit

    # ------------------------------------------------------------ numbers
    @cached_property
    def table(self) -> pd.DataFrame:
        """ArviZ's summary of every entry: mean, sd, interval, ``ess_bulk``, ``r_hat``, ...

        Invariant quantities come first. Sites that would make it longer than 1,000 rows are
        left out, see :attr:`left_out`; ``arviz.summary(fit.arviz)`` has them.
        """
        return self._summarise(self._chosen)

    @property
    def invariants(self) -> pd.DataFrame:
        """The rows of :attr:`table` that the symmetry leaves alone."""
        return self.table.loc[self._names(self.fit.invariants)]

    @cached_property
    def raw(self) -> pd.DataFrame:
        """The table of the draws as the engine left them, not aligned."""
        chosen = {k: v for k, v in self.fit.draws.items() if k in self._chosen}
        return self._summarise(chosen)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Sites too large for the table."""
        return tuple(name for name in self.fit.aligned.draws if name not in self._chosen)

    @cached_property
    def _chosen(self) -> dict[str, Tensor]:
        chosen, total = {}, 0
        for name, value in {**self.fit.invariants, **self.fit.aligned.draws}.items():
            size = value[0, 0].numel()
            if total + size <= _MAX_ENTRIES:  # a large one does not push out those behind it
                chosen[name] = value
                total += size
        return chosen

    def draws_of(self, label: str) -> NDArray[np.float64]:
        """The draws ``(chain, draw)`` of one row of :attr:`table`.

        Raises:
            ValueError: There is no such row.
        """
        for name, value in self._chosen.items():
            names = self._labels(name, value)
            if label in names:
                flat = value.reshape(*value.shape[:2], -1)[..., names.index(label)]
                return flat.detach().double().cpu().numpy()
        raise ValueError(f"the table has no row {label!r}; see fit.summary().table.index.")

    # ------------------------------------------------------------ verdict
    @property
    def problems(self) -> tuple[str, ...]:
        """What speaks against trusting this posterior; empty when nothing does."""
        return tuple(finding.message for finding in self.fit.verdict().findings)

    @property
    def is_converged(self) -> bool:
        """Whether :meth:`bayesgen.fit.Fit.verdict` is PASS; ambiguity does not count."""
        return bool(self.fit.verdict())

    @cached_property
    def judged(self) -> pd.DataFrame:
        """Rows of :attr:`table` that bear on the verdict: not of empty or confused components."""
        return self.table.loc[
            [
                label
                for name, value in self._chosen.items()
                for label, kept in zip(
                    self._labels(name, value), self.is_readable(name, value), strict=True
                )
                if kept
            ]
        ]

    def is_readable(self, name: str, value: Tensor) -> list[bool]:
        """For each entry of a site whether its component, if it has one, is identified.

        Of discrete latents none is: drawn given the parameters, they mix as those do.
        """
        if name in self.fit.draws and not value.is_floating_point():
            return [False] * value[0, 0].numel()
        aligned, model = self.fit.aligned, self.fit.model
        counted = model.symmetry.dim if isinstance(model, Symmetric) else ""
        readable = None if aligned.elements is None else set(aligned.identified)
        dims = model.dims.get(name, ())
        axis = dims.index(counted) if counted in dims else None
        return [
            axis is None or readable is None or index[axis] in readable
            for index in np.ndindex(*value.shape[2:])
        ]

    # ------------------------------------------------------------ words
    def __str__(self) -> str:
        fit = self.fit
        lines = [str(fit.model), "", self._run(), f"{fit.num_chains} x {fit.num_draws} draws"]
        lines += ["", f"verdict: {fit.verdict()}"]
        lines += [f"  note: {message}" for message in fit.attrs.get("messages", [])]
        if fit.aligned.elements is not None and not fit.aligned.is_ambiguous:
            lines.append(fit.aligned.message)
        return "\n".join([*lines, "", self._shown()])

    __repr__ = __str__

    def _run(self) -> str:
        attrs = self.fit.attrs
        settings = attrs.get("settings")
        inside = ""
        if isinstance(settings, Mapping):
            inside = ", ".join(f"{k}={v}" for k, v in settings.items() if v is not None)
        columns = self.fit.columns
        names = ", ".join(columns[:6]) + (", ..." if len(columns) > 6 else "")
        rows = attrs.get("num_rows", "?" if self.fit.data is None else self.fit.data.num_rows)
        seconds = f" in {attrs['seconds']:.2g} s" if "seconds" in attrs else ""
        engine = attrs.get("engine", "an unnamed engine")
        size = f"{rows} rows x {len(columns)} columns ({names})"
        return f"fitted by {engine}({inside}) to {size}{seconds}"

    def _shown(self) -> str:
        table = self.judged[self.judged["sd"] != 0.0][:_SHOWN]  # zeros of a triangle say nothing
        keep = [c for c in table.columns if not c.startswith("mcse")]
        text = table[keep].to_string(float_format=lambda v: f"{v:.4g}")
        more = len(self.table) - len(table)
        text += f"\n... and {more} more rows in summary().table" if more else ""
        if self.left_out:
            text += f"\nleft out for their size: {', '.join(self.left_out)}; see fit.arviz"
        return text

    # ------------------------------------------------------------ private
    def _summarise(self, values: Mapping[str, Tensor]) -> pd.DataFrame:
        if self.fit.num_draws < MIN_DRAWS:
            return self._points(values)
        arrays: dict[str, NDArray[Any]] = {k: v.cpu().numpy() for k, v in values.items()}
        data = convert(
            {"posterior": arrays}, coords=self.fit.model.coords(), dims=self.fit.model.dims
        )
        table: pd.DataFrame = summarise(data)
        table.index = [n for k, v in values.items() for n in self._labels(k, v)]
        groups = self.fit.attrs.get("num_superchains", 0)
        if groups > 1:  # chains too short for a plain R-hat
            table["r_hat"] = torch.cat(
                [nested_r_hat(v, groups).reshape(-1) for v in values.values()]
            ).numpy()
        return table

    def _points(self, values: Mapping[str, Tensor]) -> pd.DataFrame:
        """Too few draws for ArviZ: the mean alone, the other columns empty."""
        import pandas as pd

        names = [n for k, v in values.items() for n in self._labels(k, v)]
        means = [float(m) for v in values.values() for m in v.double().mean((0, 1)).flatten()]
        table = pd.DataFrame({"mean": means}, index=names)
        for column in ("sd", "ess_bulk", "ess_tail", "r_hat"):
            table[column] = math.nan
        return table

    def _names(self, values: Mapping[str, Tensor]) -> list[str]:
        return [n for k, v in values.items() if k in self._chosen for n in self._labels(k, v)]

    def _labels(self, name: str, value: Tensor) -> list[str]:
        model = self.fit.model
        return labels(name, tuple(value.shape[2:]), coords=model.coords(), dims=model.dims)
