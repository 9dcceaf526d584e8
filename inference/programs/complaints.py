"""What is wrong with a user's Pyro program, in words: which site, what it has, how to mend it."""

from __future__ import annotations

import contextlib
import linecache
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch.distributions import biject_to, constraints

import bayesgen
import bayesgen.distributions  # registers bijections that torch lacks
from bayesgen.prior_replacement import PriorError
from bayesgen.replay import ProgramError, is_computed, no_tensor, plain, unwrapped

__all__ = [
    "NOTHING_LATENT",
    "ProgramError",
    "bijection",
    "check_joint_values",
    "check_law",
    "check_mask",
    "check_observed",
    "check_rows",
    "check_same",
    "check_site",
    "check_trace",
    "current_line",
    "explained",
    "outside_plates",
    "user_line",
]


def check_law(name: str, law: Any) -> None:
    """Refuse what stands in the place of a Pyro distribution."""
    if isinstance(law, TorchDistributionMixin):
        return
    if isinstance(law, type):
        raise ProgramError(
            f"site '{name}' was given the class {law.__name__}, not a distribution: write "
            f"dist.{law.__name__}(...) with its parameters."
        )
    if isinstance(law, torch.distributions.Distribution):
        raise ProgramError(
            f"site '{name}' has a distribution of torch.distributions, which Pyro cannot sample. "
            f"Write `import pyro.distributions as dist` and dist.{type(law).__name__}(...), with "
            "the same parameters."
        )
    raise ProgramError(
        f"site '{name}' was given a {type(law).__name__}, but pyro.sample needs a distribution, "
        "such as dist.Normal(0.0, 1.0)."
    )


def check_site(msg: Mapping[str, Any]) -> None:
    """Refuse a latent site that can be neither moved along a gradient nor summed out."""
    name, law = msg["name"], msg["fn"]
    if law.support.is_discrete and not law.has_enumerate_support:
        raise ProgramError(
            f"site '{name}' is a latent {_kind(law)}: discrete with endless values, so it can be "
            "neither moved along a gradient nor summed out. Observe it (obs=...), marginalise it "
            "by hand (Gamma-Poisson is a NegativeBinomial), or bound it with a Categorical."
        )


_CIRCLE = constraints.interval(-math.pi, math.pi)


def bijection(law: Any, name: str = "") -> Any:
    """The map from all real numbers onto the support of a distribution.

    Of an angle once around: Pyro calls all real numbers its support, over which no density of
    angles can be normalised, and chains would end at different copies of one angle.
    """
    support = law.support
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    if isinstance(unwrapped(law), torch.distributions.VonMises):
        support = constraints.independent(_CIRCLE, law.event_dim)
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ProgramError(
            f"site '{name}' is a latent {_kind(law)} on {support}, onto which no smooth "
            "one-to-one map from the real numbers is known. Sample a Cholesky factor instead "
            "(dist.LKJCholesky, bayesgen.distributions.InverseWishartCholesky) or register one "
            "with torch.distributions.biject_to.register."
        ) from None


