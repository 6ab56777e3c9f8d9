"""PyTorch's own parallel forms for transformers' LlamaForCausalLM: FSDP2, DTensor tensor parallelism, and pipelining.

Each builder returns the module that owns this rank's parameters and a function that does one step's passes, whose argument
is the global batch (tokens, targets) and whose result is the loss (0 where this rank does not see it).
"""


def cross_entropy(logits, targets):
    import torch.nn.functional as F

    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1))


def fsdp2(model, m, rank, world, _micro_batches):
    """A unit per decoder layer, resharded after the forward pass (the default)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rows = m["global_batch"] // world

    def passes(tokens, targets):
        own = slice(rank * rows, (rank + 1) * rows)
        loss = cross_entropy(model(input_ids=tokens[own]).logits, targets[own])
        loss.backward()
        return float(loss.detach())

    return model, passes


def tp(model, m, rank, world, _micro_batches):
    """Column and row splits, a vocabulary-parallel embedding, output head and loss."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for column in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{column}"] = ColwiseParallel()
    for row in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{row}"] = RowwiseParallel()
    parallelize_module(model, init_device_mesh("cpu", (world,)), plan)

    def passes(tokens, targets):
        with loss_parallel():
            loss = cross_entropy(model(input_ids=tokens).logits, targets)
            loss.backward()
        return float(loss.detach().full_tensor())

    return model, passes


def pp(model, m, rank, world, micro_batches):
    """1F1B over stages of equally many layers."""
    import torch
    from torch import nn
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    layers = m["layers"] // world
    is_first, is_last = rank == 0, rank == world - 1

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = model.model.embed_tokens if is_first else None
            self.layers = nn.ModuleList(model.model.layers[rank * layers:(rank + 1) * layers])
            self.rotary = model.model.rotary_emb
            self.norm, self.head = (model.model.norm, model.lm_head) if is_last else (None, None)

        def forward(self, x):
            x = self.embedding(x) if is_first else x
            positions = torch.arange(x.shape[1])[None]
            rotary = self.rotary(x, positions)
            for layer in self.layers:
                out = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
                x = out[0] if isinstance(out, tuple) else out
            return self.head(self.norm(x)) if is_last else x

    part = Part()
    stage = PipelineStage(part, rank, world, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=micro_batches, loss_fn=cross_entropy)

    def passes(tokens, targets):
        losses = []
        if is_first:
            schedule.step(tokens)
        elif is_last:
            schedule.step(target=targets, losses=losses)
        else:
            schedule.step()
        return float(torch.stack([loss.detach() for loss in losses]).mean()) if losses else 0.0

    return part, passes


FORMS = {"fsdp2": fsdp2, "tp": tp, "pp": pp}
