"""Which site made a bound stop being finite."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from bayesgen import rng
from bayesgen.inference.variational.noise import Fed, Tape
from bayesgen.inference.variational.pair import Pair

__all__ = ["culprit"]


def culprit(
    pair: Pair, params: Tensor, normals: Tensor, uniforms: Tensor, batch: tuple[Tensor, ...]
) -> str:
    """The first sites, of guide or model, whose log density is not finite, in words.

    Args:
        pair: Model and guide.
        params: What the step found.
        normals: Its noise, one row for each particle; without entries, any noise will do.
        uniforms: The same.
        batch: Tensors of the call and indices of the plates.
    """
    is_fed = normals.numel() + uniforms.numel() > 0
    for row, other in zip(normals, uniforms, strict=True):
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(pair.using(params))
            if is_fed:
                stack.enter_context(Tape(Fed(row, other)))
            else:
                stack.enter_context(rng.fork(rng.make_generator(0, pair.device)))
            traces = pair.run(*pair.parted(batch))
            for who, trace in (("guide", traces.guide), ("model", traces.model)):
                for name, node in trace.nodes.items():
                    if node["type"] != "sample" or site_is_subsample(node):
                        continue
                    value = node["fn"].log_prob(node["value"])
                    if not bool(value.isfinite().all()):
                        return _words(who, name, node["value"])
    return "Every site's log density is finite there: it is the gradient that is not."


def _words(who: str, name: str, value: Tensor) -> str:
    seen = "" if bool(value.isfinite().all()) else ", whose value is not finite either"
    return f"The first culprit is site {name!r} of the {who}: its log density is not finite{seen}."
