"""The workloads and the checkpoints every speed figure of this project is taken with.

Everything here is a pure function of a seed, so that a figure can be taken again on another machine:

* ``W1``: 64 requests, prompts of 16..512 tokens, outputs of 16..256 tokens, both uniform;
* ``W2``: one request, 128 prompt tokens and 128 output tokens;
* ``W3``: 32 requests which share their first 512 tokens, 32 own tokens each, 64 output tokens;
* ``warm``: three short requests, run before the clock starts.

Decoding is greedy and the end-of-sequence token is ignored, so each request yields exactly ``out`` tokens.

Checkpoints are Llama checkpoints in Hugging Face layout with random float32 weights. This module needs only
numpy and safetensors.

Command line: ``python benchmarks/workloads.py --size small --checkpoint DIR --workloads-json FILE``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WORKLOADS = ("W1", "W2", "W3")
VOCAB_SIZE = 4096
FIRST_TOKEN = 2  # tokens 0 and 1 are the beginning and the end of a sequence: no prompt holds them

SIZES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
    },
    "medium": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 2816,
    },
}


@dataclasses.dataclass(frozen=True)
class Request:
    """One request: the token ids of its prompt and the exact number of tokens to generate."""

    prompt: tuple[int, ...]
    out: int


def make_workloads(seed: int = 0) -> dict[str, list[Request]]:
    """Return ``W1``, ``W2``, ``W3`` and ``warm`` for a seed.

    One generator is drawn from in this order, so a change of one workload would change all that follow it.
    """
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randint(FIRST_TOKEN, VOCAB_SIZE - 1) for _ in range(count))

    lengths = [(rng.randint(16, 512), rng.randint(16, 256)) for _ in range(64)]
    mixed = [Request(tokens(prompt), out) for prompt, out in lengths]
    single = [Request(tokens(128), 128)]
    prefix = tokens(512)
    shared = [Request(prefix + tokens(32), 64) for _ in range(32)]
    warm = [Request(tokens(count), 8) for count in (16, 100, 300)]
    return {"W1": mixed, "W2": single, "W3": shared, "warm": warm}


def write_workloads(path: str | Path, seed: int = 0) -> Path:
    """Write the workloads as JSON, the form in which the peers' own interpreters read them."""
    path = Path(path)
    data = {
        name: [{"prompt": list(request.prompt), "out": request.out} for request in requests]
        for name, requests in make_workloads(seed).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def read_workloads(path: str | Path) -> dict[str, list[Request]]:
    """Read what :func:`write_workloads` wrote."""
    data = json.loads(Path(path).read_text())
    return {
        name: [Request(tuple(r["prompt"]), r["out"]) for r in requests] for name, requests in data.items()
    }


def make_config(size: str) -> dict[str, object]:
    """Return the ``config.json`` of the checkpoint called ``size``."""
    dims = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dims,
        "head_dim": dims["hidden_size"] // dims["num_attention_heads"],
        "vocab_size": VOCAB_SIZE,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _shapes(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of each tensor, in the order in which they are drawn."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_dim = config["num_attention_heads"] * config["head_dim"]
    kv_dim = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (q_dim, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv_dim, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv_dim, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, q_dim)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def make_weights(config: dict[str, object], seed: int = 0) -> dict[str, np.ndarray]:
    """Draw the weights: normal, norms one, and scaled so that greedy decoding stays lively.

    A matrix is scaled by the inverse root of its input width: each layer then changes the residual stream by
    about as much as the stream holds, so the next token depends on the whole context and greedy decoding does
    not soon repeat itself.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in _shapes(config):
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
            continue
        scale = 1.0 if name == "model.embed_tokens.weight" else shape[1] ** -0.5
        weights[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
    return weights


def make_checkpoint(size: str, path: str | Path, seed: int = 0) -> Path:
    """Write a random Llama checkpoint (``config.json`` and ``model.safetensors``); a finished one is kept."""
    from safetensors.numpy import save_file

    path = Path(path)
    config = make_config(size)
    done = path / "config.json"
    stamp = {"size": size, "seed": seed, "recipe": 1}
    if done.exists() and json.loads(done.read_text()).get("benchmark_checkpoint") == stamp:
        return path
    path.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    save_file(make_weights(config, seed), path / "model.safetensors", metadata={"format": "pt"})
    done.write_text(
        json.dumps({**config, "benchmark_checkpoint": stamp}, indent=1)
    )  # last: marks it finished
    return path


def main() -> None:
    """Write a checkpoint and the workloads."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--checkpoint", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--workloads-json", type=Path, help="file to write the workloads to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.checkpoint:
        print(make_checkpoint(args.size, args.checkpoint, args.seed))
    if args.workloads_json:
        print(write_workloads(args.workloads_json, args.seed))


if __name__ == "__main__":
    main()
