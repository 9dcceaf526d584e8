"""What :mod:`bayesgen.data` is made of: reading, checking and coding tables."""

__all__: list[str] = []
