"""The one loop of every engine: progress, history, early stop, checkpoints, Ctrl-C, resume."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.alignment import settled
from bayesgen.capabilities import require
from bayesgen.data import Dataset, as_dataset
from bayesgen.fingerprint import tensor_bytes
from bayesgen.inference.checks import check_called
from bayesgen.storage import flatten, read_folder, unflatten, write_folder

if TYPE_CHECKING:
    from bayesgen.fit import Fit

__all__ = ["Callback", "Engine", "Info", "Progress", "Task"]

_CHECKPOINT_SECONDS = 20.0


class Info(NamedTuple):
    """What a person needs to know of one step."""

    values: Mapping[str, float]
    """Live numbers, kept in the fit's history."""
    done: bool = False
    """Whether the engine has converged, or has all its draws."""


class Progress(NamedTuple):
    """What a callback sees after each step."""

    engine: str
    step: int
    max_steps: int
    values: Mapping[str, float]
    seconds: float


Callback = Callable[[Progress], bool | None]
"""Called after each step; returning True stops the run and keeps the work."""


@dataclass(frozen=True, eq=False)
class Task:
    """What one run works on: the bound model, its data, and where randomness comes from."""

    model: Any
    data: Any
    """A :class:`~bayesgen.data.Dataset`, or what a plain program is called with."""
    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype
    program: str = ""
    """Fingerprint of a plain program, which unlike a model has no configuration to compare."""


S = TypeVar("S", bound=NamedTuple)


