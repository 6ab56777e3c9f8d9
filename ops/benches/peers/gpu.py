#!/usr/bin/env python3
"""Trains transformers' LlamaForCausalLM on one GPU in plain PyTorch, and prints one JSON line about it.

Started by ../../gpu-bench. FP32 weights, gradients and AdamW (fused), BF16 autocast, gradients clipped: as ours. With
`--device cpu` it tries itself.
"""

import argparse
import json
import os
import statistics
import time


def parse():
    p = argparse.ArgumentParser()
    p.add_argument("--work", required=True, help="the sizes, as JSON")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--steps", type=int, default=10)
    return p.parse_args()


def main():
    a = parse()
    m = json.loads(a.work)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=m["dim"], intermediate_size=m["ffn"], num_hidden_layers=m["layers"], num_attention_heads=m["heads"],
        num_key_value_heads=m["kv_heads"], head_dim=m["head_dim"], vocab_size=m["vocab"], rope_theta=500000.0,
        max_position_embeddings=max(2048, m["sequence"]), rms_norm_eps=1e-5, tie_word_embeddings=m["tied"], use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(a.device):
        model = LlamaForCausalLM(config)
    model.train()
    run = torch.compile(model) if a.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    rows = m["micro_batch"] * m["micro_batches"]
    data = torch.randint(0, m["vocab"], (4, rows, m["sequence"] + 1), generator=generator)
    on_gpu = a.device == "cuda"
    if on_gpu:
        data = data.pin_memory()

    def step(index):
        optimizer.zero_grad(set_to_none=True)
        total = 0
        for tokens in data[index % 4].split(m["micro_batch"]):
            tokens = tokens.to(a.device, non_blocking=True)
            with torch.autocast(a.device, torch.bfloat16):
                logits = run(input_ids=tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            (loss / m["micro_batches"]).backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total / m["micro_batches"]

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    losses = [float(step(0))]
    wait()
    startup_s = time.time() - float(os.environ["BENCH_T0"])
    for index in range(1, a.warmup):
        step(index)
    wait()
    times = []
    for index in range(a.steps):
        start = time.perf_counter()
        loss = step(a.warmup + index)
        wait()
        times.append(time.perf_counter() - start)
    losses.append(float(loss))
    median = statistics.median(times)
    print(json.dumps(dict(
        tokens_per_s=rows * m["sequence"] / median, median_ms=median * 1e3, startup_s=startup_s, losses=losses,
        memory_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None, torch=torch.__version__,
    )), flush=True)


if __name__ == "__main__":
    main()
