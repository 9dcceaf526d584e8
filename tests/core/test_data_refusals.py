"""Bad input: an error that says where, what is allowed, and how to get there."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
import xarray as xr

from bayesgen.data import Schema, as_dataset
from bayesgen.tables import sources as sources_module

NAN = float("nan")
NUMBERS = [[1.0, 2.0], [3.0, NAN], [5.0, 6.0]]


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "size": [1.5, NAN, -2.0, 0.25],
            "count": pd.array([3, 0, None, 7], dtype="Int64"),
            "flag": pd.array([True, False, None, True], dtype="boolean"),
            "colour": ["red", None, "blue", "red"],
        }
    )


SCHEMA = Schema(
    ("size", "count", "flag", "colour"),
    ("real", "count", "binary", "category"),
    (None, None, None, ("blue", "red")),
)


class Odd:
    pass


GOOD = {"x": [1.0, 2.0, 3.0], "k": ["a", "b", "a"]}
ID = [f"id{i}" for i in range(30)]

REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("inf", [[1.0, 2.0], [3.0, np.inf]], ValueError, r"row 1, column 'x1' is inf.*np\.isinf"),
    ("-inf", pd.DataFrame({"a": [0.0, -np.inf]}), ValueError, "row 1, column 'a' is -inf"),
    ("empty list", [], ValueError, "no rows"),
    ("empty", np.empty((0, 3)), ValueError, "no rows"),
    ("no columns", np.empty((3, 0)), ValueError, "no columns"),
    ("empty frame", pd.DataFrame(), ValueError, "no columns"),
    ("frame without rows", pd.DataFrame({"x": []}), ValueError, "no rows"),
    ("3-d", np.zeros((2, 3, 4)), ValueError, r"shape is \(2, 3, 4\).*reshape\(len\(x\), -1\)"),
    ("4-d tensor", torch.zeros(2, 3, 4, 4), ValueError, r"shape is \(2, 3, 4, 4\)"),
    ("scalar", 3.0, ValueError, r"single number 3; pass \[\[3\]\]"),
    ("scalar tensor", torch.tensor(3.0), ValueError, "single number"),
    ("complex", np.zeros((2, 2), complex), ValueError, "complex128.*real part"),
    (
        "complex tensor",
        torch.zeros(2, dtype=torch.complex64),
        ValueError,
        r"complex64; pass x\.real",
    ),
    ("dates", np.array(["2020-01-01"], "M8[D]"), ValueError, "datetime64.*days since"),
    ("text array", np.array([["a", "b"]]), ValueError, r"holds text.*DataFrame\(x"),
    ("text objects", np.array([["a", 1]], object), ValueError, r"holds text.*DataFrame\(x"),
    ("object", np.array([[1.0, Odd()]], object), ValueError, "row 1 of the data holds .*Odd"),
    ("nested", np.array([[1, 2]], object), None, ""),  # type: ignore[list-item]
    ("ragged", [[1.0, 2.0], [3.0]], ValueError, "row 0 has 2 and row 1 has 1; write NaN"),
    ("list of dicts", [{"a": 1}], TypeError, r"list of dicts; pass pandas\.DataFrame\(rows\)"),
    ("odd", Odd(), TypeError, "data must be a numpy array.*but got Odd"),
    ("set", {1.0, 2.0}, TypeError, "but got set"),
    ("None", None, TypeError, "but got NoneType"),
    ("generator", (i for i in range(3)), TypeError, "but got generator"),
    ("structured", np.zeros(2, [("a", float)]), ValueError, r"structured array; pass pandas"),
    ("sparse", torch.eye(2).to_sparse(), ValueError, r"x\.to_dense\(\)"),
    ("lazy", pl.LazyFrame({"a": [1]}), TypeError, r"frame\.collect\(\)"),
    ("large integers", np.array([2**53 + 1]), ValueError, r"9007199254740993, beyond 2\*\*53"),
    ("large tensor", torch.tensor([-(2**60)]), ValueError, r"beyond 2\*\*53"),
    ("large in frame", pd.DataFrame({"id": [2**60]}), ValueError, r"column 'id'.*beyond 2\*\*53"),
    ("large in polars", pl.DataFrame({"id": [2**60]}), ValueError, r"column 'id'.*beyond"),
    ("large unsigned", np.array([2**64 - 1], np.uint64), ValueError, r"beyond 2\*\*53"),
    ("large objects", np.array([10**30, 1], object), ValueError, r"beyond 2\*\*53"),
    (
        "number among text",
        pd.DataFrame({"x": ["1.5", "2", "3", "oops"]}),
        ValueError,
        r"column 'x' holds numbers, but row 3 holds the text 'oops'.*kinds=\{'x': 'category'\}",
    ),
    (
        "numbers as text",
        pd.DataFrame({"x": ["1.5", "2"]}),
        ValueError,
        r"'x' holds numbers written as text.*frame\['x'\]\.astype\(float\)",
    ),
    (
        "mixed objects",
        pd.DataFrame({"x": [1.5, "a"]}),
        ValueError,
        r"column 'x' mixes text \('a' in row 1\) with float \(1\.5 in row 0\)",
    ),
    (
        "identifier",
        pd.DataFrame({"x": ID}),
        ValueError,
        "'x' holds text that is different in every",
    ),
    (
        "date column",
        pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}),
        ValueError,
        "column 'when' is datetime64.*days since",
    ),
    (
        "polars dates",
        pl.DataFrame({"when": [datetime.date(2020, 1, 1)]}),
        ValueError,
        "column 'when' is Date",
    ),
    ("complex column", pd.DataFrame({"z": [1j]}), ValueError, "column 'z' is complex"),
    ("duplicates", pd.DataFrame([[1, 2]], columns=["a", "a"]), ValueError, "'a' occurs more than"),
    (
        "lengths",
        {"a": [1, 2], "b": [1]},
        ValueError,
        "column 'b' has 1 rows, but column 'a' has 2",
    ),
    ("wide column", {"a": np.zeros((2, 2))}, ValueError, r"column 'a' has shape \(2, 2\)"),
    (
        "2-d variable",
        xr.Dataset({"a": (("r", "s"), np.zeros((2, 2)))}),
        ValueError,
        "variable 'a' has dimensions",
    ),
    ("no file", "nowhere.csv", FileNotFoundError, "there is no file 'nowhere.csv'"),
]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [r[1:] for r in REFUSED if r[2]],
    ids=[r[0] for r in REFUSED if r[2]],
)
def test_bad_input_is_refused_with_a_way_out(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_dataset(x)


AT_TEST_TIME: list[tuple[str, Any, str]] = [
    (
        "wide",
        np.zeros((2, 5)),
        "got 5 columns, but 4 are needed: 'size', 'count', 'flag', 'colour'",
    ),
    ("row", np.zeros(4), r"got 1 column, but 4 are needed.*pass x\[None, :\]"),
    ("missing", frame().drop(columns="flag"), "missing column 'flag'; got 'size'.*NaN"),
    ("extra", frame().assign(more=1.0), r"unknown column 'more'; needed are.*frame\[\[\.\.\.\]\]"),
    (
        "level",
        frame().assign(colour=["red", "green", "red", "red"]),
        "row 1, column 'colour' holds the unknown level 'green'; allowed are 'blue', 'red'",
    ),
    ("code", np.array([[1.0, 2.0, 1.0, 7.0]]), "column 'colour' holds the unknown level '7'"),
    (
        "text",
        frame().assign(size=["a", "b", None, "c"]),
        "row 0, column 'size' holds text, 'a', but the column is real: pass a number",
    ),
    ("binary", frame().assign(flag=[0, 1, 2, 1]), "row 2, column 'flag' holds 2, but .* binary"),
    ("inf", frame().assign(size=[0, np.inf, 0, 0]), "row 1, column 'size' is inf"),
]


@pytest.mark.parametrize(
    ("x", "message"), [r[1:] for r in AT_TEST_TIME], ids=[r[0] for r in AT_TEST_TIME]
)
def test_data_that_do_not_fit_the_schema_are_refused(x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_dataset(x, schema=SCHEMA)


def test_errors_in_files_name_the_row_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 64)
    lines = [f"{i},a" for i in range(100)]
    lines[70] = "inf,a"
    (tmp_path / "t.csv").write_text("x,k\n" + "\n".join(lines))
    for in_memory in (True, False):
        with pytest.raises(ValueError, match="row 70, column 'x' is inf"):
            as_dataset(tmp_path / "t.csv", in_memory=in_memory)
    lines[70] = "oops,a"
    (tmp_path / "t.csv").write_text("x,k\n" + "\n".join(lines))
    for in_memory in (True, False):
        with pytest.raises(ValueError, match="row 70 holds the text 'oops'"):
            as_dataset(tmp_path / "t.csv", in_memory=in_memory)
    lines[70] = "1,a,b"
    (tmp_path / "t.csv").write_text("x,k\n" + "\n".join(lines))
    with pytest.raises(ValueError, match=r"t\.csv cannot be read.*Expected 2 columns, got 3"):
        as_dataset(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "is empty; a header"),
        ("t.csv", b"x,y\n", "no rows"),
        ("t.csv", b"1.5,2\n3,4\n", "first line .* holds numbers"),
        ("t.csv", b",x\n0,1\n", r"to_csv\(path, index=False\)"),
        ("t.csv", b"x\n2020-01-01\n", "column 'x' is date32.*days since"),
        ("t.csv", b"\xff\xfe\x00\n1\n", "not UTF-8"),
        ("t.csv", b"x,x\n1,2\n", "'x' occurs more than once"),
        ("t.parquet", b"nonsense", "cannot be read as Parquet"),
        ("t.npy", b"nonsense", "cannot be read as an array"),
        ("t.npz", b"nonsense", r"allowed are files .csv, .tsv, .parquet and .npy.*numpy.load"),
        ("t.xlsx", b"nonsense", "unknown type"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        as_dataset(tmp_path / name)


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([Odd()], object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as an array"):
        as_dataset(tmp_path / "t.npy")


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="schema or kinds, not both"):
        as_dataset(frame(), schema=SCHEMA, kinds="real")
    with pytest.raises(TypeError, match=r"pass \['size'\]"):
        as_dataset(frame(), columns="size")
    with pytest.raises(ValueError, match="there is no column 'nope'; there are 'size'"):
        as_dataset(frame(), columns=["nope"])
    with pytest.raises(ValueError, match="columns has 1 names .* the data have 2"):
        as_dataset(NUMBERS, columns=["a"])
    with pytest.raises(ValueError, match="kinds names column 'y', but the columns are 'x0', 'x1'"):
        as_dataset(NUMBERS, kinds={"y": "real"})
    with pytest.raises(ValueError, match="kind 'number'; allowed are real"):
        as_dataset(NUMBERS, kinds="number")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'x1' is to be a count, but has fractional"):
        as_dataset([[1.0, 1.5]], kinds="count")
    with pytest.raises(ValueError, match="'x0' is to be a count, but has negative"):
        as_dataset([[-1, 1]], kinds="count")
    with pytest.raises(ValueError, match="'x1' is to be binary .* row 0 holds 2"):
        as_dataset([[1, 2]], kinds="binary")
    with pytest.raises(ValueError, match="'k' is to be real, but row 0 holds text, 'a'"):
        as_dataset(GOOD, kinds="real")
    with pytest.raises(ValueError, match="in_memory=False streams a file"):
        as_dataset(NUMBERS, in_memory=False)
