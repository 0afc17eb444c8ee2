"""Corpus, tokenizer, packing, baseline and training loop of the embedded model, on tiny inputs."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.models import ModelConfig, load_model
from jaxpaged.models.decoder import attend_causally
from jaxpaged.models.embedded import train as training
from jaxpaged.models.embedded.bpe import BOUNDARY, VOCAB_SIZE, encode_all, train_tokenizer
from jaxpaged.models.embedded.chunked_attention import CHUNK, attend_in_chunks
from jaxpaged.models.embedded.corpus import load_corpus
from jaxpaged.models.embedded.evaluate import complete, model_nats, plot_losses
from jaxpaged.models.embedded.export import export
from jaxpaged.models.embedded.ngram import KneserNey
from jaxpaged.models.embedded.packing import batches
from jaxpaged.models.parameters import split_parameters
from jaxpaged.pallas_kernels import AttentionVariant
from tests.models.golden import golden

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    sliding_windows=(None,),
    tie_word_embeddings=True,
)
RECIPE = training.Recipe(
    steps=8,
    batch_tokens=64,
    length=16,
    long_length=32,
    long_share=0.25,
    warmup_steps=2,
    report_every=2,
    evaluate_every=4,
    probe_tokens=64,
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A small library: idiomatic files, tests, and what must be left out."""
    root = tmp_path / "library"
    for name in ("site-packages/a.py", "encodings/b.py", "notes.txt", "latin.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes("# caf\u00e9\n".encode("latin-1"))
    for i in range(300):
        (root / f"module_{i}.py").write_text(f"def function_{i}():\n    return {i}\n")
        (root / "test").mkdir(exist_ok=True)
        (root / "test" / f"test_{i}.py").write_text(f"def test_{i}():\n    assert {i} == {i}\n")
    (root / "copy.py").write_text((root / "module_0.py").read_text())
    (root / "empty.py").write_text("\n")
    return root


def test_the_corpus_is_split_without_overlap(sources: Path) -> None:
    corpus = load_corpus(sources)
    everything = corpus.train + corpus.held_out
    assert load_corpus(sources) == corpus
    assert len({document.text for document in everything}) == len(everything)
    assert {"latin.py", "empty.py", "site-packages/a.py", "encodings/b.py"}.isdisjoint(
        document.path for document in everything
    )
    assert 0.01 < len(corpus.held_out) / len(everything) < 0.12
    tests = sum(len(document.text) for document in everything if document.path.startswith("test"))
    assert 0.35 < tests / sum(len(document.text) for document in everything) <= 0.4


def test_the_tokenizer_returns_every_text(sources: Path) -> None:
    tokenizer = train_tokenizer(document.text for document in load_corpus(sources).train)
    text = "def f(x):\n\tif x:\n\n        return 'na\u00efve \u4f60\u597d' + 12345  # \U0001f600\r\n"
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id(BOUNDARY) == 0
    assert tokenizer.decode(ids) == text
    assert [a.tolist() for a in encode_all(tokenizer, [text, ""])] == [ids, [0]]


def test_an_epoch_of_batches_has_every_token_once() -> None:
    documents = [np.arange(10 * i, 10 * i + 10, dtype=np.uint16) for i in range(13)]
    epoch = [
        batch for batch, _ in zip(batches(documents, num_tokens=32, length=8, seed=3), range(4), strict=False)
    ]
    again = next(batches(documents, num_tokens=32, length=8, seed=3))
    assert epoch[0].shape == (4, 9)
    assert epoch[0].dtype == np.int32
    np.testing.assert_array_equal(epoch[0], again)
    counts = Counter(np.concatenate([batch[:, :-1].ravel() for batch in epoch]).tolist())
    assert set(counts.values()) == {1}
    assert len(counts) == 128


@pytest.mark.parametrize("num_tokens", [1, CHUNK, 2 * CHUNK + 5])
def test_chunked_attention_equals_the_dense_one(num_tokens: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, num_tokens, h, 8)) for key, h in zip(keys, (4, 2, 2), strict=True))

    def run(attend: Any) -> tuple[jax.Array, Any]:
        def total(*qkv: jax.Array) -> jax.Array:
            return jnp.sin(attend(*qkv, None, 0, AttentionVariant())[0]).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), run(attend_in_chunks), run(attend_causally)
    )
    with pytest.raises(NotImplementedError, match="sliding_window=3"):
        attend_in_chunks(q, k, v, None, 0, AttentionVariant(sliding_window=3))


