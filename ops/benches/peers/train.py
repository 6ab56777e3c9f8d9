#!/usr/bin/env python3
"""Trains transformers' LlamaForCausalLM with plain PyTorch on the CPU, and prints one JSON line about it.

Started by ../compare, under torchrun. dtype bf16 is FP32 weights and AdamW with bf16 autocast, as ours.
"""

import argparse
import contextlib
import os
import statistics
import time

import common
import forms


def parse():
    p = argparse.ArgumentParser()
    p.add_argument("--mode", choices=["single", "ddp", *forms.FORMS], default="single")
    p.add_argument("--model", choices=list(common.MODELS), default="debug")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--micro-batches", type=int, default=1, help="of pp")
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--compile", action="store_true", help="torch.compile the decoder layers")
    p.add_argument("--full-compile", action="store_true", help="torch.compile the whole model")
    return p.parse_args()


def build(a, m):
    """The model, checked for its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=m["dim"], intermediate_size=m["ffn"], num_hidden_layers=m["layers"],
        num_attention_heads=m["heads"], num_key_value_heads=m["kv_heads"], vocab_size=m["vocab"],
        max_position_embeddings=max(2048, m["seq"]), rope_theta=500000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.train()
    found = sum(p.numel() for p in model.parameters())
    if found != common.n_params(m):
        raise SystemExit(f"the model has {found} parameters, expected {common.n_params(m)}")
    if a.compile:
        for layer in model.model.layers:
            layer.compile()
    return model


def parts(a, m, rank, world):
    """What owns the parameters, and the passes of a step: (tokens, targets) of the global batch -> loss."""
    import torch

    model = build(a, m)
    if a.mode in forms.FORMS:
        return forms.FORMS[a.mode](model, m, rank, world, a.micro_batches)
    run = torch.compile(model) if a.full_compile else model
    if a.mode == "ddp":
        run = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    amp = (lambda: torch.autocast("cpu", torch.bfloat16)) if a.dtype == "bf16" else contextlib.nullcontext
    rows = m["global_batch"] // world

    def passes(tokens, targets):
        own = slice(rank * rows, (rank + 1) * rows)
        with amp():
            logits = run(input_ids=tokens[own]).logits
        loss = forms.cross_entropy(logits, targets[own])
        loss.backward()
        return float(loss)

    return run, passes


def optimizer_of(run):
    """Fused AdamW; it refuses a group that mixes DTensors and plain tensors, so each kind has its own."""
    import torch
    from torch.distributed.tensor import DTensor

    kinds = {}
    for parameter in run.parameters():
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    groups = [{"params": parameters} for parameters in kinds.values()]
    return torch.optim.AdamW(groups, fused=True, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def main():
    a = parse()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if a.mode != "single":
        dist.init_process_group("gloo")
    m = common.MODELS[a.model]
    run, passes = parts(a, m, rank, world)
    optimizer = optimizer_of(run)

    # Every rank makes the same global batch and takes its rows.
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, m["vocab"], (16, m["global_batch"], m["seq"] + 1), generator=generator)

    def step(i):
        batch = data[i % 16]
        optimizer.zero_grad(set_to_none=True)
        loss = passes(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        optimizer.step()
        return loss

    losses = [step(0)]
    first_step_s = time.time() - common.t0()
    losses += [step(i) for i in range(1, max(1, a.warmup))]
    times = []
    for i in range(a.steps):
        if world > 1:
            dist.barrier()
        start = time.perf_counter()
        losses.append(step(a.warmup + i))
        if world > 1:
            dist.barrier()
        times.append(time.perf_counter() - start)

    mine = dict(peak_rss_mb=common.peak_rss_mb(), first_step_s=first_step_s)
    ranks = [mine]
    if world > 1:
        ranks = [None] * world
        dist.all_gather_object(ranks, mine)
    if rank == 0:
        median = statistics.median(times)
        tokens = m["seq"] * m["global_batch"]
        common.emit(dict(
            tokens_per_s=round(tokens / median, 1), median_ms=round(median * 1e3, 3), steps=len(times),
            startup_s=round(max(r["first_step_s"] for r in ranks), 3),
            peak_rss_mb=max(r["peak_rss_mb"] for r in ranks), loss_first=losses[0], loss_last=losses[-1],
        ))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
