"""What is shipped: real files behind the two links, cheap imports, working entry points."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

__all__: list[str] = []

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("models", "inference")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
HEAVY = ("arviz", "matplotlib", "pandas", "polars", "pyarrow", "sklearn", "xarray")


def python(code: str, *, executable: str = sys.executable, cwd: Path = ROOT) -> str:
    """Run code in a fresh interpreter outside the checkout, and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", LINKS)
def test_links_point_at_the_wings(name: str):
    link = ROOT / "bayesgen" / name
    if not (ROOT / name).is_dir():
        pytest.skip("an sdist holds real files in place of the links")
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_import_loads_nothing_heavy(tmp_path: Path):
    code = "import sys, bayesgen, bayesgen.models, bayesgen.inference; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in python(code, cwd=tmp_path).split()}
    assert "bayesgen" in loaded
    assert loaded.isdisjoint(HEAVY), loaded & set(HEAVY)


def test_using_names_costs_at_most_half_a_second_over_torch_and_pyro(tmp_path: Path):
    # Processor time and the smaller of two runs: the machine may be busy.
    code = (
        "import time, torch, pyro, pyro.distributions; start = time.process_time();"
        "import bayesgen, bayesgen.models as m, bayesgen.inference as i;"
        "bayesgen.Fit, m.GaussianMixture, i.EM, i.VB, i.Gibbs;"
        "print(time.process_time() - start)"
    )
    assert min(float(python(code, cwd=tmp_path)) for _ in range(2)) < 0.5


@pytest.mark.parametrize("package", ["bayesgen", "bayesgen.models", "bayesgen.inference"])
def test_lazy_names_exist_and_others_do_not(package: str, tmp_path: Path):
    code = (
        f"import {package} as p\n"
        "assert set(p.__all__) <= set(dir(p))\n"
        "for name in p.__all__: getattr(p, name)\n"
        "try: p.no_such_name\n"
        "except AttributeError as error: print(error)"
    )
    assert "no_such_name" in python(code, cwd=tmp_path)


@pytest.mark.parametrize("group", sorted(PROJECT["entry-points"]))
def test_entry_points_load(group: str):
    declared = PROJECT["entry-points"][group]
    installed = {e.name: e for e in entry_points(group=group)}
    assert set(declared) <= set(installed)
    for name, target in declared.items():
        assert installed[name].value == target
        assert installed[name].load().__name__ == target.partition(":")[2]


def test_constraints_are_pins_and_name_no_host():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.partition(";")[0].strip() for line in lines if line and line[0] != "#"]
    assert pins
    assert [pin for pin in pins if pin.count("==") != 1 or any(c in pin for c in "@/+")] == []


def test_every_requirement_is_pinned():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins: dict[str, list[str]] = {}
    for line in lines:
        if line and line[0] != "#":
            pin = Requirement(line)
            pins.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier)[2:])
    extras = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        versions = pins[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(v) for v in versions), requirement


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_code_on_the_first_pages_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"```(?:python|\{code-cell\})\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}  # cells of a page share their names
    for block in blocks:
        exec(compile(block, page, "exec"), names)


# ------------------------------------------------------------------ build, install, import
def sources() -> set[str]:
    """What every artefact must hold, as paths under ``bayesgen/``: data files as well as code."""
    files = {p.relative_to(ROOT) for d in ("bayesgen", *LINKS) for p in (ROOT / d).rglob("*")}
    kept = [p for p in files if (ROOT / p).is_file() and "__pycache__" not in p.parts]
    return {p.as_posix() if p.parts[0] == "bayesgen" else f"bayesgen/{p.as_posix()}" for p in kept}


def build(source: Path, out: Path, *kinds: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        modes = {i.filename: i.external_attr >> 16 for i in archive.infolist()}
        assert [name for name, mode in modes.items() if stat.S_ISLNK(mode)] == []
        return set(archive.namelist())


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist; ``direct/`` holds the wheel of the checkout, ``again/`` that of the sdist."""
    out = tmp_path_factory.mktemp("artefacts")
    checkout = out / "checkout"
    skip = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "runs")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=shutil.ignore_patterns(*skip))
    build(checkout, out, "--sdist")
    build(checkout, out / "direct", "--wheel")
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out / "unpacked", filter="data")
    build(next((out / "unpacked").iterdir()), out / "again", "--wheel")
    return out


@pytest.mark.slow
def test_the_sdist_holds_real_files(artefacts: Path):
    with tarfile.open(next(artefacts.glob("*.tar.gz"))) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
    assert sources() <= set(members)
    assert [n for n, m in members.items() if m.issym() or m.islnk()] == []
    assert not [n for n in members if n.startswith(tuple(f"{link}/" for link in LINKS))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["direct", "again"])
def test_the_wheel_holds_real_files(artefacts: Path, kind: str):
    files = wheel_files(next((artefacts / kind).glob("*.whl")))
    assert sources() <= files
    top = {f.partition("/")[0] for f in files}
    assert {t for t in top if not t.endswith(".dist-info")} == {"bayesgen"}


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(artefacts: Path, tmp_path: Path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    executable = str(home / "bin" / "python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(python(ask, executable=executable).strip())
    wheel = next((artefacts / "again").glob("*.whl"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True)
    # Borrow the dependencies, but not the editable bayesgen: its finder starts from a .pth file,
    # and a .pth file is not read in a folder that another .pth file names.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    code = (
        "import bayesgen, bayesgen.models, bayesgen.inference\n"
        "from bayesgen.models import GaussianMixture\n"
        "from bayesgen.inference import EM, VB, Gibbs\n"
        "from bayesgen import datasets\n"
        "assert len(datasets.load('faithful')) == 272\n"
        "print(bayesgen.models.__file__, bayesgen.inference.__file__)"
    )
    where = python(code, executable=executable, cwd=tmp_path).split()
    assert all(Path(w).is_relative_to(site) and not Path(w).is_symlink() for w in where)
