#!/usr/bin/env python3
"""Makes the small CPU libtorch that Phalanx is built against, out of three wheels, each checked by its hash.

usage: libtorch.py LINK

The prefix is kept under ${XDG_CACHE_HOME:-~/.cache}/phalanx and LINK is pointed at it. A second run finds it and does nothing;
an interrupted run leaves only a folder with a temporary name, which the next run removes.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

from cached import fail, made_once, point

VERSION = "2.11.0"
PYTHON = "3.12"  # which build of the wheel to take; no Python runs its code
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_25_x86_64", "manylinux2014_x86_64"]
# The hash is that of the file for PYTHON and PLATFORMS. Members: a folder ends in '/'.
WHEELS = [
    (
        "torch==2.11.0",
        "0f68f4ac6d95d12e896c3b7a912b5871619542ec54d3649cf48cc1edd4dd2756",
        [
            "torch/include/",
            "torch/lib/libc10.so",
            "torch/lib/libtorch_cpu.so",
            "torch/lib/libgomp.so.1",
            "torch/version.py",
        ],
    ),
    (
        "nvidia-cuda-runtime==13.0.96",
        "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
        ["nvidia/cu13/lib/libcudart.so.13"],
    ),
    (
        "nvidia-cuda-cupti==13.0.85",
        "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
        ["nvidia/cu13/lib/libcupti.so.13"],
    ),
]


def fetch(requirement, sha256, folder):
    """Downloads one wheel into `folder` and returns its path; pip refuses any file of another hash."""
    lock = folder / "requirement.txt"
    lock.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    command += [f"--platform={name}" for name in PLATFORMS] + ["-r", str(lock), "-d", str(folder)]
    if subprocess.run(command).returncode != 0:
        fail(f"pip could not download {requirement}; is a package index reachable? (python3 -m pip config list)")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        fail(f"{requirement}: expected one wheel, found {len(wheels)}")
    return wheels[0]


def unpack(wheel, members, destination):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for member in members:
            matching = [n for n in names if n == member or (member.endswith("/") and n.startswith(member))]
            if not matching:
                fail(f"{wheel.name} holds no {member}")
            archive.extractall(destination, matching)


def link_libtorch(lib):
    """The wheel's libtorch.so needs libtorch_cuda.so and exports nothing itself: an empty one takes its place."""
    command = ["gcc", "-shared", "-o", str(lib / "libtorch.so"), "-x", "c", "/dev/null", "-Wl,-soname,libtorch.so"]
    command += ["-Wl,--no-as-needed", f"-L{lib}", "-l:libtorch_cpu.so", "-l:libc10.so"]
    command += ["-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined"]
    if subprocess.run(command).returncode != 0:
        fail("gcc could not link libtorch.so")


def build(work):
    for requirement, sha256, members in WHEELS:
        folder = work / "download"
        folder.mkdir()
        print(f"libtorch: downloading {requirement}", file=sys.stderr)
        unpack(fetch(requirement, sha256, folder), members, work)
        shutil.rmtree(folder)
    link_libtorch(work / "torch" / "lib")
    (work / "torch" / "build-version").write_text(VERSION + "\n")


def main():
    if len(sys.argv) != 2:
        fail("usage: libtorch.py LINK")
    if os.uname().machine != "x86_64":
        fail(f"this machine is {os.uname().machine}; the pinned wheels are for x86_64 only")
    recipe = hashlib.sha256(repr((WHEELS, PYTHON)).encode()).hexdigest()[:12]
    prefix = made_once(f"libtorch-{VERSION}-cpu-{recipe}", 2000, build)
    point(pathlib.Path(sys.argv[1]), prefix / "torch")


if __name__ == "__main__":
    main()
