"""The installed command as a process: start-up, exit codes, pipes, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bayesgen

__all__: list[str] = []

COMMAND = [sys.executable, "-m", "bayesgen.app"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT
    )


def start(*arguments: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], text=True, env=ENVIRONMENT, **pipes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "em"
    told = call(
        *["fit", "GaussianMixture", "faithful", "--set", "num_components=2", "--engine", "em"],
        *["--engine-set", "num_starts=1", "--out", folder],
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout == ""
    assert "saved" in told.stderr
    return folder


def test_help_loads_nothing_heavy():
    code = "from bayesgen.app.cli import cli; import sys; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(told.stdout.split())
    assert "click" in loaded
    assert not loaded & {"torch", "pyro", "numpy", "pandas", "arviz", "matplotlib", "tqdm"}
    assert call("--help").returncode == 0


def test_exit_codes_and_one_line_errors(tmp_path: Path):
    wrong = call("fit", "GaussianMixture", "faithful", "--set", "no=1", "--out", tmp_path / "x")
    assert wrong.returncode == 2
    (tmp_path / "bad.csv").write_text("a\ninf\n")
    bad = call(
        *["fit", "GaussianMixture", tmp_path / "bad.csv", "--set", "num_components=1"],
        *["--out", tmp_path / "x"],
    )
    assert bad.returncode == 1
    assert bad.stderr.startswith("bayesgen: error: row 0, column 'a' is inf")
    assert "Traceback" not in bad.stderr + wrong.stderr
    assert bad.stdout + wrong.stdout == ""


def test_a_closed_pipe_is_no_news(run: Path):
    with start("sample", run, "-n", 300_000) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "eruptions,waiting\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) == 128 + signal.SIGPIPE


def test_ctrl_c_saves_the_fit_and_says_so(tmp_path: Path):
    command = [
        "fit",
        "GaussianMixture",
        "galaxies",
        "--engine",
        "gibbs",
        "--out",
        tmp_path / "run",
    ]
    command += ["--set", "num_components=3", "--engine-set", "num_warmup=0"]
    command += ["--engine-set", "num_samples=100000", "--engine-set", "num_chains=2"]
    with start(*command) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Gibbs: step 1 of 100000" in line:
                break
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait(60) == 130
    assert f"the fit so far is saved in {tmp_path / 'run'}" in told
    assert "Traceback" not in told
    fit = bayesgen.load(tmp_path / "run")
    assert 1 <= fit.num_draws < 100_000
    assert "interrupted" in fit.attrs["messages"][0]


def test_ctrl_c_in_any_command_is_130():
    code = (
        "import os, signal\n"
        # A job in the background starts with SIGINT ignored, and its children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from bayesgen.app import actions, cli\n"
        "actions.score = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.cli(['score', 'a', 'b'])\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 130
    assert "interrupted" in told.stderr
    assert "Traceback" not in told.stderr