def check_trace(trace: Any, latents: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse what cannot be sampled; return notes on what is odd but allowed."""
    notes: list[str] = []
    nodes = [n for n in trace.nodes.values() if n["type"] == "sample"]
    for node in trace.nodes.values():
        if node["type"] == "param":
            raise ProgramError(_parameter(node["name"]))
    for node in nodes:
        if poutine.util.site_is_subsample(node):
            _check_plate(node)
    if not latents:
        raise ProgramError(NOTHING_LATENT)
    if not any(n["is_observed"] and not is_computed(n) for n in nodes):
        notes.append("no site is observed (obs=...): the draws come from the prior.")
    notes += [note for note in map(outside_plates, nodes) if note]
    return tuple(notes)


NOTHING_LATENT = (
    "the program has no continuous latent site: every pyro.sample is observed or discrete, so "
    "there is nothing to sample. Give a parameter a prior, such as pyro.sample('loc', "
    "Normal(0, 1))."
)


def _parameter(name: str) -> str:
    if "$$$" in name:
        name = name.split("$$$")[0]
        return (
            f"pyro.module '{name}' in the model: a sampler draws from a posterior and does not "
            "optimise weights. Call the module without pyro.module to keep its weights fixed, "
            "give them priors by pyro.nn.PyroSample, or fit by SVI."
        )
    return (
        f"pyro.param '{name}' in the model: a sampler draws from a posterior and does not "
        f"optimise. Give it a prior with pyro.sample('{name}', ...), or pass a fixed tensor."
    )


def _check_plate(node: Mapping[str, Any]) -> None:
    law = node["fn"]
    size, part = law.size, law.subsample_size
    if part is not None and part < size:
        raise ProgramError(
            f"plate '{node['name']}' takes a random subsample of {part} of its {size} rows, and "
            "a sampler needs them all. Leave out subsample_size, or fit by SVI."
        )


def _inside(law: Any, value: torch.Tensor) -> bool:
    try:
        return bool(law.support.check(value).all())
    except (NotImplementedError, ValueError, RuntimeError):
        return False


def check_observed(node: Mapping[str, Any]) -> None:
    """Refuse observed values that the site's distribution cannot have."""
    name, law, value = node["name"], node["fn"], node["value"]
    if not node["is_observed"] or is_computed(node):
        return
    if not isinstance(value, torch.Tensor):
        raise ProgramError(no_tensor(name, value))
    if isinstance(law, pyro.distributions.Unit):
        return
    gaps = value.is_floating_point() and bool(value.isnan().any())
    # A law whose support holds NaN integrates missing entries out.
    if gaps and not _inside(law, value):
        count = int(value.isnan().sum())
        raise ProgramError(
            f"site '{name}': {count} of {value.numel()} observed values are NaN. Drop those "
            "rows, or make them latent with pyro.sample(..., obs=values, obs_mask=~missing)."
        )
    _check_shapes(node)
    if _support_may_move(law):
        return  # uniform up to a latent bound: another start may hold all values
    try:
        inside = law.support.check(value)
    except (NotImplementedError, ValueError, RuntimeError):
        return
    if not bool(inside.all()):
        count = int((~inside).sum())
        raise ProgramError(
            f"site '{name}': {count} of {inside.numel()} observed values lie outside the support "
            f"of {_kind(law)}, {law.support}. Transform the data, or choose a distribution that "
            "allows them."
        )


def _support_may_move(law: Any) -> bool:
    """Whether the ends of a continuous support are parameters, and so perhaps latent."""
    law = unwrapped(law)
    support = getattr(type(law), "support", None)
    return bool(constraints.is_dependent(support)) and not bool(law.support.is_discrete)


def _check_shapes(node: Mapping[str, Any]) -> None:
    name, law, shape = node["name"], node["fn"], tuple(node["value"].shape)
    wanted = tuple(law.shape())
    for k in range(1, 1 + min(len(wanted), len(shape))):
        if wanted[-k] == shape[-k] or 1 in (wanted[-k], shape[-k]):
            continue
        dim = law.event_dim - k
        plates = [f.name for f in node["cond_indep_stack"] if f.vectorized and f.dim == dim]
        if plates:
            raise ProgramError(
                _plate_mismatch(name, plates[0], wanted[-k], "observed", shape[-k], dim)
            )
        raise ProgramError(
            f"site '{name}': the distribution has shape {wanted}, and the observed values "
            f"{shape}. Make them equal: each observed value needs its own parameters, or shares "
            "those of size 1."
        )
    both = np.broadcast_shapes(wanted, shape)
    if wanted and shape and tuple(both) not in (wanted, shape):
        raise ProgramError(
            f"site '{name}': the distribution has shape {wanted} and the observed values {shape}, "
            "which broadcast to a third shape and so count values several times. Reshape one, "
            "for example values.squeeze(-1)."
        )


def _plate_mismatch(site: str, plate: str, size: int, what: str, found: int, dim: int) -> str:
    values = "observed values have" if what == "observed" else "distribution has"
    return (
        f"site '{site}': plate '{plate}' has size {size}, but the {values} size {found} along it "
        f"(dimension {dim}). Write pyro.plate('{plate}', {found}), or make both of size {size}."
    )


def check_rows(node: Mapping[str, Any], discrete: Sequence[str]) -> None:
    """Refuse rows outside plates in a program with discrete latents."""
    kind = "discrete" if node["name"] in discrete else "latent"
    outside = outside_plates(node, "" if node["is_observed"] else kind)
    if outside:
        raise ProgramError(
            f"{outside} Discrete latents ({', '.join(discrete)}) are summed out row by row, and "
            "plates say what a row is."
        )


def outside_plates(node: Mapping[str, Any], kind: str = "") -> str:
    """What to say of rows that no plate holds, of an observed site or one of a kind."""
    if node["is_observed"] and not is_computed(node):
        kind = "observed"
    if not kind or poutine.util.site_is_subsample(node):
        return ""
    law, value = node["fn"], node["value"]
    own = value.shape[: value.ndim - law.event_dim]
    batch = np.broadcast_shapes(law.batch_shape, own)
    held = {f.dim for f in node["cond_indep_stack"] if f.vectorized}
    loose = [k for k in range(-len(batch), 0) if batch[k] > 1 and k not in held]
    if not loose:
        return ""
    name = node["name"]
    plate = f"{name}_row" if kind == "latent" else "data"
    return (
        f"{kind} site '{name}' has batch shape {tuple(batch)} outside any plate: write "
        f"`with pyro.plate('{plate}', {batch[loose[-1]]}):` around it, or "
        f".to_event({len(batch)})."
    )


def check_mask(node: Mapping[str, Any]) -> None:
    """Refuse a mask of more entries than the site has."""
    mask, law, value = node["mask"], node["fn"], node["value"]
    if poutine.util.site_is_subsample(node):
        return
    if not isinstance(mask, torch.Tensor) or not isinstance(value, torch.Tensor):
        return
    batch = np.broadcast_shapes(law.batch_shape, value.shape[: value.ndim - law.event_dim])
    try:
        fits = np.broadcast_shapes(mask.shape, batch) == tuple(batch)
    except ValueError:
        fits = False
    if not fits:
        raise ProgramError(
            f"site '{node['name']}': the mask has shape {tuple(mask.shape)}, but the site one "
            f"entry for each of {tuple(batch)}. A mask says which rows count, not which columns: "
            "make it of that shape, for example mask.all(-1)."
        )


def check_same(first: Iterable[str], second: Iterable[str]) -> None:
    """Refuse a program whose sites change from run to run."""
    one, two = set(first), set(second)
    if one != two:
        name = sorted(one ^ two)[0]
        raise ProgramError(
            f"the program's sites change from run to run: '{name}' is not always there. A sampler "
            "needs the same sites in every run: choose by torch.where or by a discrete latent "
            "(dist.Categorical), not by `if`."
        )


def check_joint_values(msg: Mapping[str, Any], nesting: int) -> None:
    """Refuse to sum over more joint values of discrete latents than anyone wants to wait for."""
    if poutine.util.site_is_subsample(msg):
        return
    batch = msg["fn"].batch_shape
    count = math.prod(batch[: max(0, len(batch) - nesting)])  # left of the plates
    if count > _MAX_JOINT:
        raise ProgramError(
            f"site '{msg['name']}' depends on {count:,} joint values of discrete latents, too "
            "many to sum over. Where each latent depends on the one before alone, loop `for t in "
            "pyro.markov(range(n))`, or use dist.DiscreteHMM; put independent ones into a plate."
        )


_MAX_JOINT = 2**20


def _kind(law: Any) -> str:
    while "base_dist" in vars(law):
        law = law.base_dist
    return type(law).__name__


@contextmanager
def explained() -> Iterator[None]:
    """Turn Pyro's own complaints into ones that name the site, the cure and the user's line."""
    try:
        yield
    except PriorError as error:
        raise ProgramError(plain(error)) from None
    except ProgramError as error:
        raise ProgramError(_located(plain(error), error)) from None
    except Exception as error:  # a user's program may raise anything
        raise ProgramError(_located(_explain(error), error)) from error


def _located(text: str, error: BaseException) -> str:
    where = user_line(error)
    return f"{text}\n  at {where}" if where else text


def _explain(error: BaseException) -> str:
    text = plain(error)
    for pattern, words in _KNOWN:
        found = re.search(pattern, text, re.DOTALL)
        if found:
            return words(*(" ".join(group.split()) for group in found.groups()))
    first = text.strip().splitlines()[0] if text.strip() else ""
    return f"the program stopped with {type(error).__name__}: {first}"


def _twice(name: str) -> str:
    return (
        f"the site name '{name}' is used twice: every pyro.sample and pyro.plate needs its own "
        f"name. In a Python loop write f'{name}_{{i}}', or use one pyro.plate around all of it."
    )


def _invalid(parameter: str, law: str, constraint: str, values: str) -> str:
    if law == "Unit":
        return (
            "pyro.factor adds NaN to the log density: an operation has left its domain, such as "
            "the logarithm of a negative number or 0 / 0."
        )
    values = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.4g}", values[:80])
    return (
        f"{parameter} of {law} must satisfy {constraint}, but is {values}. Where it comes "
        "from a latent, give that a prior on this support (HalfNormal, LogNormal or Gamma for "
        "what is positive), or transform it (.exp(), torch.sigmoid)."
    )


