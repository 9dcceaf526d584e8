"""One optimiser step of variational inference: ours against Pyro, torch by hand, and NumPyro.

    python benchmarks/svi.py [--workloads mixture logistic vae] [--numpyro PYTHON] [--rounds 5]

Every contender does the same step on the same data: a minibatch, the evidence bound of one
particle under a mean-field normal guide (the VAE: its encoder), its gradient, Adam. Each has a
process of its own with one thread (NumPyro's by the Python that has it) and they take turns,
round by round; printed are medians of the CPU time of a step and ratios to ours. One that fails
or takes longer than --limit seconds to trace and compile is named and left out. On a busy machine
believe the ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import statistics
import subprocess
import sys
import time

__all__: list[str] = []

ROWS, BATCH, COMPONENTS = 1000, 64, 3
IMAGES, WIDTH, HIDDEN, LATENT, IMAGE_BATCH = 1280, 784, 400, 20, 128
CALLS = {"mixture": 960, "logistic": 480, "vae": 48}
RATE = 1e-3


def data_of(name):
    import numpy as np

    generator = np.random.default_rng(0)
    if name == "mixture":
        x = generator.normal(size=(ROWS, 2))
        x[: ROWS // 3] += 4.0
        return (x,)
    if name == "logistic":
        x = generator.normal(size=(ROWS, 25))
        y = (
            generator.random(ROWS) < 1 / (1 + np.exp(-x @ (0.3 * generator.normal(size=25))))
        ) * 1.0
        return x, y
    return ((generator.random((IMAGES, WIDTH)) < 0.3).astype("float32"),)


# ---------------------------------------------------------------- Pyro programs
def mixture(x, num_rows=None):
    import pyro
    import pyro.distributions as dist
    import torch

    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(COMPONENTS)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(COMPONENTS, 2), 5.0).to_event(2))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(COMPONENTS, 2), 1.0).to_event(2))
    with pyro.plate("data", num_rows or len(x), subsample=x):
        parts = dist.Normal(loc, scale).to_event(1)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=x)


def logistic(x, y):
    import pyro
    import pyro.distributions as dist
    import torch

    slope = pyro.sample("slope", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ slope), obs=y)


def vae():
    import pyro
    import pyro.distributions as dist
    import torch
    from torch import nn

    class Vae(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Softplus())
            self.loc, self.log_scale = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)
            self.decode = nn.Sequential(
                nn.Linear(LATENT, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, WIDTH)
            )

        def posterior(self, x):
            hidden = self.encode(x)
            return self.loc(hidden), self.log_scale(hidden).exp()

        def model(self, x, num_rows=None):
            pyro.module("vae", self)
            with pyro.plate("data", num_rows or len(x), subsample=x):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), LATENT), 1.0).to_event(1))
                law = dist.Bernoulli(logits=self.decode(z)).to_event(1)
                pyro.sample("x", law, obs=x)

        def guide(self, x, num_rows=None):
            pyro.module("vae", self)
            with pyro.plate("data", num_rows or len(x), subsample=x):
                loc, scale = self.posterior(x)
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Vae()


# ---------------------------------------------------------------- contenders
class Ours:
    """The compiled step of `SVI`: blocks of 48 as its loop calls it, or one step a call."""

    def __init__(self, name, single=False):
        import torch

        from bayesgen import rng
        from bayesgen.inference import SVI

        dtype = torch.float32 if name == "vae" else torch.float64
        data = tuple(torch.as_tensor(v).to(dtype) for v in data_of(name))
        program, guide = {"mixture": mixture, "logistic": logistic}.get(name), None
        if name == "vae":
            net = vae()
            program, guide = net.model, net.guide
        self.engine = SVI(
            guide=guide,
            batch_size={"mixture": BATCH, "vae": IMAGE_BATCH}.get(name),
            learning_rate=RATE,
            compile=True,
            num_steps=10**6,
            tolerance=0.0,
            dtype=dtype,
        )
        self.task = self.engine.task(program, data, rng.make_generator(0))
        self.work = self.engine.prepare(self.task)
        assert self.work.traced.graph is not None, self.work.traced.message
        self.state = self.engine.init(self.task, self.work)

        self.single = single

    def run(self, calls):
        if self.single:
            for _ in range(calls):
                self.one()
            return
        for _ in range(calls // 48):
            self.state, _ = self.engine.step(self.task, self.work, self.state)

    def one(self):
        """Noise, rows and scalars of one step, and the step: nothing is drawn ahead."""
        from bayesgen.inference.variational.machine import Steps
        from bayesgen.inference.variational.step import draw_noise

        engine, task, work, state = self.engine, self.task, self.work, self.state
        generator, pair, done = task.generator, work.setup.pair, state.num_steps
        noise = draw_noise(work.traced.noise, (1, engine.num_particles), pair, generator)
        indices, data, places = engine._rows(task, work, state, 1)
        scalars = engine._scalars(done, 1, state.params)
        moving = (state.params, state.average, *state.slots.values())
        now = Steps(scalars, *noise, tuple(indices), data)
        _, (params, average, *slots) = work.machine.run(done, moving, now)
        slots = dict(zip(state.slots, slots, strict=True))
        self.state = state._replace(
            params=params, average=average, slots=slots, num_steps=done + 1, places=places
        )


class Pyro:
    """Pyro's own `SVI.step`."""

    def __init__(self, name):
        import pyro
        import torch
        from pyro.infer import SVI, Trace_ELBO
        from pyro.infer.autoguide import AutoNormal

        pyro.clear_param_store()
        self.dtype = torch.float32 if name == "vae" else torch.float64
        torch.set_default_dtype(self.dtype)
        pyro.enable_validation(False)
        self.data = tuple(torch.as_tensor(v).to(self.dtype) for v in data_of(name))
        self.batch = {"mixture": BATCH, "vae": IMAGE_BATCH}.get(name)
        self.rows = len(self.data[0])
        program = {"mixture": mixture, "logistic": logistic}.get(name)
        if name == "vae":
            net = vae()
            program, guide = net.model, net.guide
        else:
            guide = AutoNormal(program)
        self.svi = SVI(program, guide, pyro.optim.Adam({"lr": RATE}), Trace_ELBO())
        self.generator = torch.Generator().manual_seed(0)

    def rows_of(self):
        import torch

        if self.batch is None:
            return self.data
        return (self.data[0][torch.randint(self.rows, (self.batch,), generator=self.generator)],)

    def run(self, calls):
        import torch

        torch.set_default_dtype(self.dtype)
        more = {} if self.batch is None else {"num_rows": self.rows}
        for _ in range(calls):
            self.svi.step(*self.rows_of(), **more)


