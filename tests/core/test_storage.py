"""Storage: exact, without pickle, and never without a good save."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesgen import storage
from bayesgen.storage import flatten, read_folder, unflatten, write_bytes, write_folder


def bits(x: torch.Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def data_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ------------------------------------------------------------------ round trip
def test_tensors_come_back_bit_by_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    odd = torch.tensor([math.nan, -math.nan, math.inf, -0.0, 5e-324, 0.1], dtype=torch.float64)
    tensors = {
        "float64": base,
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": base[:, :1].expand(6, 3),
        "shares memory": base,
        "float32": base.float(),
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "bool": base > 0,
        "int64": torch.arange(3) * 2**60,
        "uint8": torch.arange(256).to(torch.uint8),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "odd": odd,
        "with/slash and ünicode": odd,
        "parameter": torch.nn.Parameter(base.float()),
    }
    write_folder(tmp_path / "a" / "b", tensors=tensors, config={"x": [1, None, "ü"]})
    back, config, files = read_folder(tmp_path / "a" / "b")
    assert config == {"x": [1, None, "ü"]}
    assert files == {}
    assert set(back) == set(tensors)
    for name, x in tensors.items():
        assert back[name].dtype == x.dtype, name
        assert back[name].shape == x.shape, name
        assert bits(back[name]) == bits(x), name


@pytest.mark.gpu
def test_cuda_tensors(tmp_path: Path) -> None:
    x = torch.randn(5, device="cuda")
    write_folder(tmp_path / "a", tensors={"x": x}, config={})
    back = read_folder(tmp_path / "a")[0]["x"]
    assert back.device.type == "cpu"
    assert torch.equal(back, x.cpu())


def test_files_and_no_tensors(tmp_path: Path) -> None:
    files = {"config.json": b"not ours", "tensors.safetensors": b"\0", "a.b-c.nc": b"1", "x": b""}
    for _ in range(3):
        write_folder(tmp_path / "a", tensors={}, config=None, files=files)
    assert read_folder(tmp_path / "a") == ({}, None, files)
    assert len(data_files(tmp_path / "a")) == 7  # nothing stale, whatever the names


def test_a_new_save_replaces_the_old_and_leaves_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_folder(folder, tensors={"x": torch.zeros(2)}, config=1, files={"old.txt": b"old"})
    (folder / "notes.txt").write_text("mine")
    write_folder(folder, tensors={"y": torch.ones(2)}, config=2)
    tensors, config, files = read_folder(folder)
    assert list(tensors) == ["y"]
    assert config == 2
    assert files == {}
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(data_files(folder)) == 4  # manifest, tensors, config, notes


def test_a_save_can_be_moved(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", tensors={"x": torch.zeros(2)}, config=1)
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_folder(str(tmp_path / "b"))[1] == 1


# ------------------------------------------------------------------ refusals
def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"not empty and not a bayesgen save .*'thesis\.tex'"):
        write_folder(tmp_path, tensors={}, config={})
    assert data_files(tmp_path) == ["thesis.tex"]
    (tmp_path / "thesis.tex").rename(tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="not a manifest of bayesgen"):
        write_folder(tmp_path, tensors={}, config={})
    (tmp_path / "manifest.json").write_text('{"format": "other", "version": 1, "files": {}}')
    with pytest.raises(ValueError, match="not a manifest of bayesgen"):
        write_folder(tmp_path, tensors={}, config={})
    with pytest.raises(ValueError, match="is a file; choose the name of a new folder"):
        write_folder(tmp_path / "manifest.json", tensors={}, config={})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tensors": {"x": [1.0]}, "config": {}}, TypeError, r"tensors\['x'\] is list; convert"),
        ({"tensors": {}, "config": math.nan}, ValueError, "config is not JSON"),
        ({"tensors": {}, "config": {"x": torch.zeros(1)}}, ValueError, "through .*flatten"),
        ({"tensors": {}, "config": 0, "files": {"../x": b""}}, ValueError, "file name '../x'"),
        ({"tensors": {}, "config": 0, "files": {".x": b""}}, ValueError, "file name '.x'"),
    ],
)
def test_bad_arguments_touch_nothing(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_folder(tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()


def saved(tmp_path: Path) -> Path:
    write_folder(tmp_path / "a", tensors={"x": torch.arange(9.0)}, config={"k": 1})
    return tmp_path / "a"


def edit_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def test_missing_saves(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no finished save"):
        read_folder(tmp_path)
    folder = saved(tmp_path)
    next(folder.glob("tensors-*")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks its file tensors-"):
        read_folder(folder)


def test_damaged_saves(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    path = next(folder.glob("tensors-*"))
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"has \d+ bytes, but \d+ were saved: it is truncated"):
        read_folder(folder)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit
    with pytest.raises(ValueError, match="is damaged: its content is not what was saved"):
        read_folder(folder)
    path.write_bytes(content)
    assert read_folder(folder)[1] == {"k": 1}
    (folder / "manifest.json").write_text('{"format": "bayesgen-fol')
    with pytest.raises(ValueError, match="is damaged or not a manifest"):
        read_folder(folder)


def test_newer_formats_are_named_and_can_be_overwritten(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    edit_manifest(folder, version=2)
    with pytest.raises(ValueError, match="format version 2, .* reads up to 1; update bayesgen"):
        read_folder(folder)
    write_folder(folder, tensors={}, config=3)
    assert read_folder(folder)[1] == 3


def test_a_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (tmp_path / "secret").write_bytes(b"s")
    entry = {"name": "../secret", "size": 1, "sha256": ""}
    edit_manifest(folder, files={"config.json": entry})
    with pytest.raises(ValueError, match="names a file outside"):
        read_folder(folder)
    edit_manifest(folder, files={})
    with pytest.raises(ValueError, match="is damaged"):
        read_folder(folder)


# ------------------------------------------------------------------ crashes and other processes
def test_a_failed_save_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at each of the steps of a save."""
    folder = saved(tmp_path)
    write_through, replace = storage._write_through, os.replace
    for fail_at in range(4):
        calls = 0

        def step(*args: Any, fail_at: int = fail_at) -> None:
            nonlocal calls
            calls += 1
            if calls - 1 == fail_at:
                raise OSError(28, "No space left on device")
            (replace if isinstance(args[1], Path) else write_through)(*args)

        monkeypatch.setattr(storage, "_write_through", step)
        monkeypatch.setattr(storage.os, "replace", step)
        with pytest.raises(OSError, match="No space"):
            write_folder(folder, tensors={"x": torch.zeros(1)}, config="new")
        monkeypatch.undo()
        tensors, config, _ = read_folder(folder)
        assert config == {"k": 1}
        assert torch.equal(tensors["x"], torch.arange(9.0))
    write_folder(folder, tensors={}, config="new")
    assert len(data_files(folder)) == 3  # what the failures left is gone


