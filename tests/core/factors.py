"""Probabilistic PCA as a toy: what tests of rotations and their pictures are about."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch.distributions import Independent, Normal

from bayesgen import rng
from bayesgen.capabilities import Encoder, Explained, Model, Scored, Symmetric
from bayesgen.symmetry import Rotation, factor_invariants

__all__ = ["Factors", "loadings", "turned"]


class Factors(Model, Scored, Encoder, Explained, Symmetric):
    """Probabilistic PCA about zero with unit noise, written as plainly as possible."""

    def __init__(self, d, q, group="orthogonal"):
        self.d, self.q, self.group = d, q, group

    dims = MappingProxyType({"loadings": ("column", "latent")})
    is_bound = True
    symmetry = property(lambda self: Rotation(self.q, group=self.group))

    def bind(self, data):
        return self

    def to(self, device):
        return self

    def coords(self):
        return {"column": [f"x{j}" for j in range(self.d)], "latent": list(range(self.q))}

    def to_config(self):
        return {"d": self.d, "q": self.q, "group": self.group}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def log_prob(self, x, draws):
        w = draws["loadings"]
        covariance = w @ w.mT + torch.eye(self.d, dtype=w.dtype)
        law = torch.distributions.MultivariateNormal(w.new_zeros(self.d), covariance)
        return (
            law.expand(covariance.shape[:-2]).log_prob(x[:, *[None] * (w.ndim - 2)]).movedim(0, -1)
        )

    def encode(self, x, draws):
        w = draws["loadings"]
        precision = w.mT @ w + torch.eye(self.q, dtype=w.dtype)
        mean = (x @ w) @ torch.linalg.inv(precision)
        scale = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)
        return Independent(Normal(mean, scale.expand_as(mean)), 1)

    def invariants(self, draws):
        w = draws["loadings"]
        return factor_invariants(w, w.new_ones(w.shape[:-2]))

    def explained_variance(self, draws):
        w = draws["loadings"]
        signal = self.invariants(draws)["signal_variance"]
        return {"signal": signal, "noise": w.new_full(w.shape[:-2], float(self.d))}


def loadings(scales, *, d=8, shape=(4, 200), spread=0.05, seed=0):
    """Draws that scatter about orthogonal columns of the given lengths."""
    generator = rng.make_generator(seed)
    basis = torch.linalg.qr(rng.standard_normal((d, len(scales)), generator)).Q
    center = basis * torch.tensor(scales, dtype=torch.float64)
    return center + spread * rng.standard_normal((*shape, d, len(scales)), generator)


def turned(w, symmetry, seed=1):
    elements = symmetry.random(tuple(w.shape[:2]), generator=rng.make_generator(seed))
    return symmetry.apply({"loadings": w}, elements)
