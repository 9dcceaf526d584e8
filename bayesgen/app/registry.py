"""Models and engines that installed packages declare, and what can be set on them."""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from bayesgen.app.guard import Misuse
from bayesgen.app.values import parse_value, type_name

__all__ = ["ENGINES", "MODELS", "Setting", "build", "find", "names", "settings", "story"]

MODELS, ENGINES = "bayesgen.models", "bayesgen.engines"
_KINDS = {MODELS: "model", ENGINES: "engine"}


class Setting(NamedTuple):
    """One argument of a model or an engine."""

    name: str
    annotation: Any
    default: Any
    """``inspect.Parameter.empty`` when it must be given."""
    help: str

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty

    def __str__(self) -> str:
        given = (
            ""
            if self.required or "<factory>" in str(self.default)
            else f" = {_short(self.default)}"
        )
        return f"{self.name}: {type_name(self.annotation)}{given}"


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).removeprefix("torch.")


# ------------------------------------------------------------------ finding
def names(group: str) -> list[str]:
    """Names declared in an entry point group."""
    return sorted({point.name for point in entry_points(group=group)})


def find(group: str, name: str) -> Callable[..., Any]:
    """The model or engine of this name, upper and lower case alike.

    Raises:
        Misuse: There is none, with those that there are.
        ImportError: It is declared but cannot be imported.
    """
    points: dict[str, EntryPoint] = {p.name.lower(): p for p in entry_points(group=group)}
    if name.lower() not in points:
        known = names(group)
        raise Misuse(
            f"there is no {_KINDS[group]} {name!r}{_near(name, known)}; there are "
            f"{', '.join(known) or 'none: is bayesgen installed (pip install -e .)?'}."
        )
    point = points[name.lower()]
    try:
        found: Callable[..., Any] = point.load()
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"the {_KINDS[group]} {point.name} is declared as {point.value}, but cannot be "
            f"loaded: {error}"
        ) from error
    return found


def _near(name: str, known: Iterable[str]) -> str:
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" (did you mean {lower[close[0]]}?)" if close else ""


# ------------------------------------------------------------------ what can be set
def settings(maker: Callable[..., Any]) -> dict[str, Setting]:
    """The arguments of ``maker`` that its docstring speaks of, by name."""
    told = _arguments(inspect.getdoc(maker) or "")
    hints = _hints(maker)
    return {
        name: Setting(name, hints.get(name, parameter.annotation), parameter.default, told[name])
        for name, parameter in inspect.signature(maker).parameters.items()
        if name in told
    }


def _hints(maker: Callable[..., Any]) -> dict[str, Any]:
    """Annotations as types; those that only a type checker can see stay strings."""
    target = maker.__init__ if inspect.isclass(maker) else maker
    space = vars(inspect.getmodule(maker))
    found = {}
    for name, annotation in inspect.get_annotations(target).items():
        try:
            hint = typing.get_type_hints(_Holder(name, annotation), globalns=space)
            found[name] = hint[name]
        except NameError:
            found[name] = annotation
    return found


class _Holder:
    """One annotation alone: a name that cannot be resolved does not hide the others."""

    def __init__(self, name: str, annotation: Any) -> None:
        self.__annotations__ = {name: annotation}


def _arguments(doc: str) -> dict[str, str]:
    """The ``Args:`` section of a Google docstring."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    if section is None:
        return {}
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in section[1].splitlines():
        head = re.match(r" {4}(\w+): (.*)", line)
        if head is not None:
            current = found.setdefault(head[1], [])
            current.append(head[2])
        elif line.strip():
            current.append(line.strip())
    return {name: _plain(" ".join(lines)) for name, lines in found.items()}


def _plain(text: str) -> str:
    """Sphinx roles and double backticks as plain text."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?([\w]+)`", r"\1", text).replace("``", "")


def story(maker: Callable[..., Any]) -> str:
    """The first sentence of the docstring."""
    return _plain((inspect.getdoc(maker) or "").partition("\n\n")[0].replace("\n", " "))


# ------------------------------------------------------------------ making
def build(group: str, name: str, assignments: Iterable[str]) -> Any:
    """Make a model or an engine from ``name=value`` texts.

    Raises:
        Misuse: An unknown name, setting or value, or a setting that is missing; the message lists
            what is allowed.
    """
    maker = find(group, name)
    allowed = settings(maker)
    given = _collect(name, allowed, assignments)
    missing = [s.name for s in allowed.values() if s.required and s.name not in given]
    if missing:
        option = "--set" if group == MODELS else "--engine-set"
        raise Misuse(
            f"{name} needs {' and '.join(missing)}: give {option} {missing[0]}=... "
            f"({type_name(allowed[missing[0]].annotation)}); `bayesgen models {name}` says what "
            "it may be."
        )
    try:
        return maker(**given)
    except (TypeError, ValueError) as error:
        raise Misuse(str(error)) from error


def _collect(
    owner: str, allowed: dict[str, Setting], assignments: Iterable[str]
) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        site = None
        if "." in name:  # priors.weights=...
            name, _, site = name.partition(".")
        if not equals:
            raise Misuse(f"{text!r} is no setting: write name=value, such as {_example(allowed)}.")
        if name not in allowed:
            listed = ", ".join(str(s) for s in allowed.values())
            raise Misuse(
                f"{owner} has no setting {name!r}{_near(name, allowed)}; it has {listed}."
            )
        parsed = parse_value(f"{owner}: {text}", value.strip(), allowed[name].annotation, site)
        if site is not None:
            parsed = {**given.get(name, {}), site: parsed}
        given[name] = parsed
    return given


def _example(allowed: dict[str, Setting]) -> str:
    return f"{next(iter(allowed))}=..." if allowed else "nothing: it has no settings"
