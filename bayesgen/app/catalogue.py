"""``bayesgen models``: what is installed, in words, read off signatures and docstrings."""

from __future__ import annotations

import textwrap

from bayesgen.app.registry import ENGINES, MODELS, find, names, settings, story

__all__ = ["detail", "overview"]


def overview() -> str:
    """Every model and engine with its settings, a line each."""
    lines: list[str] = []
    for title, group in (("models", MODELS), ("engines", ENGINES)):
        lines.append(f"{title}:")
        for name in names(group):
            lines += _entry(group, name)
        lines.append("")
    return "\n".join([*lines, "`bayesgen models NAME` says what each setting means."])


def _entry(group: str, name: str) -> list[str]:
    try:
        maker = find(group, name)
    except ImportError as error:
        return [f"  {name}: {error}"]
    told = ", ".join(str(setting) for setting in settings(maker).values())
    return [
        f"  {name}: {story(maker)}",
        *textwrap.wrap(told, 96, initial_indent="      ", subsequent_indent="      "),
    ]


def detail(name: str) -> str:
    """One model or engine, each setting explained."""
    group = ENGINES if name.lower() in [n.lower() for n in names(ENGINES)] else MODELS
    maker = find(group, name)
    lines = [f"{name}: {story(maker)}", ""]
    for setting in settings(maker).values():
        lines.append(f"  {setting}")
        lines += textwrap.wrap(
            setting.help, 96, initial_indent="      ", subsequent_indent="      "
        )
    return "\n".join(lines)
