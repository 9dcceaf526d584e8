"""Folders without pickle, replaced atomically: a reader sees the old save or the new one, whole.

A folder holds data files with unique names and one ``manifest.json`` that lists them with their
SHA-256. A save writes new data files, flushes them to disk, and then replaces the manifest in one
step, which is the commit; files that the new manifest does not list are removed afterwards.
Tensors are safetensors, everything else JSON or bytes; reading runs no code that a file names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

__all__ = ["flatten", "read_folder", "unflatten", "write_bytes", "write_folder"]

FORMAT = "bayesgen-folder"
VERSION = 1
MANIFEST = "manifest.json"
_OURS = re.compile(r".*-[0-9a-f]{32}(\..+)?\Z")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\Z")
_READ_ATTEMPTS = 50


# ------------------------------------------------------------------ writing
def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write one file so that it is either the old or the new one, whatever happens meanwhile."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        _write_through(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _write_through(path: Path, content: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk; Windows has no such call."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other writers out of a folder; the lock dies with the process. Not on Windows."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_folder(
    path: str | os.PathLike[str],
    *,
    tensors: Mapping[str, Tensor],
    config: Any,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Save tensors, a JSON value and named byte strings into the folder ``path``, atomically.

    A process killed at any moment leaves the previous save readable, or the new one. Files in the
    folder that are not ours stay.

    Args:
        path: The folder; made if absent. If it exists it must be empty or an earlier save.
        tensors: By name, of any shape, layout and device; values are kept bit by bit.
        config: A JSON value; see :func:`flatten` for nested values with tensors in them.
        files: Contents by plain file name, such as ``{"history.csv": b"..."}``.

    Raises:
        ValueError: If the folder holds other things, or ``config`` is not JSON.
        TypeError: If a value in ``tensors`` is not a tensor.
    """
    contents = _contents(tensors, config, files or {})
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose the name of a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _check_ours(folder)
        _commit(folder, contents)


def _contents(
    tensors: Mapping[str, Tensor], config: Any, files: Mapping[str, bytes]
) -> dict[str, bytes]:
    """The bytes of all data files, by role: bad input fails here, before a file is touched."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"tensors[{name!r}] is {type(tensor).__name__}; convert it by torch.as_tensor."
            )
        # A copy each: safetensors refuses tensors that share memory.
        plain[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        text = json.dumps(config, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config is not JSON ({error}); pass it through bayesgen.storage.flatten."
        ) from error
    contents = {"tensors.safetensors": save_tensors(plain), "config.json": text.encode()}
    for name, content in files.items():
        if not _PLAIN.match(name):
            raise ValueError(
                f"the file name {name!r} must be letters, digits, '_', '-' and '.' only."
            )
        contents[f"files/{name}"] = content
    return contents


def _check_ours(folder: Path) -> None:
    """Refuse a folder in which something else lives."""
    names = [entry.name for entry in folder.iterdir()]
    if MANIFEST in names:
        _read_manifest(folder, any_version=True)
    elif foreign := sorted(name for name in names if not _OURS.match(name)):
        raise ValueError(
            f"the folder {folder} is not empty and not a bayesgen save (it holds {foreign[0]!r}); "
            f"choose a new folder."
        )


def _commit(folder: Path, contents: Mapping[str, bytes]) -> None:
    entries = {}
    for role, content in contents.items():
        stem, _, suffix = role.rpartition("/")[2].partition(".")
        name = f"{stem}-{uuid.uuid4().hex}" + (f".{suffix}" if suffix else "")
        _write_through(folder / name, content)
        digest = hashlib.sha256(content).hexdigest()
        entries[role] = {"name": name, "size": len(content), "sha256": digest}
    manifest = {"format": FORMAT, "version": VERSION, "files": entries}
    _sync_folder(folder)
    write_bytes(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    _sync_folder(folder.parent)
    kept = {entry["name"] for entry in entries.values()}
    for entry in folder.iterdir():
        if _OURS.match(entry.name) and entry.name not in kept:
            entry.unlink(missing_ok=True)


# ------------------------------------------------------------------ reading
def read_folder(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any, dict[str, bytes]]:
    """Read what :func:`write_folder` saved: ``(tensors, config, files)``, tensors on the CPU.

    Raises:
        FileNotFoundError: If there is no finished save in ``path``, or one of its files is gone.
        ValueError: If it is damaged, foreign, or written by a newer version.
    """
    folder = Path(path)
    for attempt in range(_READ_ATTEMPTS):
        manifest = _read_manifest(folder)
        try:
            contents = {role: _verified(folder, entry) for role, entry in manifest.items()}
            break
        except FileNotFoundError:
            # A save that ran meanwhile has removed the old files: then there is a new manifest.
            if attempt + 1 == _READ_ATTEMPTS or _read_manifest(folder) == manifest:
                raise
            time.sleep(0.001 * attempt)
    try:
        tensors = load_tensors(contents.pop("tensors.safetensors"))
        config = json.loads(contents.pop("config.json"))
    except (KeyError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"the save in {folder} is damaged: {error!r}.") from error
    return tensors, config, {role.removeprefix("files/"): c for role, c in contents.items()}


def _read_manifest(folder: Path, *, any_version: bool = False) -> dict[str, dict[str, Any]]:
    """The entries of the manifest, by role."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "holds no finished save (no manifest.json)" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"the folder {folder} {what}.")
    try:
        manifest = json.loads(path.read_bytes())
        ours = manifest["format"] == FORMAT
        version, entries = int(manifest["version"]), dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not a manifest of bayesgen.") from error
    if not ours:
        raise ValueError(f"{path} is not a manifest of bayesgen; choose another folder.")
    if version > VERSION and not any_version:
        raise ValueError(
            f"the save in {folder} has format version {version}, but this bayesgen reads up to "
            f"{VERSION}; update bayesgen."
        )
    return entries


