#!/usr/bin/env python3
"""Writes the data that the loaders are measured on: the same documents in each layout.

usage: data.py --out FOLDER --text FILE.jsonl.zst [--tokens N]

Documents: the text, tokenized by a BPE of 32000 entries trained on it, then synthetic ones (lognormal lengths, Zipf's law over
the ids), shuffled, each ending in id 0. Layouts: parquet/ (zstd, input_ids: list<int32>, a document a row, row groups of 1000),
litdata/ (TokensLoader chunks), raw.bin (int32, all tokens: the ceiling) with raw.idx.npy (offsets).
"""

import argparse
import functools
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VOCAB = 32000
SEQ = 2048


def real_documents(path, out):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    with pa.input_stream(path, compression="zstd") as stream:
        texts = [json.loads(line)["text"] for line in stream.read().decode("utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<|end_of_text|>"], show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(os.path.join(out, "tokenizer.json"))
    return [np.array(e.ids + [0], np.int32) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def synthetic_documents(tokens, rng):
    probability = 1 / np.arange(2, VOCAB + 1) ** 1.1
    cumulative = np.cumsum(probability / probability.sum())
    while tokens > 0:
        n = int(min(max(8, rng.lognormal(6.0, 1.0)), 65536, tokens))
        document = (np.searchsorted(cumulative, rng.random(n)) + 1).astype(np.int32)
        np.minimum(document, VOCAB - 1, out=document)
        document[-1] = 0
        tokens -= n
        yield document


def write_parquet(folder, documents, shards):
    os.makedirs(folder)
    for s, part in enumerate(np.array_split(np.arange(len(documents)), shards)):
        chosen = [documents[i] for i in part]
        offsets = np.concatenate([[0], np.cumsum([len(d) for d in chosen])]).astype(np.int32)
        rows = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(chosen)))
        name = os.path.join(folder, f"train-{s:05d}-of-{shards:05d}.parquet")
        pq.write_table(pa.table({"input_ids": rows}), name, compression="zstd", row_group_size=1000)


def read_raw(out, part):
    """litdata's optimize() calls this in a process of its own."""
    import torch

    tokens = np.memmap(os.path.join(out, "raw.bin"), np.int32, "r")
    offsets = np.load(os.path.join(out, "raw.idx.npy"))
    for i in range(*part):
        yield torch.from_numpy(np.array(tokens[offsets[i]:offsets[i + 1]]))


def write_litdata(out, num_documents):
    from litdata import TokensLoader, optimize

    cuts = np.linspace(0, num_documents, 33).astype(int)
    parts = [(int(cuts[i]), int(cuts[i + 1])) for i in range(32)]
    loader = TokensLoader(block_size=SEQ)
    optimize(functools.partial(read_raw, out), parts, os.path.join(out, "litdata"), chunk_size=SEQ * 8192, item_loader=loader, num_workers=1)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--text", required=True)
    p.add_argument("--tokens", type=int, default=64_000_000)
    p.add_argument("--shards", type=int, default=16)
    a = p.parse_args()
    shutil.rmtree(a.out, ignore_errors=True)
    os.makedirs(a.out)
    rng = np.random.default_rng(0)
    documents = real_documents(a.text, a.out)
    documents += synthetic_documents(a.tokens - sum(len(d) for d in documents), rng)
    documents = [documents[i] for i in rng.permutation(len(documents))]
    np.concatenate(documents).tofile(os.path.join(a.out, "raw.bin"))
    np.save(os.path.join(a.out, "raw.idx.npy"), np.concatenate([[0], np.cumsum([len(d) for d in documents])]))
    write_parquet(os.path.join(a.out, "parquet"), documents, a.shards)
    write_litdata(a.out, len(documents))
    with open(os.path.join(a.out, "complete"), "w") as f:
        f.write(f"{a.tokens}\n")


if __name__ == "__main__":
    main()
