"""Files of raw rows, read in chunks: a pass over a file never holds more than a few blocks."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bayesgen.schema import Kind
from bayesgen.tables.convert import raw_table
from bayesgen.tables.frames import from_arrow
from bayesgen.tables.raw import RawTable, is_number, select, shorten
from bayesgen.tables.rows import BLOCK_BYTES, Source, rows_per_block

if TYPE_CHECKING:
    import pyarrow.parquet as pq

__all__ = [
    "ArraySource",
    "CsvSource",
    "MemorySource",
    "ParquetSource",
    "SelectedSource",
    "open_source",
]

Kinds = Mapping[str, Kind] | Kind


def file_stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written to."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class MemorySource(Source):
    """A table that is in memory already."""

    def __init__(self, raw: RawTable) -> None:
        self._raw = raw

    @property
    def names(self) -> tuple[str, ...] | None:
        return self._raw.names

    @property
    def num_columns(self) -> int:
        return self._raw.values.shape[1]

    @property
    def num_chunks(self) -> int:
        return 1

    def chunk(self, index: int) -> Iterator[RawTable]:
        yield self._raw


class SelectedSource(Source):
    """Another source with some of its columns, or with names for columns that had none."""

    def __init__(self, source: Source, columns: Sequence[str]) -> None:
        self._source, self._columns = source, tuple(columns)

    @property
    def names(self) -> tuple[str, ...]:
        return self._columns

    @property
    def num_columns(self) -> int:
        return len(self._columns)

    @property
    def num_chunks(self) -> int:
        return self._source.num_chunks

    def stamp(self) -> tuple[int, int] | None:
        return self._source.stamp()

    def chunk(self, index: int) -> Iterator[RawTable]:
        for raw in self._source.chunk(index):
            yield select(raw, self._columns)


def _keep(names: Sequence[str], columns: Collection[str]) -> tuple[str, ...]:
    """The columns of a file that are to be read."""
    known, wanted = set(names), set(columns)
    if absent := [name for name in columns if name not in known]:
        raise ValueError(f"there is no column {shorten(absent)}; there are {shorten(names)}.")
    return tuple(name for name in names if name in wanted)


class ArraySource(Source):
    """A numpy array on disk, mapped into memory: one chunk is one block of rows."""

    def __init__(self, load: Callable[[], NDArray[Any]], path: Path | None = None) -> None:
        self._path = path
        # Mapped anew for each chunk: pages of a mapping that is kept count as memory in use.
        self._load = load
        array = load()
        self._num_columns = raw_table(np.array(array[:1] if array.ndim else array)).values.shape[1]
        self._num_rows = len(array)
        self._step = rows_per_block(max(1, self._num_columns))

    @property
    def names(self) -> tuple[str, ...] | None:
        return None

    @property
    def num_columns(self) -> int:
        return self._num_columns

    @property
    def num_chunks(self) -> int:
        return -(-self._num_rows // self._step)

    def stamp(self) -> tuple[int, int] | None:
        return None if self._path is None else file_stamp(self._path)

    def chunk(self, index: int) -> Iterator[RawTable]:
        yield raw_table(np.array(self._load()[index * self._step : (index + 1) * self._step]))


class ParquetSource(Source):
    """A Parquet file: one chunk is one row group, read in blocks."""

    def __init__(self, path: Path, columns: Collection[str] | None) -> None:
        self._path = path
        with self._open() as file:
            index = (file.schema_arrow.pandas_metadata or {}).get("index_columns", ())
            names = tuple(file.schema_arrow.names)
            self._num_chunks = file.num_row_groups
        if columns is None:  # the row labels of a pandas frame are no data
            columns = [name for name in names if name not in index]
        self._names = _keep(names, columns)
        self._step = rows_per_block(max(1, len(self._names)))

    def _open(self) -> pq.ParquetFile:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # A small buffer and none in advance: row groups can be larger than memory allows.
            return pq.ParquetFile(self._path, pre_buffer=False, buffer_size=2**20)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self._path} cannot be read as Parquet: {error}") from error

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    def num_columns(self) -> int:
        return len(self._names)

    @property
    def num_chunks(self) -> int:
        return self._num_chunks

    def stamp(self) -> tuple[int, int] | None:
        return file_stamp(self._path)

    def chunk(self, index: int) -> Iterator[RawTable]:
        with self._open() as file:
            for batch in file.iter_batches(
                self._step, row_groups=[index], columns=list(self._names), use_threads=False
            ):
                yield from_arrow(batch)


class CsvSource(Source):
    """A CSV file with a header: one chunk is a range of bytes between two line ends."""

    def __init__(
        self, path: Path, delimiter: str, columns: Collection[str] | None, kinds: Kinds
    ) -> None:
        self._path, self._delimiter = path, delimiter
        self._edges = _record_edges(path)
        header = self._header()
        self._all = header
        self._names = header if columns is None else _keep(header, columns)
        self._text = [
            n for n in header if (kinds if isinstance(kinds, str) else kinds.get(n)) == "category"
        ]

    def _header(self) -> tuple[str, ...]:
        with self._path.open("rb") as file:
            first = file.read(self._edges[0])
        try:
            lines = io.StringIO(first.decode("utf-8-sig"), newline="")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path} is not UTF-8 text: {error}") from error
        names = tuple(n.strip() for n in next(csv.reader(lines, delimiter=self._delimiter), ()))
        if not names:
            raise ValueError(f"{self._path} is empty; a header line with names is needed.")
        if all(is_number(name) for name in names):
            raise ValueError(
                f"the first line of {self._path} holds numbers, but a header line with the names "
                f"of the columns is needed; add one, or pass numpy.loadtxt(path, delimiter=...)."
            )
        if "" in names:
            raise ValueError(
                f"column {names.index('')} of {self._path} has no name in the header (an index "
                f"written by pandas? use frame.to_csv(path, index=False)); name it."
            )
        return names

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    def num_columns(self) -> int:
        return len(self._names)

    @property
    def num_chunks(self) -> int:
        return len(self._edges) - 1

    def stamp(self) -> tuple[int, int] | None:
        return file_stamp(self._path)

    def chunk(self, index: int) -> Iterator[RawTable]:
        import pyarrow as pa
        import pyarrow.csv as pacsv

        start, stop = self._edges[index], self._edges[index + 1]
        with self._path.open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        if not content.strip():
            return
        try:
            table = pacsv.read_csv(
                io.BytesIO(content),
                read_options=pacsv.ReadOptions(
                    column_names=list(self._all), use_threads=False, block_size=len(content) + 1
                ),
                parse_options=pacsv.ParseOptions(
                    delimiter=self._delimiter, newlines_in_values=True
                ),
                convert_options=pacsv.ConvertOptions(
                    include_columns=list(self._names),
                    strings_can_be_null=True,
                    column_types=dict.fromkeys(self._text, pa.string()),
                ),
            )
        except pa.ArrowInvalid as error:
            where = f", in the rows after byte {start}" if index else ""
            raise ValueError(f"{self._path} cannot be read{where}: {error}") from error
        yield from_arrow(table)


def _record_edges(path: Path) -> list[int]:
    """Offsets at which records start, about a block apart, after the header; the last is the end.

    A line end counts where an even number of quotes precede it, so that quoted fields may hold
    some.
    """
    size = path.stat().st_size
    edges: list[int] = []
    with path.open("rb") as file:
        position, odd = 0, False
        while block := file.read(BLOCK_BYTES):
            codes = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(codes == ord("\n"))
            quotes = np.flatnonzero(codes == ord('"'))
            before = np.searchsorted(quotes, ends)
            ends = ends[(before + odd) % 2 == 0]
            if len(ends):
                if not edges:
                    edges.append(position + int(ends[0]) + 1)
                if (last := position + int(ends[-1]) + 1) > edges[-1]:
                    edges.append(last)
            odd ^= bool(len(quotes) % 2)
            position += len(block)
    if not edges:
        edges.append(size)
    if edges[-1] < size:
        edges.append(size)
    return edges


def open_source(path: Path, columns: Collection[str] | None, kinds: Kinds | None) -> Source:
    """Open a file by its suffix; ``kinds`` names columns not to be read as numbers."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    suffix = path.suffix.lower()
    if path.is_dir() or suffix not in (".csv", ".tsv", ".parquet", ".npy"):
        fix = (
            " Load it by numpy.load(path)['name'] and pass the array." if suffix == ".npz" else ""
        )
        raise ValueError(
            f"{str(path)!r} is {'a folder' if path.is_dir() else 'of an unknown type'}; allowed "
            f"are "
            f"files .csv, .tsv, .parquet and .npy.{fix}"
        )
    if suffix == ".npy":
        try:
            return ArraySource(lambda: np.load(path, mmap_mode="r", allow_pickle=False), path)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read as an array of numbers: {error}") from error
    if suffix == ".parquet":
        return ParquetSource(path, columns)
    return CsvSource(
        path, "\t" if suffix == ".tsv" else ",", columns, {} if kinds is None else kinds
    )
