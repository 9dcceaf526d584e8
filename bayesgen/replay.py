"""Pyro programs run forwards: data from draws, draws from the prior, the density of the prior.

All runs go at once through ``torch.func.vmap`` where the program allows it, one after the other
where it does not (a loop over a random length, a sampler that rejects).
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from bayesgen import rng
from bayesgen.gaps import Entries, RunsForwards, entries, imputed_name, is_gap

__all__ = [
    "Forwards",
    "ProgramError",
    "data_of",
    "draw_prior",
    "is_computed",
    "is_data",
    "log_priors",
    "no_tensor",
    "plain",
    "prior_sites",
    "quietly",
    "simulate",
    "unwrapped",
]

_LOCK = threading.RLock()
_BUDGET = 2**22  # numbers alive at once
Run = Callable[[], Any]


class ProgramError(ValueError):
    """A program that cannot be run; the message says why and what to do."""


def plain(error: BaseException) -> str:
    """What an error says, without the shapes of the trace that Pyro appends to it."""
    return str(error).split("\nTrace Shapes")[0].rstrip()


def no_tensor(site: str, value: object) -> str:
    """What to say of an observed value that is no tensor."""
    return (
        f"site '{site}': the observed value is a {type(value).__name__}, but must be a tensor. "
        "Give run(program, data) a tensor or an array, np.asarray(values), or write "
        "obs=torch.as_tensor(np.asarray(values))."
    )


def _nodes(run: Run) -> dict[str, dict[str, Any]]:
    """The sites of one run."""
    try:
        return dict(poutine.trace(run).get_trace().nodes)
    except ProgramError as error:
        raise ProgramError(plain(error)).with_traceback(error.__traceback__) from None


@contextmanager
def quietly(dtype: torch.dtype, *, validate: bool = False) -> Iterator[None]:
    """Run a user's program: default dtype set, Pyro's store empty, one thread; all put back.

    Pyro and the default dtype are global to the process, which is why this holds a lock.
    """
    with _LOCK:
        before = torch.get_default_dtype()
        law = torch.distributions.Distribution
        checks, check = law._validate_args, law._validate_sample
        torch.set_default_dtype(dtype)
        if not validate:
            # One made outside the program, as those of PyroSample are, checks values for itself.
            law._validate_sample = _unchecked  # type: ignore[method-assign, assignment]
        try:
            with pyro.get_param_store().scope(), pyro.validation_enabled(validate):
                yield
        finally:
            law._validate_sample = check  # type: ignore[method-assign]
            law.set_default_validate_args(checks)
            torch.set_default_dtype(before)


def _unchecked(law: torch.distributions.Distribution, value: Tensor) -> None:
    """In the place of a check that reads the value."""


def is_computed(node: Mapping[str, Any]) -> bool:
    """Whether a site's value is a function of other sites: neither drawn nor observed.

    Such are ``pyro.deterministic`` and what ``poutine.reparam`` leaves in the place of a site.
    """
    if node["infer"].get("_deterministic"):
        return True
    law = node["fn"]  # a reparametrised site has no mark of its own
    masked = isinstance(law, dist.MaskedDistribution) and law._mask is False
    return bool(masked and node["is_observed"] and isinstance(unwrapped(law), dist.Delta))


def is_data(node: Mapping[str, Any]) -> bool:
    """Whether a site holds observed data: no factor, no computed value, no plate."""
    return bool(
        node["type"] == "sample"
        and node["is_observed"]
        and not is_computed(node)
        and not imputed_name(node)
        and not isinstance(node["fn"], dist.Unit)
        and not poutine.util.site_is_subsample(node)
    )


class Forwards(RunsForwards):
    """Set some sites, and draw all others, the observed ones included unless they are kept."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        keep_observed: bool = False,
        flat_at_zero: bool = False,
    ) -> None:
        super().__init__()
        self.values, self.keep_observed = values, keep_observed
        self.flat_at_zero = flat_at_zero  # a value, and no draw, of what has no draws

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if poutine.util.site_is_subsample(msg) or msg["done"]:
            return
        if msg["name"] in self.values:
            value = self.values[msg["name"]]
            msg["value"] = _spread(msg, value) if is_gap(msg) else value
            msg["done"] = True
            return
        if msg["is_observed"]:
            if self.keep_observed or not is_data(msg):
                return
            if not isinstance(msg["value"], Tensor):
                raise ProgramError(no_tensor(msg["name"], msg["value"]))
            msg["fn"] = _expanded(msg["fn"], msg["value"])
            msg["is_observed"] = False
        if self.flat_at_zero and _is_flat(msg["fn"]):
            transform = torch.distributions.biject_to(msg["fn"].support)
            msg["value"] = transform(torch.zeros(transform.inverse_shape(msg["fn"].shape())))
        else:
            value = _drawn(msg["fn"], msg["name"])
            if value.is_floating_point():  # a prior that was given in another precision
                value = value.to(torch.get_default_dtype())
            msg["value"] = value
        msg["done"] = True