def _verified(folder: Path, entry: Mapping[str, Any]) -> bytes:
    """The content of one file, checked against the manifest."""
    name = str(entry["name"])
    if not _PLAIN.match(name):
        raise ValueError(f"the manifest of {folder} names a file outside it: {name!r}.")
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"the save in {folder} lacks its file {name}.") from None
    if len(content) != entry["size"]:
        raise ValueError(
            f"{folder / name} has {len(content)} bytes, but {entry['size']} were saved: "
            f"it is truncated or was changed."
        )
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError(f"{folder / name} is damaged: its content is not what was saved.")
    return content


# ------------------------------------------------------------------ nested values
def flatten(nested: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts and lists into tensors by path, and JSON that refers to them.

    Tuples become lists. Numbers that JSON lacks (NaN and infinities) are kept.

    Raises:
        TypeError: If a leaf is neither a tensor nor a JSON value: the message names its path.

    Example:
        >>> tensors, config = flatten({"loc": torch.zeros(2), "tolerance": 1e-6})
        >>> config
        {'loc': {'$tensor': 'loc'}, 'tolerance': 1e-06}
        >>> sorted(unflatten(tensors, config))
        ['loc', 'tolerance']
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(nested, "", tensors)


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = path or "value"
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$") or "/" in key:
                raise TypeError(
                    f"the key {key!r} at {path or 'the top'} must be a string without '/' that "
                    f"does "
                    f"not start with '$'."
                )
        return {k: _flatten(v, f"{path}/{k}" if path else k, tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [
            _flatten(v, f"{path}/{i}" if path else str(i), tensors) for i, v in enumerate(value)
        ]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"the value at {path or 'the top'} is {type(value).__name__}; allowed are tensors, dicts "
        f"with "
        f"string keys, lists, numbers, strings, booleans and None."
    )


def unflatten(tensors: Mapping[str, Tensor], config: Any) -> Any:
    """The inverse of :func:`flatten`."""
    if isinstance(config, list):
        return [unflatten(tensors, value) for value in config]
    if not isinstance(config, dict):
        return config
    if "$tensor" in config:
        if config["$tensor"] not in tensors:
            raise ValueError(f"the tensor {config['$tensor']!r} is missing from the save.")
        return tensors[config["$tensor"]]
    if "$float" in config:
        return float(config["$float"])
    return {key: unflatten(tensors, value) for key, value in config.items()}
