"""Text from the command line as the value that an argument wants; nothing is evaluated."""

from __future__ import annotations

import ast
import types
import typing
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from bayesgen.app.guard import Misuse

__all__ = ["parse_value", "type_name"]

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def type_name(annotation: Any) -> str:
    """An annotation in a word a user knows: ``int``, ``float or none``, ``prior by site``."""
    parts = _parts(annotation)
    words = [_word(part) for part in parts if part is not type(None)]
    return " or ".join(words + (["none"] if type(None) in parts else []))


def _word(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    if _is_mapping(annotation):
        return "prior by site (name.site=...)"
    known = {bool: "true|false", str: "text"}
    if annotation in known:
        return known[annotation]
    return str(getattr(annotation, "__name__", annotation)).rpartition(".")[2]


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _is_mapping(annotation: Any) -> bool:
    origin = typing.get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, Mapping)


def parse_value(what: str, text: str, annotation: Any, site: str | None = None) -> Any:
    """Turn ``text`` into what ``annotation`` asks for.

    Numbers, truth values, texts and dtypes are read plainly. Families, priors and distributions
    are written as they are printed, ``GammaDirichlet(shape=1, rate=20)``: names are looked up
    among those of bayesgen and Pyro, arguments are literals.

    Args:
        what: Names the setting in messages.
        text: What the user wrote.
        annotation: The argument's annotation.
        site: The key, when the argument is a mapping by site.

    Raises:
        Misuse: What was given, and what is allowed.
    """
    if site is not None:
        if not any(_is_mapping(part) for part in _parts(annotation)):
            raise Misuse(
                f"{what}: a name with a dot is for priors by site, such as priors.weights."
            )
        return _expression(what, text)
    parts = _parts(annotation)
    if type(None) in parts and text.lower() == "none":
        return None
    for part in parts:
        if _is_mapping(part):
            raise Misuse(f"{what}: name the site, such as priors.weights=GammaDirichlet(1, 20).")
        if part is not type(None):
            return _one(what, text, part)
    return None


def _one(what: str, text: str, wanted: Any) -> Any:
    import torch

    if wanted is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise Misuse(f"{what}: expected true or false, got {text!r}.")
        return text.lower() in _TRUE
    if wanted is int or wanted is float:
        try:
            return wanted(text.replace("_", ""))
        except ValueError:
            kind = "a whole number" if wanted is int else "a number"
            raise Misuse(f"{what}: expected {kind}, got {text!r}.") from None
    if wanted is str:
        return text
    if wanted is torch.dtype:
        dtypes = {"float32": torch.float32, "float64": torch.float64}
        if text.removeprefix("torch.") not in dtypes:
            raise Misuse(f"{what}: expected {' or '.join(dtypes)}, got {text!r}.")
        return dtypes[text.removeprefix("torch.")]
    if typing.get_origin(wanted) is typing.Literal:
        choices = {str(value): value for value in typing.get_args(wanted)}
        if text not in choices:
            raise Misuse(f"{what}: expected one of {', '.join(choices)}, got {text!r}.")
        return choices[text]
    return _expression(what, text)


# ------------------------------------------------------------------ Name(argument, key=argument)
def _expression(what: str, text: str) -> Any:
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise Misuse(f"{what}: cannot read {text!r}; write {_SHAPE}.") from None
    if isinstance(tree, ast.Name):  # Gaussian is Gaussian()
        tree = ast.Call(tree, [], [])
    return _value(what, tree)


_SHAPE = "Name or Name(number, key=number), such as Gaussian or StickBreaking(1.0)"


def _value(what: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _made(what, node, node.func.id)
    if isinstance(node, ast.List | ast.Tuple):
        items = [_value(what, item) for item in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    if isinstance(node, ast.Dict):
        keys = [_value(what, key) for key in node.keys if key is not None]
        return dict(zip(keys, (_value(what, item) for item in node.values), strict=True))
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise Misuse(f"{what}: {ast.unparse(node)!r} is no literal; write {_SHAPE}.") from None


def _made(what: str, node: ast.Call, name: str) -> Any:
    import torch

    maker: Any = _named(what, name)
    positional = [_value(what, argument) for argument in node.args]
    keyword = {k.arg: _value(what, k.value) for k in node.keywords if k.arg is not None}
    if isinstance(maker, type) and issubclass(maker, torch.distributions.Distribution):
        positional = [_tensor(value) for value in positional]
        keyword = {key: _tensor(value) for key, value in keyword.items()}
    else:
        positional = [_tensor(v) if _is_numbers(v) else v for v in positional]
        keyword = {k: _tensor(v) if _is_numbers(v) else v for k, v in keyword.items()}
    try:
        return maker(*positional, **keyword)
    except (TypeError, ValueError) as error:
        raise Misuse(f"{what}: {error}") from error


def _is_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_numbers(v) or isinstance(v, int | float) for v in value)
    return False


def _tensor(value: Any) -> Any:
    import torch

    return torch.tensor(value, dtype=torch.float64) if _is_numbers([value]) else value


def _named(what: str, name: str) -> Any:
    """A family, a model, a prior description or a distribution by its name."""
    import pyro.distributions
    import torch

    from bayesgen import distributions, priors
    from bayesgen.models.families import FAMILIES, family_class

    if name in FAMILIES:
        return family_class(name)
    models = {point.name: point for point in entry_points(group="bayesgen.models")}
    if name in models:
        return models[name].load()
    described = [n for n in priors.__all__ if isinstance(getattr(priors, n), type)]
    if name in described:
        found: type = getattr(priors, name)
        return found
    for home in (distributions, pyro.distributions):
        candidate = getattr(home, name, None)
        if isinstance(candidate, type) and issubclass(candidate, torch.distributions.Distribution):
            return candidate
    raise Misuse(
        f"{what}: there is no {name!r}; models are {', '.join(sorted(models))}; families "
        f"{', '.join(sorted(FAMILIES))}; priors {', '.join(described)}, or a distribution of Pyro "
        "such as Dirichlet([1, 1])."
    )
