"""C++ loops from tensor expressions: the part of the code generator that knows no operator.

A value is a function from an index to a C++ expression. Values of one shape that follow each other
are computed in one loop; what no later loop reads is never written to memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Emitter", "Unsupported", "Value", "add", "linear_index", "literal", "mul"]

Term = int | str
Index = tuple[Term, ...]
Generator = Callable[[Index, list[Any]], str]
_LONG, _BESIDE = 12, 64  # rows that make a loop, and numbers of a row that are kept at hand
_UNROLLED = 8


class Unsupported(Exception):
    """The graph holds what the generator has no rule for; another back end takes it."""


class _Flush(Exception):
    """A loop being built must end first: a value of it is read at another index."""

    def __init__(self, group: _Group) -> None:
        super().__init__()
        self.group = group


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor, entry by entry.

    Args:
        shape: Its shape, chains apart.
        kind: ``V`` numbers by chain, ``M`` truths by chain, ``I`` integers that all chains share.
        at: The C++ expression of the entry at an index.
        linear: The same by position in row-major order, where that needs no division.
        cost: Operations that computing one entry repeats; 0 for what is only read.
        place: The pointer and the strides of what lies in memory.
        shared: Whether all chains share the numbers, so that ``place`` points to single doubles.
        still: Dimensions along which nothing changes: computed once.
        is_zero: Whether it is known to be zero everywhere.
    """

    shape: tuple[int, ...]
    kind: str
    at: Callable[[Index], str]
    linear: Callable[[Term], str] | None = None
    cost: int = 0
    place: Callable[[], tuple[str, tuple[int, ...]]] | None = None
    shared: bool = False
    still: frozenset[int] = frozenset()
    is_zero: bool = False
    known: Tensor | None = None
    """The integers themselves, where they are constants."""

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


# ---------------------------------------------------------------- index arithmetic
def add(left: Term, right: Term) -> Term:
    """The sum of two index terms."""
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    if left == 0:
        return right
    if right == 0:
        return left
    return f"({left}+{right})"


def mul(term: Term, factor: int) -> Term:
    """An index term times a number."""
    if isinstance(term, int):
        return term * factor
    if factor == 1:
        return term
    return 0 if factor == 0 else f"({term})*{factor}"


def linear_index(index: Index, strides: Sequence[int], offset: int = 0) -> Term:
    """Position in memory."""
    total: Term = offset
    for term, stride in zip(index, strides, strict=True):
        total = add(total, mul(term, stride))
    return total


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def literal(number: float | int | bool) -> str:
    """A C++ double, exactly."""
    value = float(number)
    if math.isnan(value):
        return '__builtin_nan("")'
    if math.isinf(value):
        return "__builtin_inf()" if value > 0 else "-__builtin_inf()"
    return value.hex() if value >= 0 else f"({value.hex()})"


@dataclass(eq=False)
class _Group:
    """A loop under construction: over every entry of a shape, or over rows of a number."""

    key: tuple[int, ...]
    index: Index
    head: list[str] = field(default_factory=list)
    body: list[Any] = field(default_factory=list)


def _long_axis(shape: Sequence[int]) -> int | None:
    """The dimension that a loop over rows runs along, where the others are few."""
    size = max(shape, default=0)
    if size < _LONG or math.prod(shape) > _BESIDE * size or list(shape).count(size) > 1:
        return None
    return list(shape).index(size)


def _others(items: Sequence[Any], axis: int) -> tuple[Any, ...]:
    return (*items[:axis], *items[axis + 1 :])


@dataclass(frozen=True)
class _Store:
    """A write that is kept if anything reads the buffer later."""

    buffer: int
    text: str


