"""What requests hold of the KV memory, told in small stories; the machines have the invariants."""

from jaxpaged.block_space import BlockSpace
from jaxpaged.request import Request
from tests.core.pool_model import make_request


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
