"""Trains the embedded model: ``python -m jaxpaged.models.embedded.train --steps 3000 --out folder``.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; optax.contrib.muon) for the layers'
matrices, AdamW for the rest; linear warm-up, then linear decay to zero; float32; one device. The last steps
see longer rows, so that the model can use its whole context. Progress goes to ``train.jsonl`` in the output
folder; an interrupted run continues from ``state.npz`` when started again with the same arguments.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.embedded.bpe import VOCAB_SIZE, encode_all, train_tokenizer
from jaxpaged.models.embedded.chunked_attention import attend_in_chunks
from jaxpaged.models.embedded.corpus import load_corpus, standard_library
from jaxpaged.models.embedded.export import export
from jaxpaged.models.embedded.packing import batches
from jaxpaged.models.parameters import Parameters, split_parameters

logger = logging.getLogger(__name__)

Merge = Callable[[Mapping[str, jax.Array]], Decoder]

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=704,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    sliding_windows=(None,) * 6,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(0,),
)


@dataclass(frozen=True)
class Recipe:
    """What a run does; two runs of equal recipes on the same data and machine give the same weights."""

    steps: int
    seed: int = 0
    batch_tokens: int = 4096
    length: int = 512
    long_length: int = 2048
    long_share: float = 0.1  # of the steps, at the end
    warmup_steps: int = 60
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 0.003
    weight_decay: float = 0.1
    report_every: int = 20
    evaluate_every: int = 200
    probe_tokens: int = 16384  # held-out tokens of each evaluation


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon where a matrix maps activations to activations, AdamW for the embedding and the norms."""

    def schedule(peak: float) -> optax.Schedule:
        decay = max(recipe.steps - recipe.warmup_steps, 1)
        return optax.join_schedules(
            [optax.linear_schedule(0.0, peak, recipe.warmup_steps), optax.linear_schedule(peak, 0.0, decay)],
            [recipe.warmup_steps],
        )

    def dimension_numbers(params: Parameters) -> dict[str, Any]:
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
        return {path: matrix if path.endswith(".kernel") else None for path in params}

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule(recipe.muon_learning_rate),
            weight_decay=recipe.weight_decay,
            adam_b2=0.98,
            adam_learning_rate=schedule(recipe.adam_learning_rate),
            muon_weight_dimension_numbers=dimension_numbers,
        ),
    )


def mean_loss(model: Decoder, rows: jax.Array) -> jax.Array:
    """Mean negative log-likelihood in nats a token of rows int32 [B, T + 1]."""
    logits = model(rows[:, :-1], attend=attend_in_chunks)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def loss_and_gradients(merge: Merge, params: Parameters, rows: jax.Array) -> tuple[jax.Array, Parameters]:
    """``mean_loss`` and its gradient, one row at a time: on a CPU one row's activations stay in the cache."""

    def add_row(
        total: tuple[jax.Array, Parameters], row: jax.Array
    ) -> tuple[tuple[jax.Array, Parameters], None]:
        one = jax.value_and_grad(lambda p: mean_loss(merge(p), row[None]))(params)
        return jax.tree.map(jnp.add, total, one), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add_row, zero, rows)
    return jax.tree.map(lambda x: x / rows.shape[0], total)


def schedule_rows(documents: list[np.ndarray], recipe: Recipe) -> Iterator[np.ndarray]:
    """One batch a step: short rows first, long rows for the last ``long_share`` of the steps."""
    num_long = int(recipe.steps * recipe.long_share)
    short = batches(documents, num_tokens=recipe.batch_tokens, length=recipe.length, seed=recipe.seed)
    long = batches(documents, num_tokens=recipe.batch_tokens, length=recipe.long_length, seed=recipe.seed + 1)
    for step in range(recipe.steps):
        yield next(short if step < recipe.steps - num_long else long)


def train(
    config: ModelConfig,
    recipe: Recipe,
    documents: list[np.ndarray],
    held_out: list[np.ndarray],
    out: Path,
) -> Decoder:
    """Runs a recipe to its end, from ``out/state.npz`` when that exists, and returns the model."""
    params, merge = split_parameters(Decoder(config, rngs=nnx.Rngs(recipe.seed)))
    transform = optimizer(recipe)
    state = (params, transform.init(params))
    state, first = _resume(out / "state.npz", state)

    @jax.jit
    def evaluate(params: Parameters, rows: jax.Array) -> jax.Array:
        return jax.lax.map(lambda row: mean_loss(merge(params), row[None]), rows).mean()

    def step(state: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
        params, optimizer_state = state
        loss, gradients = loss_and_gradients(merge, params, rows)
        updates, optimizer_state = transform.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    step = jax.jit(step, donate_argnums=0)
    probe = next(batches(held_out, num_tokens=recipe.probe_tokens, length=recipe.length, seed=0))
    losses, started, tokens = [], time.monotonic(), 0
    for index, rows in enumerate(schedule_rows(documents, recipe)):
        if index < first:
            continue
        state, loss = step(state, rows)
        losses.append(loss)
        tokens += recipe.batch_tokens
        done = index + 1
        last = done == recipe.steps
        if done % recipe.report_every == 0 or last:
            entry = {"step": done, "loss": float(np.mean(losses)), "seconds": time.monotonic() - started}
            entry["tokens_per_second"] = tokens / entry["seconds"]
            losses = []
            if done % recipe.evaluate_every == 0 or last:
                entry["held_out_loss"] = float(evaluate(state[0], probe))
                _save(out / "state.npz", state, done)
            _report(out / "train.jsonl", entry)
    return merge(state[0])


def _report(path: Path, entry: dict[str, Any]) -> None:
    logger.info("%s", entry)
    with path.open("a") as file:
        file.write(json.dumps({k: round(v, 4) for k, v in entry.items()}) + "\n")


def _save(path: Path, state: Any, step: int) -> None:
    """Writes all leaves in tree order; the old file stays whole until the new one is."""
    leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    partial = path.with_name("partial.npz")
    np.savez(partial, allow_pickle=False, step=np.asarray(step), **leaves)
    partial.replace(path)


def _resume(path: Path, state: Any) -> tuple[Any, int]:
    if not path.exists():
        return state, 0
    leaves, treedef = jax.tree.flatten(state)
    with np.load(path, allow_pickle=False) as saved:
        leaves = [jnp.asarray(saved[f"leaf_{i}"]) for i in range(len(leaves))]
        return jax.tree.unflatten(treedef, leaves), int(saved["step"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for log, state and tokenizer")
    parser.add_argument(
        "--steps", type=int, required=True, help="optimiser steps; the schedule ends with them"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)

    corpus = load_corpus(standard_library())
    tokenizer = train_tokenizer(document.text for document in corpus.train)
    documents = encode_all(tokenizer, [document.text for document in corpus.train])
    held_out = encode_all(tokenizer, [document.text for document in corpus.held_out])
    for name, texts, ids in (("train", corpus.train, documents), ("held out", corpus.held_out, held_out)):
        num_bytes = sum(len(document.text.encode()) for document in texts)
        logger.info("%s: %d files, %d bytes, %d tokens", name, len(texts), num_bytes, sum(map(len, ids)))
    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)
    (arguments.out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    model = train(CONFIG, recipe, documents, held_out, arguments.out)
    export(model, tokenizer.to_str(), arguments.out / "model")


if __name__ == "__main__":
    main()
