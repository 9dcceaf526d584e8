"""The table of all posteriors: ``python -m tests.posteriordb [ENGINE] [PART OF A NAME ...]``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tests.posteriordb.posteriors import ENGINES, POSTERIORS, judge, reference, run

__all__: list[str] = []


def main(engine: str = "NUTS", *parts: str) -> None:
    """Print one line a posterior: the worst |z|, where, the least ESS, divergences, seconds."""
    root = Path(__file__).resolve().parents[3] / "shared" / "data"
    root = Path(os.environ.get("BAYESGEN_SHARED_DATA", root))
    print(f"{'posterior':44}{'|z|':>6}  {'of':20}{'ESS':>7}{'div.':>6}{'R-hat':>8}{'CPU s':>8}")
    for name in POSTERIORS:
        if parts and not any(part in name for part in parts):
            continue
        start = time.process_time()
        fit = run(name, ENGINES[engine], root)
        seconds = time.process_time() - start
        found = judge(fit.draws, fit.sample_stats, reference(root, name))
        print(
            f"{name:44}{found.z:6.2f}  {found.parameter:20}{found.ess:7.0f}{found.divergences:6}"
            f"{found.r_hat:8.3f}{seconds:8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
