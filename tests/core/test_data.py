"""Data in: every common form gives the same numbers, and bad input a message with a way out."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bayesgen.data import ColumnSummary, Dataset, Schema, as_dataset
from bayesgen.tables import rows as rows_module
from bayesgen.tables import sources as sources_module
from bayesgen.tables.moments import summarise

NAN = float("nan")


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "size": [1.5, NAN, -2.0, 0.25],
            "count": pd.array([3, 0, None, 7], dtype="Int64"),
            "flag": pd.array([True, False, None, True], dtype="boolean"),
            "colour": ["red", None, "blue", "red"],
        }
    )


CODES = torch.tensor(
    [[1.5, 3, 1, 1], [NAN, 0, 0, NAN], [-2.0, NAN, NAN, 0], [0.25, 7, 1, 1]], dtype=torch.float64
)
SCHEMA = Schema(
    ("size", "count", "flag", "colour"),
    ("real", "count", "binary", "category"),
    (None, None, None, ("blue", "red")),
)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.allclose(a, b.to(a), equal_nan=True, rtol=0, atol=0))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few rows already span many blocks."""
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 128)
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 128)


# ------------------------------------------------------------------ forms of input
def table_forms(folder: Path) -> dict[str, Any]:
    pandas_frame = frame()
    arrow = pa.Table.from_pandas(pandas_frame, preserve_index=False)
    pandas_frame.to_csv(folder / "t.csv", index=False)
    pandas_frame.to_csv(folder / "t.tsv", index=False, sep="\t")
    pq.write_table(arrow, folder / "t.parquet", row_group_size=2)
    polars_frame = pl.from_arrow(arrow)
    return {
        "pandas": pandas_frame,
        "pandas objects": pandas_frame.astype(object),
        "pandas arrow": pandas_frame.convert_dtypes(dtype_backend="pyarrow"),
        "pandas categorical": pandas_frame.astype({"colour": "category"}),
        "polars": polars_frame,
        "polars categorical": polars_frame.with_columns(pl.col("colour").cast(pl.Categorical)),
        "polars enum": polars_frame.with_columns(pl.col("colour").cast(pl.Enum(["blue", "red"]))),
        "arrow": arrow,
        "dict": {name: pandas_frame[name].to_numpy(dtype=object) for name in pandas_frame},
        "xarray": xr.Dataset(
            {n: ("row", pandas_frame[n].to_numpy(dtype=object)) for n in pandas_frame}
        ),
        "csv": folder / "t.csv",
        "csv text path": str(folder / "t.csv"),
        "tsv": folder / "t.tsv",
        "parquet": folder / "t.parquet",
    }


def test_every_form_of_table_gives_the_same_dataset(tmp_path: Path) -> None:
    for name, x in table_forms(tmp_path).items():
        data = as_dataset(x)
        assert data.schema == SCHEMA, name
        assert same(data.tensor(), CODES), name
        assert data.in_memory, name
        assert data.has_missing, name


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
@pytest.mark.usefixtures("small_blocks")
def test_streaming_gives_the_same_dataset(tmp_path: Path, suffix: str) -> None:
    forms = table_forms(tmp_path)
    data = as_dataset(forms[suffix], in_memory=False)
    assert not data.in_memory
    assert data.schema == SCHEMA
    assert data.num_rows == 4
    assert same(torch.cat(list(data.batches(3))), CODES)
    assert data.fingerprint() == as_dataset(forms["pandas"]).fingerprint()
    with pytest.raises(ValueError, match=r"batches\(batch_size\)"):
        data.tensor()


NUMBERS = [[1.0, 2.0], [3.0, NAN], [5.0, 6.0]]


