"""Our NUTS and ManyChains: ``{"engine": "NUTS" or "ManyChains", "settings": {...}}``."""

from __future__ import annotations

import torch
from common import contest
from pyro_models import program

import bayesgen.inference

__all__: list[str] = []


def prepare(workload, data, options):
    torch.set_default_dtype(torch.float64)
    model = program(workload, data)
    engine = getattr(bayesgen.inference, options["engine"])(**options.get("settings", {}))

    def sample(seed):
        fit = engine.run(model, seed=seed)
        latent = {s.name: fit.draws[s.name].numpy() for s in fit.model.density.layout.sites}
        steps = int(fit.sample_stats["n_steps"].sum())
        return latent, steps, fit.attrs["speed"]

    return sample


if __name__ == "__main__":
    contest(prepare)
