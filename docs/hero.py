"""Draw the picture that opens the README: ``.venv/bin/python docs/hero.py``."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from bayesgen import datasets
from bayesgen.inference import VB
from bayesgen.models import GaussianMixture

plt.switch_backend("Agg")
PLANTED = [(2.6, 78.0), (2.9, 86.0), (3.4, 50.0), (4.2, 58.0), (4.6, 62.0), (5.4, 60.0)]
PLANTED += [(1.3, 70.0), (1.7, 84.0), (5.6, 98.0), (2.2, 90.0), (3.9, 48.0), (4.9, 54.0)]

rows = datasets.load("faithful").tensor()
order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
seen, kept = rows[order[:222]], rows[order[222:]]
new = torch.cat([kept, torch.tensor(PLANTED, dtype=rows.dtype)])

fit = VB().run(GaussianMixture(num_components=10), seen, seed=0)
verdict = fit.outliers(new, fdr=0.05, folds=10)
called = verdict.is_outlier.numpy()
dreams = fit.sample(len(rows), seed=1).numpy()

x, y = np.linspace(1.0, 6.0, 160), np.linspace(38.0, 102.0, 160)
grid = torch.as_tensor(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2))
density = fit.log_prob(grid).reshape(160, 160).numpy()
levels = np.linspace(-14, density.max(), 15)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
for axis in (left, right):
    axis.contourf(x, y, density, levels=levels, cmap="Blues", extend="min")
    axis.set(xlabel="eruption, minutes", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
left.set_ylabel("waiting for the next, minutes")
left.plot(*seen.T, ".", color="0.35", markersize=3, label="rows fitted")
left.plot(*new[~called].T, "o", color="white", mec="0.2", ms=5, label="new rows that belong")
left.plot(*new[called].T, "X", color="crimson", ms=8, label="new rows that do not, FDR 5 %")
left.set_title("Old Faithful: posterior predictive density, and who does not belong", fontsize=10)
right.plot(*dreams.T, ".", color="darkorange", markersize=4, label="rows drawn from the fit")
figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
right.set_title("New eruptions, drawn from the same fit", fontsize=10)
figure.savefig(Path(__file__).parent / "_static" / "hero.png", dpi=110)
