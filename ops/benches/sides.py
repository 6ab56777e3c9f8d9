"""How each side is measured: ours through its own command line, PyTorch's through the scripts in peers/."""

import json
import os
import pathlib
import shutil
import statistics
import sys
import time

import machine

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE / "peers"))
from common import MODELS  # noqa: E402

RELEASE = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target") / "release"
CORPUS = ROOT / "ops" / "corpus" / "sotu.jsonl.zst"


class Peers:
    """PyTorch and the Python packages, in environments of their own."""

    def __init__(self, cache):
        self.cache = cache
        self.python = cache / "venv" / "bin" / "python"
        self.tokenizers = cache / "venv-tokenizers" / "bin" / "python"
        self.data = cache / "data"

    def prepare(self):
        peers = HERE / "peers"
        self.environment(self.python, ["-r", peers / "requirements.txt", "-c", peers / "constraints.txt"])
        self.environment(self.tokenizers, ["--no-deps", "-r", peers / "requirements-tokenizers.txt"])
        if not (self.data / "complete").is_file():
            machine.say("writing the data that loaders are measured on")
            machine.run([self.python, peers / "data.py", "--out", self.data, "--text", CORPUS])

    def environment(self, python, requirements):
        done = python.parent.parent / "complete"
        wanted = " ".join(pathlib.Path(str(r)).read_text() if str(r).endswith(".txt") else str(r) for r in requirements)
        if done.is_file() and done.read_text() == wanted:
            return
        machine.say(f"installing {python.parent.parent}")
        machine.run([sys.executable, "-m", "venv", "--clear", python.parent.parent])
        machine.run([python, "-m", "pip", "install", "--quiet", *requirements])
        done.write_text(wanted)

    def train(self, model, dtype, mode, compiled, steps, warmup, ranks=2, micro_batches=1):
        ranks, threads = (1, 2) if mode == "single" else (ranks, 1)
        command = [self.python.parent / "torchrun", "--standalone", "--nproc-per-node", str(ranks)]
        command += [HERE / "peers" / "train.py", "--mode", mode, "--model", model, "--dtype", dtype]
        command += ["--threads", str(threads), "--steps", str(steps), "--warmup", str(warmup)]
        command += ["--micro-batches", str(micro_batches)] + (["--compile"] if compiled else [])
        env = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        out, foreign = machine.run(command, env)
        return dict(machine.last_json(out), foreign_cores=foreign)

    def load(self, loader):
        out, foreign = machine.run([self.python, HERE / "peers" / "loader.py", loader, "--data", self.data], {"OMP_NUM_THREADS": "1"})
        return dict(machine.last_json(out), foreign_cores=foreign)

    def peak(self):
        """GFLOP/s of matrix products by precision."""
        out, _ = machine.run([self.python, HERE / "peers" / "peak.py"])
        return machine.last_json(out)

    def tokenize(self, tokenizer, text):
        out, foreign = machine.run([self.tokenizers, HERE / "peers" / "tokenizing.py", tokenizer, text])
        return dict(machine.last_json(out), foreign_cores=foreign)


