"""Components of mixed columns: one family for each group of columns, independent of each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from bayesgen.data import Dataset, Schema
from bayesgen.models.families import family_class
from bayesgen.models.families.base import Evaluation, Family
from bayesgen.models.families.bernoulli import Bernoulli
from bayesgen.models.families.categorical import Categorical
from bayesgen.models.families.gaussian import Gaussian
from bayesgen.models.families.joint import JointColumns, ProductBlock, merge, part_of
from bayesgen.models.families.poisson import Poisson
from bayesgen.tables.rows import MemoryRows, Rows

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["Product"]

Columns = Sequence[str | int]


class Part(NamedTuple):
    """One bound part of a product."""

    name: str
    family: Family
    columns: tuple[int, ...]

    def of(self, x: Tensor) -> Tensor:
        """This part's columns of rows ``(n, d)``."""
        return x[:, list(self.columns)]


class _ColumnRows(Rows):
    """Some columns of rows that stream from disk."""

    def __init__(self, data: Dataset, columns: list[int]) -> None:
        self.num_rows = data.num_rows
        self._data, self._columns = data, columns

    def pieces(self, generator: torch.Generator | None = None) -> Iterator[tuple[int, Tensor]]:
        start = 0
        for batch in self._data.batches(1 << 16, generator=generator):
            yield start, batch[:, self._columns]
            start += len(batch)


def _select(data: Dataset, columns: tuple[int, ...]) -> Dataset:
    index, schema = list(columns), data.schema
    own = Schema(
        tuple(schema.columns[i] for i in index),
        tuple(schema.kinds[i] for i in index),
        tuple(schema.levels[i] for i in index),
    )
    if data.in_memory:
        return Dataset(own, MemoryRows(data.tensor()[:, index]))
    return Dataset(own, _ColumnRows(data, index))


