"""The roof, which alone sees both wings: command line, demo, scikit-learn facade."""

__all__: list[str] = []
