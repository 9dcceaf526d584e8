"""What a model can do: the small contracts that engines and verbs ask for.

An engine never asks what a model *is*; it asks for a capability with :func:`require`, which raises
a ``TypeError`` naming the missing one. Every class below is abstract; every model is final.

Shapes: data ``(n, d)`` (or ``(n, channels, height, width)``); draws are mappings from site name to
a tensor ``(*draw, *event)``, where ``*draw`` is usually ``(chain, draw)``; log densities are in
nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributions import Distribution

    from bayesgen.conjugate import Block, Local, MarginalBlock
    from bayesgen.data import Dataset
    from bayesgen.symmetry import Symmetry

__all__ = [
    "Conditional",
    "Conjugate",
    "Continued",
    "Denoising",
    "Encoder",
    "Explained",
    "Generative",
    "Guided",
    "Model",
    "Partitioned",
    "Pointwise",
    "Pooled",
    "Program",
    "Scored",
    "Simulated",
    "Solution",
    "Solvable",
    "Symmetric",
    "Tensors",
    "Weighted",
    "require",
]

Tensors = Mapping[str, Tensor]
"""Named tensors: draws, parameters, statistics, the hyperparameters of a posterior."""


class Model(ABC):
    """What every model is: a description that can be bound to data, and saved."""

    @abstractmethod
    def bind(self, data: Dataset) -> Self:
        """A copy that knows the columns of ``data``, with default priors scaled to them.

        Binding a bound model again starts from the unbound description. A prior that does not fit
        the data's width raises ``ValueError``.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """A copy of the bound model on another device."""

    @property
    @abstractmethod
    def is_bound(self) -> bool:
        """Whether :meth:`bind` has been called: verbs on data need it."""

    @property
    @abstractmethod
    def dims(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the event dimensions of each site: ``{"loc": ("component", "column")}``."""

    @abstractmethod
    def coords(self) -> Mapping[str, list[Any]]:
        """Labels along each named dimension, such as the names of the data's columns."""

    @property
    def attrs(self) -> Mapping[str, Any]:
        """JSON values about the model that its fits record, such as its priors in words."""
        return {}

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """The bound model as nested dicts of JSON values and tensors."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_config`; runs no code that the file names."""


class Program(ABC):
    """A Pyro program whose data sit inside ``plate("data", n, subsample=...)``."""

    @abstractmethod
    def model(self, batch: Tensor | None, *, num_rows: int | None = None) -> None:
        """The Pyro program of a batch ``(b, d)`` out of ``num_rows`` rows."""


class Guided(ABC):
    """Its own variational posterior, amortised over rows where it likes."""

    @abstractmethod
    def guide(self, batch: Tensor | None, *, num_rows: int | None = None) -> None:
        """The Pyro guide, called with the arguments of the program."""


class Scored(ABC):
    """A normalised log density of new data."""

    @abstractmethod
    def log_prob(self, x: Tensor, draws: Tensors) -> Tensor:
        """``log p(x_i | draw)`` with local latents integrated out: ``(*draw, n)``, in nats.

        ``NaN`` entries of ``x`` are integrated out exactly where the model can.
        """

    @property
    def is_estimated(self) -> bool:
        """Whether it is an estimate, so dear that what can do without it should."""
        return False


class Pointwise(ABC):
    """A log density of each of its own observed values: what cross-validation needs."""

    @abstractmethod
    def log_likelihood(self, draws: Tensors) -> Tensors:
        """By observed site ``(*draw, *rows)``, discrete latents summed out, in nats."""

    @property
    @abstractmethod
    def observed(self) -> Tensors:
        """The observed values by site."""


class Simulated(ABC):
    """New data sets from the program itself, and its prior, in the shapes of its own data."""

    @property
    @abstractmethod
    def program(self) -> Callable[[], Any]:
        """The Pyro program with its data, called without arguments."""

    @abstractmethod
    def replicate(self, draws: Tensors, *, generator: torch.Generator) -> Tensors:
        """One data set for each of the draws ``(m, *event)``: ``(m, *shape)`` by observed site."""

    @abstractmethod
    def prior(self, num_samples: int, *, generator: torch.Generator) -> tuple[Tensors, Tensors]:
        """Draws from the prior, and one data set for each; ``(num_samples, *shape)`` by site."""

    @abstractmethod
    def log_prior(self, draws: Tensors) -> Tensors:
        """Log density of the prior of each latent site at draws ``(m, *event)``: ``(m,)``."""


class Generative(ABC):
    """New data from the model."""

    @abstractmethod
    def sample(self, draws: Tensors, *, generator: torch.Generator) -> Tensor:
        """One new row for each of the ``m`` parameter draws ``(m, *event)``: ``(m, d)``."""


class Encoder(ABC):
    """Inference of the local latents of new data."""

    @abstractmethod
    def encode(self, x: Tensor, draws: Tensors) -> Distribution:
        """The distribution of each row's latent, batch shape ``(*draw, n)``."""


class Conditional(ABC):
    """The distribution of some columns given the others."""

    @abstractmethod
    def condition(self, x: Tensor, observed: Tensor, draws: Tensors) -> Distribution:
        """``p(x[~observed] | x[observed], draw)``: batch ``(*draw, n)``, event ``(d_missing,)``.

        ``observed`` is one boolean mask ``(d,)`` for all rows of ``x`` ``(n, d)``; entries of
        ``x`` outside the mask are not read.
        """


class Denoising(ABC):
    """Rows that would be seen if there were no noise: the signal of a latent variable model."""

    @abstractmethod
    def reconstruct(self, x: Tensor, draws: Tensors) -> Tensor:
        """``E[signal_i | x_i, draw]``, ``(*draw, n, d)``; ``NaN`` entries are filled too."""

    @abstractmethod
    def sample_signal(self, draws: Tensors, *, generator: torch.Generator) -> Tensor:
        """One new row without noise for each of the ``m`` parameter draws: ``(m, d)``."""


class Explained(ABC):
    """How much of the variance of the rows its latents explain."""

    @abstractmethod
    def explained_variance(self, draws: Tensors) -> Tensors:
        """``signal (*draw, q)`` along principal directions, decreasing; ``noise (*draw,)``.

        Their sum is the total variance of all columns, in squared units of the data.
        """


class Weighted(ABC):
    """A robust model: how much each cell of a row counts."""

    @abstractmethod
    def cell_weights(self, x: Tensor, draws: Tensors) -> Tensor:
        """Expected scale of each cell given its row, ``(*draw, n, d)``; ``NaN`` where missing.

        About one for a cell that fits, near zero for one that does not.
        """


class Symmetric(ABC):
    """A model whose posterior is unchanged by a group of transformations."""

    @property
    @abstractmethod
    def symmetry(self) -> Symmetry:
        """The group and the sites it acts on."""

    @abstractmethod
    def invariants(self, draws: Tensors) -> Tensors:
        """Quantities that the group leaves alone, each ``(*draw, ...)``."""


class Conjugate(ABC):
    """A model made of conjugate blocks: one description serves EM, variational Bayes and Gibbs.

    The engines alternate a *local* step (latents of each row given a message about the parameters)
    and a *global* one (each :class:`~bayesgen.conjugate.Block` turns the summed statistics into
    its mode, a draw, or expectations). Everything carries leading batch dimensions (chains,
    starts).
    """

    @property
    @abstractmethod
    def blocks(self) -> Mapping[str, Block]:
        """The conjugate blocks, by name."""

    @property
    @abstractmethod
    def row_size(self) -> int:
        """Numbers that one row costs in :meth:`local`: engines size chunks by it."""

    @abstractmethod
    def observe(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Any:
        """Everything about a batch ``(b, d)`` that does not depend on parameters, computed once.

        ``x`` comes in float64 and is centred there; features are then kept in ``dtype``.
        """

    def ready(self, messages: Mapping[str, Tensors], dtype: torch.dtype) -> Mapping[str, Tensors]:
        """The messages with what every batch of a pass would work out from them again.

        Engines call it once a pass; :meth:`local` takes messages with it or without.
        """
        return messages

    @abstractmethod
    def local(
        self,
        observed: Any,
        messages: Mapping[str, Tensors],
        *,
        generator: torch.Generator | None = None,
    ) -> Local:
        """Local step: statistics of the batch, and its contribution to the bound.

        Without ``generator`` latents are replaced by expectations (EM, variational Bayes), with it
        they are drawn (Gibbs).
        """

    @abstractmethod
    def inner(self, messages: Mapping[str, Tensors], statistics: Mapping[str, Tensors]) -> Tensor:
        """Expected complete-data log density carried by the statistics, ``(...)``: linear in them.

        The bound of a batch is this plus the entropy of its latents, which is how memoised passes
        keep an exact bound without visiting every batch.
        """

    @abstractmethod
    def start(
        self,
        x: Tensor,
        *,
        num_batch: int,
        generator: torch.Generator,
        varied: bool = False,
    ) -> Mapping[str, Tensors]:
        """Statistics of ``num_batch`` starting guesses of the latents of the rows of ``x``.

        With ``varied`` they differ in size where that means anything: the first guess of a mixture
        uses all components, the last two, and the others lie between.
        """

    @abstractmethod
    def export(self, values: Mapping[str, Tensors]) -> dict[str, Tensor]:
        """The blocks' sites as draws in the data's units, under their public names."""

    @abstractmethod
    def degenerate(self, values: Mapping[str, Tensors]) -> Tensor:
        """``(...)`` whether the values sit where the likelihood has no maximum.

        As when a component has collapsed onto a point.
        """

    @abstractmethod
    def log_predictive(self, x: Tensor, posterior: Mapping[str, Tensors]) -> Tensor | None:
        """Exact posterior predictive ``(n,)``; None where there is no closed form."""


class Partitioned(Conjugate):
    """A conjugate model whose rows each belong to one of several interchangeable components.

    What the moves of variational Bayes and Gibbs ask for: they split, merge and relabel.
    """

    @property
    @abstractmethod
    def blocks(self) -> Mapping[str, MarginalBlock]:
        """The conjugate blocks, ``"components"`` among them, each with its evidence."""

    @abstractmethod
    def assigned(
        self, observed: Any, responsibilities: Tensor
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Statistics of a batch under given responsibilities ``(..., K, b)``, by block."""

    @abstractmethod
    def scattered(
        self, x: Tensor, *, num_batch: int, generator: torch.Generator, varied: bool = False
    ) -> Mapping[str, Tensors]:
        """As :meth:`start`, from responsibilities drawn at random whatever the row holds.

        Distances mean little between sparse rows (words of a text, items of a basket): there this
        is the better start.
        """

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Rows as points ``(b, e)`` on one scale: distances there guide starts and splits."""

    @abstractmethod
    def occupancy(self, statistics: Mapping[str, Tensors]) -> Tensor:
        """``(..., K)`` rows that each component holds: what moves split and merge."""

    @abstractmethod
    def component_scores(self, observed: Any, message: Tensors) -> Tensor:
        """``(..., J, b)`` scores of a batch under a message of any number ``J`` of components."""

    @abstractmethod
    def collapsible(self, observed: Any) -> bool:
        """Whether labels alone determine the statistics: no missing entry, no local scale."""


class Pooled(Conjugate):
    """A conjugate model of which batches can be observed together, by their sums.

    Engines then pass over the data once: a step works on the sums, however many rows there are.
    """

    @property
    @abstractmethod
    def pools(self) -> bool:
        """Whether sums suffice for the data that the model is bound to."""

    @abstractmethod
    def pool(self, left: Any, right: Any) -> Any:
        """What :meth:`observe` would give of both batches together."""


class Continued(Conjugate):
    """A conjugate model whose local step goes on from where the last one left each row.

    Its local latents have no joint law in closed form, only laws given one another. A step of
    coordinate ascent raises the bound from what the last step left; a draw alternates.
    """

    @property
    @abstractmethod
    def continues(self) -> bool:
        """Whether this model needs it, as its arguments say; else :meth:`local` does."""

    @property
    def num_passes(self) -> int:
        """Passes over the rows in one sweep of Gibbs.

        Each goes on from what the one before left, and after each the blocks draw what its
        statistics tell of.
        """
        return 1

    @abstractmethod
    def local_after(
        self,
        observed: Any,
        messages: Mapping[str, Tensors],
        left: Tensor | None,
        *,
        generator: torch.Generator | None = None,
    ) -> Local:
        """As :meth:`local`, after a step that left ``left (..., b, k)``; None begins.

        The latents of what it returns hold ``left`` for the next step.
        """


class Solvable(ABC):
    """A model whose likelihood has its maximum in closed form."""

    @abstractmethod
    def takes_products(self, num_rows: int, num_columns: int, method: str) -> bool:
        """Whether sums of products of the columns are all that :meth:`solve` needs of such data.

        Asked of a model before it is bound.
        """

    @abstractmethod
    def solve(
        self,
        passes: Callable[[], Iterable[Tensor]],
        *,
        products: Tensor | None,
        restricted: bool,
        method: str,
        generator: torch.Generator,
    ) -> Solution:
        """The maximum, in as few passes as can be.

        Args:
            passes: Called for each pass; gives all rows in batches ``(b, d)``, float64.
            products: Sums of products of the columns' deviations from their means ``(d, d)``,
                where they are known: then no pass is needed.
            restricted: Whether the mean is integrated out of the likelihood under a flat prior.
            method: ``"exact"``, ``"randomised"``, or ``"auto"`` for what suits the data's size.
            generator: Source of randomness of ``"randomised"``.

        Raises:
            ValueError: The data have gaps, or an unknown method.
        """


class Solution(NamedTuple):
    """The maximum of a likelihood."""

    values: Tensors
    """Parameters in the data's units, under their public names."""
    log_likelihood: float
    """Of all rows at these values, in nats."""
    messages: tuple[str, ...] = ()
    """What a person should know of it."""


C = TypeVar("C")


def require(model: object, capability: type[C], who: str) -> C:
    """Return ``model`` seen as ``capability``, or raise a ``TypeError`` naming it."""
    if isinstance(model, capability):
        return model
    has = [c.__name__ for c in _ALL if isinstance(model, c)]
    raise TypeError(
        f"{who} needs a model with the capability {capability.__name__}, but "
        f"{type(model).__name__} has {', '.join(has) if has else 'none of the capabilities'}. "
        f"Implement bayesgen.capabilities.{capability.__name__}, or use another engine or verb."
    )


_ALL: tuple[type, ...] = (
    Program,
    Guided,
    Scored,
    Pointwise,
    Simulated,
    Generative,
    Encoder,
    Conditional,
    Denoising,
    Explained,
    Weighted,
    Symmetric,
    Conjugate,
    Partitioned,
    Pooled,
    Continued,
    Solvable,
)