def _spread(msg: dict[str, Any], value: Tensor) -> Tensor:
    """Imputed values in their rows; the others are drawn, and nothing depends on them."""
    whole = _drawn(msg["fn"], msg["name"])
    missing = entries(msg, msg["fn"].batch_shape)
    return value if missing is None else missing.into(value, whole, msg["fn"].event_dim)


def _expanded(law: Any, value: Any) -> Any:
    """The distribution with one value for each observed one, also where no plate says so."""
    shape = torch.broadcast_shapes(law.shape(), value.shape)
    batch = shape[: len(shape) - law.event_dim]
    return law if batch == law.batch_shape else law.expand(batch)


def unwrapped(law: Any) -> Any:
    """A distribution without what only shapes it: events, expansion, masks."""
    wrappers = (
        torch.distributions.Independent | dist.ExpandedDistribution | dist.MaskedDistribution
    )
    while isinstance(law, wrappers):
        law = law.base_dist
    return law


def _is_flat(law: Any) -> bool:
    while isinstance(law, torch.distributions.Independent):
        law = law.base_dist
    return isinstance(law, dist.ImproperUniform)


def _drawn(law: Any, name: str) -> Tensor:
    try:
        value: Tensor = _sample(law)
    except NotImplementedError:
        raise ProgramError(
            f"site '{name}' has a flat prior ({type(law).__name__}), which cannot be drawn from. "
            f"Give a proper one: with_priors(program, {{'{name}': ...}})."
        ) from None
    # As engines do: a prior that was built elsewhere may be of another precision.
    return value.to(torch.get_default_dtype()) if value.is_floating_point() else value


