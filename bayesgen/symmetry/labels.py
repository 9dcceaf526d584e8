"""Label switching: draws of a mixture relabelled until components mean the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayesgen.symmetry.base import PRESENT, Alignment, Symmetry

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.fit import Fit

__all__ = ["LabelPermutation", "assign", "match"]

_SMOOTHING = 1e-6  # keeps log(reference) finite where the reference draw gives a row no weight
_SETTLED = 1e-6  # relative change of the mean cost at which relabelling ends
_AMBIGUOUS = 0.05  # a pair is confused when this share of its draws could as well be swapped


@dataclass(frozen=True)
class LabelPermutation(Symmetry):
    r"""The permutations of ``num_components`` labels, aligned by Stephens' algorithm.

    With responsibilities :math:`p^{(s)}_{ik}` of anchor rows it alternates, from the draw of
    highest density on,

    .. math::
        \sigma_s = \arg\min_\sigma \sum_{i,k} p^{(s)}_{i\sigma(k)} \log
        \frac{p^{(s)}_{i\sigma(k)}}{q_{ik}}, \qquad q_{ik} = \frac1S \sum_s p^{(s)}_{i\sigma_s(k)}

    until nothing moves. Each :math:`\sigma_s` is an exact linear assignment. Without
    responsibilities it compares parameters, standardised by their spread within components.

    References:
        Stephens (2000). Dealing with label switching in mixture models. JRSS B 62.

    Args:
        num_components: How many labels.
        axes: For each site the axis of its event that counts components (``0`` is the first after
            the draw dimensions; negative ones count from the end), or several axes, as in the
            transition matrix of a hidden Markov model.
        weights: The site of the mixing weights, used to order the components; None when there is
            none.
        dim: Name of the dimension that counts components.

    Raises:
        ValueError: No component, or no axis.

    Example:
        >>> symmetry = LabelPermutation(2, {"weights": 0, "loc": 0})
        >>> draws = {"weights": torch.tensor([[[0.7, 0.3], [0.3, 0.7]]]),
        ...          "loc": torch.tensor([[[0.0, 5.0], [5.1, 0.1]]])}
        >>> symmetry.align(draws).draws["loc"]
        tensor([[[0.0000, 5.0000],
                 [0.1000, 5.1000]]])
    """

    num_components: int
    axes: Mapping[str, int | tuple[int, ...]]
    weights: str | None = "weights"
    dim: str = "component"

    def __post_init__(self) -> None:
        if self.num_components < 1:
            raise ValueError(f"num_components={self.num_components}, but at least 1 is needed.")
        if not self.axes:
            raise ValueError("axes is empty: name a site whose event counts components.")

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.axes)

    def random(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
        size = (*shape, self.num_components)
        return torch.rand(size, generator=generator, device=generator.device).argsort(-1)

    def apply(self, draws: Tensors, elements: Tensor) -> dict[str, Tensor]:
        self._check(draws)
        lead = elements.ndim - 1
        moved = dict(draws)
        for site, axes in self.axes.items():
            for axis in axes if isinstance(axes, tuple) else (axes,):
                value = moved[site]
                dim = lead + axis if axis >= 0 else value.ndim + axis
                index = elements.to(value.device)
                index = index.reshape(
                    *elements.shape[:lead],
                    *(self.num_components if d == dim else 1 for d in range(lead, value.ndim)),
                )
                moved[site] = torch.take_along_dim(value, index, dim=dim)
        return moved

    def align(
        self,
        draws: Tensors,
        *,
        responsibilities: Tensor | None = None,
        log_density: Tensor | None = None,
        max_steps: int = 50,
    ) -> Alignment:
        self._check(draws)
        lead = next(iter(draws.values())).shape[:2]
        flat = {site: draws[site].detach().cpu().flatten(0, 1) for site in self.axes}
        occupancy = self._occupancy(flat, responsibilities)
        costs = (
            _Responsibilities(responsibilities)
            if responsibilities is not None
            else _Parameters(self._features(flat), occupancy)
        )
        start = int(log_density.flatten().argmax()) if log_density is not None else 0
        permutations, matrix, num_steps = _relabel(costs, start, max_steps)
        shares = occupancy.gather(1, permutations)
        occupancy = shares.mean(0)
        order = torch.argsort(self._mean_weights(flat, permutations, occupancy), descending=True)
        permutations, occupancy = permutations[:, order], occupancy[order]
        matrix = matrix[:, order][:, :, order]
        shares = shares[:, order]
        elements = permutations.unflatten(0, lead)
        return _report(
            self.apply(draws, elements),
            elements,
            matrix,
            shares,
            negligible=_negligible(costs.num_anchors, self.num_components),
            num_steps=num_steps,
        )

    # ------------------------------------------------------------ private
    def _check(self, draws: Tensors) -> None:
        missing = [site for site in self.axes if site not in draws]
        if missing:
            raise ValueError(
                f"LabelPermutation acts on {sorted(self.axes)}, but the draws lack {missing}; "
                f"they hold {sorted(draws)}."
            )
        for site, axes in self.axes.items():
            event = draws[site].shape[2:]
            for axis in axes if isinstance(axes, tuple) else (axes,):
                inside = -len(event) <= axis < len(event)
                if not inside or event[axis] != self.num_components:
                    raise ValueError(
                        f"site '{site}' has event shape {tuple(event)}, but axis {axis} of it "
                        f"must have size num_components={self.num_components}."
                    )

    def _occupancy(self, flat: Tensors, responsibilities: Tensor | None) -> Tensor:
        """Share of the rows of each component in each draw, ``(s, K)``."""
        if responsibilities is not None:
            return responsibilities.detach().cpu().flatten(0, 1).mean(1)
        if self.weights is not None and self.weights in flat:
            return flat[self.weights]
        some = next(iter(flat.values()))
        return torch.full(
            (some.shape[0], self.num_components), 1.0 / self.num_components, dtype=some.dtype
        )

    def _mean_weights(self, flat: Tensors, permutations: Tensor, occupancy: Tensor) -> Tensor:
        if self.weights is None or self.weights not in flat:
            return occupancy
        return flat[self.weights].gather(1, permutations).mean(0)

    def _features(self, flat: Tensors) -> Tensor:
        """All values that belong to one component alone, ``(s, K, f)``."""
        parts = []
        for site, axis in self.axes.items():
            if isinstance(axis, int):
                value = flat[site]
                dim = 1 + axis if axis >= 0 else value.ndim + axis
                parts.append(value.unsqueeze(-1).movedim(dim, 1).flatten(2))
        if not parts:
            raise ValueError(
                "no site has a single axis of components: give responsibilities to align by."
            )
        return torch.cat([part.to(torch.float64) for part in parts], dim=-1)


def match(reference: Fit, fit: Fit, x: object = None) -> Tensor:
    """Which component of ``fit`` is which of ``reference``, for mixtures.

    Compares mean responsibilities of the same rows, so that fits of different engines line up.

    Args:
        reference: The fit whose numbering stays.
        fit: The fit to renumber; it may have another number of components.
        x: Rows to compare on; the reference's anchor rows when None.

    Returns:
        ``(K_reference,)`` integers, ``-1`` where ``fit`` has no component left.

    Raises:
        TypeError: A model without a :class:`LabelPermutation`.
    """
    from scipy.optimize import linear_sum_assignment

    from bayesgen.capabilities import Symmetric
    from bayesgen.data import Dataset

    for fit_ in (reference, fit):
        symmetry = fit_.model.symmetry if isinstance(fit_.model, Symmetric) else None
        if not isinstance(symmetry, LabelPermutation):
            raise TypeError(
                f"match compares fits of models with a LabelPermutation, but "
                f"{type(fit_.model).__name__} has none. Loadings are lined up by "
                "bayesgen.symmetry.rotate_onto."
            )
    rows = Dataset.from_codes(reference.anchors, reference.schema) if x is None else x
    left, right = reference.encode(rows).cpu(), fit.encode(rows).cpu()
    cost = -(left.sqrt().mT @ right.sqrt()).numpy()  # Bhattacharyya affinity of the columns
    row, column = linear_sum_assignment(cost)
    found = torch.full((left.shape[-1],), -1, dtype=torch.long)
    found[torch.from_numpy(row)] = torch.from_numpy(column)
    return found


# ---------------------------------------------------------------- relabelling


class _Responsibilities:
    """Stephens' cost: Kullback-Leibler divergence from the mean responsibilities, in nats."""

    def __init__(self, responsibilities: Tensor) -> None:
        self._p = responsibilities.detach().cpu().flatten(0, 1).mT.contiguous()  # (s, K, n)
        self._entropy = torch.special.entr(self._p).sum(-1)
        self.num_draws, self.num_components, self.num_anchors = self._p.shape

    def reference(self, permutations: Tensor, rows: Tensor) -> Tensor:
        """Mean over the draws ``rows`` of the permuted responsibilities, ``(K, n)``."""
        mean = torch.zeros_like(self._p[0])
        for k in range(self.num_components):  # one slot at a time: no permuted copy of everything
            mean[k] = self._p[rows, permutations[rows, k]].mean(0)
        return (mean + _SMOOTHING) / (1.0 + self.num_components * _SMOOTHING)

    def matrix(self, reference: Tensor) -> Tensor:
        """``(s, K, K)`` cost of calling component ``j`` of draw ``s`` by the label ``k``."""
        return -self._entropy[..., None] - self._p @ reference.log().mT


