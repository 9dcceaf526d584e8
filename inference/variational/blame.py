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
    pair: Pair,
    params: Tensor,
    normals: Tensor,
    uniforms: Tensor,
    batch: tuple[Tensor, ...],
    *,
    is_first: bool,
) -> str:
    """The first sites, of guide or model, whose log density is not finite, in words.

    Args:
        pair: Model and guide.
        params: What the step found.
        normals: Its noise, one row for each particle; without entries, any noise will do.
        uniforms: The same.
        batch: Tensors of the call and indices of the plates.
        is_first: Whether it was the first step.
    """
    advice = "Lower learning_rate, give max_norm=10.0, or rescale the data."
    if is_first:
        advice = "Start elsewhere (init_loc_fn of the autoguide), or rescale the data."
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
                        return f"{_words(who, name, node['value'])} {advice}"
    text = "Every site's log density is finite there: it is the gradient that is not"
    if is_first:
        return f"{text}; an operation such as sqrt(0), 0 / 0 or a norm at zero has no derivative."
    return f"{text}. {advice}"


def _words(who: str, name: str, value: Tensor) -> str:
    seen = "" if bool(value.isfinite().all()) else ", whose value is not finite either"
    return f"The first culprit is site {name!r} of the {who}: its log density is not finite{seen}."
