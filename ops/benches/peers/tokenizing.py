#!/usr/bin/env python3
"""Tokenizes text held in memory with the `tokenizers` package, on one thread, and prints MB/s and a hash of the ids.

usage: tokenizing.py TOKENIZER.json TEXT.jsonl
"""

import hashlib
import json
import os
import struct
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers  # noqa: E402  (after the variable that it reads)


def main():
    tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
    with open(sys.argv[2], encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for line in f]
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    tokenizer.encode(texts[0], add_special_tokens=False)
    start = time.perf_counter()
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    elapsed = time.perf_counter() - start
    digest = hashlib.sha256()
    for ids in encoded:
        digest.update(struct.pack(f"<{len(ids)}I", *ids))
    print(json.dumps(dict(mb_per_s=num_bytes / 1e6 / elapsed, tokens=sum(map(len, encoded)), sha256=digest.hexdigest())))


if __name__ == "__main__":
    main()
