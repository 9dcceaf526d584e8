"""Data in: every common form gives the same numbers, and bad input a message with a way out."""

from __future__ import annotations

import math
import re
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

from bayesgen.data import Dataset, Schema, as_dataset
from bayesgen.tables import rows as rows_module
from bayesgen.tables import sources as sources_module

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


def test_fingerprints_tell_rows_apart():
    """Binary and short numbers have most bits empty: they still change it."""
    base = torch.tensor([[0.0, 1.0, 2.0, 0.5]] * 50, dtype=torch.float64)
    prints = {as_dataset(base, kinds="real").fingerprint()}
    changed = [base.clone() for _ in range(5)]
    changed[0][3, 1] = 0.0
    changed[1][3, :2] = torch.tensor([1.0, 0.0])  # swapped
    changed[2][3, 0] = math.nan
    changed[3][3, 3] = torch.nextafter(base[3, 3], base[3, 2])
    changed[4] = torch.cat([changed[0][1:], changed[0][:1]])
    prints |= {as_dataset(x, kinds="real").fingerprint() for x in changed}
    assert len(prints) == 6
    assert as_dataset(base.float(), kinds="real").fingerprint() in prints
