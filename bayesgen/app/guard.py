"""How things end for a Unix user: exit codes, one-line errors, quiet pipes, Ctrl-C heard."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click

from bayesgen.app.wording import for_shell

__all__ = ["Failure", "GuardedGroup", "Interrupts", "Misuse", "interrupts"]

_EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    MemoryError,
)
_PLAIN = (ValueError, OSError, ImportError)


class Failure(click.ClickException):
    """Bad data or a failed run: one line on stderr, exit code 1."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        """Print the line."""
        print(f"bayesgen: error: {self.message}", file=sys.stderr if file is None else file)


class WrongUse(Failure):
    """Options that do not exist or are not allowed: the same with exit code 2."""

    exit_code = 2


class Misuse(ValueError):
    """Asked for what does not exist or is not allowed: exit code 2, as for any wrong option."""


class GuardedGroup(click.Group):
    """Commands whose errors end as exit codes: 1 failed, 2 usage, 130 Ctrl-C, 141 closed pipe."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn what it raises into an exit code."""
        with _plain_warnings():
            try:
                code = super().invoke(ctx)
                sys.stdout.flush()
            except BrokenPipeError:
                _silence_stdout()
                raise click.exceptions.Exit(128 + signal.SIGPIPE) from None
            except KeyboardInterrupt:
                print("\nbayesgen: interrupted", file=sys.stderr)
                raise click.exceptions.Exit(128 + signal.SIGINT) from None
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except _EXPECTED as error:
                _fail(ctx, error)
        ctx.exit(code or 0)


def _fail(ctx: click.Context, error: BaseException) -> NoReturn:
    if ctx.meta.get("bayesgen.traceback"):
        raise error
    message = for_shell(str(error)) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if not isinstance(error, _PLAIN):
        message += " (--traceback shows where)"
    raise (WrongUse if isinstance(error, Misuse) else Failure)(message) from error


def _silence_stdout() -> None:
    """Whoever read our output has gone: nothing more can be said, not even by Python at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout that is no file
        sys.stdout = open(os.devnull, "w")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our warnings as one line on stderr; those of libraries, no user's business, are dropped."""

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"bayesgen: warning: {for_shell(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=UserWarning, module="bayesgen")
        warnings.showwarning = show
        yield


class Interrupts:
    """Remembers that a signal asked us to stop."""

    number: int | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number."""
        return 128 + (self.number or int(signal.SIGINT))


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Within, Ctrl-C and SIGTERM (of batch systems) raise ``KeyboardInterrupt`` and are kept."""
    heard = Interrupts()

    def handler(number: int, frame: FrameType | None) -> None:
        heard.number = number
        raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield heard
    finally:
        for which, old in before.items():
            signal.signal(which, old)
