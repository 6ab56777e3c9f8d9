"""Makes the files of this folder with PyTorch and transformers: one small model in Meta's layout (in one file and in two), and the
same in Hugging Face's, with the q and k rows reordered by the formula of transformers' own conversion script.

Run: python3 make.py (torch 2.11, transformers 4.57, safetensors 0.6).
"""

import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

DIM, HEADS, KV, LAYERS, FFN, VOCAB = 16, 4, 2, 1, 48, 32
HERE = pathlib.Path(__file__).parent


def meta_weights():
    torch.manual_seed(0)

    def new(*shape):
        return torch.randn(*shape).to(torch.bfloat16)

    weights = {"tok_embeddings.weight": new(VOCAB, DIM)}
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        weights[at + "attention.wq.weight"] = new(DIM, DIM)
        weights[at + "attention.wk.weight"] = new(DIM // HEADS * KV, DIM)
        weights[at + "attention.wv.weight"] = new(DIM // HEADS * KV, DIM)
        weights[at + "attention.wo.weight"] = new(DIM, DIM)
        weights[at + "feed_forward.w1.weight"] = new(FFN, DIM)
        weights[at + "feed_forward.w3.weight"] = new(FFN, DIM)
        weights[at + "feed_forward.w2.weight"] = new(DIM, FFN)
        weights[at + "attention_norm.weight"] = new(DIM)
        weights[at + "ffn_norm.weight"] = new(DIM)
    weights["norm.weight"] = new(DIM)
    weights["output.weight"] = new(VOCAB, DIM)
    return weights


def permute(weight, heads):
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def hf_weights(meta):
    names = {
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    out = {
        "model.embed_tokens.weight": meta["tok_embeddings.weight"],
        "model.norm.weight": meta["norm.weight"],
        "lm_head.weight": meta["output.weight"],
    }
    for layer in range(LAYERS):
        at, to = f"layers.{layer}.", f"model.layers.{layer}."
        out[to + "self_attn.q_proj.weight"] = permute(meta[at + "attention.wq.weight"], HEADS)
        out[to + "self_attn.k_proj.weight"] = permute(meta[at + "attention.wk.weight"], KV)
        for old, new in names.items():
            out[to + new + ".weight"] = meta[at + old + ".weight"]
    return {name: weight.contiguous() for name, weight in out.items()}


def shard(name, weight, rank, count):
    if weight.dim() == 1:
        return weight
    dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
    return weight.chunk(count, dim)[rank].clone()


def main():
    meta = meta_weights()
    params = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV, "vocab_size": VOCAB}
    params |= {"multiple_of": 8, "ffn_dim_multiplier": 1.1, "norm_eps": 1e-05, "rope_theta": 500000.0}
    for folder, count in (("one", 1), ("two", 2)):
        path = HERE / folder
        path.mkdir(exist_ok=True)
        (path / "params.json").write_text(json.dumps(params) + "\n")
        for rank in range(count):
            part = {name: shard(name, weight, rank, count) for name, weight in meta.items()}
            # As in the releases: a table that the model recomputes.
            part["rope.freqs"] = torch.arange(2, dtype=torch.bfloat16)
            torch.save(part, path / f"consolidated.{rank:02d}.pth")
    path = HERE / "hf"
    path.mkdir(exist_ok=True)
    save_file(hf_weights(meta), path / "model.safetensors", metadata={"format": "pt"})
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV, rope_theta=500000.0, rms_norm_eps=1e-05, max_position_embeddings=128, torch_dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    (path / "config.json").write_text(config.to_json_string(use_diff=False))


if __name__ == "__main__":
    main()
