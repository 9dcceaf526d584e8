"""Draw the picture that opens the README, as ``bayesgen demo`` does: ``python docs/hero.py``."""

from pathlib import Path

import torch

from bayesgen.app.demo.faithful import Faithful, hero

torch.set_num_threads(1)
demo = Faithful(Path("unused"))
demo.judge()
figure = hero(demo.vb, demo.judged, demo.new)
figure.savefig(Path(__file__).parent / "_static" / "hero.png", dpi=110, bbox_inches="tight")