def _sample(law: Any) -> Tensor:
    """One sample by operations that ``vmap`` has rules for, where the family's own have none."""
    kind = type(law)
    if issubclass(kind, torch.distributions.Independent | dist.MaskedDistribution):
        return _sample(law.base_dist)
    if issubclass(kind, torch.distributions.TransformedDistribution):
        if kind.sample in _TRANSFORMED:
            return functools.reduce(lambda x, f: f(x), law.transforms, _sample(law.base_dist))
    elif issubclass(kind, torch.distributions.Dirichlet):
        return _dirichlet(law.concentration)
    elif issubclass(kind, torch.distributions.Beta):
        return _dirichlet(torch.stack((law.concentration1, law.concentration0), -1))[..., 0]
    elif issubclass(kind, torch.distributions.MultivariateNormal):
        noise = torch.randn(_shape(law), dtype=law.loc.dtype, device=law.loc.device)
        return law.loc + (law._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    elif issubclass(kind, torch.distributions.StudentT):
        noise = torch.randn(_shape(law), dtype=law.loc.dtype, device=law.loc.device)
        chi2 = 2 * torch._standard_gamma((law.df / 2).expand(_shape(law)))
        return law.loc + law.scale * noise * (law.df / chi2).sqrt()
    elif issubclass(kind, _BY_QUANTILE):
        like = law.mean
        uniform = torch.rand(_shape(law), dtype=like.dtype, device=like.device)
        return law.icdf(uniform.clamp_min(torch.finfo(like.dtype).tiny))
    value: Tensor = law.sample()
    return value


def _shape(law: Any) -> torch.Size:
    size: torch.Size = law.batch_shape + law.event_shape
    return size


_TRANSFORMED = (
    torch.distributions.TransformedDistribution.sample,
    dist.TransformedDistribution.sample,
)
_BY_QUANTILE = (
    torch.distributions.Exponential,
    torch.distributions.Laplace,
    torch.distributions.HalfCauchy,
    torch.distributions.Cauchy,
)


def _dirichlet(concentration: Tensor) -> Tensor:
    """Small concentrations by one more gamma variate, since their own underflow."""
    small = torch._standard_gamma(concentration + 1.0).log()
    uniform = torch.rand(
        concentration.shape, dtype=concentration.dtype, device=concentration.device
    )
    return (small + uniform.clamp_min(1e-300).log() / concentration).softmax(-1)


# ---------------------------------------------------------------- many runs
def prior_sites(
    run: Run, *, dtype: torch.dtype = torch.float64
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the sites that are drawn or computed from the prior, and of the observed ones."""
    nodes = _once(run, dtype)
    held = tuple(name for name, node in nodes.items() if is_data(node))
    drawn = [n for n, node in nodes.items() if n not in held and not _is_unit(node)]
    return tuple(drawn), held


def data_of(run: Run, *, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The observed values of a program by site, those left out that a mask makes missing."""
    nodes = {name: node for name, node in _once(run, dtype).items() if is_data(node)}
    seen = {name: entries(node) for name, node in nodes.items()}
    return {name: _kept(node["value"], node, seen[name]) for name, node in nodes.items()}


def draw_prior(
    run: Run, num_samples: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws from the prior ``(num_samples, *shape)`` by site, and a data set for each."""
    nodes = _once(run, dtype)
    drawn, held = prior_sites(run, dtype=dtype)
    seen = {n: entries(nodes[n]) for n in (*drawn, *held) if n in held or is_gap(nodes[n])}
    found = simulate(
        run,
        {},
        (*drawn, *held),
        num_runs=num_samples,
        generator=generator,
        dtype=dtype,
        seen=seen,
    )
    return {n: found[n] for n in drawn}, {n: found[n] for n in held}


def _kept(value: Any, node: Mapping[str, Any], seen: Entries | None) -> Tensor:
    value = torch.as_tensor(value)
    return value if seen is None else seen.of(value, node["fn"].event_dim)


def _once(run: Run, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Sample sites of one run at any values, plates left out."""
    values = Forwards({}, keep_observed=True, flat_at_zero=True)
    with rng.fork(rng.make_generator(0)), quietly(dtype), torch.no_grad(), values:
        nodes = _nodes(run)
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and not poutine.util.site_is_subsample(node)
    }


def _is_unit(node: Mapping[str, Any]) -> bool:
    return isinstance(node["fn"], dist.Unit)


def simulate(
    run: Run,
    draws: Mapping[str, Tensor],
    wanted: Sequence[str],
    *,
    num_runs: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    keep_observed: bool = False,
    seen: Mapping[str, Entries | None] | None = None,
) -> dict[str, Tensor]:
    """Run a program ``num_runs`` times, some sites set, all others drawn.

    Args:
        run: The program with its data, called without arguments.
        draws: ``(num_runs, *shape)`` by site to set; the others are drawn from the program.
        wanted: The sites whose values are returned.
        num_runs: How often.
        generator: Of all draws, on the device where to compute.
        dtype: Default dtype while the program runs.
        keep_observed: Whether observed sites keep their data.
        seen: The entries of sites that are returned; None stands for all.

    Returns:
        ``(num_runs, *shape)`` by site.

    Raises:
        ValueError: A flat prior or a ``pyro.factor``, which have no draws; runs of other shapes.
    """

    def one(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with Forwards(values, keep_observed=keep_observed):
            nodes = _nodes(run)
        if not values:
            _check_prior(nodes)
        return {n: _kept(nodes[n]["value"], nodes[n], kept.get(n)).clone() for n in wanted}

    kept = seen or {}
    with rng.fork(generator):
        return _many(one, draws, num_runs, generator.device, dtype)


def _check_prior(nodes: Mapping[str, Any]) -> None:
    for name, node in nodes.items():
        if node["type"] == "sample" and isinstance(node["fn"], dist.Unit):
            raise ProgramError(
                f"pyro.factor '{name}' weighs the prior by a number, so the prior cannot be drawn "
                "from. Write it as a distribution, or give another prior by with_priors."
            )


def log_priors(
    run: Run, draws: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Log density of each latent site's prior at given draws.

    Args:
        run: The program with its data.
        draws: ``(s, *shape)`` of every continuous latent site, and maybe of others.
        dtype: Default dtype while the program runs.

    Returns:
        ``(s,)`` by site, in the order of the program; factors stand beside under their names.

    Raises:
        ValueError: A site is missing, or its prior depends on a discrete latent.
    """

    def one(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with Forwards(values, keep_observed=True):
            nodes = _nodes(run)
        found = {}
        for name, node in nodes.items():
            if node["type"] != "sample" or poutine.util.site_is_subsample(node) or is_data(node):
                continue
            if is_gap(node):  # its law is that of the data
                continue
            if name in values or isinstance(node["fn"], dist.Unit):
                found[name] = node["fn"].log_prob(node["value"]).sum()
            elif not node["is_observed"] and not node["fn"].support.is_discrete:
                raise ValueError(f"the draws lack the site '{name}' of the program.")
        return found

    size, generator = len(next(iter(draws.values()))), rng.make_generator(0)
    some = {name: value[:1] for name, value in draws.items()}
    with rng.fork(generator):
        first = _many(one, some, 1, generator.device, dtype)
    with rng.fork(generator):  # discrete latents are drawn, which must not matter
        found = _many(one, draws, size, generator.device, dtype)
    for name, value in first.items():
        if not torch.allclose(value, found[name][:1]):
            raise ValueError(
                f"the prior of '{name}' depends on a discrete latent that was summed out, so it "
                "has no density of its own."
            )
    return found


def _many(
    one: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    draws: Mapping[str, Tensor],
    num_runs: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    first = {name: value[0] for name, value in draws.items()}
    with quietly(dtype), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap tells where it is slower than it could be
        size = sum(v.numel() for v in (*one(first).values(), *first.values()))
        chunk = max(1, _BUDGET // (16 * max(1, size)))
        counter = torch.arange(num_runs, device=device)

        def numbered(values: dict[str, Tensor], _: Tensor) -> dict[str, Tensor]:
            return one(values)

        many = torch.func.vmap(numbered, randomness="different")
        parts, at_once = [], True
        for start in range(0, num_runs, chunk):
            block = slice(start, start + chunk)
            values = {name: value[block] for name, value in draws.items()}
            if at_once:
                try:
                    parts.append(many(values, counter[block]))
                    continue
                except (RuntimeError, NotImplementedError):
                    at_once = False  # the program has something that vmap cannot follow
            parts.append(_one_by_one(one, values, len(counter[block])))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _one_by_one(
    one: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    values: Mapping[str, Tensor],
    count: int,
) -> dict[str, Tensor]:
    rows = [one({name: value[i] for name, value in values.items()}) for i in range(count)]
    shapes = {name: {tuple(row[name].shape) for row in rows} for name in rows[0]}
    odd = [name for name, found in shapes.items() if len(found) > 1]
    if odd:
        raise ValueError(
            f"site '{odd[0]}' has another shape in each run of the program, {shapes[odd[0]]}: "
            "its draws cannot be stacked."
        )
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