TWO_PRECISIONS = "tensors of float32 and float64 meet"
"""How a complaint begins where torch refuses to mix them."""


def _dtypes() -> str:
    return (
        f"{TWO_PRECISIONS}. Data given to run(program, data) are converted to "
        "the engine's dtype; tensors that the program finds elsewhere are not. Pass them as data, "
        "convert them (.double()), or run with dtype=torch.float32."
    )


def _devices() -> str:
    return (
        "tensors on several devices meet. Data given to run(program, data) are moved to the "
        "engine's device; tensors that the program finds elsewhere are not. Pass them as data, or "
        "move them (.to(device))."
    )


def _branch() -> str:
    return (
        "the program asks `if` of a discrete latent, which is summed over all its values at once. "
        "Choose by torch.where(latent.bool(), a, b), or by index: torch.stack([b, a])[latent]."
    )


def _unpacked(site: str, allowed: str, shape: str) -> str:
    return (
        f"site '{site}' has log densities of shape {shape}, but plates and the discrete latents "
        f"that are summed out take the dimensions {allowed or '(none)'} alone. Write "
        ".to_event(...) where the others are parts of one value, or a pyro.plate around the site "
        "where they are rows."
    )


def _collide(one: str, other: str, dim: str) -> str:
    return (
        f"plates '{other}' and '{one}' are nested and both take dimension {dim}. Leave out dim=, "
        f"or give one of them dim={int(dim) - 1}."
    )


