"""Observed rows whose log densities are added up at once instead of one by one."""

from __future__ import annotations

from typing import Any

from bayesgen.distributions import Summed

__all__ = ["add_up", "is_summed"]


def is_summed(node: Any) -> bool:
    """Whether a site of a trace has rows that its distribution adds up, all with weight one."""
    return (
        node["type"] == "sample"
        and node["is_observed"]
        and node["mask"] is None
        and isinstance(node["scale"], int | float)
        and node["scale"] == 1
        and isinstance(node["fn"], Summed)
    )


def add_up(trace: Any) -> None:
    """Give such sites of a Pyro trace the sum of their log densities."""
    for node in trace.nodes.values():
        if is_summed(node):
            node["log_prob_sum"] = node["fn"].log_prob_sum(node["value"])