class _Parameters:
    """Squared distance of standardised parameters, weighted by how much the component matters."""

    num_anchors: int | None = None

    def __init__(self, features: Tensor, weights: Tensor) -> None:
        self._scale = features.flatten(0, 1).std(0).nan_to_num(1.0)
        self._features = features
        self._weights = weights.to(features.dtype)
        self.num_draws, self.num_components = features.shape[:2]

    def reference(self, permutations: Tensor, rows: Tensor) -> Tensor:
        moved = self._features[rows[:, None], permutations[rows]]
        if len(rows) > 1:
            spread = (moved - moved.mean(0)).square().mean((0, 1)).sqrt()
            self._scale = torch.maximum(spread, 1e-3 * self._scale)
        return moved.mean(0)

    def matrix(self, reference: Tensor) -> Tensor:
        scale = torch.where(self._scale > 0, self._scale, torch.ones_like(self._scale))
        distance = torch.cdist(self._features / scale, (reference / scale)[None]).square()
        return 0.5 * self.num_components * self._weights[..., None] * distance


def _relabel(
    costs: _Responsibilities | _Parameters, start: int, max_steps: int
) -> tuple[Tensor, Tensor, int]:
    """Permutations ``(s, K)``, aligned cost matrices ``(s, K, K)`` and the number of rounds."""
    identity = torch.arange(costs.num_components).expand(costs.num_draws, -1)
    permutations, everything = identity, torch.arange(costs.num_draws)
    reference = costs.reference(permutations, torch.tensor([start]))
    matrix, step, last = costs.matrix(reference), 0, torch.inf
    while step < max_steps:
        step += 1
        permutations = assign(matrix)
        matrix = costs.matrix(costs.reference(permutations, everything))
        cost = float(matrix.gather(1, permutations.unsqueeze(1)).sum(-1).mean())
        if cost > last - _SETTLED * (1.0 + abs(last)):
            break  # only empty components still change places
        last = cost
    return permutations, matrix.gather(1, permutations[..., None].expand_as(matrix)), step


