"""Loading and saving: sources, dtypes, and every way in which a folder can be broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpaged.models import CheckpointError, UnsupportedModelError, load_config, load_model, save_model
from jaxpaged.models.parameters import split_parameters
from tests.models.golden import NAMES, golden

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a single-file float32 checkpoint."""
    return shutil.copytree(golden("llama2").folder, tmp_path / "model")


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def bits(array: np.ndarray) -> bytes:
    return np.asarray(array).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_keep_every_bit(name: str, tmp_path: Path) -> None:
    """load -> save -> load, in the dtype of the source; and the written tensors are those of the source."""
    model = load_model(golden(name).folder)
    save_model(model, tmp_path, dtype=model.dtype)
    before, after = (split_parameters(m)[0] for m in (model, load_model(tmp_path)))
    assert before.keys() == after.keys()
    assert all(bits(before[path]) == bits(after[path]) for path in before)
    written = load_file(tmp_path / "model.safetensors")
    for file in golden(name).folder.glob("model*.safetensors"):
        for tensor, content in load_file(file).items():
            assert bits(written.pop(tensor)) == bits(content)
    assert not written


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_cast_to_the_dtype_asked_for(dtype: str) -> None:
    for name in ("llama2", "llama3", "llama_linear"):  # stored as float32, bfloat16 and float16
        model = load_model(golden(name).folder, dtype=dtype)
        parameters, _ = split_parameters(model)
        assert {str(array.dtype) for array in parameters.values()} == {dtype}
        assert model.dtype == jnp.dtype(dtype)


def test_parameters_can_be_placed_by_the_caller() -> None:
    seen = {}

    def place(path: str, array: np.ndarray) -> Any:
        seen[path] = array.shape
        return jnp.asarray(array)

    model = load_model(golden("llama3").folder, place=place)
    assert seen == {path: array.shape for path, array in split_parameters(model)[0].items()}
    assert seen["layers.0.attn.qkv.kernel"] == (32, 2 * (2 + 2) * 16)


def test_the_generation_config_adds_end_of_sequence_ids(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_config(folder).eos_token_ids == (2, 7)
    (folder / "generation_config.json").unlink()
    assert load_config(folder).eos_token_ids == (2,)


def test_tensors_that_only_repeat_the_config_are_ignored(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    assert load_model(folder).config.num_layers == 2


def test_a_tied_model_ignores_a_stored_head(tmp_path: Path) -> None:
    tied = shutil.copytree(golden("qwen2").folder, tmp_path / "model")
    edit(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert load_model(tied).lm_head is None


def test_a_name_instead_of_a_folder_is_not_downloaded() -> None:
    for load in (load_config, load_model):
        with pytest.raises(
            CheckpointError, match=r"meta-llama/Llama-3\.1-8B is not a local folder.*downloaded"
        ):
            load("meta-llama/Llama-3.1-8B")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{folder}.*{file}"):
        load_model(folder)


def test_pickles_are_named_and_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin hold pickles"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_broken_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(folder)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file"):
        load_model(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded = shutil.copytree(golden("llama3").folder, tmp_path / "model")
    (sharded / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00004\.safetensors: no such file"):
        load_model(sharded)


@pytest.mark.parametrize(
    "weight_map", [None, {}, {"a": 1}, {"a": "../model.safetensors"}, {"a": "/etc/hosts"}]
)
def test_an_index_reaches_nothing_but_its_own_folder(tmp_path: Path, weight_map: Any) -> None:
    sharded = shutil.copytree(golden("llama3").folder, tmp_path / "model")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json.*weight_map"):
        load_model(sharded)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    sharded = shutil.copytree(golden("llama3").folder, tmp_path / "model")
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    with pytest.raises(CheckpointError, match=f"{second.name}: tensor {name} is also in .*{first.name}"):
        load_model(sharded)


def test_a_missing_tensor_is_named_with_its_shape(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(DOWN))
    with pytest.raises(CheckpointError, match=rf"{folder}.*missing 1 of 21 tensors: {DOWN} \[32, 48\]"):
        load_model(folder)


def test_an_extra_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.2.adapter": np.ones(3, np.float32)}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: 1 tensors.*model\.layers\.2\.adapter"):
        load_model(folder)


def test_a_wrong_shape_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({DOWN: tensors[DOWN].T.copy()}))
    with pytest.raises(CheckpointError, match=rf"{DOWN}: expected shape \[32, 48\], got \[48, 32\]"):
        load_model(folder)


@pytest.mark.parametrize(("dtype", "stored"), [(np.float64, "F64"), (np.int8, "I8")])
def test_a_wrong_dtype_is_named(folder: Path, dtype: Any, stored: str) -> None:
    edit(folder, lambda tensors: tensors.update({DOWN: tensors[DOWN].astype(dtype)}))
    with pytest.raises(CheckpointError, match=f"{DOWN}: expected dtype BF16 or F16 or F32, got {stored}"):
        load_model(folder)


def test_an_unknown_architecture_is_refused_before_the_weights_are_looked_at(folder: Path) -> None:
    edit_config(folder, architectures=["MambaForCausalLM"])
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UnsupportedModelError, match="'MambaForCausalLM' is not supported; known: LlamaForCausalLM"
    ):
        load_model(folder)


def test_another_dtype_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = load_model(golden("llama2").folder)
    with pytest.raises(ValueError, match="dtype=int8"):
        save_model(model, tmp_path / "model", dtype=jnp.int8)
    assert not (tmp_path / "model").exists()
