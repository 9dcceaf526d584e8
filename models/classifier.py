"""A generative classifier: one mixture a class, the class by Bayes' rule, holes allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bayesgen.data import as_dataset
from bayesgen.fit import Fit, load
from bayesgen.rng import make_generator, spawn
from bayesgen.saving import Assembled, write_assembled

if TYPE_CHECKING:
    import os

    from bayesgen.capabilities import Model
    from bayesgen.schema import Schema

__all__ = ["ClassifierFit", "MixtureClassifier"]


class _Runs(Protocol):
    """Any engine."""

    def run(self, model: Any, data: object, *, seed: int, callbacks: Sequence[Any]) -> Fit: ...


@dataclass(frozen=True, eq=False)
class MixtureClassifier:
    r"""One generative model for each class, fitted apart; classes follow by Bayes' rule.

    .. math::
        p(y \mid x) = \frac{p(y)\,p(x \mid y)}{\sum_{y'} p(y')\,p(x \mid y')}, \qquad
        p(y) = \frac{n_y + \alpha}{n + \alpha C}

    Unlike a discriminative classifier it also answers :math:`p(x)` and :math:`p(x \mid y)`,
    generates rows of a class, and classifies rows with missing entries, whose holes are integrated
    out. With one full Gaussian a class, fitted by maximum likelihood, it is quadratic discriminant
    analysis.

    References:
        Hastie & Tibshirani (1996). Discriminant analysis by Gaussian mixtures.

    Args:
        model: The model of one class, such as ``GaussianMixture(3)``.
        concentration: Dirichlet pseudo-count of each class in the prior of the classes; 0 takes
            their shares of the training rows.

    Example:
        >>> from bayesgen import datasets
        >>> from bayesgen.inference import EM
        >>> from bayesgen.models import GaussianMixture, MixtureClassifier
        >>> x, y = datasets.load("iris", with_target=True)
        >>> fit = MixtureClassifier(GaussianMixture(1)).run(EM(num_starts=1), x, y)
        >>> fit.predict([[5.1, 3.5, float("nan"), 0.2]])
        [0]
    """

    model: Model
    concentration: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.concentration < float("inf"):
            raise ValueError(
                f"concentration={self.concentration!r}, but it must be >= 0 and finite."
            )

    def run(
        self,
        engine: _Runs,
        x: object,
        y: Sequence[Any] | Tensor,
        *,
        seed: int = 0,
        target: str = "",
        callbacks: Sequence[Any] = (),
    ) -> ClassifierFit:
        """Fit the model of each class by ``engine``.

        Args:
            engine: Any engine that can fit the model, such as ``VB()``.
            x: Rows, as :func:`bayesgen.data.as_dataset` takes them.
            y: One label a row: strings, numbers or booleans, none missing.
            seed: Seed; each class gets its own child of it.
            target: What the classes are called, for summaries.
            callbacks: As for the engine's ``run``; they see the steps of one class after another.

        Raises:
            ValueError: Labels that do not go with the rows, or a single class.
        """
        data = as_dataset(x)
        labels = _labels(y, data.num_rows)
        classes = sorted(set(labels), key=lambda label: (str(type(label)), label))
        if len(classes) < 2:
            raise ValueError(f"y holds the single class {classes[0]!r}; at least two are needed.")
        where = {label: [i for i, own in enumerate(labels) if own == label] for label in classes}
        fits = tuple(
            engine.run(self.model, data.subset(where[label]), seed=child, callbacks=callbacks)
            for label, child in zip(classes, spawn(seed, len(classes)), strict=True)
        )
        counts = torch.tensor([float(len(where[label])) for label in classes], dtype=torch.float64)
        shares = (counts + self.concentration) / (counts + self.concentration).sum()
        return ClassifierFit(tuple(classes), fits, shares, target)


def _labels(y: Sequence[Any] | Tensor, num_rows: int) -> list[Any]:
    labels = y.tolist() if isinstance(y, Tensor) else np.asarray(y).tolist()
    if not isinstance(labels, list) or any(isinstance(label, list) for label in labels):
        raise ValueError("y must be one label a row, a sequence of one dimension.")
    if len(labels) != num_rows:
        raise ValueError(f"y has {len(labels)} labels, but x has {num_rows} rows.")
    missing = [i for i, label in enumerate(labels) if label is None or label != label]
    if missing:
        raise ValueError(
            f"y is missing at row {missing[0]}; drop such rows, or give them a class."
        )
    return labels


@dataclass(frozen=True, eq=False, repr=False)
class ClassifierFit(Assembled):
    """A fitted classifier.

    Args:
        classes: Labels, in order.
        fits: The fit of each class.
        shares: ``(C,)`` prior probabilities of the classes.
        target: What the classes are called, or empty.
    """

    classes: tuple[Any, ...]
    fits: tuple[Fit, ...]
    shares: Tensor
    target: str = ""

    @property
    def schema(self) -> Schema:
        """Names, kinds and levels of the columns."""
        return self.fits[0].schema

    def log_prob_given_class(self, x: object) -> Tensor:
        """``log p(x | y)`` in nats, ``(n, C)``."""
        data = as_dataset(x, schema=self.schema)
        return torch.stack([fit.log_prob(data) for fit in self.fits], dim=-1)

    def _log_joint(self, x: object) -> Tensor:
        return self.log_prob_given_class(x) + self.shares.log()

    def log_prob(self, x: object) -> Tensor:
        """``log p(x)`` in nats, classes summed out, ``(n,)``."""
        return torch.logsumexp(self._log_joint(x), dim=-1)

    def predict_proba(self, x: object) -> Tensor:
        """``p(y | x)``, ``(n, C)``, columns in the order of :attr:`classes`."""
        return torch.softmax(self._log_joint(x), dim=-1)

    def predict(self, x: object) -> list[Any]:
        """The most probable class of each row."""
        return [self.classes[i] for i in self._log_joint(x).argmax(-1).tolist()]

    def sample(
        self, num_samples: int, *, label: Any = None, seed: int = 0
    ) -> tuple[Tensor, list[Any]]:
        """New rows ``(num_samples, d)`` and their labels; ``label`` asks for rows of one class."""
        if label is not None and label not in self.classes:
            raise ValueError(
                f"label={label!r} is not a class; the classes are {list(self.classes)}."
            )
        generator = make_generator(seed)
        if label is None:
            index = torch.multinomial(
                self.shares, num_samples, replacement=True, generator=generator
            )
        else:
            index = torch.full((num_samples,), self.classes.index(label))
        rows = torch.empty((num_samples, len(self.fits[0].columns)), dtype=torch.float64)
        for k, child in enumerate(spawn(seed, len(self.fits))):
            own = index == k
            if bool(own.any()):
                rows[own] = self.fits[k].sample(int(own.sum()), seed=child).double()
        return rows, [self.classes[i] for i in index.tolist()]

    # ------------------------------------------------------------ saved
    @property
    def parts(self) -> tuple[Fit, ...]:
        """The fit of each class."""
        return self.fits

    def to_config(self) -> dict[str, Any]:
        return {"classes": list(self.classes), "shares": self.shares, "target": self.target}

    @classmethod
    def assemble(cls, parts: Sequence[Fit], config: Mapping[str, Any]) -> ClassifierFit:
        """The inverse of :attr:`parts` and :meth:`to_config`."""
        return cls(tuple(config["classes"]), tuple(parts), config["shares"], config["target"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one folder, atomically; :func:`bayesgen.load` gives it back bit by bit."""
        write_assembled(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassifierFit:
        """Read what :meth:`save` wrote; :func:`bayesgen.load` does too."""
        found = load(path)
        if not isinstance(found, cls):
            raise ValueError(
                f"{path} holds a {type(found).__name__}, not a classifier: use bayesgen.load."
            )
        return found

    # ------------------------------------------------------------ words
    def summary(self) -> str:
        """Classes with their shares, and the verdict on the fit of each."""
        lines = [f"Classifier of {self.target or 'the class'}: {len(self.classes)} classes"]
        for label, fit, share in zip(self.classes, self.fits, self.shares.tolist(), strict=True):
            lines += ["", f"class {label!r}, probability {share:.3g}: {fit!r}"]
            lines += [f"  {line}" for line in f"verdict: {fit.verdict()}".splitlines()]
            lines += [f"  note: {message}" for message in fit.attrs.get("messages", [])]
        return "\n".join(lines)

    def __repr__(self) -> str:
        names = ", ".join(str(label) for label in self.classes[:6])
        more = ", ..." if len(self.classes) > 6 else ""
        return f"ClassifierFit({len(self.classes)} classes: {names}{more})"
