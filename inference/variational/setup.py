"""What a run of stochastic variational inference works on: data cut up, guide made, pair met."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Conjugate, Guided, Program
from bayesgen.data import Dataset
from bayesgen.gaps import imputing
from bayesgen.inference.programs.call import Call
from bayesgen.inference.programs.complaints import ProgramError, explained
from bayesgen.inference.programs.flat import starting_in_the_support
from bayesgen.inference.programs.precision import in_one_dtype
from bayesgen.inference.programs.sites import Checked, quietly
from bayesgen.inference.programs.start import conjugate_values
from bayesgen.inference.variational.guides import is_automatic, make_guide
from bayesgen.inference.variational.minibatch import Order, Stream
from bayesgen.inference.variational.objectives import Traces
from bayesgen.inference.variational.pair import Pair, Plate, meet
from bayesgen.inference.variational.step import Feed

__all__ = ["Setup", "Source", "from_function", "from_model", "make_setup", "model_setup"]

_STARTS = 5


class Source(NamedTuple):
    """A program with its data, before it is run."""

    model: Callable[..., Any]
    call: Call
    guide: Any
    extra: Mapping[str, Any]
    stream: Stream | None
    batch_size: int | None
    """None where every step sees all rows."""


class Setup(NamedTuple):
    """A program, its guide and its data, ready to be traced."""

    pair: Pair
    feed: Feed
    orders: tuple[Order, ...]
    stream: Stream | None

    def example(self) -> tuple[Tensor, ...]:
        """Tensors and indices of one minibatch."""
        rows = [torch.arange(o.batch_size, device=o.device) for o in self.orders]
        return self.feed.batch(rows, self.pair.call.tensors)


def from_model(
    model: Any,
    data: Dataset,
    guide: Any,
    batch_size: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Source:
    """The program of a bound model on the rows of a data set."""
    if batch_size is not None:
        batch_size = _checked(batch_size, data.num_rows)
    elif not data.in_memory:
        raise ValueError(
            f"SVI: the {data.num_rows} rows stream from disk and are not read at once; give "
            "batch_size, such as 1024."
        )
    stream = None
    if data.in_memory:
        rows = data.tensor(dtype, device)
    else:
        stream = Stream(data, batch_size or data.num_rows, dtype, device)
        rows = next(data.batches(stream.batch_size, dtype=dtype, device=device))
    if guide is None:
        guide = model.guide if isinstance(model, Guided) else "AutoNormal"
    call = Call.of((rows,), {})
    extra = {"num_rows": data.num_rows}
    return Source(model.model, call, guide, extra, stream, batch_size)


def from_function(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    guide: Any,
    batch_size: int | None,
) -> Source:
    """A plain function with what it is called with."""
    call = Call.of(args, kwargs)
    extra: dict[str, Any] = {}
    if batch_size is not None:
        if call.num_rows == 0:
            raise ValueError("SVI: batch_size needs data with rows: pass tensors or arrays.")
        batch_size = _checked(batch_size, call.num_rows)
        names = inspect.signature(function).parameters
        if "num_rows" in names and "num_rows" not in kwargs:
            extra["num_rows"] = call.num_rows
    return Source(function, call, guide or "AutoNormal", extra, None, batch_size)


def _checked(batch_size: int, num_rows: int) -> int | None:
    """None where a batch holds all rows."""
    return None if batch_size >= num_rows else batch_size


def model_setup(
    model: Any,
    data: Dataset,
    guide: Any,
    batch_size: int | None,
    *,
    objective: str,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Setup:
    """:func:`from_model` and :func:`make_setup`; a conjugate model says where the guide begins."""
    source = from_model(model, data, guide, batch_size, dtype, generator.device)
    start = conjugate_start(model, data, dtype, generator)
    return make_setup(source, objective=objective, dtype=dtype, start=start, generator=generator)


def make_setup(
    source: Source,
    *,
    objective: str,
    dtype: torch.dtype,
    start: Mapping[str, Tensor] | None,
    generator: torch.Generator,
) -> Setup:
    """Make the guide, run both once, and decide which rows each plate is told.

    Raises:
        ValueError: A program and a guide that do not fit together or lack a plate for the data.
    """
    call, size = source.call, source.batch_size
    tensors = call.tensors
    cut = size is not None and source.stream is None
    if cut and size is not None:
        tensors = call.rows(torch.arange(size, device=generator.device))
    model = imputing(source.model, latents=is_automatic(source.guide))
    source = source._replace(model=model)
    discrete = _discrete(source, call, tensors, dtype, generator)
    guide = make_guide(source.guide, source.model, discrete, start, dtype)
    pair = meet(
        source.model,
        guide,
        call,
        tensors,
        objective=objective,
        dtype=dtype,
        generator=generator,
        extra=source.extra,
        plates=_random_plates,
    )
    device, orders, places = generator.device, [], []
    if size is not None:
        _check_scaled(pair.traces, size, call.num_rows)
    if cut and size is not None:
        orders.append(Order(call.num_rows, size, device))
    for plate in pair.plates:
        same = bool(orders) and cut and plate[1:] == (call.num_rows, size)
        if not same:
            orders.append(Order(plate.size, plate.batch_size, device))
        places.append(0 if same else len(orders) - 1)
    rows = tuple(cut and row for row in call.rowwise)
    if source.stream is not None:
        rows = tuple(True for _ in rows)
    shift = source.stream is not None
    feed = Feed(rows, tuple(p + shift for p in places), len(orders) + shift)
    return Setup(pair, feed, tuple(orders), source.stream)


def _discrete(
    source: Source,
    call: Call,
    tensors: tuple[Tensor, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> list[str]:
    """Latents of the model that can be summed out."""
    args, kwargs = call.arguments(tensors)
    kwargs |= source.extra
    with rng.fork(generator), quietly(dtype, validate=True), explained(), torch.no_grad():
        with Checked(), in_one_dtype(dtype), starting_in_the_support():
            nodes = poutine.trace(source.model).get_trace(*args, **kwargs).nodes
    return [
        name
        for name, node in nodes.items()
        if node["type"] == "sample"
        and not node["is_observed"]
        and not poutine.util.site_is_subsample(node)
        and getattr(node["fn"], "has_enumerate_support", False)
    ]


def _random_plates(traces: Traces) -> tuple[Plate, ...]:
    found: dict[str, Plate] = {}
    for nodes in (traces.model.nodes, traces.guide.nodes):
        for name, node in nodes.items():
            if not poutine.util.site_is_subsample(node):
                continue
            size, part = node["fn"].size, node["fn"].subsample_size
            if part is not None and part < size:
                found.setdefault(name, Plate(name, int(size), int(part)))
    return tuple(found.values())


def _check_scaled(traces: Traces, batch_size: int, num_rows: int) -> None:
    """Minibatches must be scaled to all rows by a plate that knows their number."""
    for node in traces.model.nodes.values():
        if node["type"] != "sample":
            continue
        for frame in node["cond_indep_stack"]:
            if frame.size == batch_size and frame.full_size == num_rows:
                return
    raise ProgramError(
        f"batch_size={batch_size}, but no plate of the model says that its {batch_size} rows "
        f"stand for {num_rows}: let the function take num_rows=None and write "
        "pyro.plate('data', num_rows or len(x), subsample=x)."
    )


def conjugate_start(
    model: Any, data: Dataset, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor] | None:
    """Where a guide of a conjugate model begins: the best of several random assignments."""
    if not (isinstance(model, Conjugate) and isinstance(model, Program) and data.in_memory):
        return None
    rows = data.tensor(dtype, generator.device)
    values = conjugate_values(model, data, _STARTS, generator)
    if values is None:
        return None
    starts = [{k: v[c].to(dtype) for k, v in values.items()} for c in range(_STARTS)]
    heights = []
    with rng.fork(generator), quietly(dtype), torch.no_grad():
        for start in starts:
            conditioned = poutine.condition(model.model, data=start)
            heights.append(float(poutine.trace(conditioned).get_trace(rows).log_prob_sum()))
    return starts[max(range(_STARTS), key=heights.__getitem__)]