class ByHand:
    """A torch loop written for the one model: no Pyro; optionally the loss compiled."""

    def __init__(self, name, compiled=False):
        import torch

        self.dtype = torch.float32 if name == "vae" else torch.float64
        torch.set_default_dtype(self.dtype)
        self.data = tuple(torch.as_tensor(v).to(self.dtype) for v in data_of(name))
        self.batch = {"mixture": BATCH, "vae": IMAGE_BATCH}.get(name)
        self.rows = len(self.data[0])
        self.generator = torch.Generator().manual_seed(0)
        if name == "vae":
            self.net = vae()
            self.parameters = list(self.net.parameters())
            self.loss = self._vae_loss
            self.noise = (IMAGE_BATCH, LATENT)
        else:
            size = {"mixture": COMPONENTS * 4 + COMPONENTS - 1, "logistic": 25}[name]
            self.parameters = [
                torch.zeros(size, requires_grad=True),
                torch.full((size,), -2.0, requires_grad=True),
            ]
            self.loss = {"mixture": self._mixture_loss, "logistic": self._logistic_loss}[name]
            self.noise = (size,)
        if compiled:
            self.loss = torch.compile(self.loss)
        self.optimizer = torch.optim.Adam(self.parameters, lr=RATE)

    def _drawn(self, noise):
        loc, raw = self.parameters
        return loc + raw.exp() * noise, raw.sum()

    def _mixture_loss(self, x, noise):
        import torch
        from torch.nn.functional import logsigmoid

        z, entropy = self._drawn(noise)
        k = COMPONENTS
        loc, log_scale, raw = z[: 2 * k].view(k, 2), z[2 * k : 4 * k].view(k, 2), z[4 * k :]
        offset = torch.arange(k - 1, 0, -1, dtype=x.dtype).log()
        stick, rest = logsigmoid(raw - offset), logsigmoid(offset - raw)
        before = torch.cat([rest.new_zeros(1), rest.cumsum(0)])
        log_weights = torch.cat([stick, stick.new_zeros(1)]) + before
        jacobian = (stick + rest + before[:-1]).sum()
        prior = -0.5 * (loc / 5.0).square().sum() - 0.5 * log_scale.square().sum() + jacobian
        u = (x[:, None] - loc) * (-log_scale).exp()
        rows = -0.5 * u.square().sum(-1) - log_scale.sum(-1) + log_weights
        return -(prior + self.rows / len(x) * rows.logsumexp(-1).sum() + entropy)

    def _logistic_loss(self, x, y, noise):
        from torch.nn.functional import binary_cross_entropy_with_logits

        slope, entropy = self._drawn(noise)
        fit = binary_cross_entropy_with_logits(x @ slope, y, reduction="sum")
        return fit + 0.5 * slope.square().sum() - entropy

    def _vae_loss(self, x, noise):
        from torch.nn.functional import binary_cross_entropy_with_logits

        loc, scale = self.net.posterior(x)
        z = loc + scale * noise
        fit = binary_cross_entropy_with_logits(self.net.decode(z), x, reduction="sum")
        kl = 0.5 * (z.square() - noise.square()).sum() - scale.log().sum()
        return self.rows / len(x) * (fit + kl)

    def run(self, calls):
        import torch

        torch.set_default_dtype(self.dtype)
        for _ in range(calls):
            batch = self.data
            if self.batch is not None:
                index = torch.randint(self.rows, (self.batch,), generator=self.generator)
                batch = (self.data[0][index],)
            noise = torch.randn(self.noise, generator=self.generator)
            loss = self.loss(*batch, noise)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()


