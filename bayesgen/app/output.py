"""Results into files by their suffix, or as CSV to stdout."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesgen.app.guard import Misuse
from bayesgen.storage import write_bytes

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from bayesgen.schema import Schema

__all__ = ["SUFFIXES", "check_out", "rows_frame", "write_frame"]

SUFFIXES = (".csv", ".tsv", ".parquet", ".npy")


def check_out(out: str, *, force: bool) -> None:
    """Refuse, before work begins, a file that exists, a folder that does not, an odd suffix.

    Raises:
        Misuse: The suffix, with those that there are.
        ValueError: The file exists, or its folder does not.
    """
    if out == "-":
        return
    path = Path(out)
    if path.suffix.lower() not in SUFFIXES:
        raise Misuse(
            f"--out {out}: the suffix says the format, and must be one of {', '.join(SUFFIXES)}; "
            "'-' is CSV on stdout."
        )
    if path.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file.")
    if path.exists() and not force:
        raise ValueError(f"--out {out} exists; add --force to replace it, or choose another name.")
    if not path.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {path.parent}.")


def rows_frame(values: Tensor, schema: Schema) -> pd.DataFrame:
    """Rows ``(n, d)`` as a table: category codes become levels, counts whole numbers."""
    import numpy as np
    import pandas as pd

    columns: dict[str, Any] = {}
    array = values.double().cpu().numpy()
    for j, (name, kind) in enumerate(zip(schema.columns, schema.kinds, strict=True)):
        column = pd.Series(array[:, j])
        if kind == "category":
            column = pd.Series(
                pd.Categorical.from_codes(
                    np.nan_to_num(array[:, j], nan=-1.0).astype(int).tolist(),
                    categories=pd.Index(list(schema.levels[j] or ())),
                )
            )
        elif kind in ("count", "binary") and bool((column.dropna() % 1 == 0).all()):
            column = column.astype("Int64")
        columns[name] = column
    return pd.DataFrame(columns)


def write_frame(frame: pd.DataFrame, out: str, *, array: Any = None) -> None:
    """Write a table.

    Args:
        frame: The table.
        out: A path that :func:`check_out` has passed, or ``"-"``.
        array: What an ``.npy`` file holds instead of the table's numbers, such as category codes.
    """
    if out == "-":
        frame.to_csv(sys.stdout, index=False)
        sys.stdout.flush()
        return
    path = Path(out)
    buffer = io.BytesIO()
    match path.suffix.lower():
        case ".parquet":
            frame.to_parquet(buffer, index=False)
        case ".npy":
            import numpy as np

            np.save(buffer, frame.to_numpy() if array is None else array, allow_pickle=False)
        case suffix:
            separator = "\t" if suffix == ".tsv" else ","
            buffer.write(frame.to_csv(index=False, sep=separator).encode())
    write_bytes(path, buffer.getvalue())
