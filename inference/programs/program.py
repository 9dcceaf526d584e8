"""A plain Pyro function, with its data, as a model that a fit can hold."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, Self, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bayesgen.alignment import aligned
from bayesgen.capabilities import Model, Pointwise, Simulated, Tensors
from bayesgen.fingerprint import tensor_bytes
from bayesgen.inference.programs.trace import Density
from bayesgen.prior_replacement import Reprior
from bayesgen.replay import draw_prior, log_priors, simulate
from bayesgen.schema import Schema

__all__ = ["Arguments", "CodeModel", "FunctionModel", "arguments", "labels_of"]


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a Pyro function is called with, in place of a table of rows."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    num_rows: int = 0
    columns: tuple[str, ...] = ()
    program: str = ""
    """Fingerprint of the traced program: a checkpoint belongs to one posterior."""

    @property
    def schema(self) -> Schema:
        """A program's data have no columns."""
        return Schema((), (), ())

    @property
    def in_memory(self) -> bool:
        """Always."""
        return True

    def fingerprint(self) -> str:
        """A hash of every value."""
        digest = hashlib.sha256(self.program.encode())
        for name, value in [*enumerate(self.args), *sorted(self.kwargs.items())]:
            digest.update(repr(name).encode())
            _hash(digest, value)
        return digest.hexdigest()[:32]


