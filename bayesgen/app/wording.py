"""Hints of the library in the words of the shell: ``columns=[...]`` is ``--columns`` there."""

from __future__ import annotations

import re

__all__ = ["for_shell"]

_ENGINES = "ClosedForm|EM|Gibbs|Laplace|ManyChains|NUTS|SVI|VB"
_SPELLINGS: tuple[tuple[str, str], ...] = (
    (r",? (?:for example|in pandas) by \S*\[.*?\](?: = np\.nan|\.astype\(float\))?(?=[.,])", ""),
    (r"Name the columns with columns=\[\.\.\.\]", "Give a .csv file with names"),
    (
        r"(?i)\b(leave (?:it|the others) out) with columns=\[\.\.\.\]",
        r"\1: --columns names those to keep",
    ),
    (r"kinds=\{'([^']*)': '(\w+)'\}", r"--kind '\1=\2'"),
    (r"\bkinds names column\b", "--kind names column"),
    (r"priors=\{'(\w+)': ([^{}]*)\}", r"--set 'priors.\1=\2'"),
    (r"\bMixture\((\w+)\(\), num_components\)", r"Mixture with --set family=\1"),
    (rf"\b({_ENGINES})\((\w+)=['\"]?([^'\",()]+)['\"]?\)", r"--engine \1 --engine-set \2=\3"),
    (r"\bdtype=torch\.(float32|float64)", r"--engine-set dtype=\1"),
    (r"\bcalibration=rows\b", "--calibration DATA"),
    (r"\bcalibration='model'", "--calibration model"),
    (r"(\d+) more rows in summary\(\)\.table", r"\1 more rows; --out FILE writes them all"),
    (
        r"\bnum_samples=([\d,]+) would do",
        r"\1 draws a chain (--engine-set num_samples=...) would do",
    ),
    (
        r"\braise (\w+), or continue with resume=\.\.\.",
        r"raise --engine-set \1=..., or go on with --resume",
    ),
    (r"\blook at plots\.trace\(fit\)", "look at the traces that `bayesgen report RUN` draws"),
)


def for_shell(message: str) -> str:
    """A message with its Python spelled as options of the command line.

    Example:
        >>> for_shell("column 'b' is to be a count; use kinds={'b': 'real'}.")
        "column 'b' is to be a count; use --kind 'b=real'."
    """
    for python, shell in _SPELLINGS:
        message = re.sub(python, shell, message)
    return message
