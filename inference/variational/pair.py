"""A model and a guide as one function of a flat parameter vector, noise and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.overrides import TorchFunctionMode

from bayesgen import rng
from bayesgen.inference.compiled.products import PlainProducts
from bayesgen.inference.programs.call import Call
from bayesgen.inference.programs.complaints import ProgramError, check_rows, explained
from bayesgen.inference.programs.flat import starting_in_the_support
from bayesgen.inference.programs.precision import Converted, in_one_dtype
from bayesgen.inference.programs.sites import Bounded, Checked, check_program, quietly
from bayesgen.inference.variational.noise import Branches, Fed, Read, Tape
from bayesgen.inference.variational.objectives import OBJECTIVES, Traces, run_both
from bayesgen.priors import same_support
from bayesgen.replay import unwrapped

__all__ = ["Pair", "Parameter", "Plate", "meet"]


class Parameter(NamedTuple):
    """One unconstrained parameter tensor and where it lies in the flat vector."""

    name: str
    tensor: Tensor
    start: int


class Plate(NamedTuple):
    """A plate that takes a random subsample of its rows."""

    name: str
    size: int
    batch_size: int


# ---------------------------------------------------------------- handlers
_NESTED = (tuple, list)
_ASKED = tuple(vars(torch._C.TensorBase)[name].__get__ for name in ("requires_grad", "is_leaf"))


@final
class _Substitute(TorchFunctionMode):
    """Wherever a tensor is used, use another: parameters become slices of a flat vector.

    By identity, and so wherever the parameter lives: Pyro's store, a module, a closure.
    """

    def __init__(self, pairs: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.pairs = pairs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        pairs = self.pairs
        if func in _ASKED:  # about the parameter itself
            return func(*args, **(kwargs or {}))
        if any(id(v) in pairs or type(v) in _NESTED for v in args):
            args = tuple(self._other(v) for v in args)
        if kwargs:
            return func(*args, **{k: self._other(v) for k, v in kwargs.items()})
        return func(*args)

    def _other(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.pairs.get(id(value), value)
        if type(value) in _NESTED:
            return type(value)(self._other(v) for v in value)
        return value


@final
class _Indexed(Messenger):
    """Tell plates which rows they hold."""

    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if poutine.util.site_is_subsample(msg) and msg["value"] is None:
            index = self.indices.get(msg["name"])
            if index is not None and msg["fn"].subsample_size == len(index):
                msg["value"] = index
                msg["done"] = True


# ---------------------------------------------------------------- the pair
@dataclass(frozen=True, eq=False)
class Pair:
    """Model, guide and data, once met: what there is to optimise, and how to evaluate it.

    Args:
        model: The Pyro program.
        guide: The guide, called with the same arguments.
        call: These arguments.
        parameters: What is optimised, unconstrained.
        store: Pyro's parameter store of this pair.
        plates: Plates whose rows the engine chooses.
        objective: Name of the bound of one particle.
        max_plate_nesting: Vectorised plates, counted from the right.
        traces: Of the first run.
        extra: Keyword arguments of every call.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    call: Call
    parameters: tuple[Parameter, ...]
    store: dict[str, Any]
    plates: tuple[Plate, ...]
    objective: str
    max_plate_nesting: int
    traces: Traces
    dtype: torch.dtype
    device: torch.device
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_params(self) -> int:
        """Length of the flat vector."""
        return sum(p.tensor.numel() for p in self.parameters)

    @property
    def has_latents(self) -> bool:
        """Whether the guide samples anything."""
        return any(True for _ in self.traces.guide.stochastic_nodes)

    def start(self) -> Tensor:
        """The parameters as they were met, ``(P,)``."""
        if not self.parameters:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        parts = [p.tensor.detach().reshape(-1).to(self.dtype) for p in self.parameters]
        return torch.cat(parts).clone()

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Unconstrained parameters by name."""
        pieces = flat.split([p.tensor.numel() for p in self.parameters])
        return {
            p.name: v.reshape(p.tensor.shape) for p, v in zip(self.parameters, pieces, strict=True)
        }

    def constrained(self, flat: Tensor) -> dict[str, Tensor]:
        """Parameters by name as the program sees them."""
        laws = self.store["constraints"]
        return {
            name: transform_to(laws[name])(value) if name in laws else value
            for name, value in self.named(flat).items()
        }

    @contextmanager
    def using(self, flat: Tensor) -> Iterator[None]:
        """Inside, model and guide see the parameters of ``flat``."""
        pieces = self.named(flat)
        pairs = {id(p.tensor): pieces[p.name].view(p.tensor.shape) for p in self.parameters}
        with _context(self.dtype, self.store), _Substitute(pairs):
            yield

    def run(
        self, tensors: Sequence[Tensor], indices: Sequence[Tensor] = (), *, full: bool = False
    ) -> Traces:
        """Guide and model on some data; to be called inside :meth:`using`.

        ``full`` runs them on all rows, whatever plates the engine feeds.
        """
        names = [] if full else [plate.name for plate in self.plates]
        args, kwargs = self.call.arguments(tensors)
        kwargs |= self.extra
        with _Indexed(dict(zip(names, indices, strict=True))):
            return run_both(
                lambda: self.model(*args, **kwargs),
                lambda: self.guide(*args, **kwargs),
                max_plate_nesting=self.max_plate_nesting if self.objective == "enum" else None,
            )

    # ------------------------------------------------------------ functions of tensors
    def gradient(
        self, flat: Tensor, normals: Tensor, uniforms: Tensor, *data: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The bound of one particle, its gradient ``(P,)``, and whether a branch has changed.

        Tensors, then indices, are data. Branches: :mod:`~bayesgen.inference.variational.noise`.
        """
        return self.watched(None, flat, normals, uniforms, *data)

    def watched(
        self,
        seen: list[Read] | None,
        flat: Tensor,
        normals: Tensor,
        uniforms: Tensor,
        *data: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same; numbers that the program reads are added to ``seen``."""
        branches = Branches(seen)
        with branches, Tape(Fed(normals, uniforms)):
            value, gradient = self.gradient_now(flat, *data)
            return value, gradient, branches.violated(value)

    def gradient_now(self, flat: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        """The same with whatever randomness is in force."""
        leaf = flat.detach().requires_grad_(True)
        with torch.enable_grad(), PlainProducts(), self.using(leaf):
            elbo, surrogate = OBJECTIVES[self.objective](self.run(*self.parted(data)))
            if not surrogate.requires_grad:
                return elbo.detach(), torch.zeros_like(leaf)
            (gradient,) = torch.autograd.grad(surrogate, leaf, materialize_grads=True)
        return elbo.detach(), gradient

    def parted(self, data: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Tensors of the call, and indices of the plates."""
        count = len(self.call.tensors)
        return data[:count], data[count:]


@contextmanager
def _context(
    dtype: torch.dtype, store: dict[str, Any], *, validate: bool = False
) -> Iterator[None]:
    with (
        quietly(dtype, validate=validate),
        # Parameters of every kind of module show up in the one store, which is of this pair alone.
        pyro.settings.context(module_local_params=False),
        pyro.get_param_store().scope(store),
        Converted(dtype),
    ):
        yield


def meet(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    call: Call,
    tensors: Sequence[Tensor],
    *,
    objective: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    extra: Mapping[str, Any],
    plates: Callable[[Traces], tuple[Plate, ...]],
) -> Pair:
    """Run a model and a guide once, and find out what is in them.

    Args:
        model: The Pyro program.
        guide: The guide.
        call: Their arguments.
        tensors: The tensors of the call, of one minibatch.
        objective: Name of the bound, or ``"auto"``.
        dtype: Default dtype under which they run.
        generator: For their first run; its device is where to compute.
        extra: Keyword arguments of every call.
        plates: Which plates the engine feeds, given the traces.

    Raises:
        ValueError: A pair that does not fit together.
    """
    store: dict[str, Any] = {"params": {}, "constraints": {}}
    args, kwargs = call.arguments(tensors)
    kwargs |= extra
    if isinstance(guide, AutoGuide):
        # By another generator and store: the seed decides where parameters start.
        aside = rng.make_generator(0, generator.device)
        with _context(dtype, {"params": {}, "constraints": {}}), in_one_dtype(dtype):
            check_program(lambda: model(*args, **kwargs), dtype=dtype, generator=aside)
    with (
        rng.fork(generator),
        _context(dtype, store, validate=True),
        explained(),
        starting_in_the_support(),
        in_one_dtype(dtype),
    ):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        with Checked():
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        traces = Traces(model_trace, guide_trace)
        discrete = _check_match(traces)
        for node in model_trace.nodes.values() if discrete else ():
            if node["type"] == "sample":
                check_rows(node, discrete)
    if objective == "auto":
        objective = "enum" if discrete else "trace"
    elif discrete and objective != "enum":
        raise ProgramError(
            f"objective={objective!r}, but the model has discrete latents that the guide does not "
            f"sample: {', '.join(discrete)}. Use objective='enum', which sums them out."
        )
    parameters = _parameters(store, (model, guide))
    if objective == "enum":
        from pyro.infer import config_enumerate

        model = config_enumerate(model, "parallel")
    found = plates(traces)
    pair = Pair(
        model,
        guide,
        call,
        parameters,
        store,
        found,
        objective,
        _nesting(traces),
        traces,
        dtype,
        generator.device,
        extra,
    )
    if objective == "enum":
        _rehearse(pair, tensors)
    return pair


def _rehearse(pair: Pair, tensors: Sequence[Tensor]) -> None:
    """Sum out the discrete latents once, so that what prevents it is explained."""
    aside = rng.fork(rng.make_generator(0, pair.device))
    with aside, torch.no_grad(), explained(), pair.using(pair.start()):
        with Bounded(pair.max_plate_nesting):
            traces = pair.run(tensors, full=True)
        OBJECTIVES["enum"](traces)


def _parameters(store: Mapping[str, Any], owners: Sequence[Any]) -> tuple[Parameter, ...]:
    """Everything trainable in Pyro's store and in the modules that model and guide are."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in store["params"].items():
        found.setdefault(id(tensor), (name, tensor))
    for owner in owners:
        module = owner if isinstance(owner, nn.Module) else getattr(owner, "__self__", None)
        if isinstance(module, nn.Module):
            for name, tensor in module.named_parameters():
                if tensor.requires_grad:
                    found.setdefault(id(tensor), (name, tensor))
    parameters, start, used = [], 0, set[str]()
    for name, tensor in found.values():
        while name in used:
            name += "_"
        used.add(name)
        parameters.append(Parameter(name, tensor, start))
        start += tensor.numel()
    return tuple(parameters)


def _nesting(traces: Traces) -> int:
    frames = [
        frame
        for trace in traces
        for node in trace.nodes.values()
        for frame in node.get("cond_indep_stack", ())
    ]
    return max((-f.dim for f in frames if f.vectorized), default=0)


def _check_match(traces: Traces) -> list[str]:
    """Discrete latents that the guide leaves to the model; refuse anything else it leaves out."""
    left, discrete = [], []
    for name, node in traces.model.nodes.items():
        if node["type"] != "sample" or node["is_observed"] or name in traces.guide.nodes:
            continue
        if poutine.util.site_is_subsample(node):
            continue
        if getattr(node["fn"], "has_enumerate_support", False):
            discrete.append(name)
        else:
            left.append(name)
    if left:
        raise ProgramError(
            f"the guide has no site for the model's latent {', '.join(map(repr, left))}: add "
            f"pyro.sample({left[0]!r}, ...) to it, or observe the site in the model (obs=...)."
        )
    for name, node in traces.guide.nodes.items():
        known = node["infer"].get("is_auxiliary") if node["type"] == "sample" else True
        if not known and not poutine.util.site_is_subsample(node):
            _check_site(name, node, traces.model.nodes.get(name))
    return discrete


def _check_site(name: str, node: Any, other: Any) -> None:
    """A site of the guide against that of the model."""
    if other is None:
        raise ProgramError(
            f"the guide's site {name!r} is not in the model: give both the same name, or mark "
            "it infer={'is_auxiliary': True}."
        )
    if other["is_observed"]:
        raise ProgramError(
            f"the guide samples {name!r}, which the model observes: take it out of the guide."
        )
    given, wanted = (unwrapped(n["fn"]) for n in (node, other))
    if isinstance(given, pyro.distributions.Delta):  # a value, already in the support
        return
    try:
        fits = same_support(given.support, wanted.support)
    except NotImplementedError:  # a distribution that does not say
        return
    if not fits:
        raise ProgramError(
            f"the guide's site {name!r} can take any value of {given.support}, but the model's "
            f"only of {wanted.support}: outside it the density is zero. Give the guide a "
            "distribution on the model's support (LogNormal or Gamma for what is positive, Beta "
            "on the unit interval)."
        )