@dataclass(frozen=True, eq=False)
class Product(Family):
    r"""Components of mixed columns, independent between groups of columns given the component.

    .. math:: p(x \mid k) = \prod_g p_g(x_{\text{columns of } g} \mid k)

    A table with numbers, counts and categories is one product family, each of its groups conjugate
    as its family is. Sites, priors and dimensions carry the name of their group before:
    ``real_loc``, ``priors={"count_components": ...}``.

    Without ``parts`` the kinds of the columns choose them when the model meets the data:
    ``"real"`` columns take the family ``real``, ``"count"`` Poisson, ``"binary"`` Bernoulli, and
    ``"category"`` Categorical.

    References:
        Hunt & Jorgensen (2011). Clustering mixed data.

    Args:
        parts: ``{name: (family, columns)}``, columns by name or number; together all columns, each
            once. Names are identifiers, and none begins with another and an underscore.
        real: Family of the real columns when ``parts`` is None.

    Raises:
        ValueError: Impossible names here; unknown, repeated or left-out columns in :meth:`bind`.

    Example:
        >>> from bayesgen.models import Mixture
        >>> from bayesgen.models.families.gaussian import Gaussian
        >>> parts = {"size": (Gaussian(), ["height", "weight"]), "visits": (Poisson(), ["visits"])}
        >>> Mixture(Product(parts), num_components=3).num_components
        3
    """

    parts: Mapping[str, tuple[Family, Columns]] | None = None
    real: Family = field(default_factory=Gaussian)
    bound: tuple[Part, ...] = ()
    num_columns: int = 0

    def __post_init__(self) -> None:
        names = [] if self.parts is None else list(self.parts)
        if self.parts is not None and not names:
            raise ValueError("Product: parts is empty; give at least one, or leave it out.")
        for name in names:
            clash = [other for other in names if other.startswith(f"{name}_")]
            if not name.isidentifier() or clash:
                raise ValueError(
                    f"Product: {name!r} cannot name a part: names are letters, digits and "
                    f"underscores, and none is another and an underscore and more. Got {names}."
                )

    @classmethod
    def from_schema(cls, schema: Schema, *, real: Family | None = None) -> Self:
        """The product that the kinds of the columns ask for.

        Args:
            schema: Of the data.
            real: Family of the real columns; default Gaussian with full covariance.
        """
        families = _families(Gaussian() if real is None else real)
        return cls(
            {
                kind: (family, [i for i, own in enumerate(schema.kinds) if own == kind])
                for kind, family in families.items()
                if kind in schema.kinds
            }
        )

    # ------------------------------------------------------------ description
    def bind(self, data: Dataset, num_components: int, priors: Mapping[str, Any]) -> Self:
        parts = self.parts
        if parts is None:
            parts = type(self).from_schema(data.schema, real=self.real).parts
        assert parts is not None
        owners = {name: self._numbers(data, columns) for name, (_, columns) in parts.items()}
        _check_partition(data, owners)
        known = {
            f"{name}_{key}" for name, (family, _) in parts.items() for key in family.prior_sites
        }
        for key in priors:
            if key not in known:
                raise ValueError(
                    f"priors names {key!r}, but no column of the data is of that kind; known are "
                    f"{', '.join(sorted(known))}."
                )
        bound = tuple(
            Part(
                name,
                family.bind(_select(data, owners[name]), num_components, part_of(priors, name)),
                owners[name],
            )
            for name, (family, _) in parts.items()
        )
        return replace(self, bound=bound, num_columns=data.num_columns)

    @staticmethod
    def _numbers(data: Dataset, columns: Columns) -> tuple[int, ...]:
        where = {name: i for i, name in enumerate(data.columns)}
        for column in columns:
            if column not in (range(len(where)) if isinstance(column, int) else where):
                raise ValueError(
                    f"Product: there is no column {column!r}; the data have "
                    f"{', '.join(data.columns[:8])}."
                )
        return tuple(c if isinstance(c, int) else where[c] for c in columns)

    def describe(self) -> str:
        if self.bound:
            own = [f"{part.name}: {part.family.describe()}" for part in self.bound]
        elif self.parts is not None:
            own = [f"{name}: {family.describe()}" for name, (family, _) in self.parts.items()]
        else:
            own = ["by the kinds of the columns"]
        return f"Product ({'; '.join(own)})"

    @property
    def _own(self) -> tuple[Part, ...]:
        if not self.bound:
            raise ValueError("the model is not bound to data yet: call bind(as_dataset(x)) first.")
        return self.bound

    @property
    def block(self) -> ProductBlock:
        return ProductBlock({part.name: part.family.block for part in self._own})

    @property
    def prior_sites(self) -> tuple[str, ...]:
        if self.bound:
            families = {part.name: part.family for part in self.bound}
        elif self.parts is not None:
            families = {name: family for name, (family, _) in self.parts.items()}
        else:
            families = _families(self.real)
        return tuple(f"{name}_{key}" for name, own in families.items() for key in own.prior_sites)

    @property
    def priors(self) -> dict[str, Any]:
        return merge({part.name: part.family.priors for part in self._own})

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        return self._named_dims({part.name: part.family.dims for part in self._own})

    @property
    def invariant_dims(self) -> dict[str, tuple[str, ...]]:
        return self._named_dims({part.name: part.family.invariant_dims for part in self._own})

    @staticmethod
    def _named_dims(
        parts: Mapping[str, Mapping[str, tuple[str, ...]]],
    ) -> dict[str, tuple[str, ...]]:
        return {
            f"{name}_{site}": tuple(d if d == "component" else f"{name}_{d}" for d in dims)
            for name, own in parts.items()
            for site, dims in own.items()
        }

    @property
    def row_size(self) -> int:
        return sum(part.family.row_size for part in self._own)

    def to_config(self) -> dict[str, Any]:
        return {
            "num_columns": self.num_columns,
            "parts": [
                {
                    "name": part.name,
                    "columns": list(part.columns),
                    "family": type(part.family).__name__,
                    "family_config": part.family.to_config(),
                }
                for part in self._own
            ],
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], priors: Mapping[str, Any]) -> Self:
        bound = tuple(
            Part(
                item["name"],
                family_class(item["family"]).from_config(
                    item["family_config"], part_of(priors, item["name"])
                ),
                tuple(item["columns"]),
            )
            for item in config["parts"]
        )
        parts = {part.name: (part.family, part.columns) for part in bound}
        return cls(parts, bound=bound, num_columns=config["num_columns"])

    def coords(self) -> dict[str, list[Any]]:
        return merge({part.name: part.family.coords() for part in self._own})

    @property
    def device(self) -> torch.device:
        return self._own[0].family.device

    def to(self, device: torch.device) -> Self:
        bound = tuple(part._replace(family=part.family.to(device)) for part in self._own)
        return replace(self, bound=bound)

    def invariants(self, weights: Tensor, values: Tensors) -> dict[str, Tensor]:
        return merge(
            {
                part.name: part.family.invariants(weights, part_of(values, part.name))
                for part in self._own
            }
        )

    # ------------------------------------------------------------ data -> scores -> statistics
    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.num_columns:
            raise ValueError(
                f"the rows have {x.shape[1]} columns, but the model has {self.num_columns}."
            )
        return x

    def observe(self, x: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        x = self._checked(x)
        return tuple(part.family.observe(part.of(x), dtype) for part in self._own)

    def collapsed(self, values: Tensors) -> Tensor:
        parts = [part.family.collapsed(part_of(values, part.name)) for part in self._own]
        return torch.stack(parts).any(0)

    def collapsible(self, observed: tuple[Any, ...]) -> bool:
        pairs = zip(self._own, observed, strict=True)
        return all(part.family.collapsible(own) for part, own in pairs)

    def evaluate(self, observed: tuple[Any, ...], message: Tensors) -> Evaluation:
        evaluations = tuple(
            part.family.evaluate(own, part_of(message, part.name))
            for part, own in zip(self._own, observed, strict=True)
        )
        scores = evaluations[0].scores
        for evaluation in evaluations[1:]:
            scores = scores + evaluation.scores
        return Evaluation(scores, None, evaluations)

    def statistics(
        self,
        observed: tuple[Any, ...],
        responsibilities: Tensor,
        evaluation: Evaluation | None,
        message: Tensors | None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        return merge(
            {
                part.name: part.family.statistics(
                    own,
                    responsibilities,
                    None if evaluation is None else evaluation.parts[i],
                    None if message is None else part_of(message, part.name),
                    generator=generator,
                )
                for i, (part, own) in enumerate(zip(self._own, observed, strict=True))
            }
        )

    def inner(self, message: Tensors, statistics: Tensors) -> Tensor:
        parts = [
            part.family.inner(part_of(message, part.name), part_of(statistics, part.name))
            for part in self._own
        ]
        return torch.stack(parts).sum(0)

    def rows(self, statistics: Tensors) -> Tensor:
        first = self._own[0]
        return first.family.rows(part_of(statistics, first.name))

    def embed(self, x: Tensor) -> Tensor:
        x = self._checked(x)
        return torch.cat([part.family.embed(part.of(x)) for part in self._own], dim=-1)

    # ------------------------------------------------------------ densities and draws
    def export(self, values: Tensors) -> dict[str, Tensor]:
        return merge(
            {part.name: part.family.export(part_of(values, part.name)) for part in self._own}
        )

    def log_prob(self, x: Tensor, values: Tensors) -> Tensor:
        x = self._checked(x)
        parts = [
            part.family.log_prob(part.of(x), part_of(values, part.name)) for part in self._own
        ]
        return torch.stack(parts).sum(0)

    def log_predictive(self, x: Tensor, posterior: Tensors) -> Tensor | None:
        x, total = self._checked(x), None
        for part in self._own:
            own = part.family.log_predictive(part.of(x), part_of(posterior, part.name))
            if own is None:
                return None
            total = own if total is None else total + own
        return total

    def conditional(
        self, x: Tensor, observed: Tensor, values: Tensors
    ) -> torch.distributions.Distribution:
        place = (~observed).long().cumsum(0) - 1
        parts, positions = [], []
        for part in self._own:
            own = observed[list(part.columns)]
            if bool(own.all()):
                continue
            parts.append(part.family.conditional(part.of(x), own, part_of(values, part.name)))
            positions.append(place[list(part.columns)][~own])
        return JointColumns(parts, positions)

    def draw(self, values: Tensors, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        rows = torch.empty(
            (len(labels), self.num_columns), dtype=torch.float64, device=labels.device
        )
        for part in self._own:
            own = part_of(values, part.name)
            drawn = part.family.draw(own, labels, generator=generator)
            rows[:, list(part.columns)] = drawn.to(rows.dtype)
        return rows

    # ------------------------------------------------------------ the Pyro program
    def program(self, plate: Any, prefix: str = "") -> dict[str, Tensor]:
        return merge(
            {part.name: part.family.program(plate, f"{prefix}{part.name}_") for part in self._own}
        )


def _families(real: Family) -> dict[str, Family]:
    """The family of each kind of column."""
    return {"real": real, "count": Poisson(), "binary": Bernoulli(), "category": Categorical()}


def _check_partition(data: Dataset, owners: Mapping[str, tuple[int, ...]]) -> None:
    """Every column belongs to one part."""
    owner: dict[int, str] = {}
    for name, columns in owners.items():
        if not columns:
            raise ValueError(f"Product: the part {name!r} has no columns; drop it.")
        for column in columns:
            if column in owner:
                raise ValueError(
                    f"Product: column {data.columns[column]!r} is in the parts {owner[column]!r} "
                    f"and {name!r}; give it to one."
                )
            owner[column] = name
    left = [name for i, name in enumerate(data.columns) if i not in owner]
    if left:
        raise ValueError(
            f"Product: no part has the column{'s' * (len(left) > 1)} {', '.join(left[:8])}; give "
            "each to a part, or leave them out of the data."
        )