@pytest.mark.parametrize(
    "x",
    [
        NUMBERS,
        [[1.0, 2.0], [3.0, None], [5.0, 6.0]],
        tuple(map(tuple, NUMBERS)),
        np.array(NUMBERS),
        np.array(NUMBERS, dtype=np.float32),
        np.array(NUMBERS, dtype=np.float16),
        np.array(NUMBERS, dtype=np.longdouble),
        np.array(NUMBERS, dtype=">f8"),
        np.array(NUMBERS, order="F"),
        np.array(NUMBERS)[::-1][::-1],
        np.array(NUMBERS)[::-1].copy()[::-1],
        np.array(NUMBERS, dtype=object),
        np.ma.masked_array([[1, 2], [3, 99], [5, 6]], [[0, 0], [0, 1], [0, 0]]),
        torch.tensor(NUMBERS),
        torch.tensor(NUMBERS, dtype=torch.bfloat16),
        torch.tensor(NUMBERS, requires_grad=True),
        pd.DataFrame(NUMBERS, columns=["x0", "x1"]),
        xr.DataArray(np.array(NUMBERS), dims=("row", "column")),
        xr.DataArray(np.array(NUMBERS), dims=("a", "b"), coords={"b": ["x0", "x1"]}),
    ],
)
def test_every_form_of_numbers(x: Any) -> None:
    data = as_dataset(x)
    assert data.columns == ("x0", "x1")
    assert same(data.tensor(), torch.tensor(NUMBERS, dtype=torch.float64))
    assert not data.tensor().requires_grad


def test_read_only_arrays_do_not_warn() -> None:
    x = np.arange(4.0)
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(as_dataset(x).tensor()[:, 0], torch.arange(4.0))


@pytest.mark.parametrize(
    ("x", "name"),
    [
        (np.arange(3.0), "x0"),
        ([0.0, 1.0, 2.0], "x0"),
        (torch.arange(3.0), "x0"),
        (pd.Series([0.0, 1, 2]), "x0"),
        (pd.Series([0.0, 1, 2], name="v"), "v"),
        (pl.Series("v", [0.0, 1, 2]), "v"),
        (pl.Series([0.0, 1, 2]), "x0"),
        (xr.DataArray([0.0, 1, 2], dims="row", name="v"), "v"),
        (xr.DataArray([0.0, 1, 2], dims="row"), "x0"),
    ],
)
def test_one_dimension_is_one_column(x: Any, name: str) -> None:
    data = as_dataset(x)
    assert data.columns == (name,)
    assert data.tensor().tolist() == [[0], [1], [2]]


@pytest.mark.gpu
def test_cuda_tensors_stay_on_their_device() -> None:
    x = torch.randn(5, 2, device="cuda")
    data = as_dataset(x)
    assert data.tensor(device="cuda").device.type == "cuda"
    assert same(data.tensor(torch.float32), x.cpu())
    assert next(data.batches(2)).device.type == "cpu"
    assert same(data.summary().mean, x.cpu().double().mean(0))


def test_a_dataset_passes_through() -> None:
    data = as_dataset(NUMBERS)
    assert as_dataset(data) is data
    assert as_dataset(data, schema=data.schema) is data


@given(
    x=hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 30), st.integers(1, 4)),
        elements=st.floats(allow_infinity=False, allow_nan=False),
    )
)
@settings(max_examples=30, deadline=None)
def test_numbers_survive_csv_and_parquet_bit_by_bit(
    x: np.ndarray[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("round")
    table = pd.DataFrame(x, columns=[f"c{i}" for i in range(x.shape[1])])
    expected = as_dataset(x, columns=list(table.columns), kinds="real").fingerprint()
    table.to_csv(folder / "t.csv", index=False)
    table.to_parquet(folder / "t.parquet")
    np.save(folder / "t.npy", x)
    for in_memory in (True, False):
        for suffix in ("csv", "parquet"):
            data = as_dataset(folder / f"t.{suffix}", in_memory=in_memory, kinds="real")
            assert data.fingerprint() == expected
        data = as_dataset(folder / "t.npy", in_memory=in_memory, columns=list(table.columns))
        assert data.fingerprint() == expected


# ------------------------------------------------------------------ kinds, levels, schemas
@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([0, 3, 1], "count"),
        ([0, -3, 1], "real"),
        ([0.0, 3.0, 1.0], "real"),
        ([True, False, True], "binary"),
        (["a", "b", "a"], "category"),
    ],
)
def test_kinds_are_learnt_and_can_be_overridden(column: list[Any], kind: str) -> None:
    assert as_dataset({"x": column}).kinds == (kind,)
    assert as_dataset({"x": column}, kinds={"x": "category"}).kinds == ("category",)


