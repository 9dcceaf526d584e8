"""The script that writes the stored reference needs NumPyro, which the suite does not."""

__all__: list[str] = []

collect_ignore = ["reference_numpyro.py"]
