"""Try a wheel as a stranger would: a fresh environment of each Python, and no compiler in sight.

    python tools/check_wheel.py dist/kconv-*.whl [python3.10 python3.13 ...]

Without a list it takes every CPython from 3.10 on that is on the path or of pyenv. Of a wheel for
Linux auditwheel says first for which systems it is.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OLDEST = (3, 10)
PROGRAM = """
import numpy as np, kconv
rng = np.random.default_rng(0)
x = rng.normal(size=(2, 12, 5, 7)).astype(np.float32)
weight = rng.normal(size=(8, 3)).astype(np.float32)
y = kconv.pointwise_conv(x, weight, groups=4)
parts = zip(np.split(x, 4, 1), np.split(weight, 4))
expected = np.concatenate([np.einsum("nihw,oi->nohw", a, b) for a, b in parts], 1)
np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
assert "site-packages" in kconv.__file__, kconv.__file__
assert kconv.list_models() and kconv.models.count(kconv.models.create("keffnet_b0")).trainable
print(kconv.build_info())
"""


def main() -> int:
    """Check, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pythons", nargs="*", help="interpreters")
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    if "linux" in wheel.name:
        said = subprocess.run(
            [sys.executable, "-m", "auditwheel", "show", str(wheel)],
            capture_output=True,
            text=True,
            check=True,
        )
        print(" ".join(said.stdout.split()))
        if not re.search(r"-(many|musl)linux_\d+_\d+", wheel.name):
            print("it is for this system alone, not for others", file=sys.stderr)
            return 1
    pythons = options.pythons or found()
    for python in pythons:
        print(f"{python}: ", end="", flush=True)
        print(tried(python, wheel))
    return 0 if pythons else 1


def found() -> list[str]:
    """The CPythons there are, one of each minor version."""
    names = [f"python3.{minor}" for minor in range(OLDEST[1], 20)]
    paths = [path for name in names if (path := shutil.which(name))]
    pyenv = Path.home() / ".pyenv/versions"
    paths += [str(path) for path in sorted(pyenv.glob("3.*/bin/python"))]
    versions: dict[tuple[int, ...], str] = {}
    for path in paths:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        version = re.fullmatch(r"Python (\d+)\.(\d+).*", text.stdout.strip())
        if text.returncode == 0 and version:
            versions.setdefault(tuple(map(int, version.groups())), path)
    return [path for version, path in sorted(versions.items()) if version >= OLDEST]


def tried(python: str, wheel: Path) -> str:
    """What the wheel says of itself in a new environment, where nothing but pip is on the path."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        programs = Path(folder) / "bin"
        bare = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        bare["PATH"] = str(programs)
        own = str(programs / "python")
        install = [own, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", str(wheel)]
        subprocess.run(install, check=True, env=bare)
        said = [
            subprocess.run(
                command, check=True, env=bare, cwd=folder, stdout=subprocess.PIPE, text=True
            ).stdout
            for command in ([own, "-c", PROGRAM], [str(programs / "kconv"), "models"])
        ]
        return said[0].strip()


if __name__ == "__main__":
    sys.exit(main())
