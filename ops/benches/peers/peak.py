"""How fast this machine multiplies matrices, in GFLOP/s with two threads: what no training step can beat."""

import time

import common
import torch

SIZE, REPEATS = 2048, 5


def gflops(dtype):
    a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return round(2 * SIZE**3 / min(times) / 1e9, 1)


if __name__ == "__main__":
    torch.set_num_threads(2)
    common.emit({"fp32": gflops(torch.float32), "bf16": gflops(torch.bfloat16)})
