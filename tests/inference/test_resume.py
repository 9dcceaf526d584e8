"""A run stopped anywhere, by a stop or by kill -9, ends in another process to the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesgen.inference import EM, run
from bayesgen.models import GaussianMixture
from bayesgen.storage import read_folder
from tests.inference.resume_cases import CASES, folders, outcome, rows, same

__all__: list[str] = []

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    """The other process has one, and sums over several round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def other_process(folder, *words):
    command = [sys.executable, "-m", "tests.inference.resume_cases", str(folder), *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder, names):
    with other_process(folder, *names) as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]


def stop(name, data, folder, step):
    """Run a case to a step; some engines refuse to call so short a run a fit."""
    case, callbacks = CASES[name], [lambda progress: progress.step >= step]
    try:
        case.run(data, resume=folder, callbacks=callbacks)
    except ValueError as error:
        if "before the first draw" not in str(error):
            raise


def check_all(folder, names, seed, num_stops):
    r, data, whole = random.Random(seed), rows(folder), {}
    for name in names:
        whole[name] = outcome(CASES[name].run(data))
        steps = int(whole[name]["steps"])
        for step in r.sample(range(1, max(2, steps)), min(num_stops, max(1, steps - 1))):
            stop(name, data, folder / f"{name}@{step}", step)
    finish(folder, names)
    for name in names:
        stopped = list(folders(folder, name))
        assert stopped, name
        for path in stopped:
            with np.load(folder / f"{path.name}.npz") as found:
                same(whole[name], dict(found), f"stopped at {path.name}")


def test_another_process_finishes_bit_by_bit(tmp_path):
    names = ["em-mixture", "vb-minibatch", "gibbs-robust", "gibbs-cells", "closed-form", "svi"]
    check_all(
        tmp_path,
        [*names, "svi-subsample", "nuts", "nuts-discrete", "many", "laplace"],
        seed=0,
        num_stops=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_another_process_finishes_from_many_steps(tmp_path, seed):
    check_all(tmp_path, list(CASES), seed=seed, num_stops=4)


def test_a_run_that_starts_again_elsewhere_is_caught(tmp_path):
    data = rows(tmp_path)
    whole = outcome(CASES["gibbs-mixture"].run(data))
    stop("gibbs-mixture", data, tmp_path / "run", 12)
    nudged = {**data, "table": data["table"].copy()}
    again = CASES["gibbs-mixture"].run(nudged, resume=tmp_path / "run")
    same(whole, outcome(again), "untouched")
    other = CASES["gibbs-mixture"].engine.run(CASES["gibbs-mixture"].model, data["table"], seed=6)
    with pytest.raises(AssertionError, match="differs"):
        same(whole, outcome(other), "another seed")


# ---------------------------------------------------------------- kill -9
KILLED = ["em-minibatch", "vb-minibatch", "gibbs-mixture", "svi", "nuts", "many"]


def last_step(folder, name):
    """Steps that the checkpoint holds."""
    return read_folder(folder / f"{name}@kill")[1]["step"]


def logged(folder, name):
    """Steps that were finished before the kill."""
    file = folder / f"{name}.log"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)[0] for line in lines]


def killed(folder, name, seconds):
    """Start or continue a run and kill it after a while; whether it had ended before."""
    with other_process(folder, "kill", name, "0.0") as process:
        deadline, begun = time.monotonic() + 120.0, len(logged(folder, name))
        # Importing takes seconds: the clock starts with the first step of this process.
        while process.poll() is None and len(logged(folder, name)) == begun:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(seconds)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), errors[-2000:]
    return process.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("name", KILLED)
def test_kill_loses_no_finished_step(tmp_path, name):
    """With a checkpoint after every step, a kill loses only the step that it interrupts."""
    data, r = rows(tmp_path), random.Random(name)
    whole = outcome(CASES[name].run(data))
    kills = 0
    for _ in range(4):
        if killed(tmp_path, name, r.uniform(0.0, 0.1)):
            break
        kills += 1
        last = logged(tmp_path, name)[-1]
        # The checkpoint of a step is written before anybody is told of the step.
        assert last_step(tmp_path, name) in (last, last + 1)
    else:
        finish(tmp_path, [name])
        with np.load(tmp_path / f"{name}@kill.npz") as found:
            same(whole, dict(found), name)
        return
    assert kills, "the run was over before the first kill"
    with np.load(tmp_path / f"{name}.npz") as found:
        same(whole, dict(found), name)


def test_a_checkpoint_at_least_every_interval(tmp_path, monkeypatch):
    """By a clock on which each look takes a second: no step is older than 20 s and unsaved."""
    ticks, saved, seen = count(), [0.0], []

    class Clock:
        perf_counter = staticmethod(lambda: float(next(ticks)))

    right = run._Loop._save

    def save(self, state):
        saved.append(self.seconds)
        right(self, state)

    monkeypatch.setattr(run, "time", Clock)
    monkeypatch.setattr(run._Loop, "_save", save)

    def watch(progress):
        seen.append(progress.seconds - saved[-1])
        return False

    engine = EM(num_starts=1, max_steps=60, tolerance=0.0)
    engine.run(
        GaussianMixture(4), rows(tmp_path)["table"], resume=tmp_path / "run", callbacks=[watch]
    )
    assert len(saved) > 3
    # One look more: the clock is read twice a step.
    assert 10.0 < max(seen) <= run._CHECKPOINT_SECONDS + 1.0
