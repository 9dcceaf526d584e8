"""From a tensor graph to what runs it fastest: generated C++, Inductor, or as it is."""

__all__: list[str] = []