class Elsewhere:
    """A contender in a process of its own, spoken to by lines."""

    def __init__(self, python, name, kind):
        command = [python, "-W", "ignore", __file__, "--serve", name, kind]
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags},
        )

    def answer(self, seconds):
        """The next number that it prints.

        Raises:
            Failed: It ended, or took longer.
        """
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not ready:
            raise Failed(f"no answer within {seconds:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"ended with status {self.process.wait()}")
        return json.loads(line)

    def measure(self, calls, seconds):
        self.process.stdin.write(f"{calls}\n")
        return self.answer(seconds) / calls

    def close(self):
        self.process.kill()
        self.process.wait()


class Failed(Exception):
    """Why a contender leaves the match."""


def serve(name, kind):
    """One contender: built and warmed, then CPU seconds of as many steps as each line says."""
    if kind.startswith("NumPyro"):
        run = numpyro_steps(name, kind.removeprefix("NumPyro "))
    else:
        import torch

        torch.set_num_threads(1)
        makers = {
            "ours": Ours,
            "ours, one a call": lambda name: Ours(name, True),
            "Pyro SVI.step": Pyro,
            "torch by hand": ByHand,
            "the same, compiled": lambda name: ByHand(name, True),
        }
        run = makers[kind](name).run
    run(calls_of(name, kind))
    print(json.dumps(time.process_time()), flush=True)
    for line in sys.stdin:
        before = time.process_time()
        run(int(line))
        print(json.dumps(time.process_time() - before), flush=True)


def calls_of(name, kind):
    """Steps of one turn; slow contenders make fewer."""
    return max(48, CALLS[name] // (10 if kind.startswith("Pyro") else 1))


def numpyro_steps(name, kind):
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax import random
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    if name != "vae":
        jax.config.update("jax_enable_x64", True)
    data = tuple(jnp.asarray(v) for v in data_of(name))
    rows, batch = len(data[0]), {"mixture": BATCH, "vae": IMAGE_BATCH}.get(name)

    def jax_mixture(x):
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(COMPONENTS)))
        loc = numpyro.sample("loc", dist.Normal(jnp.zeros((COMPONENTS, 2)), 5.0).to_event(2))
        scale = numpyro.sample(
            "scale", dist.LogNormal(jnp.zeros((COMPONENTS, 2)), 1.0).to_event(2)
        )
        with numpyro.plate("data", rows, subsample_size=len(x)):
            parts = dist.Normal(loc, scale).to_event(1)
            law = dist.MixtureSameFamily(dist.Categorical(weights), parts)
            numpyro.sample("x", law, obs=x)

    def jax_logistic(x, y):
        slope = numpyro.sample("slope", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ slope), obs=y)

    def dense(tag, sizes, x):
        for k, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)):
            weight = numpyro.param(
                f"{tag}{k}.w", lambda key, a=a, b=b: random.normal(key, (a, b)) / math.sqrt(a)
            )
            x = x @ weight + numpyro.param(f"{tag}{k}.b", jnp.zeros(b))
            if k < len(sizes) - 2:
                x = jax.nn.softplus(x)
        return x

    def jax_vae(x):
        with numpyro.plate("data", rows, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros((len(x), LATENT)), 1.0).to_event(1))
            logits = dense("decode", (LATENT, HIDDEN, WIDTH), z)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def jax_guide(x):
        hidden = jax.nn.softplus(dense("encode", (WIDTH, HIDDEN), x))
        loc = dense("loc", (HIDDEN, LATENT), hidden)
        scale = jnp.exp(dense("scale", (HIDDEN, LATENT), hidden))
        with numpyro.plate("data", rows, subsample_size=len(x)):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    program = {"mixture": jax_mixture, "logistic": jax_logistic, "vae": jax_vae}[name]
    guide = jax_guide if name == "vae" else AutoNormal(program)
    svi = SVI(program, guide, numpyro.optim.Adam(RATE), Trace_ELBO())
    key = random.PRNGKey(0)

    def taken(key):
        if batch is None:
            return data
        return (data[0][random.randint(key, (batch,), 0, rows)],)

    def step(state, key):
        return svi.update(state, *taken(key))

    hold = {"state": svi.init(key, *taken(key)), "key": key}
    update = jax.jit(step)
    scan = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))

    def run(calls):
        hold["key"], now = random.split(hold["key"])
        keys = random.split(now, calls)
        if kind == "scan":
            hold["state"], losses = scan(hold["state"], keys)
            losses.block_until_ready()
            return
        for k in range(calls):
            hold["state"], loss = update(hold["state"], keys[k])
        loss.block_until_ready()

    return run


