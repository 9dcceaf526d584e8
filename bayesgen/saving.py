"""A fit in a folder and back: no pickle, no code from the file, scores equal bit by bit.

Draws, posterior, statistics, the model's tensors, small training data and the calibration go into
one safetensors file; everything else is JSON beside it. See :mod:`bayesgen.storage` for the
folder itself. The class of the model is found by its recorded name among the entry points of the
group ``bayesgen.models``, which installed packages declare, or is handed in; a file never names
an import. What is made of several fits (:class:`Assembled`, declared in the group
``bayesgen.results``) lies in one folder too, so that it is replaced as a whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesgen.capabilities import Model, Symmetric
from bayesgen.data import Dataset, as_dataset
from bayesgen.schema import Schema
from bayesgen.storage import flatten, read_folder, unflatten, write_folder

if TYPE_CHECKING:
    from os import PathLike

    from bayesgen.fit import Fit

__all__ = ["MAX_DATA_BYTES", "Assembled", "read", "write_assembled", "write_fit"]

MAX_DATA_BYTES = 64 * 2**20
"""Training data in memory up to this size are saved with the fit."""

_VERSION = 1


class Assembled(ABC):
    """A result made of several fits, such as a classifier's: saved and loaded as one."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Fit]:
        """The fits, in order."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """What joins them: nested dicts of JSON values and tensors."""

    @classmethod
    @abstractmethod
    def assemble(cls, parts: Sequence[Fit], config: Mapping[str, Any]) -> Assembled:
        """The inverse of :attr:`parts` and :meth:`to_config`."""


def write_fit(fit: Fit, path: str | PathLike[str], *, include_data: bool | None = None) -> None:
    """Save a fit; see :meth:`bayesgen.fit.Fit.save`."""
    tensors, config = flatten(_nested(fit, include_data))
    write_folder(path, tensors=tensors, config=config)


def write_assembled(result: Assembled, path: str | PathLike[str]) -> None:
    """Save several fits and what joins them into one folder, atomically."""
    nested = {
        "version": _VERSION,
        "result_class": type(result).__name__,
        "result": result.to_config(),
        "parts": [_nested(fit, None) for fit in result.parts],
    }
    tensors, config = flatten(nested)
    write_folder(path, tensors=tensors, config=config)


def _nested(fit: Fit, include_data: bool | None) -> dict[str, Any]:
    """Everything that a file holds of a fit."""
    data = fit.data.tensor() if fit.data is not None and fit.data.in_memory else None
    if include_data is None:
        small = data is not None and data.numel() * data.element_size() <= MAX_DATA_BYTES
        include_data = small
    elif include_data and data is None:
        raise ValueError(
            "include_data=True, but this fit does not hold its training data in memory; leave it "
            "out, and pass data to the verbs that need it."
        )
    return {
        "version": _VERSION,
        "model_class": type(fit.model).__name__,
        "model": fit.model.to_config(),
        "draws": dict(fit.draws),
        "posterior": _plain(fit.posterior),
        "sample_stats": dict(fit.sample_stats),
        "history": _plain(fit.history),
        "attrs": _plain(fit.attrs),
        "schema": fit.schema.to_config(),
        "anchors": fit.anchors if isinstance(fit.model, Symmetric) else None,
        "data": data if include_data else None,
        "calibration": None if fit.calibration is None else fit.calibration.to_config(),
        "guide": None if fit.guide is None else fit.guide.to_config(),
    }


def read(path: str | PathLike[str], model: type[Model] | None = None) -> Fit | Any:
    """Load a fit, or what is made of several; see :func:`bayesgen.fit.load`."""
    tensors, config, _ = read_folder(path)
    if not isinstance(config, dict) or not config.keys() & {"model_class", "result_class"}:
        raise ValueError(f"{path} holds no fit; it was saved by something else of bayesgen.")
    if config["version"] > _VERSION:
        raise ValueError(
            f"{path} was saved in version {config['version']} of the format, but this bayesgen "
            f"reads up to {_VERSION}: update bayesgen."
        )
    # A fresh copy of each tensor is aligned in memory as any other: sums come out bit by bit.
    saved = unflatten({name: value.clone() for name, value in tensors.items()}, config)
    if "result_class" not in saved:
        return _restored(saved, model)
    parts = [_restored(part, model) for part in saved["parts"]]
    return _result_class(saved["result_class"]).assemble(parts, saved["result"])


def _restored(saved: Mapping[str, Any], model: type[Model] | None) -> Fit:
    """The inverse of :func:`_nested`."""
    from bayesgen.fit import Fit
    from bayesgen.outliers import Calibration

    model_class = _model_class(saved["model_class"], model)
    bound = model_class.from_config(saved["model"])
    calibration = saved["calibration"]
    data = _dataset(saved["data"], saved["schema"])
    fit = Fit(
        bound,
        saved["draws"],
        posterior=saved["posterior"],
        sample_stats=saved["sample_stats"],
        history=saved["history"],
        attrs={**saved["attrs"], "schema": saved["schema"]},
        data=data,
        refit=_refit(bound, saved["attrs"]),
        calibration=None
        if calibration is None
        else Calibration.from_config(calibration, model_class),
        guide=_guide(saved, bound, data),
    )
    if saved["anchors"] is not None:
        fit.__dict__["anchors"] = saved["anchors"]  # where functools.cached_property keeps it
    return fit


def _plain(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Nested mappings and sequences as dicts and lists."""
    if values is None:
        return None
    return {k: _plain(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _guide(saved: Mapping[str, Any], model: Model, data: Dataset | None) -> Any:
    """What the engine of the fit makes of its trained guide; None where there is none."""
    if saved.get("guide") is None:
        return None
    found = list(entry_points(group="bayesgen.engines", name=saved["attrs"]["engine"].lower()))
    if not found:
        return None
    return found[0].load().guide_from_config(saved["guide"], model, data)


def _dataset(values: Tensor | None, schema: Mapping[str, Any]) -> Dataset | None:
    if values is None:
        return None
    return Dataset.from_codes(values, Schema.from_config(schema))


def _model_class(name: str, given: type[Model] | None) -> type[Model]:
    if given is not None:
        if given.__name__ != name:
            raise ValueError(
                f"the fit was saved with a model of class {name}, got {given.__name__}."
            )
        return given
    found = list(entry_points(group="bayesgen.models", name=name))
    if not found:
        raise ValueError(
            f"the fit was saved with a model of class {name}, which no installed package declares "
            f"in its entry points 'bayesgen.models': pass the class, load(path, model={name})."
        )
    loaded = found[0].load()
    if not (isinstance(loaded, type) and issubclass(loaded, Model)):
        raise ValueError(f"the entry point {name} of 'bayesgen.models' is no Model: {loaded!r}.")
    return loaded


def _result_class(name: str) -> type[Assembled]:
    found = list(entry_points(group="bayesgen.results", name=name))
    if not found:
        raise ValueError(
            f"this is a save of class {name}, which no installed package declares in its entry "
            "points 'bayesgen.results': install the package that wrote it."
        )
    loaded = found[0].load()
    if not (isinstance(loaded, type) and issubclass(loaded, Assembled)):
        raise ValueError(
            f"the entry point {name} of 'bayesgen.results' is no Assembled: {loaded!r}."
        )
    return loaded


def _setting(name: str, value: Any) -> Any:
    """A recorded setting as the engine takes it; dtypes were written by name."""
    if name == "dtype" and isinstance(value, str):
        return {"float32": torch.float32, "float64": torch.float64}[value.removeprefix("torch.")]
    return value


def _refit(model: Model, attrs: Mapping[str, Any]) -> Callable[[Dataset, int], Fit] | None:
    """Runs the engine that made the fit, by its recorded name and settings, found when called."""
    name, settings = attrs.get("engine"), attrs.get("settings")
    if not isinstance(name, str) or not isinstance(settings, Mapping):
        return None
    found = list(entry_points(group="bayesgen.engines", name=name.lower()))
    if not found:
        return None

    def refit(data: Dataset, seed: int) -> Fit:
        engine = found[0].load()(**{k: _setting(k, v) for k, v in settings.items()})
        fit: Fit = engine.run(model, as_dataset(data), seed=seed)
        return fit

    return refit