def test_numeric_categories() -> None:
    data = as_dataset({"x": [10, 2, 2], "y": [True, False, True]}, kinds="category")
    assert data.schema.levels == (("2", "10"), ("False", "True"))
    assert data.tensor().tolist() == [[1, 1], [0, 0], [0, 1]]
    again = as_dataset({"y": [True], "x": [2]}, schema=data.schema)
    assert again.tensor().tolist() == [[0, 1]]
    with pytest.raises(ValueError, match=r"could be levels or codes.*Dataset\.from_codes"):
        as_dataset([[2, 1]], schema=data.schema)
    assert Dataset.from_codes(torch.tensor([[0.0, 1.0]]), data.schema).columns == ("x", "y")


def test_categories_of_arrays_are_codes() -> None:
    """So that what a model samples can be passed back to it."""
    x = np.array([[1, 0], [3, 1], [1, 1]])
    data = as_dataset(x, kinds="category")
    assert data.schema.levels == (("0", "1", "2", "3"), ("0", "1"))
    assert np.array_equal(data.tensor(), x)
    assert np.array_equal(as_dataset([[2, 0]], schema=data.schema).tensor(), [[2, 0]])
    with pytest.raises(ValueError, match="unknown level '4'; allowed are '0', '1', '2', '3'"):
        as_dataset([[4, 0]], schema=data.schema)
    for bad in (-1, 0.5, 10**6):
        with pytest.raises(ValueError, match=r"must hold codes 0, 1, \.\.\..*columns=\["):
            as_dataset([[bad], [0]], kinds="category")
    named = as_dataset([[-1], [0.5]], kinds="category", columns=["k"])
    assert named.schema.levels == (("-1", "0.5"),)
    assert same(as_dataset(CODES, schema=SCHEMA).tensor(), CODES)


def test_columns_in_the_users_terms() -> None:
    columns = as_dataset(frame()).to_columns()
    assert columns["colour"].tolist() == ["red", None, "blue", "red"]
    assert as_dataset(columns, schema=SCHEMA).fingerprint() == as_dataset(frame()).fingerprint()
    whole = as_dataset(frame().iloc[[0, 3]]).to_columns()
    assert whole["count"].dtype == np.int64
    again = as_dataset(pd.DataFrame(whole), schema=SCHEMA)
    assert same(again.tensor(), CODES[[0, 3]])


def test_from_codes_checks_the_shape() -> None:
    with pytest.raises(ValueError, match=r"values must be \(n, 4\).* shape is \(2, 3\)"):
        Dataset.from_codes(torch.zeros(2, 3), SCHEMA)


