"""What EM, variational Bayes and Gibbs share: passes over conjugate blocks, and moves."""

__all__: list[str] = []
