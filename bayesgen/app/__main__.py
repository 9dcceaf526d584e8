"""``python -m bayesgen.app``: the command line without its installed script."""

from __future__ import annotations

from bayesgen.app.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
