"""Generated C++, compiled in a fraction of a second and called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bayesgen.inference.compiled.emit import Unsupported
from bayesgen.inference.compiled.graph import gradient_alone
from bayesgen.inference.compiled.translate import Translation, translate
from bayesgen.inference.programs.trace import Density

__all__ = [
    "LONG",
    "MACHINE",
    "PATHS",
    "STEPS",
    "NativeDensity",
    "aligned_zeros",
    "compiler",
    "load",
    "translated",
    "with_slope",
]

_FLAGS = (
    "-std=gnu++17 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-freciprocal-math "
    "-fno-strict-aliasing -fopenmp-simd -fno-exceptions -shared -fPIC -w -x c++"
).split()
MAX_STATEMENTS = 60_000
LONG = 2000
"""Lines of a program with a loop over hundreds of steps: compiled without unrolling, and by a
compiler that tries less, which takes a quarter of the time and gives code nearly as fast."""
_QUICK = "-O1 -fno-tree-ter --param max-combine-insns=2".split()
MACHINE, PATHS, STEPS = ("trajectory.cpp",), ("random.cpp", "paths.cpp"), ("steps.cpp",)


def compiler() -> str | None:
    """Path of a C++ compiler: ``CXX``, ``g++`` or ``clang++``."""
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    return next((found for name in names if (found := shutil.which(name))), None)


@functools.cache
def _source(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@functools.cache
def _machine() -> str:
    """What code for this processor depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        flags = ""
    return f"{platform.machine()} {flags}"


def _vector_library(path: str) -> list[str]:
    """Flags for glibc's vector functions, where it has them and the compiler knows their calls."""
    name, version = platform.libc_ver()
    if name != "glibc" or platform.machine() != "x86_64":
        return []
    parts = tuple(int(p) for p in version.split(".")[:2])
    flags = ["-DHAVE_MVEC"] if parts >= (2, 22) else []
    return flags + (["-DMVEC_ALL"] if parts >= (2, 35) else [])


def cache_folder() -> Path:
    """Where compiled densities are kept; nobody else may write there."""
    base = os.environ.get("BAYESGEN_CACHE")
    if base is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        base = str(home / "bayesgen")
    folder = Path(base) / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder.stat()
    if os.name == "posix" and (owner.st_uid != os.getuid() or owner.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written by others")
    return folder


def _folder() -> Path:
    try:
        return cache_folder()
    except OSError:
        return _temporary()


@functools.cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="bayesgen-"))


@functools.lru_cache(maxsize=64)
def _library(text: str, width: int, parts: tuple[str, ...]) -> ctypes.CDLL:
    """Compile and load, with the files in ``parts``; the same text is compiled once."""
    path = compiler()
    if path is None:
        raise Unsupported("there is no C++ compiler (install g++ or clang, or set CXX)")
    vectors = _vector_library(path)
    level = ["-O2"]
    if text.count("\n") > LONG:
        text = re.sub(r"^#pragma GCC unroll.*\n", "", text, flags=re.MULTILINE)
        level = _QUICK if "clang" not in path else ["-O1"]
    flags = [*_FLAGS, *level, *vectors, f"-DW={width}"]
    source = "".join((_source("lanes.cpp"), text, *map(_source, parts)))
    key = hashlib.sha256(
        "\0".join((source, path, *flags, _machine(), *platform.libc_ver())).encode()
    ).hexdigest()[:40]
    target = _folder() / f"{key}.so"
    if not target.exists():
        _compile(path, flags, source, target, bool(vectors))
    return ctypes.CDLL(str(target))


def _compile(path: str, flags: list[str], source: str, target: Path, vectors: bool) -> None:
    command = [path, *flags, "-", *(["-lmvec"] if vectors else []), "-lm"]
    try:
        handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise Unsupported(f"{target.parent} cannot be written: {error}") from error
    try:
        if complaint := _complaint([*command, "-o", name], source):
            raise Unsupported(f"the C++ compiler failed: {complaint}")
        os.replace(name, target)
    finally:
        if os.path.exists(name):
            os.unlink(name)


def _complaint(command: list[str], source: str) -> str:
    """What the compiler says, if it fails twice.

    It may be killed where memory is short. Without a second try that one run would be computed by
    torch, and differ from all others of its seed by rounding.
    """
    complaint = ""
    for _ in range(2):
        try:
            done = subprocess.run(
                command, input=source, capture_output=True, text=True, check=False
            )
        except OSError as error:
            complaint = str(error)
            continue
        if not done.returncode:
            return ""
        lines = [s for s in done.stderr.splitlines() if "error" in s] or [done.stderr[:200]]
        complaint = lines[0] or f"exit status {done.returncode}"
    return complaint


