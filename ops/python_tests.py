#!/usr/bin/env python3
"""Makes the folder of Python packages that tests need, as pinned in requirements-tests.txt.

usage: python_tests.py LINK

The folder is kept in the cache and LINK is pointed at it; tests put LINK on PYTHONPATH. No virtual environment: a bare Debian
has no python3-venv, and `pip install --target` touches nothing of the system's Python.
"""

import hashlib
import pathlib
import subprocess
import sys

from cached import fail, made_once, point

REQUIREMENTS = pathlib.Path(__file__).resolve().parent / "requirements-tests.txt"


def install(folder):
    print(f"python_tests: installing {REQUIREMENTS.name}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]
    command += ["--require-hashes", "--no-deps", "--only-binary=:all:", "--target", str(folder), "-r", str(REQUIREMENTS)]
    if subprocess.run(command).returncode != 0:
        fail(f"pip could not install {REQUIREMENTS}; is a package index reachable? (python3 -m pip config list)")


def main():
    if len(sys.argv) != 2:
        fail("usage: python_tests.py LINK")
    version = "{}.{}".format(*sys.version_info[:2])
    recipe = hashlib.sha256(REQUIREMENTS.read_bytes() + version.encode()).hexdigest()[:12]
    point(pathlib.Path(sys.argv[1]), made_once(f"python-tests-{recipe}", 500, install))


if __name__ == "__main__":
    main()