def test_write_bytes_replaces_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.csv"
    write_bytes(path, b"old")
    write_bytes(str(path), b"new")
    assert path.read_bytes() == b"new"

    def fail(*_: object) -> None:
        raise OSError("unplugged")

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError, match="unplugged"):
        write_bytes(path, b"newer")
    assert path.read_bytes() == b"new"
    assert data_files(tmp_path) == ["out.csv"]


WRITER = """
import sys, torch
torch.set_num_threads(1)
from bayesgen.storage import write_folder
folder, i = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
while True:
    i += 1
    x = torch.full((20_000,), float(i), dtype=torch.float64)
    write_folder(folder, tensors={"x": x}, config={"i": i}, files={"i.txt": str(i).encode()})
    print(i, flush=True)
"""


def start_writer(folder: Path, i: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(folder), str(i)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def check_whole(folder: Path) -> int:
    """All parts of the save belong to the same one; its number."""
    tensors, config, files = read_folder(folder)
    i: int = config["i"]
    assert files == {"i.txt": str(i).encode()}
    assert torch.equal(tensors["x"], torch.full((20_000,), float(i), dtype=torch.float64))
    return i


FORKING = """
import os, sys, torch
torch.set_num_threads(1)
from bayesgen.storage import write_folder
for line in sys.stdin:  # one child that saves without end for each line
    pid = os.fork()
    if pid == 0:
        i = int(line)
        while True:
            i += 1
            x = torch.full((20_000,), float(i), dtype=torch.float64)
            write_folder(sys.argv[1], tensors={"x": x}, config={"i": i},
                         files={"i.txt": str(i).encode()})
            os.write(1, b"saved %d\\n" % i)
    os.write(1, b"pid %d\\n" % pid)
    os.waitpid(pid, 0)
    os.write(1, b"dead\\n")
"""


def kill_many(folder: Path, times: int) -> None:
    """Kill -9 a process that saves without end, at random moments; check what is left each time.

    The processes are forked from one that has imported torch already, or this would take minutes.
    """
    moments = random.Random(0)
    reached = left_behind = 0
    parent = subprocess.Popen(
        [sys.executable, "-c", FORKING, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    try:
        for _ in range(times):
            print(reached, file=parent.stdin, flush=True)
            acknowledged, pid = reached, 0
            while pid == 0 or acknowledged == reached:  # until it runs and has saved once
                word, number = parent.stdout.readline().split()
                if word == "pid":
                    pid = int(number)
                else:
                    acknowledged = int(number)
            time.sleep(moments.random() * 0.03)
            os.kill(pid, signal.SIGKILL)
            while (line := parent.stdout.readline()) != "dead\n":
                acknowledged = int(line.split()[1])
            found = check_whole(folder)
            assert found in (acknowledged, acknowledged + 1), "a finished save was lost"
            left_behind += len(data_files(folder)) > 4
            reached = found
    finally:
        parent.kill()
        parent.wait()
        parent.stdin.close()
        parent.stdout.close()
    assert left_behind > 0, "no kill hit a save: the test proves nothing"
    write_folder(folder, tensors={}, config={})
    assert len(data_files(folder)) == 3


def test_kill_while_saving(tmp_path: Path) -> None:
    kill_many(tmp_path / "a", 20)


@pytest.mark.slow
def test_kill_while_saving_200_times(tmp_path: Path) -> None:
    kill_many(tmp_path / "a", 200)


def test_readers_see_old_or_new_while_two_processes_save(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    writers = [start_writer(folder, i) for i in (0, 1_000_000)]
    seen = set()
    try:
        deadline = time.monotonic() + 1.5
        while not (folder / "manifest.json").exists():
            assert time.monotonic() < deadline + 20
        while time.monotonic() < deadline:
            seen.add(check_whole(folder))
    finally:
        for writer in writers:
            assert writer.poll() is None, "a writer failed"
            writer.kill()
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
    assert len({i < 1_000_000 for i in seen}) == 2
    assert len(seen) > 10


# ------------------------------------------------------------------ flatten
def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor)
)
keys = st.text(max_size=5).filter(lambda k: not k.startswith("$") and "/" not in k)
nested = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)


@given(nested)
def test_flatten_round_trip_through_json(value: Any) -> None:
    tensors, config = flatten(value)
    text = json.dumps(config, allow_nan=False)
    assert equal(value, unflatten(tensors, json.loads(text)))


def test_nested_config_through_a_folder(tmp_path: Path) -> None:
    value = {
        "prior": {"loc": torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).T},
        "parts": [torch.tensor(1), {"scale": torch.tensor([0.5])}, (1, math.inf)],
    }
    tensors, config = flatten(value)
    assert sorted(tensors) == ["parts/0", "parts/1/scale", "prior/loc"]
    write_folder(tmp_path / "a", tensors=tensors, config=config)
    assert equal(value, unflatten(*read_folder(tmp_path / "a")[:2]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, object()]}, "the value at a/1 is object; allowed are tensors"),
        ({"a": {1: 2}}, "the key 1 at a must be a string"),
        ({"$tensor": 1}, "key '.tensor' at the top"),
        ({"a/b": 1}, "key 'a/b'"),
        ({"a": torch.float64}, "the value at a is dtype"),
    ],
)
def test_flatten_names_what_it_cannot_hold(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        flatten(value)


def test_unflatten_names_a_missing_tensor() -> None:
    with pytest.raises(ValueError, match="the tensor 'x' is missing from the save"):
        unflatten({}, {"a": {"$tensor": "x"}})
