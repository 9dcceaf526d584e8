"""Any prior of any Pyro program, replaced by site name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger, block_messengers
from pyro.poutine.plate_messenger import PlateMessenger
from torch import Tensor
from torch.distributions import Distribution, biject_to

from bayesgen.capabilities import Model
from bayesgen.priors import check_prior, describe

__all__ = ["PriorError", "Reprior", "with_priors"]

Prior = Distribution | Callable[[], Distribution]


class PriorError(ValueError):
    """A prior that does not fit the site that it is for; the message says what would."""


def with_priors(program: Any, priors: Mapping[str, Prior]) -> Reprior:
    r"""The same Pyro program under other priors, named by the sites that they are for.

    .. math:: p(\theta, y) = p(y \mid \theta) \prod_k p_k(\theta_k) \quad\to\quad
        p(y \mid \theta)\, q_j(\theta_j) \prod_{k \ne j} p_k(\theta_k)

    A prior is a Pyro distribution, or a callable that samples hyperparameters of its own and
    returns one. Hyperparameters belong to the program as a whole: the plates around the site do
    not repeat them. A distribution of scalars stands for every entry of a site that is a vector.
    The result is a Pyro program: run it with any engine, or by Pyro.

    Args:
        program: Any callable that calls ``pyro.sample``.
        priors: By the name of a latent site.

    Returns:
        The program. Support, shape and names are checked when it first runs, before anything is
        sampled; at once if it takes no arguments, and by :meth:`Reprior.check` with the data.

    Raises:
        TypeError: What is no program, or no prior.
        ValueError: A prior whose support or shape does not fit its site, or an unknown site.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def schools(y, sigma):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        ...     with pyro.plate("school", len(y)):
        ...         theta = pyro.sample("theta", dist.Normal(mu, tau))
        ...         pyro.sample("y", dist.Normal(theta, sigma), obs=y)
        >>> def tau():
        ...     return dist.HalfNormal(pyro.sample("tau_scale", dist.LogNormal(0.0, 1.0)))
        >>> y, sigma = torch.tensor([28.0, 8.0, -3.0]), torch.tensor([15.0, 10.0, 16.0])
        >>> model = with_priors(schools, {"mu": dist.Normal(0.0, 1.0), "tau": tau})
        >>> print(model.check(y, sigma))
        schools with priors
          mu ~ Normal(loc=[0], scale=[1])
          tau ~ callable tau
        >>> with_priors(schools, {"tau": dist.Normal(0.0, 1.0)}).check(y, sigma)
        Traceback (most recent call last):
        bayesgen.prior_replacement.PriorError: prior of site 'tau': Normal has support Real(), ...
    """
    if isinstance(program, Model):
        name, sites = type(program).__name__, ", ".join(f"{site!r}: ..." for site in priors)
        raise TypeError(
            f"with_priors is for Pyro functions; a {name} takes its priors itself: "
            f"{name}(..., priors={{{sites}}})."
        )
    if not callable(program):
        raise TypeError(
            f"with_priors: got {type(program).__name__}, but a program is a callable that calls "
            "pyro.sample."
        )
    for site, prior in priors.items():
        check_prior(site, prior)
    found = Reprior(program, dict(priors))
    parameters = inspect.signature(program).parameters.values()
    if all(p.default is not p.empty or p.kind in (2, 4) for p in parameters):
        found.check()
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Reprior:
    """A Pyro program, some of whose priors are replaced; see :func:`with_priors`.

    Args:
        program: The program as it was written.
        replaced: Priors by site.
    """

    program: Callable[..., Any]
    replaced: Mapping[str, Prior]

    def __post_init__(self) -> None:
        # A program is known by its name and its arguments.
        name = getattr(self.program, "__name__", type(self.program).__name__)
        object.__setattr__(self, "__name__", name)
        object.__setattr__(self, "__signature__", inspect.signature(self.program))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Replace(self.replaced) as handler:
            result = self.program(*args, **kwargs)
        handler.check_names()
        return result

    def check(self, *args: Any, **kwargs: Any) -> Self:
        """Run the program once, at one point of its support, to check its priors; gives itself.

        Args:
            args: What the program is called with.
            kwargs: Named ones.

        Raises:
            ValueError: A prior that does not fit its site, or an unknown site.
        """
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        floating = [v for v in tensors if v.is_floating_point()]
        with torch.no_grad(), _Anywhere(floating[0] if floating else torch.zeros(())):
            self(*args, **kwargs)
        return self

    @property
    def priors(self) -> dict[str, str]:
        """Every replaced prior in one line, by site."""
        inner = self.program.priors if isinstance(self.program, Reprior) else {}
        return {**inner, **{site: describe(prior) for site, prior in self.replaced.items()}}

    def __repr__(self) -> str:
        name = vars(self)["__name__"]
        return "\n".join(
            [f"{name} with priors", *(f"  {k} ~ {v}" for k, v in self.priors.items())]
        )


class _Replace(Messenger):
    """Put other distributions behind the names of latent sites."""

    def __init__(self, priors: Mapping[str, Prior]) -> None:
        super().__init__()
        self.priors = priors
        self.met: dict[str, bool] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if poutine.util.site_is_subsample(msg):
            return
        self.met[name] = bool(msg["is_observed"])
        prior = self.priors.get(name)
        if prior is None:
            return
        if msg["is_observed"]:
            raise PriorError(
                f"site '{name}' is observed or deterministic, so it has no prior to replace; "
                f"{self._known()}."
            )
        if not isinstance(prior, Distribution):
            with block_messengers(lambda m: isinstance(m, PlateMessenger)):
                prior = prior()
        msg["fn"] = _fitted(name, prior, msg)

    def check_names(self) -> None:
        """Refuse priors of sites that the program does not have."""
        for name in self.priors:
            if name not in self.met:
                near = difflib.get_close_matches(name, self.met, 1)
                meant = f" Did you mean '{near[0]}'?" if near else ""
                raise PriorError(
                    f"priors name the site '{name}', which the program does not have; "
                    f"{self._known()}.{meant}"
                )

    def _known(self) -> str:
        latent = [name for name, observed in self.met.items() if not observed]
        return f"its latent sites are {', '.join(latent) or 'none'}"


def _fitted(name: str, prior: Any, msg: Mapping[str, Any]) -> Any:
    """The prior, of the site's shapes."""
    if not isinstance(prior, Distribution):
        raise TypeError(
            f"prior of site '{name}': the callable returned {type(prior).__name__}, but it must "
            "return a Pyro distribution."
        )
    law = msg["fn"]
    batch, event = tuple(law.batch_shape), tuple(law.event_shape)
    own = tuple(prior.batch_shape), tuple(prior.event_shape)
    missing = len(event) - len(own[1])
    whole = own[0] + own[1]
    if missing < 0 or own[1] != event[missing:] or not _broadcasts(whole, batch + event):
        plates = {f.name: f.size for f in msg["cond_indep_stack"] if f.vectorized}
        raise PriorError(
            f"prior of site '{name}': {type(prior).__name__} has batch shape {own[0]} and event "
            f"shape {own[1]}, but the site takes values of shape {batch + event}: {batch} from "
            f"its plates {plates or '(none)'} and {event} of its own. Use scalar arguments, or "
            f"{_advice(event)}."
        )
    try:
        check_prior(name, prior, support=law.support)
    except ValueError as error:
        raise PriorError(str(error)) from None
    shaped = prior.expand(torch.Size(batch + event[:missing]))
    return shaped.to_event(missing) if missing else shaped


def _advice(event: tuple[int, ...]) -> str:
    if not event:
        return "one that is broadcast over the plates"
    return f".expand({list(event)}).to_event({len(event)})"


def _broadcasts(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if len(given) > len(wanted):
        return False
    tail = wanted[len(wanted) - len(given) :]
    return all(g in (1, w) for g, w in zip(given, tail, strict=True))


class _Anywhere(Messenger):
    """Give every latent some value in its support, without a random number."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.like = like

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or poutine.util.site_is_subsample(msg):
            return
        law = msg["fn"]
        if law.support.is_discrete:
            if not law.has_enumerate_support:
                return
            msg["value"] = law.enumerate_support(expand=True)[0]
        else:
            transform = biject_to(law.support)
            msg["value"] = transform(self.like.new_zeros(transform.inverse_shape(law.shape())))
        msg["done"] = True