@dataclass(frozen=True, eq=False)
class Engine(ABC, Generic[S]):
    """An inference engine: settings, and pure ``init`` / ``step`` functions.

    ``State`` is what the next step needs (nested dicts of tensors and numbers, so that it can be
    written to disk); ``Info`` is what a person needs. The loop owns time, history and checkpoints.
    """

    @property
    @abstractmethod
    def max_steps(self) -> int:
        """Steps after which the loop ends in any case."""

    @abstractmethod
    def prepare(self, task: Task) -> Any:
        """Work area of a run that is rebuilt on resume: passes over the data, compiled graphs."""

    @abstractmethod
    def init(self, task: Task, work: Any) -> S:
        """The first state."""

    @abstractmethod
    def step(self, task: Task, work: Any, state: S) -> tuple[S, Info]:
        """The next state, and what to say about it."""

    @abstractmethod
    def finish(self, task: Task, work: Any, state: S) -> dict[str, Any]:
        """Fields of the :class:`~bayesgen.fit.Fit` that the state amounts to.

        ``"model"`` among them where training changed the task's.
        """

    def news(self, work: Any) -> Sequence[str]:
        """What a person should know before the run rather than after it; shown as warnings."""
        return ()

    def advice(self, step: int) -> str:
        """What to say of a run that ended before it was done."""
        return f"not converged after {step} steps: raise max_steps, or loosen tolerance."

    @property
    @abstractmethod
    def capability(self) -> type:
        """What a model must be able to do."""

    @property
    @abstractmethod
    def state_type(self) -> type[S]:
        """The NamedTuple of the state, rebuilt from a checkpoint by its fields."""

    # ------------------------------------------------------------ the run
    def run(
        self,
        model: Any,
        data: object = None,
        *,
        seed: int = 0,
        callbacks: Sequence[Callback] = (),
        resume: str | os.PathLike[str] | None = None,
    ) -> Fit:
        """Fit ``model`` to ``data``.

        Args:
            model: A model with the capability that the engine needs.
            data: Whatever :func:`bayesgen.data.as_dataset` takes.
            seed: Seed of every random number of the run; same seed, same fit.
            callbacks: Called after each step with a :class:`Progress`; True stops the run.
            resume: A folder for checkpoints. What it holds is continued, exactly as if the run had
                never stopped; it is brought up to date every 20 seconds and at the end, and Ctrl-C
                keeps what is there.

        Returns:
            The fit. ``attrs["converged"]`` says whether the run reached its own criterion.

        Raises:
            TypeError: The model lacks the capability.
            ValueError: Data that do not fit, or a checkpoint of another run.
        """
        check_called(self, Engine, model)
        task = self.task(model, data, rng.make_generator(seed, self._device))
        work = self.prepare(task)
        for text in self.news(work):
            warnings.warn(text, stacklevel=2)
        loop = _Loop(self, task, work, seed, tuple(callbacks), resume)
        state = loop.run()
        return self._fit(loop, state, model, seed)

    def task(self, model: Any, data: object, generator: torch.Generator) -> Task:
        """The model bound to checked data; engines that take plain functions extend this."""
        bindable: Any = require(model, self.capability, f"{type(self).__name__}.run")
        dataset = as_dataset(data)
        bound = bindable.bind(dataset).to(self._device)
        return Task(bound, dataset, generator, self._device, self._dtype)

    def _fit(self, loop: _Loop, state: S, model: Any, seed: int) -> Fit:
        from bayesgen.fit import Fit

        parts = self.finish(loop.task, loop.work, state)
        extra = parts.pop("attrs", {})
        fitted = parts.pop("model", loop.task.model)
        data = loop.task.data
        attrs = {
            "engine": type(self).__name__,
            "settings": self.settings(),
            "seed": seed,
            "seconds": loop.seconds,
            "num_steps": loop.step,
            "converged": loop.done,
            "messages": loop.messages,
            "num_rows": data.num_rows,
            "columns": list(data.columns),
            "schema": data.schema.to_config(),
            "data_fingerprint": data.fingerprint(),
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": str(self._device),
            "versions": _versions(),
            **loop.task.model.attrs,
            **extra,
        }
        attrs["messages"] = [*loop.messages, *extra.get("messages", []), *_notes(data)]
        return Fit(
            fitted,
            **parts,
            history=loop.history,
            attrs=attrs,
            data=data if isinstance(data, Dataset) else None,
            refit=lambda other, other_seed: self.run(model, other, seed=other_seed),
        )

    def settings(self) -> dict[str, Any]:
        """The engine's settings as JSON values."""
        return {
            f.name: value if isinstance(value := getattr(self, f.name), _JSON) else str(value)
            for f in fields(self)
        }

    @property
    def _device(self) -> torch.device:
        name = getattr(self, "device", "cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"device={name!r}, but it must be 'cpu' or such as 'cuda'.") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={name!r}, but torch sees no CUDA device here; use 'cpu'.")
        return device

    @property
    def _dtype(self) -> torch.dtype:
        dtype = getattr(self, "dtype", torch.float64)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype!r}, but it must be torch.float32 or torch.float64.")
        found: torch.dtype = dtype
        return found


_JSON = (int, float, str, bool, type(None))