class Emitter:
    """Collects constants, buffers and statements of one function."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.open: dict[str, _Group] = {}
        """Loops being built: over the entries of small tensors, and over rows of large ones."""
        self.sizes: dict[int, int] = {}
        self.used: set[int] = set()
        self.numbers: list[Tensor] = []
        self.num_numbers = 0
        self.integers: list[Tensor] = []
        self.num_integers = 0
        self.softmax: dict[int, tuple[Value, Value, Value, tuple[int, ...]]] = {}
        """Of a log-sum-exp: itself, the exponentials, their sum, over which dimensions."""
        self._names = 0

    def name(self, prefix: str) -> str:
        """A name not used before."""
        self._names += 1
        return f"{prefix}{self._names}"

    # ------------------------------------------------------------ constants
    def constant(self, tensor: Tensor) -> Value:
        """A value that all chains share."""
        tensor = tensor.detach()
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        small = tensor
        for k, stride in enumerate(strides):
            if stride == 0 and shape[k] > 1:
                small = small.narrow(k, 0, 1)
        small = small.contiguous()
        steps = tuple(
            0 if shape[k] > 1 and strides[k] == 0 else s
            for k, s in enumerate(contiguous(small.shape))
        )
        floating = tensor.is_floating_point()
        if floating and tensor.dtype != torch.float64:
            raise Unsupported(f"numbers of {tensor.dtype}")
        if tensor.is_complex():
            raise Unsupported("complex numbers")
        if floating:
            base, array = self.num_numbers, "C"
            self.numbers.append(small.reshape(-1))
            self.num_numbers += small.numel()
        else:
            base, array = self.num_integers, "J"
            self.integers.append(small.reshape(-1).to(torch.int64))
            self.num_integers += small.numel()
        kind = "V" if floating else "M" if tensor.dtype == torch.bool else "I"
        wrap = {"V": "all({})", "M": "truth({})", "I": "{}"}[kind]

        def at(index: Index) -> str:
            return wrap.format(f"{array}[{linear_index(index, steps, base)}]")

        is_plain = steps == contiguous(shape)
        return Value(
            shape,
            kind,
            at,
            (lambda term: wrap.format(f"{array}[{add(base, term)}]")) if is_plain else None,
            place=(lambda: (f"(C+{base})", steps)) if floating else None,
            shared=True,
            still=frozenset(k for k, step in enumerate(steps) if step == 0 and shape[k] > 1),
            is_zero=small.numel() == 1 and not bool(small.any()),
            known=tensor if kind == "I" else None,
        )

    def blobs(self) -> tuple[Tensor, Tensor]:
        """Numbers and integers that the function is called with."""
        none = torch.zeros(1, dtype=torch.float64)
        numbers = torch.cat([v.cpu() for v in self.numbers] or [none])
        integers = torch.cat([v.cpu() for v in self.integers] or [none.to(torch.int64)])
        return numbers, integers

    # ------------------------------------------------------------ loops
    def flush(self) -> None:
        """End the loops being built; neither reads what the other computes."""
        for group in list(self.open.values()):
            self._end(group)

    def _end(self, group: _Group) -> None:
        self.open = {kind: g for kind, g in self.open.items() if g is not group}
        self.lines += group.head
        self.lines += _nested(group.index, group.key, group.body)

    def _is_open(self, group: _Group) -> bool:
        return any(g is group for g in self.open.values())

    def _join(self, kind: str, key: tuple[int, ...]) -> _Group:
        group = self.open.get(kind)
        if group is None or group.key != key:
            if group is not None:
                self._end(group)
            index = tuple(0 if n == 1 else self.name("i") for n in key)
            group = self.open[kind] = _Group(key, index)
        return group

    def _attempt(self, generate: Callable[[], Any]) -> Any:
        while True:
            try:
                return generate()
            except _Flush as must:
                self._end(must.group)

    def realise(
        self,
        shape: tuple[int, ...],
        kind: str,
        generate: Generator,
        still: frozenset[int] = frozenset(),
    ) -> Value:
        """Compute every entry now; ``generate`` gives statements and an expression at an index."""
        if kind == "I":
            raise Unsupported("integers that depend on the parameters")
        if any(shape[k] > 1 for k in still):
            small = tuple(1 if k in still else n for k, n in enumerate(shape))
            return _widened(self.realise(small, kind, generate), shape)
        if math.prod(shape) == 1:
            return self._scalar(shape, kind, generate)
        axis = _long_axis(shape)
        if axis is not None:
            return self._rows(
                shape,
                kind,
                axis,
                lambda entry, fixed: self.loops(
                    shape, lambda index: _assigned(entry(index), generate, index), fixed
                ),
            )
        buffer = self._buffer(math.prod(shape))
        name, strides = self.name("t"), contiguous(shape)

        def build() -> tuple[_Group, list[Any], str]:
            group, body = self._join("entries", shape), list[Any]()
            return group, body, generate(group.index, body)

        found: tuple[_Group, list[Any], str] = self._attempt(build)
        group, body, expression = found
        group.body += [*body, f"const {kind} {name} = {expression};"]
        where = linear_index(group.index, strides)
        group.body.append(_Store(buffer, f"{self._at(buffer, kind, where)} = {name};"))
        return self._member(
            group, shape, kind, buffer, lambda index: name if index == group.index else None
        )

    def _rows(
        self,
        shape: tuple[int, ...],
        kind: str,
        axis: int,
        write: Callable[[Callable[[Index], str], dict[int, Term]], list[Any]],
    ) -> Value:
        """Statements for one row, in a loop over rows; its numbers lie in a small array."""
        name, small = self.name("t"), contiguous(_others(shape, axis))
        buffer, strides = self._buffer(math.prod(shape)), contiguous(shape)

        def local(index: Index) -> str:
            return f"{name}[{linear_index(_others(index, axis), small)}]"

        def build() -> tuple[_Group, list[Any]]:
            group = self._join("rows", (shape[axis],))
            return group, write(local, {axis: group.index[0]})

        found: tuple[_Group, list[Any]] = self._attempt(build)
        group, lines = found
        row = group.index[0]
        group.body += [f"{kind} {name}[{math.prod(shape) // shape[axis]}];", *lines]
        stores = self.loops(
            shape,
            lambda index: [
                f"{self._at(buffer, kind, linear_index(index, strides))} = {local(index)};"
            ],
            {axis: row},
        )
        group.body += [_Store(buffer, line) for line in stores]
        return self._member(
            group, shape, kind, buffer, lambda index: local(index) if index[axis] == row else None
        )

    def _member(
        self,
        group: _Group,
        shape: tuple[int, ...],
        kind: str,
        buffer: int,
        now: Callable[[Index], str | None],
    ) -> Value:
        """A value of a loop: read at hand while that is being built, from memory afterwards."""
        strides = contiguous(shape)

        def check() -> None:
            if self._is_open(group):
                raise _Flush(group)

        def at(index: Index) -> str:
            if self._is_open(group):
                found = now(index)
                if found is not None:
                    return found
            check()
            return self.read(buffer, kind, linear_index(index, strides))

        def linear(term: Term) -> str:
            check()
            return self.read(buffer, kind, term)

        def place() -> tuple[str, tuple[int, ...]]:
            check()
            self.used.add(buffer)
            return f"b{buffer}", strides

        return Value(shape, kind, at, linear, place=place if kind == "V" else None)

    def _scalar(self, shape: tuple[int, ...], kind: str, generate: Generator) -> Value:
        zeros, name = (0,) * len(shape), self.name("s")

        def build() -> tuple[list[Any], str]:
            body: list[Any] = []
            return body, generate(zeros, body)

        body, expression = self._attempt(build)
        self.lines += [*body, f"const {kind} {name} = {expression};"]
        place = (lambda: (f"(&{name})", zeros)) if kind == "V" else None
        return Value(shape, kind, lambda index: name, lambda term: name, place=place)

    def total(self, value: Value, dims: Sequence[int]) -> Callable[[Index], str] | None:
        """The sum over ``dims``, taken in the loop that computes the entries.

        Returns:
            The sum at an index of the other dimensions; None where no such loop is to be had.
        """
        axis, shape = _long_axis(value.shape), value.shape
        kept = [k for k in range(len(shape)) if k not in dims]
        if axis is None or axis in kept:
            if kept or axis is not None:
                return None
        name, strides = self.name("a"), contiguous([shape[k] for k in kept])
        count = math.prod(shape[k] for k in kept)

        def build() -> tuple[_Group, list[Any]]:
            if axis is None:
                group = self._join("entries", shape)
                return group, [f"{name}[0] += {value.at(group.index)};"]
            group = self._join("rows", (shape[axis],))

            def step(index: Index) -> list[Any]:
                place = linear_index(tuple(index[k] for k in kept), strides)
                return [f"{name}[{place}] += {value.at(index)};"]

            return group, self.loops(shape, step, {axis: group.index[0]})

        found: tuple[_Group, list[Any]] = self._attempt(build)
        group, lines = found
        group.head += [
            f"V {name}[{count}];",
            f"for (long k = 0; k < {count}; k++) {name}[k] = zero();",
        ]
        group.body += lines

        def at(index: Index) -> str:
            if self._is_open(group):
                raise _Flush(group)
            return f"{name}[{linear_index(index, strides)}]"

        return at

    # ------------------------------------------------------------ buffers
    def _buffer(self, size: int) -> int:
        number = len(self.sizes)
        self.sizes[number] = size
        return number

    def _at(self, buffer: int, kind: str, where: Term) -> str:
        return f"b{buffer}[{where}]" if kind == "V" else f"((M*)b{buffer})[{where}]"

    def read(self, buffer: int, kind: str, where: Term) -> str:
        """An entry of a buffer."""
        self.used.add(buffer)
        return self._at(buffer, kind, where)

    def written(
        self,
        shape: tuple[int, ...],
        kind: str,
        write: Callable[[Callable[[Index], str], dict[int, Term]], list[Any]],
        parallel: Sequence[int] = (),
    ) -> Value:
        """A buffer filled by statements of one's own.

        Args:
            shape: Of the result.
            kind: Of its entries.
            write: From the text of an entry, and the index terms that are given from outside, to
                the statements.
            parallel: Dimensions along which nothing is read but at the same index: one of them may
                be given.
        """
        if kind == "I":
            raise Unsupported("integers that depend on the parameters")
        axis = _long_axis(shape)
        if axis is not None and axis in parallel:
            return self._rows(shape, kind, axis, write)
        buffer, strides = self._buffer(math.prod(shape)), contiguous(shape)

        def entry(index: Index) -> str:
            return self.read(buffer, kind, linear_index(index, strides))

        self.lines += self._attempt(lambda: write(entry, {}))

        def place() -> tuple[str, tuple[int, ...]]:
            self.used.add(buffer)
            return f"b{buffer}", strides

        return Value(
            shape,
            kind,
            entry,
            lambda term: self.read(buffer, kind, term),
            place=place if kind == "V" else None,
        )

    def settle(self, value: Value) -> Value:
        """The value, computed once, if reading an entry costs something."""
        if value.cost == 0:
            return value
        return self.realise(
            value.shape, value.kind, lambda index, body: value.at(index), value.still
        )

    def pointer(self, value: Value) -> tuple[str, tuple[int, ...]]:
        """Where the value lies in memory, and its strides."""
        if value.place is None:
            value = self.realise(value.shape, "V", lambda index, body: value.at(index))
        assert value.place is not None
        found: tuple[str, tuple[int, ...]] = self._attempt(value.place)
        return found

    def loops(
        self,
        shape: Sequence[int],
        body: Callable[[Index], list[Any]],
        fixed: dict[int, Term] | None = None,
    ) -> list[Any]:
        """Statements for every index; of ``fixed`` dimensions, for the given one."""
        given = fixed or {}
        index = tuple(
            given[k] if k in given else 0 if n == 1 else self.name("i")
            for k, n in enumerate(shape)
        )
        run = tuple(0 if k in given else i for k, i in enumerate(index))
        return _nested(run, shape, body(index))

    # ------------------------------------------------------------ the text
    def text(self) -> tuple[str, int]:
        """The statements, and the number of vectors of memory they need."""
        self.flush()
        at, head = 0, []
        for buffer in sorted(self.used):
            head.append(f"V* const b{buffer} = w + {at};")
            at += self.sizes[buffer]
        lines = [
            line.text if isinstance(line, _Store) else line
            for line in self.lines
            if not isinstance(line, _Store) or line.buffer in self.used
        ]
        return "\n".join([*head, *lines]), at


def _widened(value: Value, shape: tuple[int, ...]) -> Value:
    """A value repeated along dimensions of size one."""
    source = value.place

    def place() -> tuple[str, tuple[int, ...]]:
        assert source is not None
        pointer, strides = source()
        return pointer, tuple(
            0 if n == 1 else s for n, s in zip(value.shape, strides, strict=True)
        )

    return Value(
        shape,
        value.kind,
        lambda index: value.at(
            tuple(0 if n == 1 else i for i, n in zip(index, value.shape, strict=True))
        ),
        place=place if source is not None else None,
        still=frozenset(k for k, n in enumerate(shape) if value.shape[k] == 1 and n > 1),
    )


def _assigned(entry: str, generate: Generator, index: Index) -> list[Any]:
    body: list[Any] = []
    expression = generate(index, body)
    return [*body, f"{entry} = {expression};"]


def _nested(index: Index, shape: Sequence[int], body: list[Any]) -> list[Any]:
    head: list[Any] = []
    for i, n in zip(index, shape, strict=True):
        if isinstance(i, str):
            if n <= _UNROLLED:
                head.append(f"#pragma GCC unroll {n}")
            head.append(f"for (long {i} = 0; {i} < {n}; {i}++) {{")
    count = sum(isinstance(i, str) for i in index)
    return [*head, *body, "}" * count] if count else ["{", *body, "}"]
