"""What both sides of the comparison share: the model sizes, and how a process looks at itself."""

import json
import os
import time

# The sizes at which both sides are measured; ../compare writes our run configs out of them.
MODELS = {
    "debug": dict(dim=256, layers=6, heads=8, kv_heads=4, ffn=688, vocab=2048, seq=256, global_batch=8),
    # For the parallel forms: layers, both kinds of heads, batch and all widths divide by 8 ranks.
    "parallel": dict(dim=256, layers=8, heads=8, kv_heads=8, ffn=688, vocab=2048, seq=256, global_batch=8),
    "small": dict(dim=512, layers=8, heads=8, kv_heads=4, ffn=1408, vocab=32000, seq=512, global_batch=4),
}


def n_params(m):
    head_dim = m["dim"] // m["heads"]
    layer = m["dim"] * head_dim * (2 * m["heads"] + 2 * m["kv_heads"]) + 3 * m["dim"] * m["ffn"] + 2 * m["dim"]
    return m["layers"] * layer + m["dim"] + m["vocab"] * m["dim"] * 2


def matrix_flops(m):
    """Operations of a step's matrix products but attention's: 2 a weight and token forward, 4 backward."""
    weights = n_params(m) - m["vocab"] * m["dim"]  # the embedding is looked up
    return 6 * weights * m["seq"] * m["global_batch"]


def t0():
    """The time at which the driver started the command."""
    return float(os.environ["BENCH_T0"])


def peak_rss_mb():
    with open("/proc/self/status") as f:
        kib = next(int(line.split()[1]) for line in f if line.startswith("VmHWM:"))
    return round(kib / 1024, 1)


def cpu_s():
    times = os.times()
    return times.user + times.system


def emit(measurement):
    print(json.dumps(measurement), flush=True)
