"""From a Pyro program to a log density of one flat vector, and back to its named sites."""

__all__: list[str] = []
