"""A normalising flow as a guide; needs `zuko` (`pip install 'bayesgen[flows]'`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = ["FlowGuide"]

_KINDS = ("NSF", "MAF", "NAF", "UNAF", "SOSPF", "BPF", "NICE")


@final
class _FlowLaw(TorchDistribution):
    r"""``y = loc + scale * T(e)`` with standard normal ``e``: one pass for a draw and its density.

    Args:
        transform: The invertible map ``T`` of vectors.
        loc: Shift ``(d,)``.
        scale: Positive factors ``(d,)``.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, transform: Any, loc: Tensor, scale: Tensor) -> None:
        self.transform, self.loc, self.scale = transform, loc, scale
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> _FlowLaw:
        if tuple(batch_shape):
            raise ValueError(f"a flow guide draws one vector at a time, not {tuple(batch_shape)}.")
        return self

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        noise = torch.randn((*sample_shape, *self.loc.shape), dtype=self.loc.dtype)
        noise = noise.to(self.loc.device)
        inner, log_det = self.transform.call_and_ladj(noise)
        value: Tensor = self.loc + self.scale * inner
        self._drawn = value, self._base(noise) - log_det - self.scale.log().sum()
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None and value is self._drawn[0]:
            return self._drawn[1]
        inner = (value - self.loc) / self.scale
        noise, log_det = self.transform.inv.call_and_ladj(inner)
        density: Tensor = self._base(noise) + log_det - self.scale.log().sum()
        return density

    @staticmethod
    def _base(noise: Tensor) -> Tensor:
        constant = 0.5 * noise.shape[-1] * torch.log(torch.tensor(2 * torch.pi)).to(noise)
        return -0.5 * noise.square().sum(-1) - constant


@final
class FlowGuide(AutoContinuous):
    r"""A guide that bends a normal distribution into the posterior by a normalising flow.

    .. math:: z = \mu + \sigma \odot T(\epsilon), \qquad \epsilon \sim \mathrm{N}(0, I)

    over all continuous latents together, unconstrained. Autoregressive flows run in the direction
    in which a draw and its density cost one pass (inverse autoregressive flow).

    References:
        Rezende & Mohamed (2015). Variational inference with normalizing flows. Kingma and others
        (2016). Improved variational inference with inverse autoregressive flow. Durkan, Bekasov,
        Murray & Papamakarios (2019). Neural spline flows.

    Args:
        model: The Pyro program.
        kind: A flow of zuko: ``"NSF"`` (rational splines), ``"MAF"`` (affine), ``"NAF"``,
            ``"UNAF"``, ``"SOSPF"``, ``"BPF"`` or ``"NICE"``.
        num_transforms: Transforms one after the other.
        hidden_features: Widths of the networks inside.
        init_scale: Scale at first.
        init_loc_fn: Where it begins, as in Pyro's guides.

    Raises:
        ImportError: zuko is not installed.
        ValueError: An unknown kind.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        kind: str = "NSF",
        num_transforms: int = 2,
        hidden_features: tuple[int, ...] = (32, 32),
        init_scale: float = 0.1,
        **options: Any,
    ) -> None:
        if kind not in _KINDS:
            raise ValueError(
                f"FlowGuide: kind={kind!r}, but it must be one of {', '.join(_KINDS)}."
            )
        super().__init__(model, **options)
        self.kind, self.num_transforms = kind, num_transforms
        self.hidden_features, self.init_scale = hidden_features, init_scale

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        try:
            import zuko
        except ImportError as error:
            raise ImportError(
                "FlowGuide needs zuko: pip install 'bayesgen[flows]' (or pip install zuko)."
            ) from error
        loc = self._init_loc().detach()
        flow = getattr(zuko.flows, self.kind)(
            self.latent_dim,
            transforms=self.num_transforms,
            hidden_features=self.hidden_features,
        )
        self.flow = flow.to(loc.dtype)
        self.loc = nn.Parameter(loc.clone())
        self.log_scale = nn.Parameter(torch.full_like(loc, self.init_scale).log())

    def get_base_dist(self) -> Any:
        """Standard normal of all latents."""
        from pyro.distributions import Normal

        return Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)

    def get_posterior(self, *args: Any, **kwargs: Any) -> _FlowLaw:
        """The distribution of the unconstrained vector."""
        return _FlowLaw(self.flow.transform(), self.loc, self.log_scale.exp())