# ---------------------------------------------------------------- the match
KINDS = ("ours", "ours, one a call", "Pyro SVI.step", "torch by hand", "the same, compiled")


def compare(name, arguments):
    pythons = dict.fromkeys(KINDS, sys.executable)
    if arguments.numpyro:
        pythons |= dict.fromkeys(("NumPyro update", "NumPyro scan"), arguments.numpyro)
    contenders, times = {}, {}
    try:
        for kind, python in pythons.items():  # one after the other: traced, compiled, warm
            contenders[kind] = Elsewhere(python, name, kind)
            if guarded(name, contenders, kind, lambda c: c.answer(arguments.limit)) is not None:
                times[kind] = []
        for _ in range(arguments.rounds):
            for kind in list(times):
                calls = calls_of(name, kind)
                one = guarded(name, contenders, kind, lambda c, n=calls: c.measure(n, 30.0))
                if one is None:
                    del times[kind]
                else:
                    times[kind].append(one)
    finally:
        for contender in contenders.values():
            contender.close()
    if not arguments.rounds:
        print(f"{name:10} warm: {', '.join(times)}", flush=True)
        return
    base = statistics.median(times["ours"]) if "ours" in times else math.nan
    for kind, values in times.items():
        middle = statistics.median(values)
        print(f"{name:10} {kind:20} {1e6 * middle:10.1f} us {middle / base:8.2f} x", flush=True)


def guarded(name, contenders, kind, ask):
    """What a contender answers; None, with the reason printed, where it fails."""
    try:
        return ask(contenders[kind])
    except (Failed, OSError) as error:
        print(f"{name:10} {kind:20} left out: {error}", flush=True)
        contenders[kind].close()
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--numpyro", help="a Python that has NumPyro")
    parser.add_argument("--rounds", type=int, default=5, help="0 only fills the compiler's cache")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds to build a contender")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    print(f"{'workload':10} {'step':20} {'CPU a step':>13} {'ratio':>10}", flush=True)
    for name in arguments.workloads:
        compare(name, arguments)


if __name__ == "__main__":
    main()
