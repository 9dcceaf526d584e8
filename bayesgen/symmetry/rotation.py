"""Rotation and sign: draws of loadings turned until directions mean the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.symmetry.base import PRESENT, Alignment, Symmetry
from bayesgen.symmetry.labels import assign
from bayesgen.symmetry.subspace import arrange, orient, polar

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["Rotation"]

_GROUPS = ("orthogonal", "signed")
_ORIENTATIONS = ("principal", "varimax")
_SETTLED = 1e-13  # relative change of the spread at which Procrustes ends
_SCATTERED = 0.25  # an axis whose draws scatter by more than some 22 degrees is ambiguous
_SWAPPED = 0.05  # so is a pair when this share of its draws could as well be swapped


@dataclass(frozen=True)
class Rotation(Symmetry):
    r"""The orthogonal group of a latent space, or its signed permutations.

    :math:`W W^\top` does not change when :math:`W` becomes :math:`W Q` with orthogonal :math:`Q`,
    and the latents :math:`z` become :math:`Q^\top z`. Draws are aligned by generalised Procrustes:
    from the draw of highest density on,

    .. math::
        Q_s = \arg\min_{Q^\top Q = I} \lVert \Psi^{-1/2} (W_s Q - M) \rVert_F, \qquad
        M = \frac1S \sum_s W_s Q_s

    alternate until nothing moves. The mean :math:`M` is then turned to its principal axes (or by
    varimax), columns by decreasing variance, the largest entry of each positive, and all draws
    with it. :math:`\Psi` is the noise's variance, a constant of all draws.

    Where two directions explain nearly the same variance, the axes within their plane are an
    accident of the reference. Each draw has axes of its own there, at an angle :math:`\theta_s`
    (of the draw's principal axes, or its varimax optimum), and the pair's ambiguity is the
    circular variance of :math:`2\theta_s` (of :math:`4\theta_s` for varimax): 0 when all draws
    agree, 1 when the angles are uniform.

    Models whose prior tells directions apart - sparse loadings, a diagonal-identified factor model
    - keep only signs and permutations: ``group="signed"`` matches columns by exact assignment.

    References:
        Gower (1975). Generalized Procrustes analysis. Psychometrika 40. Aßmann, Boysen-Hogrefe &
        Pape (2016). Bayesian analysis of static and dynamic factor models: an ex-post approach
        towards the rotation problem. J. Econometrics 192. Poworoznek, Anceschi, Ferrari & Dunson
        (2021). Efficiently resolving rotational ambiguity in Bayesian matrix sampling with
        matching. arXiv:2107.13783.

    Args:
        latent_dim: Dimension ``q`` of the latent space.
        axes: For each site that rotates, the axis of its event along the latent space (or
            several), counted as in :class:`~bayesgen.symmetry.LabelPermutation`.
        loadings: The site that is aligned, ``(d, q)``.
        noise: The site of the noise's scale, ``()`` or ``(d,)``, in whose units columns are
            compared; None compares the loadings as they are.
        attached: Sites ``(q,)`` that hold one number a direction, such as its prior precision. No
            rotation can carry them: signed permutations move them along, rotations sort them,
            increasing.
        group: ``"orthogonal"`` or ``"signed"``.
        orientation: ``"principal"`` or ``"varimax"`` axes; signed permutations keep theirs.
        negligible: Squared length of a column, in units of the noise's variance, below which its
            direction counts as dead.
        dim: Name of the dimension that counts directions.

    Raises:
        ValueError: No latent dimension, no loadings among the axes, an unknown group or
            orientation.

    Example:
        >>> symmetry = Rotation(1)
        >>> draws = {"loadings": torch.tensor([[[[3.0], [0.1]], [[-3.2], [0.1]]]])}
        >>> symmetry.align(draws).draws["loadings"][0, :, 0, 0]
        tensor([3.0000, 3.2000])
    """

    latent_dim: int
    axes: Mapping[str, int | tuple[int, ...]] = field(default_factory=lambda: {"loadings": -1})
    loadings: str = "loadings"
    noise: str | None = None
    attached: tuple[str, ...] = ()
    group: str = "orthogonal"
    orientation: str = "principal"
    negligible: float = 0.0
    dim: str = "latent"

    def __post_init__(self) -> None:
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim={self.latent_dim}, but at least 1 is needed.")
        if self.loadings not in self.axes:
            raise ValueError(
                f"axes names {sorted(self.axes)}, but not the loadings '{self.loadings}'."
            )
        for name, allowed in (("group", _GROUPS), ("orientation", _ORIENTATIONS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r}, but it must be one of {', '.join(allowed)}.")

    @property
    def sites(self) -> tuple[str, ...]:
        return (*self.axes, *self.attached)

    def random(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
        size = (*shape, self.latent_dim, self.latent_dim)
        noise = rng.standard_normal(size, generator)
        if self.group == "orthogonal":
            factor = torch.linalg.qr(noise)
            sign = factor.R.diagonal(dim1=-2, dim2=-1).sign()
            return factor.Q * sign.unsqueeze(-2)  # without it the law is not uniform
        order = torch.rand(size[:-1], generator=generator, device=generator.device).argsort(-1)
        signs = noise.diagonal(dim1=-2, dim2=-1).sign()
        return torch.nn.functional.one_hot(order, self.latent_dim) * signs.unsqueeze(-1)

    def apply(self, draws: Tensors, elements: Tensor) -> dict[str, Tensor]:
        self._check(draws)
        lead, moved = elements.ndim - 2, dict(draws)
        for site, axes in self.axes.items():
            value = moved[site]
            turn = elements.to(value.device, value.dtype)
            for axis in axes if isinstance(axes, tuple) else (axes,):
                dim = lead + axis if axis >= 0 else value.ndim + axis
                rows = value.movedim(dim, -1)
                shape = (*elements.shape[:lead], -1, self.latent_dim)
                value = (rows.reshape(shape) @ turn).reshape(rows.shape).movedim(-1, dim)
            moved[site] = value
        for site in self.attached:
            value = moved[site]
            if self.group == "orthogonal":
                moved[site] = value.sort(-1).values
            else:
                index = elements.abs().argmax(-2).to(value.device)
                moved[site] = value.gather(-1, index)
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
        loadings = draws[self.loadings].detach()
        lead = loadings.shape[:2]
        scaled = self._scaled(draws).flatten(0, 1)
        start = int(log_density.flatten().argmax()) if log_density is not None else 0
        if self.group == "orthogonal":
            elements, num_steps = _procrustes(scaled, start, max_steps)
            elements = elements @ orient((scaled @ elements).mean(0), self.orientation)
        else:
            elements, num_steps = _match(scaled, start, max_steps)
            elements = elements @ arrange((scaled @ elements).mean(0))
        aligned = scaled @ elements
        elements = elements.unflatten(0, lead)
        return self._report(self.apply(draws, elements), elements, aligned, num_steps)

    # ------------------------------------------------------------ private
    def _check(self, draws: Tensors) -> None:
        missing = [site for site in (*self.sites, self.noise) if site and site not in draws]
        if missing:
            raise ValueError(
                f"Rotation acts on {sorted(self.sites)}, but the draws lack {missing}; they hold "
                f"{sorted(draws)}."
            )
        places = dict(self.axes) | {site: (-1,) for site in self.attached}
        for site, axes in places.items():
            event = draws[site].shape[2:]
            for axis in axes if isinstance(axes, tuple) else (axes,):
                inside = -len(event) <= axis < len(event)
                if not inside or event[axis] != self.latent_dim:
                    raise ValueError(
                        f"site '{site}' has event shape {tuple(event)}, but axis {axis} of it "
                        f"must have size latent_dim={self.latent_dim}."
                    )

    def _scaled(self, draws: Tensors) -> Tensor:
        """Loadings in units of the noise, whose scale is a constant of all draws."""
        loadings = draws[self.loadings].detach().cpu().double()
        if self.noise is None:
            return loadings
        noise = draws[self.noise].detach().cpu().double()
        typical = noise.log().mean((0, 1)).exp()
        return loadings / (typical.unsqueeze(-1) if typical.ndim else typical)

    def _report(
        self, draws: dict[str, Tensor], elements: Tensor, aligned: Tensor, num_steps: int
    ) -> Alignment:
        strength = aligned.square().sum(-2)  # (s, q)
        mean = aligned.mean(0)
        cost = ((aligned - mean).square().sum(-2) / _variance(aligned, mean)).sum(-1)
        if self.group == "orthogonal":
            ambiguity, limit = _scatter(aligned, self.orientation), _SCATTERED
        else:
            ambiguity, limit = _exchangeable(aligned), _SWAPPED
        empty = tuple((strength.mean(0) < self.negligible).nonzero()[:, 0].tolist())
        presence = (strength >= self.negligible).double().mean(0)
        confused = tuple(
            (a, b)
            for a, b in (ambiguity > limit).triu(1).nonzero().tolist()
            if a not in empty and b not in empty
        )
        total = strength.mean(0).sum().clamp_min(torch.finfo(strength.dtype).tiny)
        return Alignment(
            draws=draws,
            elements=elements,
            cost=cost.unflatten(0, elements.shape[:2]),
            ambiguity=ambiguity,
            is_ambiguous=bool(confused),
            message=_message(ambiguity, confused, empty, presence),
            occupancy=strength.mean(0) / total,
            presence=presence,
            empty=empty,
            confused=confused,
            num_steps=num_steps,
        )


# ---------------------------------------------------------------- alignment
def _procrustes(scaled: Tensor, start: int, max_steps: int) -> tuple[Tensor, int]:
    """Rotations ``(s, q, q)`` of generalised Procrustes, and the number of rounds."""
    reference, last, step = scaled[start], math.inf, 0
    turns = polar(scaled.mT @ reference)
    while step < max_steps:
        step += 1
        aligned = scaled @ turns
        reference = aligned.mean(0)
        loss = float((aligned - reference).square().sum())
        if loss >= last * (1.0 - _SETTLED) or loss == 0.0:
            break
        last = loss
        turns = polar(scaled.mT @ reference)
    return turns, step


def _match(scaled: Tensor, start: int, max_steps: int) -> tuple[Tensor, int]:
    """Signed permutations ``(s, q, q)`` that match the columns of all draws, and the rounds."""
    reference, spread = scaled[start], scaled.new_ones(scaled.shape[-1])
    turns, step, last = torch.empty(0), 0, math.inf
    while step < max_steps:
        step += 1
        costs, signs = _costs(scaled, reference, spread)
        order = assign(costs)  # (s, q): the column under each label
        found = torch.zeros_like(signs).scatter_(1, order.unsqueeze(1), 1.0) * signs
        cost = float(costs.gather(1, order.unsqueeze(1)).sum(-1).mean())
        if step > 2 and cost > last - 1e-9 * (1.0 + abs(last)):
            break
        turns, last = found, cost
        aligned = scaled @ turns
        reference = aligned.mean(0)
        spread = _variance(aligned, reference)
    return turns, step


def _costs(scaled: Tensor, reference: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Cost ``(s, j, k)`` of column ``j`` in the place ``k``, and its sign there.

    The negative log density of a displacement along one direction, that of the strongest scatter:
    columns that rotate move so.
    """
    inner = scaled.mT @ reference
    distance = scaled.square().sum(-2).unsqueeze(-1) + reference.square().sum(-2)
    distance = (distance - 2.0 * inner.abs()).clamp_min(0.0)
    costs = 0.5 * (distance / spread + spread.log())
    return costs, torch.where(inner < 0, -1.0, 1.0).to(inner.dtype)


def _variance(aligned: Tensor, reference: Tensor) -> Tensor:
    """Mean squared displacement ``(q,)`` of each column."""
    return _floored((aligned - reference).square().sum(-2).mean(0))


def _floored(spread: Tensor) -> Tensor:
    return spread.clamp_min(max(1e-12 * float(spread.max()), torch.finfo(spread.dtype).tiny))


# ---------------------------------------------------------------- ambiguity
def _scatter(aligned: Tensor, orientation: str) -> Tensor:
    """Circular variance, by pair of directions, of the angles of each draw's own axes."""
    if orientation == "principal":
        gram = aligned.mT @ aligned
        length = gram.diagonal(dim1=-2, dim2=-1)
        cosine, sine = length.unsqueeze(-1) - length.unsqueeze(-2), 2.0 * gram
    else:  # Kaiser's planar optimum
        d, square = aligned.shape[-2], aligned.square()
        product = torch.einsum("sda,sdb->sab", square, square)
        length = square.sum(-2)
        u = length.unsqueeze(-1) - length.unsqueeze(-2)
        v = 2.0 * aligned.mT @ aligned
        fourth = square.square().sum(-2)
        uu = fourth.unsqueeze(-1) + fourth.unsqueeze(-2) - 2.0 * product
        third = torch.einsum("sda,sdb->sab", aligned**3, aligned)
        uv = 2.0 * (third - third.mT)
        cosine = uu - 4.0 * product - (u.square() - v.square()) / d
        sine = 2.0 * (uv - u * v / d)
    length = torch.hypot(cosine, sine).clamp_min(torch.finfo(aligned.dtype).tiny)
    resultant = torch.hypot((cosine / length).mean(0), (sine / length).mean(0))
    return (1.0 - resultant).clamp(0.0, 1.0).fill_diagonal_(0.0)


def _exchangeable(aligned: Tensor) -> Tensor:
    """Share of the draws in which two columns could as well be swapped, up to sign."""
    reference = aligned.mean(0)
    costs, _ = _costs(aligned, reference, _variance(aligned, reference))
    own = costs.diagonal(dim1=-2, dim2=-1)
    gain = costs + costs.mT - own[..., None, :] - own[..., :, None]
    return (2.0 * torch.sigmoid(-gain.clamp_min(0.0))).mean(0).fill_diagonal_(0.0)


def _message(
    ambiguity: Tensor,
    confused: tuple[tuple[int, int], ...],
    empty: tuple[int, ...],
    presence: Tensor,
) -> str:
    text = "directions are identified up to sign"
    if confused:
        worst = sorted(confused, key=lambda pair: -float(ambiguity[pair]))[:4]
        pairs = ", ".join(f"{a} and {b} by {float(ambiguity[a, b]):.2f}" for a, b in worst)
        names = ", ".join(str(k) for k in sorted({k for pair in confused for k in pair}))
        text = (
            f"directions {names} are ambiguous: nearly equal variances leave the axes within "
            f"their space undetermined ({pairs} on a scale from 0 to 1); read the "
            "rotation-invariant quantities instead of theirs"
        )
    for k, share in enumerate(presence.tolist()):
        if share < PRESENT and k not in empty:
            text += f"; direction {k} lives in {share:.0%} of the draws only"
    if empty:
        text += f"; {len(empty)} direction{'s' * (len(empty) > 1)} switched off"
    return text
