"""How many blocks the pool gets, on a device whose memory is known (a stand-in: no GPU is needed)."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxpaged.assembly import _new_state, assemble, kv_layout
from jaxpaged.config import EngineConfig
from jaxpaged.kv_layout import KVLayout
from jaxpaged.memory import available_bytes, bytes_per_block, num_blocks_for, step_bytes, tree_bytes
from jaxpaged.models import Decoder, split_parameters
from jaxpaged.program import Programs
from tests.engine.tiny import tiny_decoder

MIB = 2**20


class Gpu:
    """What the sizing asks of a device."""

    platform = "gpu"

    def __init__(self, limit: int, in_use: int = 0) -> None:
        self._stats = {"bytes_limit": limit, "bytes_in_use": in_use}

    def memory_stats(self) -> dict[str, int]:
        return self._stats


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_decoder()


def config_for(**arguments: object) -> EngineConfig:
    given = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 32}
    return EngineConfig.resolve(given | arguments, platform="gpu", max_position_embeddings=256)


def layout_for(model: Decoder, config: EngineConfig) -> KVLayout:
    return kv_layout(model.config, config, None)


def test_share_of_the_limit_less_what_is_in_use_and_reserved() -> None:
    config = config_for(gpu_memory_utilization=0.5)
    assert available_bytes(config, Gpu(100 * MIB), 10 * MIB, 5 * MIB) == 35 * MIB
    # What somebody else holds counts, not only our own weights.
    assert available_bytes(config, Gpu(100 * MIB, in_use=30 * MIB), 10 * MIB, 5 * MIB) == 15 * MIB
    assert available_bytes(config, Gpu(10 * MIB), 10 * MIB, 5 * MIB) == 0


def test_no_more_blocks_than_the_engine_can_use(model: Decoder) -> None:
    config = config_for()
    assert num_blocks_for(model.config, config, layout_for(model, config), Gpu(2**34), 0, 0) == 4 * 4 + 1


def test_as_many_blocks_as_fit(model: Decoder) -> None:
    config = config_for(max_num_seqs=32, gpu_memory_utilization=1.0)
    layout = layout_for(model, config)
    size = bytes_per_block(model.config, config, layout)
    assert num_blocks_for(model.config, config, layout, Gpu(40 * size + size // 2), 0, 0) == 40


def test_too_small_a_pool_says_what_to_change(model: Decoder) -> None:
    config = config_for(gpu_memory_utilization=0.25)
    layout = layout_for(model, config)
    device = Gpu(4 * bytes_per_block(model.config, config, layout))
    with pytest.raises(MemoryError, match=r"max_model_len=64 needs 5; .*gpu_memory_utilization=0.25"):
        num_blocks_for(model.config, config, layout, device, 0, 0)


def test_device_without_statistics_asks_for_num_blocks(model: Decoder) -> None:
    silent = Gpu(0)
    silent.memory_stats = dict  # type: ignore[method-assign]
    with pytest.raises(MemoryError, match="set num_blocks"):
        num_blocks_for(model.config, config_for(), layout_for(model, config_for()), silent, 0, 0)


def test_largest_step_is_reserved(model: Decoder) -> None:
    weights, merge = split_parameters(model)
    layout = layout_for(model, config_for())
    functions = Programs(merge, layout, None, "xla", 5, "raw_logprobs")
    found = []
    for tokens in (32, 128):
        config = config_for(max_num_batched_tokens=tokens)
        new_state = partial(_new_state, model.config, config, layout)
        found.append(step_bytes(functions, weights, (), config, new_state))
    hidden = 128 * model.config.hidden_size * jnp.dtype("float32").itemsize
    assert 0 < found[0] < found[1]
    assert found[1] > hidden


def test_engine_parts_on_a_device_with_little_memory(model: Decoder) -> None:
    config = config_for(max_num_seqs=32, max_num_batched_tokens=32, attention="xla")
    weights, merge = split_parameters(model)
    layout = layout_for(model, config)
    functions = Programs(merge, layout, None, "xla", config.max_logprobs, config.logprobs_mode)
    new_state = partial(_new_state, model.config, config, layout)
    sampler = tree_bytes(jax.eval_shape(lambda: new_state(2)).sampler)
    step = step_bytes(functions, weights, (), config, new_state)
    reserved = sampler + step
    room = 50 * bytes_per_block(model.config, config, layout)
    device = Gpu(int((tree_bytes(weights) + reserved + room) / 0.9) + 1)
    core = assemble(model, config, None, device)
    num_blocks = core.scheduler.space.num_blocks
    assert num_blocks == core.runner.state.pool.num_blocks
    assert num_blocks in (49, 50)  # XLA's account differs by some bytes from one compilation to the next
    report = core.memory
    assert (report.weights, report.sampler) == (tree_bytes(weights), sampler)
    assert report.step is not None
    assert abs(report.step - step) < report.block
    assert report.pool == num_blocks * report.block == tree_bytes(core.runner.state.pool)
    # Together they are the share of the limit that was asked for, but for less than a block.
    assert report.limit is not None
    used = report.weights + report.step + report.sampler + report.pool
    assert 0 <= int(0.9 * report.limit) - used < 2 * report.block
