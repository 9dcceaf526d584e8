"""What is wrong with a user's Pyro program, in words: which site, what it has, how to mend it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch.distributions import biject_to, constraints

import bayesgen
import bayesgen.distributions  # registers bijections that torch lacks
from bayesgen.prior_replacement import PriorError
from bayesgen.replay import ProgramError

__all__ = ["ProgramError", "bijection", "check_site", "check_trace", "explained", "user_line"]


def check_site(msg: Mapping[str, Any]) -> None:
    """Refuse a latent site that can be neither moved along a gradient nor summed out."""
    name, law = msg["name"], msg["fn"]
    kind = _kind(law)
    if law.support.is_discrete and not law.has_enumerate_support:
        raise ProgramError(
            f"site '{name}' is a latent {kind}: discrete with endless values, so it can be "
            f"neither moved "
            f"along a gradient nor summed out. Observe it (obs=...), marginalise it by hand "
            f"(Gamma-Poisson "
            f"is a NegativeBinomial), or bound it with a Categorical."
        )


def bijection(law: Any, name: str = "") -> Any:
    """The map from all real numbers onto the support of a distribution."""
    support = law.support
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ProgramError(
            f"site '{name}' is a latent {_kind(law)} on {support}, onto which no smooth "
            f"one-to-one map from the "
            f"real numbers is known. Sample a Cholesky factor instead (dist.LKJCholesky, "
            f"bayesgen.distributions.InverseWishartCholesky) or register one with "
            f"torch.distributions.biject_to.register."
        ) from None


def check_trace(trace: Any, latents: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse what cannot be sampled; return notes on what is odd but allowed."""
    notes: list[str] = []
    nodes = [n for n in trace.nodes.values() if n["type"] == "sample"]
    for node in trace.nodes.values():
        if node["type"] == "param":
            raise ProgramError(
                f"pyro.param '{node['name']}' in the model: a sampler draws from a posterior and "
                f"does not "
                f"optimise. Give it a prior with pyro.sample('{node['name']}', ...), or pass a "
                f"fixed tensor."
            )
    for node in nodes:
        if poutine.util.site_is_subsample(node):
            _check_plate(node)
        else:
            _check_observed(node)
    if not latents:
        raise ProgramError(
            "the program has no continuous latent site: every pyro.sample is observed or "
            "discrete, so "
            "there is nothing to sample. Give a parameter a prior, such as pyro.sample('loc', "
            "Normal(0, 1))."
        )
    if not any(n["is_observed"] and not n["infer"].get("_deterministic") for n in nodes):
        notes.append("no site is observed (obs=...): the draws come from the prior.")
    for node in nodes:
        notes += _outside_plates(node)
    return tuple(notes)


def _check_plate(node: Mapping[str, Any]) -> None:
    law = node["fn"]
    size, part = law.size, law.subsample_size
    if part is not None and part < size:
        raise ProgramError(
            f"plate '{node['name']}' takes a random subsample of {part} of its {size} rows, and "
            f"a sampler "
            f"needs them all. Leave out subsample_size, or fit by SVI."
        )


def _inside(law: Any, value: torch.Tensor) -> bool:
    try:
        return bool(law.support.check(value).all())
    except (NotImplementedError, ValueError, RuntimeError):
        return False


def _check_observed(node: Mapping[str, Any]) -> None:
    if not node["is_observed"] or node["infer"].get("_deterministic"):
        return
    name, law, value = node["name"], node["fn"], node["value"]
    if not isinstance(value, torch.Tensor) or not isinstance(law.shape(), torch.Size):
        return
    gaps = value.is_floating_point() and bool(value.isnan().any())
    # A law whose support holds NaN integrates missing entries out.
    if gaps and not _inside(law, value):
        count = int(value.isnan().sum())
        raise ProgramError(
            f"site '{name}': {count} of {value.numel()} observed values are NaN. Drop those "
            f"rows, or make "
            f"them latent with pyro.sample(..., obs=values, obs_mask=~missing)."
        )
    shape = law.shape()
    if (
        len(shape)
        and value.ndim
        and torch.broadcast_shapes(shape, value.shape)
        not in (
            shape,
            value.shape,
        )
    ):
        raise ProgramError(
            f"site '{name}': the distribution has shape {tuple(shape)} and the observed values "
            f"{tuple(value.shape)}, which broadcast to a third shape and so count values several "
            f"times. "
            f"Reshape one, for example values.squeeze(-1)."
        )
    try:
        inside = law.support.check(value)
    except (NotImplementedError, ValueError, RuntimeError):
        return
    if not bool(inside.all()):
        count = int((~inside).sum())
        raise ProgramError(
            f"site '{name}': {count} of {inside.numel()} observed values lie outside the support "
            f"of "
            f"{_kind(law)}, {law.support}. Transform the data, or choose a distribution that "
            f"allows them."
        )


def _outside_plates(node: Mapping[str, Any]) -> list[str]:
    if not node["is_observed"] or node["infer"].get("_deterministic"):
        return []
    batch = getattr(node["fn"], "batch_shape", torch.Size())
    held = {f.dim for f in node["cond_indep_stack"] if f.vectorized}
    loose = [k for k in range(-len(batch), 0) if batch[k] > 1 and k not in held]
    if not loose or poutine.util.site_is_subsample(node):
        return []
    return [
        f"observed site '{node['name']}' has batch shape {tuple(batch)} outside any plate: write "
        f"`with pyro.plate('data', {batch[loose[-1]]}):` around it, or .to_event({len(batch)})."
    ]


def _kind(law: Any) -> str:
    while "base_dist" in vars(law):
        law = law.base_dist
    return type(law).__name__


@contextmanager
def explained() -> Iterator[None]:
    """Turn Pyro's own complaints into ones that name the site, the line and the cure."""
    try:
        yield
    except (ProgramError, PriorError) as error:
        # Pyro appends the shapes of the trace to whatever passes through it.
        raise ProgramError(str(error).split("\nTrace Shapes")[0].rstrip()) from None
    except (RuntimeError, ValueError, NotImplementedError, IndexError, TypeError) as error:
        raise ProgramError(_explain(error)) from error


def _explain(error: BaseException) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = user_line(error)
    at = f" (at {where})" if where else ""
    if "Multiple sample sites named" in text or "collides with" in text:
        name = text.split("'")[1] if "'" in text else "?"
        return (
            f"the site name '{name}' is used twice{at}: every pyro.sample needs its own name. In "
            f"a Python "
            f"loop write f'{name}_{{i}}', or use a pyro.plate."
        )
    if "Shape mismatch inside plate" in text or "invalid log_prob shape" in text:
        return f"{text}{at}. The size of a plate must be that of the tensors inside it."
    return f"the program stopped with {type(error).__name__}: {text}{at}."


def user_line(error: BaseException) -> str:
    """``file:line: source`` of the innermost frame of the error that is the user's."""
    import linecache

    found, tb = "", error.__traceback__
    while tb is not None:
        name = tb.tb_frame.f_code.co_filename
        if not name.startswith(_FOREIGN):
            source = linecache.getline(name, tb.tb_lineno).strip()
            found = f"{name.rsplit('/', 1)[-1]}:{tb.tb_lineno}: {source}"
        tb = tb.tb_next
    return found


_FOREIGN = (
    "<",
    *(str(Path(m.__file__ or "").resolve().parent) for m in (torch, pyro, bayesgen)),
    str(Path(__file__).resolve().parent),  # behind the symbolic link
    str(Path(bayesgen.__file__).parent),
    contextlib.__file__,
)