def test_kneser_ney_is_a_distribution() -> None:
    stream = np.random.default_rng(0).integers(0, 5, 200)
    model = KneserNey(stream, order=3, vocab_size=7)
    for context in ([1, 2], [6, 6], [4, 6]):  # seen, unseen, unseen
        probs = [np.exp(model.log_probs(np.array([*context, token]))[-1]) for token in range(7)]
        assert math.isclose(sum(probs), 1.0, rel_tol=1e-9)
        assert min(probs) > 0


def test_kneser_ney_by_hand() -> None:
    """Bigrams of 0 1 0 2 0 1: counts 01:2 10:1 02:1 20:1; discount 3 / (3 + 2)."""
    model = KneserNey(np.array([0, 1, 0, 2, 0, 1]), order=2, vocab_size=3)
    discount, unigram_discount = 3 / 5, 2 / 4  # bigram counts 1, 1, 1, 2; continuation counts 2, 1, 1
    lower = (1 - unigram_discount + unigram_discount * 3 / 3) / 4
    expected = (2 - discount + discount * 2 * lower) / 3
    assert math.isclose(np.exp(model.log_probs(np.array([0, 1]))[0]), expected, rel_tol=1e-12)


def test_kneser_ney_refuses_keys_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="order=6 with vocab_size=4096"):
        KneserNey(np.zeros(10, np.int64), order=6, vocab_size=4096)


def test_held_out_nats_do_not_depend_on_the_windows() -> None:
    """With a context longer than the text, overlapping windows and one pass agree."""
    model = load_model(golden("llama2").folder)
    stream = golden("llama2").tokens
    log_probs = jax.nn.log_softmax(model(jnp.asarray(stream[:-1])))
    expected = -np.take_along_axis(np.asarray(log_probs), stream[1:, None], axis=1).sum()
    assert math.isclose(model_nats(model, stream, window=64), expected, rel_tol=1e-5)
    assert math.isclose(model_nats(model, stream, window=16), expected, rel_tol=0.2)
    assert model_nats(model, stream[:1], window=16) == 0.0


def documents() -> list[np.ndarray]:
    return [np.arange(i, i + 40, dtype=np.uint16) for i in range(0, 400, 40)]


def weights(model: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in split_parameters(model)[0].items()}


def test_training_learns_and_an_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    whole.mkdir()
    interrupted.mkdir()
    expected = weights(training.train(TINY, RECIPE, documents(), documents(), whole))
    report = training._report

    def stop_at_step_6(path: Path, entry: dict[str, Any]) -> None:
        report(path, entry)
        if entry["step"] == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_report", stop_at_step_6)
    with pytest.raises(KeyboardInterrupt):
        training.train(TINY, RECIPE, documents(), documents(), interrupted)
    monkeypatch.undo()
    model = training.train(TINY, RECIPE, documents(), documents(), interrupted)
    for path, array in weights(model).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    log = (whole / "train.jsonl").read_text().splitlines()
    assert len(log) == 4
    plot_losses(whole / "train.jsonl", whole / "loss.png")
    assert (whole / "loss.png").stat().st_size > 1000


def test_an_exported_model_loads_and_completes(tmp_path: Path, sources: Path) -> None:
    tokenizer = train_tokenizer(document.text for document in load_corpus(sources).train)
    recipe = training.Recipe(steps=0)
    (tmp_path / "run").mkdir()
    model = training.train(TINY, recipe, documents(), documents() * 50, tmp_path / "run")
    export(model, tokenizer.to_str(), tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == TINY
    assert len(complete(loaded, tokenizer, ["def ", "\n"], max_tokens=3)) == 2
