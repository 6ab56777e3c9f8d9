#!/usr/bin/env python3
"""Make numerical references for the parity test from transformers' LlamaForCausalLM.

    pip install -r requirements.txt
    python make_cases.py                         # the cases that live beside this script
    python make_cases.py --out DIR NAME...       # some of them, elsewhere

One folder per case:
  config.json, model.safetensors   the model in Hugging Face's format, FP32 weights
  inputs.safetensors               tokens [steps, B, S + 1] int64 (step i reads
                                   x = tokens[i, :, :-1] and predicts y = tokens[i, :, 1:]);
                                   loss_mask [B, S] for batch 0
  ref_fp32.safetensors, ref_fp64.safetensors
                                   of batch 0: logits, cos and sin, hidden.N (the residual stream
                                   that enters layer N; hidden.last: after the final norm),
                                   grad.NAME (FP64: of small tensors only)
  ref.json                         for fp32 and fp64: loss, loss_masked, gradient norms, and the
                                   losses of AdamW steps without (losses) and with clipping
                                   (losses_clip1); bf16_autocast_losses; meta (optimizer,
                                   versions, sizes)

The loss is the mean cross-entropy over all positions (masked: over those whose mask is 1). AdamW
decays every tensor, norms included. In the FP64 reference everything is FP64 but RoPE's
frequencies, which stay the FP32-rounded ones that transformers computes.
"""

import argparse
import contextlib
import json
import pathlib

import safetensors.torch
import torch
import transformers
import transformers.models.llama.modeling_llama as llama

STEPS, BATCH, SEQUENCE, SEED = 20, 2, 24, 20240
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP_NORM = 1.0
SMALL_GRADIENT = 1024  # elements; larger gradients are left out of the FP64 file
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
COMMON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 128, "initializer_range": 0.06}
CASES = {
    "gqa_llama3_tied": {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_SCALING,
        "tie_word_embeddings": True,
    },
    # Sizes that no power of two divides, and a head_dim that is not hidden_size / heads.
    "headdim_mqa": {
        "hidden_size": 36,
        "head_dim": 14,
        "intermediate_size": 75,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "vocab_size": 101,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}


def cross_entropy(logits, targets, mask=None):
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    if mask is None:
        return losses.mean()
    return (losses * mask.flatten()).sum() / mask.sum()


@contextlib.contextmanager
def everything_in_fp64():
    """transformers forces FP32 inside norms, rotary tables and softmax: replace those three."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self, x, position_ids):
        angles = position_ids[..., None].to(torch.float64) * self.inv_freq.to(torch.float64)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **unused):
        key = llama.repeat_kv(key, module.num_key_value_groups)
        value = llama.repeat_kv(value, module.num_key_value_groups)
        future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        scores = (query @ key.mT * scaling).masked_fill(future, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    places = [
        (llama.LlamaRMSNorm, "forward", norm),
        (llama.LlamaRotaryEmbedding, "forward", rotary),
        (llama, "eager_attention_forward", attention),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, replacement in places:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def make_model(case, weights=None, dtype=torch.float32, attention="eager"):
    config = transformers.LlamaConfig(
        **COMMON, **case, use_cache=False, attn_implementation=attention
    )
    config.architectures = ["LlamaForCausalLM"]
    model = transformers.LlamaForCausalLM(config)
    if weights is not None:
        model.load_state_dict(weights)
        model.tie_weights()
    # inv_freq is a buffer: it is computed in FP32 and only widened here.
    return model.to(dtype)


def train(model, tokens, clip_norm=None, autocast=False):
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses, norms = [], []
    for step_tokens in tokens:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=step_tokens[:, :-1]).logits
        loss = cross_entropy(logits.float() if autocast else logits, step_tokens[:, 1:])
        loss.backward()
        if clip_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def weight_norms(model):
    return {name: weight.detach().norm().item() for name, weight in model.named_parameters()}


def reference(case, weights, tokens, mask, dtype):
    """The contents of ref_<dtype>.safetensors, and the dtype's section of ref.json."""
    model = make_model(case, weights, dtype)
    x, y = tokens[0, :, :-1], tokens[0, :, 1:]
    out = model(input_ids=x, output_hidden_states=True)
    loss = cross_entropy(out.logits, y)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}

    positions = torch.arange(x.shape[1])[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=dtype), positions)
    tensors = {"logits": out.logits, "cos": cos[0], "sin": sin[0]}
    for layer, hidden in enumerate(out.hidden_states[:-1]):
        tensors[f"hidden.{layer}"] = hidden
    tensors["hidden.last"] = out.hidden_states[-1]
    for name, gradient in gradients.items():
        if dtype == torch.float32 or gradient.numel() <= SMALL_GRADIENT:
            tensors[f"grad.{name}"] = gradient

    section = {
        "loss": loss.item(),
        "loss_masked": cross_entropy(out.logits, y, mask.to(dtype)).item(),
        "grad_norm": torch.tensor(list(norms.values()), dtype=torch.float64).norm().item(),
        "grad_norms": norms,
    }
    for key, clip_norm in (("losses", None), ("losses_clip1", CLIP_NORM)):
        model = make_model(case, weights, dtype)
        section[key], before_clipping = train(model, tokens, clip_norm)
        section[f"{key}_final_weight_norms"] = weight_norms(model)
        if clip_norm is not None:
            section["grad_norms_clip1"] = before_clipping
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, section