def _hash(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            digest.update(repr(key).encode())
            _hash(digest, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _hash(digest, inner)
    elif isinstance(value, np.ndarray):
        digest.update(repr((value.shape, value.tolist())).encode())
    elif isinstance(value, _Table):  # its own text leaves rows out
        _hash(digest, [*_columns(value), np.asarray(value.to_numpy())])
    else:
        digest.update(repr(value).encode())


@runtime_checkable
class _Table(Protocol):
    """A column or a table of pandas or polars."""

    def to_numpy(self) -> Any: ...


def arguments(
    function: Callable[..., Any], data: object, *, dtype: torch.dtype, device: torch.device
) -> Arguments:
    """The call that ``data`` stands for: a tuple of arguments, a dict of named ones, or one value.

    Arrays become tensors, floating ones of ``dtype``; everything else is passed as it is.

    Raises:
        TypeError: The function cannot be called with them.
    """

    def move(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.as_tensor(value)
        if isinstance(value, Tensor):
            return aligned(value.to(device, dtype if value.is_floating_point() else None))
        if isinstance(value, Mapping):
            return {k: move(v) for k, v in value.items()}
        return value

    signature = inspect.signature(function)
    if data is None:
        found = Arguments((), {})
    elif isinstance(data, tuple):
        found = Arguments(tuple(move(v) for v in data), {})
    elif isinstance(data, Mapping) and _names(signature, data):
        found = Arguments((), {str(k): move(v) for k, v in data.items()})
    else:
        found = Arguments((move(data),), {})
    try:
        signature.bind(*found.args, **found.kwargs)
    except TypeError as error:
        raise TypeError(
            f"the program is {getattr(function, '__name__', 'program')}{signature}, but "
            f"run(program, data) "
            f"got data that do not fit: {error}. Pass a tuple for several arguments, a dict for "
            f"named ones, "
            "None for no argument."
        ) from error
    return found


def _names(signature: inspect.Signature, data: Mapping[Any, Any]) -> bool:
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return True
    return bool(data) and set(data) <= set(signature.parameters)


class CodeModel(Model, Simulated, ABC):
    """A model whose description is code of the user's: it holds its data, and is never saved."""

    function: Callable[..., Any]
    density: Any
    """Its :class:`~bayesgen.inference.programs.trace.Density`, which knows its sites."""

    @property
    def name(self) -> str:
        """The function's name."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it was traced."""

    @property
    def priors(self) -> dict[str, str]:
        """Priors that replace the program's own, in words."""
        return self.function.priors if isinstance(self.function, Reprior) else {}

    @property
    def attrs(self) -> dict[str, Any]:
        return {"priors": self.priors} if self.priors else {}

    def bind(self, data: Any) -> Self:
        return self

    def to(self, device: torch.device) -> Self:
        if device != self.device:
            raise ValueError(
                f"a traced program stays where it was traced, on {self.device}; run the engine "
                f"with device={str(device)!r}."
            )
        return self

    @property
    def is_bound(self) -> bool:
        return True

    def to_config(self) -> dict[str, Any]:
        raise ValueError(
            f"a fit of the Pyro function '{self.name}' cannot be saved as a folder: code is "
            f"never written to "
            "disk. Keep its draws with fit.arviz.to_netcdf(path)."
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        raise ValueError("a Pyro function cannot be read from a file.")

    # ------------------------------------------------------------ Simulated
    @property
    def program(self) -> Callable[[], Any]:
        return self.density.layout.run

    def replicate(self, draws: Tensors, *, generator: torch.Generator) -> Tensors:
        layout = self.density.layout
        self._check_observed()
        # local latents that an engine left out are drawn anew
        names = [site.name for site in layout.sites if site.name in draws]
        values = {name: draws[name] for name in names}
        return simulate(
            layout.run,
            values,
            tuple(layout.observed),
            num_runs=len(next(iter(values.values()))),
            generator=generator,
            dtype=layout.dtype,
            seen=layout.seen,
        )

    def prior(self, num_samples: int, *, generator: torch.Generator) -> tuple[Tensors, Tensors]:
        layout = self.density.layout
        return draw_prior(layout.run, num_samples, generator=generator, dtype=layout.dtype)

    def log_prior(self, draws: Tensors) -> Tensors:
        layout = self.density.layout
        names = [site.name for site in layout.sites if site.name in draws]
        values = {name: draws[name] for name in names}
        return log_priors(layout.run, values, dtype=layout.dtype)

    def _check_observed(self) -> None:
        if not self.density.layout.observed:
            raise ValueError(
                f"the program '{self.name}' observes nothing by obs=..., so there are no data to "
                "replicate; a density added by pyro.factor cannot be sampled."
            )


@final
@dataclass(frozen=True, eq=False)
class FunctionModel(CodeModel, Pointwise):
    """A Pyro function with its data: what it can do is what its trace tells.

    Args:
        function: The program.
        density: Its traced log density.
        arguments: What it was called with.
    """

    function: Callable[..., Any]
    density: Density = field(repr=False)
    arguments: Arguments = field(repr=False)

    def __repr__(self) -> str:
        layout = self.density.layout
        sites = ", ".join(f"{s.name}{list(s.shape) if s.shape else ''}" for s in layout.sites)
        lines = [
            f"FunctionModel({self.name}): {self.density.num_params} parameters",
            f"  latent: {sites}",
        ]
        if layout.enumerated:
            lines.append(f"  summed out: {', '.join(layout.enumerated)}")
        if layout.observed:
            lines.append(f"  observed: {', '.join(layout.observed)}")
        lines += [f"  {site} ~ {prior}" for site, prior in self.priors.items()]
        return "\n".join(lines)

    @property
    def device(self) -> torch.device:
        return self.density.layout.device

    @cached_property
    def dims(self) -> Mapping[str, tuple[str, ...]]:
        layout = self.density.layout
        return {**layout.dims, **layout.observed_dims}

    def coords(self) -> Mapping[str, list[Any]]:
        layout = self.density.layout
        sizes: dict[str, int] = {}
        for name, value in self._shapes.items():
            sizes |= dict(zip(self.dims[name], value, strict=True))
        for name, values in layout.observed.items():
            sizes |= dict(zip(layout.observed_dims[name], values.shape, strict=True))
        found = labels_of(
            self.function, self.arguments, layout.observed, layout.observed_dims, sizes
        )
        return found | dict(layout.rows)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        zero = torch.zeros(
            self.density.num_params,
            dtype=self.density.layout.dtype,
            device=self.density.layout.device,
        )
        shapes = {k: tuple(v.shape) for k, v in self.density.constrain(zero).items()}
        return shapes | self.density.layout.enumerated

    # ------------------------------------------------------------ Pointwise
    def log_likelihood(self, draws: Tensors) -> Mapping[str, Tensor]:
        return self.density.log_likelihood(draws)

    @property
    def observed(self) -> Tensors:
        return self.density.layout.observed


def _columns(value: Any) -> list[str]:
    """Names of the columns of a table; none of anything else."""
    return [str(name) for name in getattr(value, "columns", ())]


def _named_arguments(function: Callable[..., Any], call: Arguments) -> dict[str, Any]:
    """Arguments by name; entries of one that is a mapping by theirs."""
    bound = inspect.signature(function).bind(*call.args, **call.kwargs).arguments
    found: dict[str, Any] = {}
    for name, value in bound.items():
        found |= {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}
        found[name] = value
    return found


def labels_of(
    function: Callable[..., Any],
    call: Arguments,
    observed: Tensors,
    dims: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, int],
) -> dict[str, list[Any]]:
    """Labels along every dimension of ``sizes``: those that the data give, else numbers.

    A plate takes the strings of an argument of its own name and size; a dimension ``column`` the
    column names of a data frame of that width, and so does the last one of an observed site whose
    values are the frame's.
    """
    found: dict[str, list[Any]] = {dim: list(range(size)) for dim, size in sizes.items()}
    for name, value in _named_arguments(function, call).items():
        columns = _columns(value) if isinstance(value, _Table) else []
        if sizes.get("column") == len(columns):
            found["column"] = columns
        for site, rows in observed.items():
            if columns and rows.ndim == 2 and np.array_equal(rows.cpu(), value.to_numpy()):
                found[dims[site][-1]] = columns
        if isinstance(value, list | tuple | np.ndarray) and len(value) == sizes.get(name):
            if all(isinstance(label, str) for label in value):
                found[name] = [str(label) for label in value]
    return found


def bound_program(function: Callable[..., Any], call: Arguments) -> Callable[[], Any]:
    """The program without arguments."""

    def run() -> Any:
        return function(*call.args, **call.kwargs)

    return run


def with_density(call: Arguments, density: Density) -> Arguments:
    """The arguments, knowing the number of observed rows and the identity of the program."""
    rows = max((v.shape[0] for v in density.layout.observed.values() if v.ndim), default=0)
    return dataclasses.replace(call, num_rows=rows, program=density.fingerprint())