def aligned_zeros(count: int) -> Tensor:
    """Doubles, all zero, whose memory starts at a multiple of 64 bytes."""
    raw = torch.zeros(count + 8, dtype=torch.float64)
    return raw[(-(raw.data_ptr() // 8)) % 8 :][:count]


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Address of a contiguous tensor's memory."""
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


class NativeDensity:
    """A density compiled for ``width`` chains side by side.

    Args:
        translation: What was compiled, with its constants.
        width: Chains in one vector register.
        size: Length of the parameter vector.
        parts: Files of C++ that use the density, compiled with it.
    """

    def __init__(
        self, translation: Translation, width: int, size: int, parts: tuple[str, ...] = ()
    ) -> None:
        self.translation, self.width, self.size = translation, width, size
        self.library: Any = _library(translation.text, width, parts)
        self.workspace = aligned_zeros(max(1, translation.workspace) * width)
        self.constants = (
            pointer(self.workspace),
            pointer(translation.numbers),
            pointer(translation.integers),
        )

    def __call__(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities ``(c,)`` and gradients ``(c, D)`` of ``(c, D)``."""
        count, width = vectors.shape[0], self.width
        blocks = -(-count // width)
        lanes = aligned_zeros(blocks * width * (2 * self.size + 1))
        x, g, lp = lanes.split([blocks * width * self.size] * 2 + [blocks * width])
        padded = vectors[torch.arange(blocks * width) % count]
        x.copy_(padded.reshape(blocks, width, -1).transpose(1, 2).reshape(-1))
        self.library.evaluate(
            pointer(x),
            pointer(lp),
            pointer(g),
            *self.constants,
            ctypes.c_long(blocks),
            ctypes.c_long(self.size),
        )
        gradient = g.reshape(blocks, self.size, width).transpose(1, 2).reshape(-1, self.size)
        return lp[:count].clone(), gradient[:count].clone()


_TRANSLATIONS: WeakKeyDictionary[Density, Translation] = WeakKeyDictionary()


def translated(density: Density) -> Translation:
    """The C++ of a traced density.

    Raises:
        Unsupported: An operator without a rule, another device or precision, or no compiler.
    """
    if density.single is None or density.layout.device.type != "cpu":
        raise Unsupported("only traced programs on the CPU")
    if compiler() is None:
        raise Unsupported("there is no C++ compiler (install g++ or clang, or set CXX)")
    held = _TRANSLATIONS.get(density)
    if held is not None:
        return held
    translation = translate(density.single, density._points(1)[0])
    if translation.statements > MAX_STATEMENTS:
        raise Unsupported(f"{translation.statements} statements would take minutes to compile")
    _TRANSLATIONS[density] = translation
    return translation


def with_slope(density: Density) -> Translation:
    """The C++ of a traced density, and beside it of its gradient alone, where that is short.

    Raises:
        Unsupported: As :func:`translated`.
    """
    both, graph = translated(density), density.single
    assert graph is not None
    if both.statements > LONG:  # a second function would cost more to compile than it saves
        return both
    alone = translate(gradient_alone(graph), density._points(1)[0])
    head = (
        f"#define SLOPE\n#define SLOPE_C {both.numbers.numel()}\n"
        f"#define SLOPE_J {both.integers.numel()}\n"
    )
    return Translation(
        f"{head}{both.text}\nnamespace slope {{\n{alone.text}\n}}\n",
        torch.cat((both.numbers, alone.numbers)),
        torch.cat((both.integers, alone.integers)),
        max(both.workspace, alone.workspace),
        both.statements + alone.statements,
    )


def load(translation: Translation, num_chains: int, size: int, *parts: str) -> NativeDensity:
    """Compile a translated density of ``size`` parameters for a number of chains.

    ``parts`` are the files that call it: ``MACHINE``, ``PATHS`` or ``STEPS``.

    Raises:
        Unsupported: The compiler failed.
    """
    width = 8 if num_chains > 4 and _has_wide_registers() else 4
    return NativeDensity(translation, width, size, parts)


def _has_wide_registers() -> bool:
    return "avx512f" in _machine()
