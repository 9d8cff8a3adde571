"""Build the wheel and the sdist into dist/, and try the wheel on each version of Python at hand.

    make dist

The wheel is built from the sdist, which proves that the sdist suffices to build it.  It goes into an empty virtual
environment with the newest releases of its dependencies, whatever constraints.txt says; there smoke.py uses it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from actshuffle import __version__

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
VERSIONS = ("3.11", "3.12", "3.13")
PACKAGES = ("actshuffle", "saetrain")
IN_WHEEL = {
    "actshuffle/py.typed",
    "saetrain/py.typed",
    f"actshuffle-{__version__}.dist-info/licenses/LICENSE",
    f"actshuffle-{__version__}.dist-info/entry_points.txt",
}
IN_SDIST = {
    *(f"actshuffle-{__version__}/{name}" for name in ("LICENSE", "README.md", "CHANGELOG.md", "constraints.txt")),
    *(f"actshuffle-{__version__}/{name}" for name in ("tests/smoke.py", "tests/fixtures/half_done.tar.xz")),
}


def run(*command: str | Path, **options: str | Path) -> None:
    """Run a command, which must succeed and does not see this environment's packages."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT", "VIRTUAL_ENV")}
    subprocess.run([str(word) for word in command], check=True, env=environment, **options)


def expect(place: str, found: set[str], wanted: set[str]) -> None:
    """Stop if some of the names that belong in a place are missing."""
    if lacking := sorted(wanted - found):
        raise SystemExit(f"{place} lacks {', '.join(lacking)}")


def build() -> Path:
    """Build both distributions and check their contents; returns the wheel."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    wheel, sdist = DIST / f"actshuffle-{__version__}-py3-none-any.whl", DIST / f"actshuffle-{__version__}.tar.gz"
    expect(str(DIST), {path.name for path in DIST.iterdir()}, {wheel.name, sdist.name})
    modules = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expect(wheel.name, names, IN_WHEEL | modules)
    if others := {name.split("/")[0] for name in names} - {*PACKAGES, f"actshuffle-{__version__}.dist-info"}:
        raise SystemExit(f"{wheel.name} holds {', '.join(sorted(others))}, which should not be installed")
    with tarfile.open(sdist) as packed:
        expect(sdist.name, set(packed.getnames()), IN_SDIST)
    return wheel


def interpreters() -> list[str]:
    """A working Python of each version, on the path or among those that pyenv built."""
    found = []
    for version in VERSIONS:
        name = f"python{version}"
        built = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}"))
        candidates = [*built, *(Path(folder, name) for folder in os.get_exec_path())]
        found += [str(path) for path in candidates if _works(path, version)][:1]
    return found


def _works(path: Path, version: str) -> bool:
    """True if this is a Python of that version that can make environments."""
    code = "import ensurepip, venv, sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.strip() == version


def try_out(python: str, wheel: Path) -> None:
    """Try the wheel in an empty environment."""
    with tempfile.TemporaryDirectory() as name:
        run(python, "-m", "venv", Path(name, "venv"))
        inside = Path(name, "venv", "bin", "python")
        run(inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
        shutil.copy(ROOT / "tests" / "smoke.py", name)
        run(inside, "smoke.py", cwd=name)


def main() -> None:
    wheel, found = build(), interpreters()
    if not found:
        raise SystemExit(f"no Python {', '.join(VERSIONS)} is at hand")
    for python in found:
        try_out(python, wheel)
    sys.stdout.write(f"{wheel.name} works on {len(found)} of {len(VERSIONS)} versions of Python\n")


if __name__ == "__main__":
    main()