def test_zip_codes_of_a_csv_keep_their_zeros(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("zip,x\n01234,1\n1234,2\n01234,3\n")
    data = as_dataset(tmp_path / "t.csv", kinds={"zip": "category"})
    assert data.schema.levels[0] == ("01234", "1234")
    assert as_dataset(tmp_path / "t.csv", schema=data.schema).fingerprint() == data.fingerprint()


def test_declared_levels_keep_their_order() -> None:
    column = pd.Categorical(["low", "high"], categories=["low", "mid", "high"])
    data = as_dataset(pd.DataFrame({"x": column}))
    assert data.schema.levels == (("low", "mid", "high"),)
    assert data.tensor()[:, 0].tolist() == [0, 2]
    enum = pl.DataFrame({"x": pl.Series(["low", "high"], dtype=pl.Enum(["low", "mid", "high"]))})
    assert as_dataset(enum).schema == data.schema


def test_frames_are_matched_by_name_and_levels_by_meaning() -> None:
    new = frame()[["colour", "flag", "size", "count"]].iloc[[2, 3]]
    assert same(as_dataset(new, schema=SCHEMA).tensor(), CODES[[2, 3]])
    only_red = as_dataset(frame().iloc[[3]], schema=SCHEMA)
    assert only_red.tensor()[0, 3] == 1
    # A Dataset that learnt other levels from fewer rows is coded anew.
    learnt = as_dataset(frame().iloc[[3]])
    assert learnt.schema.levels[3] == ("red",)
    assert same(as_dataset(learnt, schema=SCHEMA).tensor(), CODES[[3]])
    # Arrays are matched by position, also inside a Dataset.
    assert same(as_dataset(CODES[:, :3], schema=_first(3)).tensor(), CODES[:, :3])
    assert same(as_dataset(as_dataset(CODES[:, :3]), schema=_first(3)).tensor(), CODES[:, :3])


def _first(n: int) -> Schema:
    return Schema(SCHEMA.columns[:n], SCHEMA.kinds[:n], SCHEMA.levels[:n])


@pytest.mark.usefixtures("small_blocks")
def test_streams_are_reread_under_another_schema(tmp_path: Path) -> None:
    table_forms(tmp_path)
    stream = as_dataset(tmp_path / "t.csv", in_memory=False).subset([1, 3])
    kept = as_dataset(stream, columns=["colour", "size"], kinds={"colour": "category"})
    assert not kept.in_memory
    assert same(torch.cat(list(kept.batches(10))), CODES[[1, 3]][:, [3, 0]])


def test_columns_select_from_a_table_and_name_an_array() -> None:
    data = as_dataset(frame(), columns=["flag", "size"])
    assert data.columns == ("flag", "size")
    assert same(data.tensor(), CODES[:, [2, 0]])
    assert as_dataset(NUMBERS, columns=["a", "b"]).columns == ("a", "b")


def test_an_all_missing_column_is_allowed_at_test_time_only() -> None:
    new = frame().assign(size=NAN)
    assert as_dataset(new, schema=SCHEMA).tensor()[:, 0].isnan().all()
    with pytest.raises(ValueError, match=r"column 'size' has no observed value; leave it out"):
        as_dataset(new)
    with pytest.raises(ValueError, match="column 'x1' has no observed value"):
        as_dataset([[1.0, NAN], [2.0, NAN]])


def test_rows_without_any_value_are_allowed_with_missing_values() -> None:
    x = [[1.0, 2.0], [NAN, NAN]]
    assert as_dataset(x).summary().count.tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"row 1, column 'x0' is missing.*dropna"):
        as_dataset(x, allow_missing=False)
    assert as_dataset([[1.0, 2.0]], allow_missing=False).num_rows == 1


@given(
    st.lists(
        st.tuples(st.text(min_size=1), st.sampled_from(["real", "count", "category"])),
        min_size=1,
        unique_by=lambda pair: pair[0],
    ),
    st.lists(st.text(), min_size=1, unique=True),
)
def test_schema_round_trip(columns: list[tuple[str, Any]], levels: list[str]) -> None:
    import json

    schema = Schema(
        tuple(name for name, _ in columns),
        tuple(kind for _, kind in columns),
        tuple(tuple(levels) if kind == "category" else None for _, kind in columns),
    )
    assert Schema.from_config(json.loads(json.dumps(schema.to_config()))) == schema


