#!/usr/bin/env python3
"""Reads data.py's tokens as shuffled, packed batches, single process, and prints tokens per second and CPU second.

  raw      a numpy memory map cut into blocks; the ceiling      arrow    pyarrow row groups, packed in numpy
  litdata  TokensLoader(block_size=seq), StreamingDataLoader
"""

import argparse
import os
import time

import common
import numpy as np
import torch


def batches(blocks, size):
    buffer = []
    for block in blocks:
        buffer.append(block)
        if len(buffer) == size:
            yield torch.from_numpy(np.stack(buffer).astype("int64"))
            buffer = []


def raw(a):
    tokens = np.memmap(os.path.join(a.data, "raw.bin"), np.int32, "r")
    order = np.random.default_rng(0).permutation(len(tokens) // a.seq)
    return batches((tokens[j * a.seq:(j + 1) * a.seq] for j in order), a.batch)


def pack(documents, seq):
    parts, length = [], 0
    for document in documents:
        parts.append(document)
        length += len(document)
        if length >= seq:
            joined = np.concatenate(parts)
            whole = len(joined) // seq
            for i in range(whole):
                yield joined[i * seq:(i + 1) * seq]
            parts, length = [joined[whole * seq:]], len(joined) - whole * seq


def arrow(a):
    import pyarrow.parquet as pq

    folder = os.path.join(a.data, "parquet")
    files = [pq.ParquetFile(os.path.join(folder, name)) for name in sorted(os.listdir(folder))]
    groups = [(i, j) for i, f in enumerate(files) for j in range(f.num_row_groups)]
    rng = np.random.default_rng(0)

    def documents():
        for k in rng.permutation(len(groups)):
            i, j = groups[k]
            column = files[i].read_row_group(j, use_threads=False).column("input_ids").combine_chunks()
            offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
            for n in rng.permutation(len(offsets) - 1):
                yield values[offsets[n]:offsets[n + 1]]

    return batches(pack(documents(), a.seq), a.batch)


def litdata(a):
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    loader = TokensLoader(block_size=a.seq)
    dataset = StreamingDataset(os.path.join(a.data, "litdata"), item_loader=loader, shuffle=True, drop_last=True, seed=42)
    return (batch.to(torch.int64) for batch in StreamingDataLoader(dataset, batch_size=a.batch, num_workers=0))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("loader", choices=["raw", "arrow", "litdata"])
    p.add_argument("--data", required=True)
    p.add_argument("--seq", type=int, default=2048)
    p.add_argument("--batch", type=int, default=8)
    a = p.parse_args()
    torch.set_num_threads(1)
    stream = iter({"raw": raw, "arrow": arrow, "litdata": litdata}[a.loader](a))
    next(stream)
    start, cpu, tokens = time.perf_counter(), common.cpu_s(), 0
    for batch in stream:
        tokens += batch.numel()
    elapsed = time.perf_counter() - start
    common.emit(dict(tokens=tokens, tokens_per_s=round(tokens / elapsed), tokens_per_cpu_s=round(tokens / (common.cpu_s() - cpu))))
    os._exit(0)  # litdata's threads do not end by themselves


if __name__ == "__main__":
    main()
