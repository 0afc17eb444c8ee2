"""What requests hold of the KV memory, told in small stories; the machines have the invariants."""

from jaxpaged.block_space import BlockSpace
from jaxpaged.host_tier import HostTier
from jaxpaged.request import Request
from jaxpaged.step_plan import Move, MoveKind
from tests.core.pool_model import make_request, make_scheduler


def request_of(space: BlockSpace, tokens: list[int], name: str = "r") -> Request:
    (request,) = make_request(name, tokens, block_size=space.block_size, num_tables=len(space.windows))
    return request


def compute(space: BlockSpace, request: Request, target: int) -> None:
    """What the scheduler does with a request that catches up to ``target``."""
    space.trim(request)
    assert space.blocks_to_grow(request, target) <= space.num_free
    space.grow(request, target)
    space.publish(request, target)
    request.num_computed_tokens = target


def entered(space: BlockSpace, tokens: list[int], name: str = "r") -> Request:
    request = request_of(space, tokens, name)
    space.enter(request, space.plan_entry(request))
    return request


def test_a_fork_left_alone_with_a_published_block_of_its_parents_writes_to_it_unseen() -> None:
    """The block is the child's own now, so no copy is needed, but what it will hold is not what its key says."""
    space = BlockSpace(8, 4)
    parent = entered(space, [1, 2, 3, 4, 5])
    compute(space, parent, 5)
    child = request_of(space, [1, 2, 9], "child")
    assert space.fork(parent, child, 2)
    space.release(parent)
    compute(space, child, 3)
    assert space.take_moves() == []
    assert child.table.ids == [1], "in place"
    assert space.plan_entry(request_of(space, [1, 2, 3, 4, 5])).num_computed_tokens == 0
    child.token_ids.append(8)
    compute(space, child, 4)
    assert space.plan_entry(request_of(space, [1, 2, 9, 8, 0])).num_computed_tokens == 4, "its own is found"


def test_what_is_swapped_out_is_what_the_window_reaches() -> None:
    """Were it more, a request might not fit again beside the step that it wants to make."""
    space = BlockSpace(20, 2, windows=(3,), host=HostTier(10))
    request = entered(space, list(range(12)))
    compute(space, request, 11)
    assert request.table.ids == [1, 2, 3, 4, 5, 6]
    assert space.swap_out(request)
    assert request.host_tables == [[-1, -1, -1, -1, 0, 1]], "positions 9 and 10, in two blocks"
    assert space.take_moves() == [Move(MoveKind.SWAP_OUT, 5, 0), Move(MoveKind.SWAP_OUT, 6, 1)]
    assert space.num_free == 19


def test_several_steps_at_a_time_give_back_what_lies_behind_the_window() -> None:
    """They pass every beginning of a block, where a step of one token looks."""
    scheduler = make_scheduler(num_blocks=40, block_size=2, windows=(3,), num_scheduler_steps=2)
    (request,) = make_request("r", [1, 2, 3], block_size=2, max_tokens=41)
    scheduler.add(request)
    scheduler.update(scheduler.schedule(), [7])
    for _ in range(15):
        step = scheduler.schedule()
        assert (step.num_steps, request.num_computed_tokens % 2) == (2, 1)
        assert sum(block > 0 for block in request.table) <= 4
        scheduler.advance(step)
        for _ in range(2):
            scheduler.collect(step, [7])
