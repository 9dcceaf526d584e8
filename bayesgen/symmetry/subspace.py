"""Loadings up to rotation: Procrustes, orientation, angles, and what no rotation changes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "factor_invariants",
    "orient",
    "polar",
    "principal_angles",
    "rotate_onto",
    "varimax",
]

_VARIMAX_STEPS = 500
_MAX_COVARIANCE = 2**22  # numbers of all draws' covariances together


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each square matrix, ``(..., q, q)``."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def rotate_onto(reference: Tensor, loadings: Tensor) -> Tensor:
    r"""The rotation that brings loadings closest to others: orthogonal Procrustes.

    .. math:: \arg\min_{Q^\top Q = I} \lVert W Q - W_0 \rVert_F = U V^\top, \qquad
        W^\top W_0 = U S V^\top

    It lines up the latents of two fits of one model: those of the second, times the rotation.

    References:
        Schönemann (1966). A generalized solution of the orthogonal Procrustes problem.
        Psychometrika 31.

    Args:
        reference: ``(..., d, q)``.
        loadings: ``(..., d, q)``, to be rotated.

    Returns:
        ``(..., q, q)``.

    Example:
        >>> turn = rotate_onto(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> turn.round()
        tensor([[0., 1.],
                [1., 0.]])
    """
    if reference.shape[-2:] != loadings.shape[-2:]:
        raise ValueError(
            f"loadings of shape {tuple(loadings.shape[-2:])} cannot be rotated onto those of "
            f"shape {tuple(reference.shape[-2:])}: both need the same columns and latent_dim."
        )
    return polar(loadings.mT @ reference)


def principal_angles(left: Tensor, right: Tensor) -> Tensor:
    """Angles between the column spaces of two matrices, in radians, increasing.

    Sines are used for small angles and cosines for large ones, so both are exact to rounding.

    References:
        Björck & Golub (1973). Numerical methods for computing angles between linear subspaces.

    Args:
        left: ``(..., d, q)``.
        right: ``(..., d, r)``.

    Returns:
        ``(..., min(q, r))``.

    Example:
        >>> plane = torch.eye(3, 2, dtype=torch.float64)
        >>> line = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
        >>> principal_angles(plane, line).rad2deg().round(decimals=9)
        tensor([45.], dtype=torch.float64)
    """
    if left.shape[-1] < right.shape[-1]:
        left, right = right, left
    left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    inner = left.mT @ right
    cosine = torch.linalg.svdvals(inner).clamp(0.0, 1.0)
    sine = torch.linalg.svdvals(right - left @ inner).clamp(0.0, 1.0).flip(-1)
    return torch.where(cosine.square() < 0.5, cosine.acos(), sine.asin())


def varimax(loadings: Tensor) -> Tensor:
    """The varimax rotation ``(..., q, q)``: each column as sparse as a rotation can make it.

    References:
        Kaiser (1958). The varimax criterion for analytic rotation in factor analysis.
        Psychometrika 23.
    """
    d, q = loadings.shape[-2:]
    turn = torch.eye(q, dtype=loadings.dtype, device=loadings.device).expand(
        *loadings.shape[:-2], q, q
    )
    last = -math.inf
    for _ in range(_VARIMAX_STEPS):
        moved = loadings @ turn
        square = moved.square()
        gradient = loadings.mT @ (moved * (square - square.mean(-2, keepdim=True)))
        turn = polar(gradient)
        value = float(torch.linalg.matrix_norm(gradient, "nuc").sum())
        if value <= last * (1.0 + 1e-12):
            break
        last = value
    return turn


def orient(loadings: Tensor, orientation: str) -> Tensor:
    """The rotation ``(q, q)`` of loadings ``(d, q)`` to their canonical axes.

    Principal axes or varimax; columns by decreasing length, the largest entry of each positive.
    """
    turn = torch.linalg.svd(loadings, full_matrices=False).Vh.mT
    if turn.shape[0] != turn.shape[1]:  # more latent dimensions than columns of the data
        turn = torch.linalg.svd(loadings, full_matrices=True).Vh.mT
    if orientation == "varimax":
        turn = turn @ varimax(loadings @ turn)
    return turn @ arrange(loadings @ turn)


def arrange(loadings: Tensor) -> Tensor:
    """The signed permutation that puts long columns first, the largest entry of each positive."""
    order = loadings.square().sum(-2).argsort(descending=True, stable=True)
    peak = loadings.abs().argmax(-2, keepdim=True)
    sign = torch.where(loadings.gather(-2, peak).squeeze(-2) < 0, -1.0, 1.0).to(loadings.dtype)
    return torch.diag(sign)[:, order]


def factor_invariants(
    loadings: Tensor, noise_scale: Tensor, *, covariance: bool = True
) -> dict[str, Tensor]:
    r"""What no rotation of the latent space changes in a linear-Gaussian model.

    With :math:`\Sigma = W W^\top + \mathrm{diag}(\sigma^2)`:

    * ``signal_variance`` ``(*draw, q)``: eigenvalues of :math:`W W^\top`, decreasing;
    * ``explained`` ``(*draw,)``: :math:`\operatorname{tr} W W^\top / \operatorname{tr} \Sigma`;
    * ``subspace_angle`` ``(*draw,)``: largest angle, in degrees, between the space that the
      loadings span and the one that all draws together span best;
    * ``covariance`` ``(*draw, d, d)``: :math:`\Sigma`, unless all of them together would hold more
      than four million numbers.

    Args:
        loadings: ``(*draw, d, q)``.
        noise_scale: ``(*draw,)`` or ``(*draw, d)``, standard deviations.
        covariance: Whether to give the covariance at all.
    """
    d, q = loadings.shape[-2:]
    noise = noise_scale.square()
    if noise.ndim == loadings.ndim - 2:
        noise = noise.unsqueeze(-1).expand(*noise.shape, d)
    spectrum = torch.linalg.eigvalsh(loadings.mT @ loadings).flip(-1).clamp_min(0.0)
    signal = spectrum.sum(-1)
    found = {"signal_variance": spectrum, "explained": signal / (signal + noise.sum(-1))}
    if q < d:
        basis = torch.linalg.qr(loadings).Q
        flat = basis.reshape(-1, d, q)
        together = flat.movedim(0, 1).reshape(d, -1)
        if together.shape[1] > 4 * d:
            center = torch.linalg.eigh(together @ together.mT).eigenvectors[:, -q:]
        else:
            center = torch.linalg.svd(together, full_matrices=False).U[:, :q]
        angles = principal_angles(flat, center.expand_as(flat))[:, -1]
        found["subspace_angle"] = angles.rad2deg().reshape(loadings.shape[:-2])
    if covariance and loadings[..., 0].numel() * d <= _MAX_COVARIANCE:
        found["covariance"] = loadings @ loadings.mT + torch.diag_embed(noise)
    return found
