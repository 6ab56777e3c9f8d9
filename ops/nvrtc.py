#!/usr/bin/env python3
"""Brings NVRTC, CUDA's compiler as a library, for the tests that compile our kernels; checked by its hash. It needs no GPU.

usage: nvrtc.py LINK

Kept under ${XDG_CACHE_HOME:-~/.cache}/phalanx, as libtorch is, and LINK is pointed at it. On a machine with GPUs, programs take
the one that comes with libtorch's CUDA build instead.
"""

import hashlib
import os
import pathlib
import shutil
import sys

from cached import fail, made_once, point
from libtorch import fetch, unpack

# Of the CUDA release that libtorch is built with.
REQUIREMENT = "nvidia-cuda-nvrtc==13.0.88"
SHA256 = "ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575"
MEMBERS = ["nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cu13/lib/libnvrtc-builtins.so.13.0"]


def build(work):
    folder = work / "download"
    folder.mkdir()
    print(f"nvrtc: downloading {REQUIREMENT}", file=sys.stderr)
    unpack(fetch(REQUIREMENT, SHA256, folder), MEMBERS, work)
    shutil.rmtree(folder)


def main():
    if len(sys.argv) != 2:
        fail("usage: nvrtc.py LINK")
    if os.uname().machine != "x86_64":
        fail(f"this machine is {os.uname().machine}; the pinned wheel is for x86_64 only")
    recipe = hashlib.sha256(repr((REQUIREMENT, SHA256, MEMBERS)).encode()).hexdigest()[:12]
    point(pathlib.Path(sys.argv[1]), made_once(f"nvrtc-{recipe}", 400, build))


if __name__ == "__main__":
    main()