_KNOWN: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"Multiple sample sites named '([^']*)'", _twice),
    (r"site \"?'?([^'\"\s]*)'?\"? collides with", _twice),
    (r"duplicate plate '([^']*)'", _twice),
    (
        r"Shape mismatch inside plate\('([^']*)'\) at site (\S+) dim (-?\d+), (\d+) vs (\d+)",
        lambda plate, site, dim, size, found: _plate_mismatch(
            site, plate, int(size), "distribution", int(found), int(dim)
        ),
    ),
    (
        r"Expected parameter (\w+) .*of distribution (\w+)\(.*to satisfy the constraint (.*), but "
        r"found invalid values:\n(.*)",
        _invalid,
    ),
    (
        r"Error while packing tensors at site '([^']*)':.*Allowed dims: ([^\n]*)\n"
        r"\s*Actual shape: (\([^)]*\))",
        _unpacked,
    ),
    (r"same dtype|Found dtype|expected scalar type", _dtypes),
    (r"Expected all tensors to be on the same device", _devices),
    (r"Boolean value of Tensor with more than one value", _branch),
    (r'at plates "(\S+)" and "(\S+)", collide at dim=(-\d+)', _collide),
)


def user_line(error: BaseException) -> str:
    """``file:line: source`` of the innermost frame of the error that is the user's."""
    found, tb = "", error.__traceback__
    while tb is not None:
        found = _line(tb.tb_frame.f_code.co_filename, tb.tb_lineno) or found
        tb = tb.tb_next
    return found


def cause(error: BaseException) -> str:
    """Kind and first line of an error, and the user's line where it arose."""
    text = str(error).strip().splitlines()[0][:200].rstrip(".") if str(error).strip() else ""
    line = user_line(error)
    kind = type(error).__name__
    return (f"{kind}: {text}" if text else kind) + (f" (at {line})" if line else "")


def current_line() -> str:
    """The same of the code that runs now; empty where none of it is the user's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if found := _line(frame.f_code.co_filename, frame.f_lineno):
            return found
        frame = frame.f_back
    return ""


def _line(file: str, number: int) -> str:
    if file.startswith(_FOREIGN):
        return ""
    source = linecache.getline(file, number).strip()
    return f"{file.rsplit('/', 1)[-1]}:{number}: {source}"


_FOREIGN = (
    "<",
    *(str(Path(m.__file__ or "").resolve().parent) for m in (torch, pyro, bayesgen)),
    str(Path(__file__).resolve().parents[1]),  # behind the symbolic link
    str(Path(bayesgen.__file__).parent),
    contextlib.__file__,
)
