"""What stochastic variational inference is made of: pair, bound, step, guide, draws."""

__all__: list[str] = []