def learnable_tokens(vocab_size, generator):
    """The next token is three times the one before plus a little noise: the loss can fall."""
    tokens = torch.empty(STEPS, BATCH, SEQUENCE + 1, dtype=torch.int64)
    tokens[..., 0] = torch.randint(vocab_size, (STEPS, BATCH), generator=generator)
    for i in range(SEQUENCE):
        noise = torch.randint(3, (STEPS, BATCH), generator=generator)
        tokens[..., i + 1] = (3 * tokens[..., i] + noise) % vocab_size
    return tokens


def make_case(name, folder):
    case = CASES[name]
    torch.manual_seed(SEED)
    model = make_model(case)
    with torch.no_grad():  # norm weights of exactly 1 would hide errors
        for parameter_name, weight in model.named_parameters():
            if "norm" in parameter_name:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    generator = torch.Generator().manual_seed(SEED + 1)
    tokens = learnable_tokens(case["vocab_size"], generator)
    mask = (torch.rand(BATCH, SEQUENCE, generator=generator) < 0.7).float()
    inputs = {"tokens": tokens, "loss_mask": mask}
    safetensors.torch.save_file(inputs, folder / "inputs.safetensors")

    result = {}
    tensors, result["fp32"] = reference(case, weights, tokens, mask, torch.float32)
    safetensors.torch.save_file(tensors, folder / "ref_fp32.safetensors")
    with everything_in_fp64():
        tensors, result["fp64"] = reference(case, weights, tokens, mask, torch.float64)
    safetensors.torch.save_file(tensors, folder / "ref_fp64.safetensors")
    autocast = make_model(case, weights, attention="sdpa")
    result["bf16_autocast_losses"], _ = train(autocast, tokens, autocast=True)
    result["meta"] = {
        "variant": name,
        "seed": SEED,
        "batch": BATCH,
        "seq": SEQUENCE,
        "steps": STEPS,
        "optimizer": {**ADAMW, "betas": list(ADAMW["betas"])},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "n_params": sum(weight.numel() for weight in model.parameters()),
    }
    (folder / "ref.json").write_text(json.dumps(result, indent=1) + "\n")
    first, last = result["fp64"]["losses"][0], result["fp64"]["losses"][-1]
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size} bytes, loss {first:.4f} -> {last:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("names", nargs="*", default=list(CASES), help="cases (default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in arguments.names:
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        make_case(name, folder)


if __name__ == "__main__":
    main()