def assign(matrix: Tensor) -> Tensor:
    """Best label for each component of each draw: ``(s, K)``, the component under each label."""
    from scipy.optimize import linear_sum_assignment

    best = matrix.argmin(-2)  # the component that each label would like most
    clash = (best.sort(-1).values != torch.arange(matrix.shape[-1])).any(-1)
    values = matrix.numpy()
    for s in clash.nonzero()[:, 0].tolist():
        component, label = linear_sum_assignment(values[s])
        best[s, torch.from_numpy(label)] = torch.from_numpy(np.asarray(component))
    return best


def _negligible(num_anchors: int | None, num_components: int) -> float:
    """Occupancy under which a component counts as empty: less than one anchor row."""
    return 1.0 / num_anchors if num_anchors is not None else 0.05 / num_components


def _report(
    draws: dict[str, Tensor],
    elements: Tensor,
    matrix: Tensor,
    shares: Tensor,
    *,
    negligible: float,
    num_steps: int,
) -> Alignment:
    own = matrix.diagonal(dim1=-2, dim2=-1)
    gain = matrix + matrix.mT - own[..., None, :] - own[..., :, None]
    ambiguity = (2.0 * torch.sigmoid(-gain.clamp_min(0.0))).mean(0).fill_diagonal_(0.0)
    occupancy, presence = shares.mean(0), (shares >= negligible).double().mean(0)
    empty = tuple((occupancy < negligible).nonzero()[:, 0].tolist())
    confused = tuple(
        (a, b)
        for a, b in (ambiguity > _AMBIGUOUS).triu(1).nonzero().tolist()
        if a not in empty and b not in empty
    )
    return Alignment(
        draws=draws,
        elements=elements,
        cost=own.sum(-1).unflatten(0, elements.shape[:-1]),
        ambiguity=ambiguity,
        is_ambiguous=bool(confused),
        message=_message(ambiguity, confused, empty, presence),
        occupancy=occupancy,
        presence=presence,
        empty=empty,
        confused=confused,
        num_steps=num_steps,
    )


def _message(
    ambiguity: Tensor,
    confused: tuple[tuple[int, int], ...],
    empty: tuple[int, ...],
    presence: Tensor,
) -> str:
    if confused:
        worst = sorted(confused, key=lambda pair: -float(ambiguity[pair]))[:4]
        pairs = ", ".join(f"{a} and {b} in {float(ambiguity[a, b]):.0%}" for a, b in worst)
        names = ", ".join(str(k) for k in sorted({k for pair in confused for k in pair}))
        text = (
            f"labels of components {names} are ambiguous: some could as well be swapped ({pairs} "
            "of the draws); read the label-invariant quantities instead of theirs"
        )
    else:
        text = "labels are identified"
    for k, share in enumerate(presence.tolist()):
        if share < PRESENT and k not in empty:
            text += f"; component {k} lives in {share:.0%} of the draws only"
    if len(empty) == 1:
        text += f"; component {empty[0]} is empty"
    elif empty:
        text += f"; {len(empty)} components are empty, exchangeable by nature"
    return text