class _Loop:
    """One run of one engine."""

    def __init__(
        self,
        engine: Engine[Any],
        task: Task,
        work: Any,
        seed: int,
        callbacks: tuple[Callback, ...],
        resume: str | os.PathLike[str] | None,
    ) -> None:
        self.engine, self.task, self.work, self.callbacks = engine, task, work, callbacks
        self.folder = None if resume is None else Path(resume)
        self.identity = {
            "engine": type(engine).__name__,
            # Where a run ends may change between sessions; how it moves may not.
            "settings": {k: v for k, v in engine.settings().items() if k not in _MAY_CHANGE},
            "seed": seed,
            "model": (task.program or _digest(task.model)) if self.folder is not None else None,
            "data": task.data.fingerprint() if self.folder is not None else None,
        }
        self.step, self.seconds, self.done = 0, 0.0, False
        self.history: dict[str, list[float]] = {}
        self.messages: list[str] = []

    def run(self) -> Any:
        before = time.perf_counter()
        state = self._load()
        before -= self.seconds
        if state is None:
            state = self._settled(self.engine.init(self.task, self.work))
        self.generator_state = rng.get_state(self.task.generator)
        saved = time.perf_counter()
        try:
            while self.step < self.engine.max_steps and not self.done:
                state, info = self.engine.step(self.task, self.work, state)
                state = self._settled(state)
                self.step += 1
                # A step that Ctrl-C cuts short has already drawn numbers: resume from before it.
                self.generator_state = rng.get_state(self.task.generator)
                self.seconds = time.perf_counter() - before
                self._record(info)
                if self.folder is not None and time.perf_counter() - saved > _CHECKPOINT_SECONDS:
                    self._save(state)
                    saved = time.perf_counter()
                if self._stopped(info):
                    break
        except KeyboardInterrupt:
            if self.step == 0:
                raise
            self.messages.append(
                f"interrupted after {self.step} steps; the fit holds what was there."
            )
        if self.folder is not None:
            self._save(state)
        if not self.done and not self.messages:
            self.messages.append(self.engine.advice(self.step))
        return state

    def _settled(self, state: Any) -> Any:
        """Laid out in memory as it would be if it came from a checkpoint."""
        return self.engine.state_type(**settled(state._asdict()))

    def _record(self, info: Info) -> None:
        for name, value in info.values.items():
            if math.isnan(value):
                raise ValueError(
                    f"{type(self.engine).__name__}: '{name}' became NaN at step {self.step}. Are "
                    "there huge "
                    "values in the data, or a prior that excludes them? Rescale the columns."
                )
            self.history.setdefault(name, []).append(float(value))
        self.done = info.done

    def _stopped(self, info: Info) -> bool:
        progress = Progress(
            type(self.engine).__name__, self.step, self.engine.max_steps, info.values, self.seconds
        )
        stop = [callback(progress) for callback in self.callbacks]
        if any(stop) and not self.done:
            self.messages.append(f"stopped by a callback after {self.step} steps.")
        return any(stop)

    def _save(self, state: Any) -> None:
        assert self.folder is not None
        nested = {
            "state": state._asdict(),
            "generator": self.generator_state,
            "step": self.step,
            "seconds": self.seconds,
            "done": self.done,
            "history": self.history,
            "identity": self.identity,
        }
        tensors, config = flatten(nested)
        write_folder(self.folder, tensors=tensors, config=config)

    def _load(self) -> Any:
        if self.folder is None or not (self.folder / "manifest.json").exists():
            return None
        tensors, config, _ = read_folder(self.folder)
        nested = unflatten(tensors, config)
        if nested.get("identity") != self.identity:
            raise ValueError(
                f"the checkpoint in {self.folder} belongs to another run: it says "
                f"{nested.get('identity')}, "
                f"this run is {self.identity}. Use another folder, or the same engine, "
                "model, seed and data."
            )
        rng.set_state(self.task.generator, nested["generator"])
        self.step, self.seconds = nested["step"], nested["seconds"]
        self.done = nested["done"]
        self.history = {k: list(v) for k, v in nested["history"].items()}
        return self._settled(self.engine.state_type(**_to(nested["state"], self.task.device)))


_MAY_CHANGE = ("max_steps", "num_steps")


def _digest(model: Any) -> str:
    """What tells models apart: their class and everything that a file would hold of them."""
    tensors, config = flatten(model.to_config())
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + tensor_bytes(value))
    return digest.hexdigest()


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return value


def _notes(data: Any) -> list[str]:
    """What a person should know of the data before trusting scores."""
    if not isinstance(data, Dataset):
        return []
    variance = data.summary().variance.tolist()
    constant = [name for name, v in zip(data.columns, variance, strict=True) if v == 0.0]
    if not constant:
        return []
    return [
        f"constant in the training rows: {', '.join(constant[:10])}. Nothing says how far such "
        "a column may vary, so a row that differs there scores as low as the prior's guess makes "
        "it; drop the column, or give a prior."
    ]


def _versions() -> dict[str, str]:
    import numpy as np
    import pyro

    import bayesgen

    return {
        "bayesgen": bayesgen.__version__,
        "torch": str(torch.__version__),
        "pyro": pyro.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
