"""Hints that say Python in the library say options in the shell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from bayesgen.app.cli import cli
from bayesgen.app.wording import for_shell

__all__: list[str] = []

PYTHON = re.compile(r"\w=[\[{(']|\]\s*=|frame\[|np\.|kinds=|columns=")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("a,d\n1,2020-01-01\n2,2020-01-02\n", (), "leave it out: --columns names those to keep"),
        ("a,b\n1,\n2,\n", (), "leave it out: --columns names those to keep"),
        ("a,b\n1,x\n2,y\n3,x\n", (), "take Mixture with --set family=Product"),
        ("a,b\n1,2\n2,3\n3,oh\n", (), "--kind 'b=category'"),
        ("a,b\n1,-1\n2,1\n", ("--kind", "b=count"), "use --kind 'b=real'"),
        ("a,b\n1,-1\n2,1\n", ("--kind", "b=binary"), "use --kind 'b=category'"),
        ("a,b\n1,-1\n2,1\n", ("--kind", "c=real"), "--kind names column 'c'"),
        ("a,b\n1,inf\n2,1\n", (), "NaN for a missing value. Replace infinities."),
    ],
)
def test_a_bad_table_is_mended_by_options(
    tmp_path: Path, content: str, options: tuple[str, ...], words: str
) -> None:
    (tmp_path / "t.csv").write_text(content)
    asked = ["fit", "GaussianMixture", str(tmp_path / "t.csv"), "--set", "num_components=1"]
    told = CliRunner().invoke(cli, [*asked, *options, "--out", str(tmp_path / "run")])
    assert told.exit_code == 1
    assert words in told.stderr
    assert not PYTHON.search(told.stderr), told.stderr


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("or EM(objective='posterior').", "or --engine EM --engine-set objective=posterior."),
        ("SVI(trace=False), which", "--engine SVI --engine-set trace=False, which"),
        (
            "Give priors={'components': Beta(a, b)}, or",
            "Give --set 'priors.components=Beta(a, b)', or",
        ),
        (
            "as calibration=rows, or calibration='model'",
            "as --calibration DATA, or --calibration model",
        ),
        ("and 9 more rows in summary().table", "and 9 more rows; --out FILE writes them all"),
        (
            "raise max_steps, or continue with resume=...",
            "raise --engine-set max_steps=..., or go on with --resume",
        ),
        (
            "about num_samples=7,600 would do",
            "about 7,600 draws a chain (--engine-set num_samples=...) would do",
        ),
        ("by VB; EM (here) is fine = 3", "by VB; EM (here) is fine = 3"),
    ],
)
def test_engines_priors_and_calibration(python: str, shell: str) -> None:
    assert for_shell(python) == shell
