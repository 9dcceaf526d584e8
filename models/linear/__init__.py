"""The linear-Gaussian core that PPCA, factor analysis and their robust kin share."""

from __future__ import annotations

__all__: list[str] = []
