"""Rows in batches and parts, from memory and from disk, at flat memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesgen.data import Dataset, as_dataset
from bayesgen.tables import rows as rows_module
from bayesgen.tables import sources as sources_module


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.allclose(a, b.to(a), equal_nan=True, rtol=0, atol=0))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few rows already span many blocks."""
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 128)
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 128)


@pytest.fixture(params=["memory", "npy", "csv", "parquet"])
def numbered(request: pytest.FixtureRequest, tmp_path: Path, small_blocks: None) -> Dataset:
    """A hundred rows ``(i, 2 i)``, streamed in all but one case."""
    x = np.stack([np.arange(100.0), 2 * np.arange(100.0)], 1)
    table = pd.DataFrame(x, columns=["a", "b"])
    if request.param == "memory":
        return as_dataset(table)
    path = tmp_path / f"t.{request.param}"
    if request.param == "npy":
        np.save(path, x)
    elif request.param == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path, row_group_size=17)
    return as_dataset(path, in_memory=False)


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_batches_hold_every_row_once(numbered: Dataset, size: int) -> None:
    batches = list(numbered.batches(size, dtype=torch.float32))
    assert all(len(b) == size for b in batches[:-1])
    assert len(batches) == -(-100 // size)
    assert batches[0].dtype == torch.float32
    assert torch.equal(torch.cat(batches)[:, 0], torch.arange(100.0))


def test_shuffled_batches(numbered: Dataset) -> None:
    def order(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(list(numbered.batches(13, generator=generator)))[:, 0]

    assert torch.equal(order(0).sort().values, torch.arange(100.0, dtype=torch.float64))
    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))
    assert not torch.equal(order(0), torch.arange(100.0, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    first = list(numbered.batches(13, generator=generator))
    second = list(numbered.batches(13, generator=generator))
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_subset_and_split(numbered: Dataset) -> None:
    def rows(data: Dataset) -> list[float]:
        return torch.cat(list(data.batches(11)))[:, 0].tolist()

    assert rows(numbered.subset(slice(10, 40, 10))) == [10, 20, 30]
    assert rows(numbered.subset([-1])) == [99]
    mask = np.arange(100) % 2 == 0
    even = numbered.subset(mask)
    assert rows(even.subset([3, 5])) == [6, 10]
    left, right = numbered.split(0.3, torch.Generator().manual_seed(0))
    assert (left.num_rows, right.num_rows) == (30, 70)
    assert sorted(rows(left) + rows(right)) == list(range(100))
    again = as_dataset(np.arange(100.0)).split(0.3, torch.Generator().manual_seed(0))[0]
    assert again.tensor()[:, 0].tolist() == rows(left)  # the same however the rows are held
    shuffled = torch.cat(list(left.batches(7, generator=torch.Generator().manual_seed(1))))
    assert sorted(shuffled[:, 0].tolist()) == rows(left)
    assert shuffled[:, 0].tolist() != rows(left)


def test_subset_refuses(numbered: Dataset) -> None:
    with pytest.raises(ValueError, match="would be empty"):
        numbered.subset([])
    with pytest.raises(IndexError, match="row 100 is out of range for 100 rows"):
        numbered.subset([0, 100])
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), not \(100,\)"):
        numbered.subset(np.array([True, False, True]))
    with pytest.raises(TypeError, match="got floats"):
        numbered.subset(torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"fraction=1\.0 of 100 rows leaves one part empty"):
        numbered.split(1.0, torch.Generator())
    with pytest.raises(ValueError, match="batch_size must be at least 1, but got 0"):
        numbered.batches(0)
    if numbered.in_memory:
        assert numbered.subset([5, 5, 1]).tensor()[:, 0].tolist() == [5, 5, 1]
    else:
        with pytest.raises(ValueError, match="only once"):
            numbered.subset([5, 5, 1])


def test_quoted_line_ends_do_not_split_records(tmp_path: Path, small_blocks: None) -> None:
    table = pd.DataFrame(
        {"k": [f'a"\n{i % 3}\n' for i in range(60)], "x": np.arange(60.0)},
    )
    table.to_csv(tmp_path / "t.csv", index=False)
    data = as_dataset(tmp_path / "t.csv", in_memory=False)
    assert data.num_rows == 60
    assert data.fingerprint() == as_dataset(table).fingerprint()
    crlf = (tmp_path / "t.csv").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "crlf.csv").write_bytes(b"\xef\xbb\xbf" + crlf)
    assert as_dataset(tmp_path / "crlf.csv", in_memory=False, columns=["x"]).num_rows == 60


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.save(path, np.zeros((4, 2)))
    data = as_dataset(path, in_memory=False)
    np.save(path, np.ones((5, 2)))
    with pytest.raises(ValueError, match="the file has changed"):
        list(data.batches(2))