class Ours:
    def __init__(self, work):
        self.work = work
        self.runs = work / "runs"
        self.phalanx = RELEASE / "phalanx"
        self.text = work / "text.jsonl"

    def prepare(self):
        machine.say("building")
        machine.run([HERE.parent / "setup"])
        packages = ["-p", "launcher", "-p", "trainer", "-p", "data-pipeline"]
        machine.run(["cargo", "build", "--release", "--bins", "--examples", *packages])
        if not self.text.is_file():
            out, _ = machine.run(["zstd", "-dcq", CORPUS])
            self.text.write_text(out)
        for vocab in sorted({m["vocab"] for m in MODELS.values()}):
            folder = self.work / f"data-{vocab}"
            if (folder / "complete").is_file():
                continue
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            tokenizer = folder / "tokenizer.json"
            machine.run([self.phalanx, "data", "train-tokenizer", "--vocab-size", str(vocab), "--out", tokenizer, self.text])
            machine.run([self.phalanx, "data", "tokenize", "--tokenizer", tokenizer, "--out", folder / "shards", self.text])
            (folder / "complete").touch()

    def config(self, model, dtype, ranks, threads, steps, parallelism="{}", micro_batch=None):
        """A run config of the same work as peers/train.py: no clipping, no validation, no checkpoint on the way."""
        m = MODELS[model]
        text = f"""name: bench
model: {{dim: {m['dim']}, layers: {m['layers']}, heads: {m['heads']}, kv_heads: {m['kv_heads']}, ffn_dim: {m['ffn']},
  vocab_size: {m['vocab']}, rope: {{theta: 500000.0}}, tied_embeddings: false}}
data:
  tokenizer: {self.work}/data-{m['vocab']}/tokenizer.json
  sources: [{{name: text, path: "{self.work}/data-{m['vocab']}/shards/*.parquet"}}]
  sequence_length: {m['seq']}
  document_mask: false
  validation_fraction: 0.0
parallelism: {parallelism}
precision: {{compute: {dtype}}}
training: {{steps: {steps}, global_batch: {m['global_batch']}, micro_batch: {micro_batch or m['global_batch'] // ranks}, clip_norm: null}}
schedule: {{kind: constant, warmup_steps: 0}}
validation: {{every_steps: 0}}
checkpoint: {{every_steps: 1000000, keep_last: 1}}
cluster: {{kind: local, ranks_per_node: {ranks}, threads_per_rank: {threads}, device: cpu}}
metrics: {{tensorboard: false}}
"""
        path = self.work / f"{model}-{dtype}-{ranks}.yaml"
        path.write_text(text)
        return path

    def train(self, model, dtype, mode, steps, warmup):
        if mode == "single":
            config = self.config(model, dtype, 1, 2, steps + warmup)
            command = [RELEASE / "phalanx-trainer", "bench", "train", "--config", config]
            out, foreign = machine.run([*command, "--steps", str(steps), "--warmup", str(warmup), "--json"])
            return dict(machine.last_json(out), foreign_cores=foreign)
        return self.run_ranks(self.config(model, dtype, 2, 1, steps + warmup), model, warmup)

    def train_parallel(self, model, dtype, form, ranks, micro_batches, steps, warmup):
        """A parallel form over all ranks, as peers/forms.py has it."""
        batch = MODELS[model]["global_batch"]
        parallelism, micro_batch = {
            "fsdp2": (f"{{shard: {{ranks: {ranks}, level: parameters, reshard_after_forward: true}}}}", batch // ranks),
            "tp": (f"{{tensor: {ranks}}}", batch),
            "pp": (f"{{pipeline: {{stages: {ranks}, schedule: 1f1b}}}}", batch // micro_batches),
        }[form]
        config = self.config(model, dtype, ranks, 1, steps + warmup, parallelism, micro_batch)
        return self.run_ranks(config, model, warmup)

    def run_ranks(self, config, model, warmup):
        """Two ranks through the whole path: launcher, ranks, loader, metrics."""
        shutil.rmtree(self.runs, ignore_errors=True)
        self.runs.mkdir()
        metrics = self.runs / "bench" / "metrics.jsonl"
        seen = {"first_step": None, "rss": 0.0, "sampled": 0.0}
        start = time.time()

        def watch(process):
            if seen["first_step"] is None and metrics.is_file() and metrics.stat().st_size > 0:
                seen["first_step"] = time.time()
            if time.time() - seen["sampled"] > 0.2:
                seen["sampled"] = time.time()
                ranks = [pid for pid, name in machine.descendants(process.pid) if name.startswith("phalanx-traine")]
                seen["rss"] = max([seen["rss"], *map(machine.peak_rss_mb, ranks)])

        _, foreign = machine.run([self.phalanx, "run", config, "--json"], {"PHALANX_RUNS": str(self.runs)}, watch)
        if seen["first_step"] is None:
            raise machine.Failed(f"{metrics} did not appear while the run lasted")
        times = [json.loads(line)["step_time_s"] for line in metrics.read_text().splitlines()][warmup:]
        median = statistics.median(times)
        tokens = MODELS[model]["seq"] * MODELS[model]["global_batch"]
        return dict(tokens_per_s=tokens / median, median_ms=median * 1e3, startup_s=seen["first_step"] - start,
                    peak_rss_mb=seen["rss"], foreign_cores=foreign)

    def load(self, data):
        out, foreign = machine.run([RELEASE / "examples" / "loader_bench", "--data", data / "parquet", "--json"])
        return dict(machine.last_json(out), foreign_cores=foreign)

    def tokenize(self, tokenizer):
        out, foreign = machine.run([RELEASE / "examples" / "tokenize_bench", tokenizer, self.text, "1"], {"RAYON_NUM_THREADS": "1"})
        return dict(machine.last_json(out), foreign_cores=foreign)
