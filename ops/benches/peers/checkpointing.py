"""PyTorch's side of ../checkpoint: the same state through torch.distributed.checkpoint, in one process."""

import argparse
import pathlib
import shutil
import statistics
import subprocess
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from common import emit


def parse():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("folder", type=pathlib.Path)
    p.add_argument("--rounds", type=int, required=True)
    p.add_argument("--state", type=int, nargs=3, required=True, metavar=("MATRICES", "ROWS", "COLUMNS"))
    p.add_argument("--threads", type=int, required=True)
    p.add_argument("--sync", action="store_true", help="fsync what was written")
    return p.parse_args()


def state(matrices, rows, columns, fill):
    """Weights and norms with two moments each, in FP32."""
    shapes = {}
    for layer in range(matrices):
        shapes[f"layers.{layer}.linear.weight"] = (rows, columns)
        shapes[f"layers.{layer}.norm.weight"] = (columns,)
    return {prefix + name: fill(shape) for prefix in ("", "m/", "v/") for name, shape in shapes.items()}


def seconds(work):
    """What is not on disk yet must not slow what is measured."""
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    saved, other = state(*options.state, torch.randn), state(*options.state, torch.zeros)
    size = sum(t.numel() * t.element_size() for t in saved.values())
    times = {"save_s": [], "load_s": [], "stall_s": []}
    for number in range(options.rounds + 1):
        folder = options.folder / f"step-{number}"

        def writer(where):
            # As many threads as it may have: faster than the default of one.
            return dcp.FileSystemWriter(where, thread_count=options.threads, sync_files=options.sync)

        times["save_s"].append(seconds(lambda: dcp.save(saved, storage_writer=writer(folder))))
        pending = []
        stall = seconds(lambda: pending.append(dcp.async_save(saved, storage_writer=writer(options.folder / "async"))))
        pending[0].result()
        times["stall_s"].append(stall)
        times["load_s"].append(seconds(lambda: dcp.load(other, storage_reader=dcp.FileSystemReader(folder))))
        assert all(torch.equal(saved[name], other[name]) for name in saved), "loaded is not what was saved"
        for tensor in other.values():
            tensor.zero_()
        shutil.rmtree(folder)
        shutil.rmtree(options.folder / "async")
    # The first round warms up.
    emit(dict(bytes=size, **{name: statistics.median(list_[1:]) for name, list_ in times.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
