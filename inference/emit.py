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


class Unsupported(Exception):
    """The graph holds what the generator has no rule for; another back end takes it."""


class _Flush(Exception):
    """The loop being built must end first: a value of it is read at another index."""


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
    """A loop under construction."""

    shape: tuple[int, ...]
    index: Index
    head: list[str] = field(default_factory=list)
    body: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class _Store:
    """A write that is kept if anything reads the buffer later."""

    buffer: int
    text: str


class Emitter:
    """Collects constants, buffers and statements of one function."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.group: _Group | None = None
        self.sizes: dict[int, int] = {}
        self.used: set[int] = set()
        self.numbers: list[Tensor] = []
        self.num_numbers = 0
        self.integers: list[Tensor] = []
        self.num_integers = 0
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
        )

    def blobs(self) -> tuple[Tensor, Tensor]:
        """Numbers and integers that the function is called with."""
        none = torch.zeros(1, dtype=torch.float64)
        numbers = torch.cat([v.cpu() for v in self.numbers] or [none])
        integers = torch.cat([v.cpu() for v in self.integers] or [none.to(torch.int64)])
        return numbers, integers

    # ------------------------------------------------------------ loops
    def flush(self) -> None:
        """End the loop under construction."""
        group, self.group = self.group, None
        if group is None:
            return
        self.lines += group.head
        self.lines += _nested(group.index, group.shape, group.body)

    def _join(self, shape: tuple[int, ...]) -> _Group:
        if self.group is None or self.group.shape != shape:
            self.flush()
            index = tuple(0 if n == 1 else self.name("i") for n in shape)
            self.group = _Group(shape, index)
        return self.group

    def _attempt(self, generate: Callable[[], Any]) -> Any:
        try:
            return generate()
        except _Flush:
            self.flush()
            return generate()

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
        buffer = self._buffer(math.prod(shape))
        name, strides = self.name("t"), contiguous(shape)

        def build() -> tuple[_Group, list[Any], str]:
            group, body = self._join(shape), list[Any]()
            return group, body, generate(group.index, body)

        found: tuple[_Group, list[Any], str] = self._attempt(build)
        group, body, expression = found
        group.body += [*body, f"const {kind} {name} = {expression};"]
        where = linear_index(group.index, strides)
        group.body.append(_Store(buffer, f"{self._at(buffer, kind, where)} = {name};"))

        def at(index: Index) -> str:
            if self.group is group:
                if index == group.index:
                    return name
                raise _Flush
            return self.read(buffer, kind, linear_index(index, strides))

        def linear(term: Term) -> str:
            if self.group is group:
                raise _Flush
            return self.read(buffer, kind, term)

        def place() -> tuple[str, tuple[int, ...]]:
            if self.group is group:
                raise _Flush
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

    def total(self, shape: tuple[int, ...], value: Value) -> Callable[[Index], str]:
        """The sum of all entries, taken in the loop that computes them."""
        name = self.name("a")

        def build() -> tuple[_Group, str]:
            group = self._join(shape)
            return group, value.at(group.index)

        group, expression = self._attempt(build)
        group.head.append(f"V {name} = zero();")
        group.body.append(f"{name} += {expression};")

        def at(index: Index) -> str:
            if self.group is group:
                raise _Flush
            return name

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
        self, shape: tuple[int, ...], kind: str, write: Callable[[Callable[..., str]], list[Any]]
    ) -> Value:
        """A buffer filled by statements of one's own; the loop before them ends first."""
        if kind == "I":
            raise Unsupported("integers that depend on the parameters")
        self.flush()
        buffer, strides = self._buffer(math.prod(shape)), contiguous(shape)

        def entry(index: Index) -> str:
            return self.read(buffer, kind, linear_index(index, strides))

        self.lines += write(entry)

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

    def loops(self, shape: Sequence[int], body: Callable[[Index], list[Any]]) -> list[Any]:
        """Statements for every index."""
        index = tuple(0 if n == 1 else self.name("i") for n in shape)
        return _nested(index, shape, body(index))

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


def _nested(index: Index, shape: Sequence[int], body: list[Any]) -> list[Any]:
    head = [
        f"for (long {i} = 0; {i} < {n}; {i}++) {{"
        for i, n in zip(index, shape, strict=True)
        if isinstance(i, str)
    ]
    return [*head, *body, "}" * len(head)] if head else ["{", *body, "}"]