def test_row_labels_of_a_parquet_frame_are_no_column(tmp_path: Path) -> None:
    table = pd.DataFrame({"x": [1.0, 2.0, 3.0]}).iloc[[2, 0]]
    table.to_parquet(tmp_path / "t.parquet")
    assert as_dataset(tmp_path / "t.parquet").columns == ("x",)


def test_large_files_stream_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "t.npy", np.zeros((1000, 2)))
    assert as_dataset(tmp_path / "t.npy").in_memory
    monkeypatch.setattr("bayesgen.data.MAX_BYTES_IN_MEMORY", 1000)
    assert not as_dataset(tmp_path / "t.npy").in_memory
    assert not as_dataset(np.load(tmp_path / "t.npy", mmap_mode="r")).in_memory
    assert as_dataset(tmp_path / "t.npy", in_memory=True).in_memory


MEMORY = """
import re, sys, torch
torch.set_num_threads(1)
from bayesgen.data import as_dataset
def peak():  # not getrusage: its maximum is inherited from the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
big, small, in_memory = sys.argv[1:]
warm = as_dataset(small, in_memory=False)  # whatever is loaded once
warm.summary(), list(warm.batches(1000))
before = peak()
data = as_dataset(big, in_memory=in_memory == "True")
data.summary()
print(sum(len(b) for b in data.batches(5000)), peak() - before)
"""
MEGABYTES = 200


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", ["npy", "parquet", pytest.param("csv", marks=pytest.mark.slow)])
def test_streaming_needs_flat_memory(tmp_path: Path, suffix: str) -> None:
    """A file of 160 MB in float64 passes through; kept blocks alone would need more than that."""
    n = 1_250_000
    x = np.random.default_rng(0).integers(0, 100, (n, 16)) / 4
    paths = []
    for name, part in (("big", x), ("small", x[:1000])):
        table = pa.table({f"c{i}": part[:, i] for i in range(16)})
        paths.append(str(tmp_path / f"{name}.{suffix}"))
        if suffix == "npy":
            np.save(paths[-1], part)
        elif suffix == "parquet":
            pq.write_table(table, paths[-1])
        else:
            import pyarrow.csv

            pyarrow.csv.write_csv(table, paths[-1])

    def more(in_memory: bool) -> float:
        command = [sys.executable, "-c", MEMORY, *paths, str(in_memory)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert int(out[0]) == n
        return float(out[1])

    assert more(in_memory=False) < MEGABYTES
    if suffix == "npy":  # the measurement sees what is not streamed
        assert more(in_memory=True) > MEGABYTES


@given(
    records=st.lists(
        st.tuples(st.text('ab",; \n\u00e9', max_size=12), st.floats(-10, 10)),
        min_size=1,
        max_size=40,
    ),
    block=st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_csv_is_split_between_records_only(
    records: list[tuple[str, float]], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    table = pd.DataFrame(records, columns=["k", "x"])
    table["k"] = "k" + table["k"] + "k"
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    table.to_csv(path, index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "BLOCK_BYTES", block)
        data = as_dataset(path, in_memory=False, kinds={"k": "category"})
        assert data.fingerprint() == as_dataset(table, kinds={"k": "category"}).fingerprint()