def test_schema_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="kind 'number'; allowed are real, count"):
        Schema(("x",), ("number",), (None,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="category columns, and they alone, have levels"):
        Schema(("x",), ("category",), (None,))
    with pytest.raises(ValueError, match="'x' occurs more than once"):
        Schema(("x", "x"), ("real", "real"), (None, None))
    with pytest.raises(ValueError, match="one kind and one levels entry"):
        Schema(("x",), (), ())


# ------------------------------------------------------------------ refusals
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


# ------------------------------------------------------------------ batches, subsets, splits
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
import resource, sys, torch
torch.set_num_threads(1)
from bayesgen.data import as_dataset
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
list(as_dataset(sys.argv[2], in_memory=False).batches(1000))  # whatever is loaded once
before = peak()
data = as_dataset(sys.argv[1], in_memory=False)
data.summary()
print(sum(len(b) for b in data.batches(5000)), peak() - before)
"""


@pytest.mark.parametrize("suffix", ["npy", "parquet", "csv"])
def test_streaming_needs_flat_memory(tmp_path: Path, suffix: str) -> None:
    """A file of 160 MB in float64 passes through in much less."""
    n = 1_250_000
    x = np.random.default_rng(0).integers(0, 100, (n, 16)) / 4
    for name, part in (("big", x), ("small", x[:1000])):
        table = pa.table({f"c{i}": part[:, i] for i in range(16)})
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "npy":
            np.save(path, part)
        elif suffix == "parquet":
            pq.write_table(table, path)
        else:
            import pyarrow.csv

            pyarrow.csv.write_csv(table, path)
    command = [
        sys.executable,
        "-c",
        MEMORY,
        *(tmp_path / f"{k}.{suffix}" for k in ("big", "small")),
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == n
    assert float(out[1]) < 90, f"{out[1]} MB more at the peak"


# ------------------------------------------------------------------ moments
@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 40), st.integers(1, 3)),
        elements=st.floats(-1e6, 1e6) | st.just(NAN),
    ),
    st.integers(1, 10),
)
@settings(deadline=None)
def test_summary_does_not_depend_on_the_blocks(x: np.ndarray[Any, Any], size: int) -> None:
    names = tuple(map(str, range(x.shape[1])))
    summary = summarise(torch.from_numpy(x).split(size), names)
    for j in range(x.shape[1]):
        column = x[~np.isnan(x[:, j]), j]
        assert summary.count[j] == len(column)
        if len(column):
            assert summary.mean[j].item() == pytest.approx(column.mean(), rel=1e-12, abs=1e-9)
            assert summary.variance[j].item() == pytest.approx(column.var(), rel=1e-9, abs=1e-9)
            assert summary.min[j] == column.min()
            assert summary.max[j] == column.max()
        else:
            assert summary.mean[j].isnan()
            assert summary.variance[j].isnan()


@pytest.mark.parametrize("offset", [0.0, 1e8, -1e8])
def test_summary_is_exact_at_any_offset(offset: float) -> None:
    rng = np.random.default_rng(0)
    noise = np.round(rng.normal(size=50_000) * 2**20) / 2**20  # exact also after the shift
    x = torch.from_numpy(noise + offset)[:, None]
    summary = summarise(x.split(997), ("x",))
    assert summary.variance.item() == pytest.approx(noise.var(), rel=1e-12)
    assert summary.mean.item() - offset == pytest.approx(noise.mean(), abs=2e-8)
    # The textbook formula is nowhere near: the test can fail.
    naive = (x.square().mean() - x.mean().square()).item()
    assert offset == 0 or abs(naive - noise.var()) > 1e-3


def test_constant_columns_have_exactly_no_variance() -> None:
    x = torch.full((1000, 1), 0.1 + 1e8, dtype=torch.float64)
    summary = summarise(x.split(7), ("x",))
    assert summary.variance.item() == 0
    assert summary.mean.item() == x[0].item()


def test_summary_is_computed_in_float64() -> None:
    x = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0)) + 1000
    summary = as_dataset(x).summary()
    assert summary.mean.dtype == torch.float64
    assert summary.variance.item() == pytest.approx(x.double().var(correction=0).item(), rel=1e-12)


def test_summaries_of_other_columns_do_not_merge() -> None:
    left = as_dataset(NUMBERS).summary()
    right = as_dataset(NUMBERS, columns=["a", "b"]).summary()
    assert isinstance(left, ColumnSummary)
    assert left.merge(left).count.tolist() == [6, 4]
    with pytest.raises(ValueError, match="cannot be merged"):
        left.merge(right)


def test_fingerprint_sees_content_and_columns() -> None:
    base = as_dataset(NUMBERS).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert as_dataset(np.array(NUMBERS)).fingerprint() == base
    assert as_dataset(NUMBERS, columns=["a", "b"]).fingerprint() != base
    assert as_dataset([[1.0, 2.0], [3.0, NAN], [5.0, 7.0]]).fingerprint() != base
    assert as_dataset(np.array(NUMBERS)[::-1]).fingerprint() != base


def test_repr_says_what_it_is() -> None:
    assert repr(as_dataset(frame())) == (
        "Dataset(4 x 4, in memory: size real, count count, flag binary, colour category)"
    )
    assert "..." in repr(as_dataset(np.zeros((2, 20))))
    assert len(as_dataset(NUMBERS)) == 3
