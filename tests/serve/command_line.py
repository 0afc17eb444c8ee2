"""Runs commands in this process on a tiny checkpoint, with sizes that compile few and small programs."""

import json
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from typer.testing import CliRunner, Result

from jaxpaged.models import Decoder, ModelConfig, save_model
from jaxpaged.serve.app import app
from tests.text.tokenizers_made_here import byte_level_backend

VOCAB_SIZE = 352
SMALL = ("--num-blocks=120", "--max-num-seqs=4", "--max-num-batched-tokens=32", "--block-size=8")
WIDTH = 80


def make_checkpoint(folder: Path, *, chat_template: str | None = None) -> Path:
    """A Llama of one layer with random weights, and a byte-level tokenizer."""
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        sliding_windows=(None,),
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_ids=(1,),
    )
    save_model(Decoder(config, rngs=nnx.Rngs(0)), folder, dtype=jnp.float32)
    byte_level_backend().save(str(folder / "tokenizer.json"))
    text = {"bos_token": "<s>", "eos_token": "</s>"}
    if chat_template is not None:
        text["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(text))
    return folder


def run(*arguments: object, stdin: str | None = None) -> Result:
    """The result of ``jaxpaged ARGUMENTS``; standard output and error apart, neither a terminal."""
    environment = {"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH)}
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin, env=environment)


def run_small(command: str, checkpoint: Path, *arguments: object, stdin: str | None = None) -> Result:
    """A command that must succeed, on the tiny checkpoint."""
    result = run(*command.split(), *arguments, "--model", checkpoint, *SMALL, stdin=stdin)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output, "an escape sequence without a terminal"
    return result
