"""A plain Pyro function after variational inference, as a model that a fit can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, final

import torch
from pyro import poutine
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Pointwise, Tensors
from bayesgen.inference.programs.program import Arguments, CodeModel, labels_of
from bayesgen.inference.programs.sites import dims_of, rows_of, seen_data
from bayesgen.inference.programs.trace import Density, trace
from bayesgen.inference.variational.pair import Pair
from bayesgen.replay import is_data

__all__ = ["TrainedProgram"]


@final
@dataclass(frozen=True, eq=False)
class TrainedProgram(CodeModel, Pointwise):
    """A Pyro function with its data and its trained parameters.

    Args:
        function: The program.
        pair: The program and its guide.
        arguments: What they were called with.
        params: Trained parameters, flat and unconstrained.
        sites_vary: Whether some runs of the program have sites that others lack: then there is no
            density of its rows.
    """

    function: Callable[..., Any]
    pair: Pair = field(repr=False)
    arguments: Arguments = field(repr=False)
    params: Tensor = field(repr=False)
    sites_vary: bool = False

    def __repr__(self) -> str:
        nodes = self._nodes
        observed = [k for k in nodes if k in self.observed]
        latent = [k for k, n in nodes.items() if not n["is_observed"]]
        lines = [f"TrainedProgram({self.name}): {self.pair.num_params} parameters of the guide"]
        lines += [f"  latent: {', '.join(latent)}", f"  observed: {', '.join(observed)}"]
        return "\n".join(lines)

    @cached_property
    def _nodes(self) -> dict[str, Any]:
        """Sample sites over all rows; of one minibatch where the program takes them by itself."""
        pair = self.pair
        model = pair.traces.model
        if not pair.plates:
            generator = rng.make_generator(0, pair.device)
            single = replace(pair, objective="trace")  # one value of each discrete latent
            with torch.no_grad(), rng.fork(generator), pair.using(self.params):
                model = single.run(pair.call.tensors, full=True).model
        return {
            name: node
            for name, node in model.nodes.items()
            if node["type"] == "sample" and not poutine.util.site_is_subsample(node)
        }

    @property
    def device(self) -> torch.device:
        return self.pair.device

    @cached_property
    def dims(self) -> Mapping[str, tuple[str, ...]]:
        found = {
            name: seen_data(node)[1] if is_data(node) else dims_of(node)
            for name, node in self._nodes.items()
        }
        for p in self.pair.parameters:
            found.setdefault(p.name, tuple(f"{p.name}_dim_{k}" for k in range(p.tensor.ndim)))
        return found

    def coords(self) -> Mapping[str, list[Any]]:
        sizes: dict[str, int] = {}
        for name, node in self._nodes.items():
            value = seen_data(node)[0] if is_data(node) else node["value"]
            sizes |= dict(zip(self.dims[name], value.shape, strict=True))
        found = labels_of(self.function, self.arguments, self.observed, self.dims, sizes)
        return found | rows_of(self._nodes)

    # ------------------------------------------------------------ Pointwise
    @cached_property
    def density(self) -> Density:
        """The log density of the program at its trained parameters, over all rows.

        Raises:
            ValueError: The program takes a random part of its rows by itself.
        """
        pair = self.pair
        return trace(self.program, dtype=pair.dtype, generator=rng.make_generator(0, pair.device))

    @property
    def program(self) -> Callable[[], Any]:
        pair = self.pair
        args, kwargs = pair.call.arguments(pair.call.tensors)
        kwargs |= pair.extra

        def run() -> Any:
            with pair.using(self.params), poutine.block(hide_types=["param"]):
                return pair.model(*args, **kwargs)

        return run

    def log_likelihood(self, draws: Tensors) -> Mapping[str, Tensor]:
        if (
            self.pair.plates
            or self.sites_vary
            or any(s.name not in draws for s in self.density.layout.sites)
        ):
            return {}  # local latents are not among the draws
        return self.density.log_likelihood(draws)

    @cached_property
    def observed(self) -> Tensors:
        if self.pair.plates:
            return {}
        return {k: seen_data(node)[0] for k, node in self._nodes.items() if is_data(node)}
