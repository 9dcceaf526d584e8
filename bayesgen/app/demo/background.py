"""A command of ours in a process of its own: the demo's second core."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["Background"]


class Background:
    """``bayesgen ARGUMENTS`` running beside us.

    Args:
        arguments: What follows ``bayesgen`` on the command line.
    """

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bayesgen.app", *arguments, "--quiet"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> None:
        """Wait until it is done.

        Raises:
            RuntimeError: It failed, with what it said.
        """
        _, told = self._process.communicate()
        if self._process.returncode != 0:
            raise RuntimeError(f"a fit in the background failed: {told.strip()}")

    def stop(self) -> None:
        """End it, if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.communicate()
