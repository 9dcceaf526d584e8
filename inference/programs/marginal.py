"""Log density of each observed row of an enumerated program, its discrete latents summed out."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.contract import contract_tensor_tree
from pyro.util import ignore_jit_warnings
from torch import Tensor

from bayesgen.inference.programs.sites import Layout

__all__ = ["pointwise"]


def pointwise(layout: Layout, trace: Any) -> dict[str, Tensor]:
    """One entry, named after the observed sites, of shape ``(rows,)``, or ``()`` for one sequence.

    Observed sites and the discrete ones are summed out plate by plate; sites that share a plate
    are
    one row together. A latent outside the rows' plates couples them, and then all are one row.
    """
    if not layout.observed:
        return {}
    evaluator = TraceEinsumEvaluator(trace, True, layout.max_plate_nesting)
    with ignore_jit_warnings():
        trace.compute_log_prob()
        trace.pack_tensors()
    terms: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    wanted = {*layout.observed, *layout.enumerated}
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and name in wanted:
            terms.setdefault(evaluator.ordering[name], []).append(node["packed"]["log_prob"])
    contracted = contract_tensor_tree(terms, evaluator._enum_dims)
    leaves = [tensors for tensors in contracted.values() if tensors]
    if len(leaves) == 1:
        total = leaves[0][0]
        for tensor in leaves[0][1:]:
            total = total + tensor
    else:
        # Rows of several kinds, or rows coupled by a discrete latent outside their plate.
        total = sum(tensor.sum() for tensors in leaves for tensor in tensors)
    kept, *others = layout.seen.values()
    if kept is not None and not others and tuple(total.shape) == kept.batch:
        total = kept.of(total, 0)
    return {"_".join(layout.observed): total}
