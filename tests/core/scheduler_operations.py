"""What users and accidents do to a scheduler, one random operation at a time.

Every operation takes a ``World`` and a ``random.Random``: ``test_scheduler_machine`` passes one of hypothesis, which
shrinks what it drew, ``benchmarks/scheduler_soak.py`` one with a seed.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from jaxpaged.prefix_cache import block_hashes, group_key
from jaxpaged.request import Request, RequestStatus
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.scheduler import ScheduledStep
from jaxpaged.step_plan import MoveKind
from tests.core.pool_model import make_request
from tests.core.scheduler_settings import TENANTS
from tests.core.scheduler_world import EOS, VOCAB, World

KINDS = ("plain", "plain", "plain", "stops", "salted", "all_logits", "on_host", "single_steps", "text_stops")


def make(
    world: World, prompt: list[int], kind: str, rng: Random, salt: str | None, tenant: str
) -> list[Request]:
    """The completions of a new request, with whatever it may ask for; it fits the pool alone."""
    n, now = rng.choice([1, 1, 1, 2, 3]), world.clock.now
    max_tokens = max(m for m in range(1, rng.randint(1, 9) + 1) if fits(world, len(prompt), m))
    requests = make_request(
        str(len(world.generations)),
        prompt,
        block_size=world.space.block_size,
        max_tokens=max_tokens,
        n=n,
        salt=salt,
        eos=frozenset({EOS} if kind == "stops" else ()),
        params=SamplingParams(
            n=n,
            temperature=1.0,
            max_tokens=max_tokens,
            prompt_logprobs=0 if kind == "all_logits" else None,
        ),
        num_tables=len(world.space.windows),
        priority=rng.randrange(3),
        tenant=tenant,
        deadline=rng.choice([None, None, None, now + rng.randint(0, 30)]),
        queue_deadline=rng.choice([None, None, None, now + rng.randint(0, 10)]),
    )
    for request in requests:
        request.arrival_time = now
        request.needs_tokens_on_host = kind == "on_host"
        request.needs_single_steps = kind in ("on_host", "single_steps")
        request.needs_all_logits &= request.index == 0
        if kind == "text_stops":
            world.stopped_by_text.add(request)
    return requests


def fits(world: World, num_prompt_tokens: int, max_tokens: int) -> bool:
    """Whether the engine would take such a request. The last sampled token is never computed."""
    chunk = world.scheduler.max_num_batched_tokens
    needed = world.space.peak_blocks(num_prompt_tokens + max_tokens - 1, chunk)
    return needed <= world.space.allocator.num_usable


def tokens(rng: Random, *lengths: int) -> list[int]:
    """So many random ones."""
    return [rng.randrange(VOCAB) for _ in range(rng.choice(lengths))]


def add(world: World, rng: Random) -> None:
    """One to three new requests; their prompts often begin alike."""
    for _ in range(rng.randint(1, 3)):
        if len(world.live) >= world.settings.max_live:
            return
        stem, kind = rng.choice(world.stems), rng.choice(KINDS)
        prompt = stem[: len(stem) - rng.choice([0, 0, 0, 1, 3])] + tokens(rng, 0, 0, 1, 3) or [0]
        while not fits(world, len(prompt), 1):
            prompt.pop()
        tenant = rng.choice(TENANTS) if world.settings.has_tenants else ""
        requests = make(world, prompt, kind, rng, "x" if kind == "salted" else None, tenant)
        world.scheduler.add(requests[0])
        world.came(requests)
        world.counts["requests"] += 1


def fork(world: World, rng: Random) -> None:
    """Branches any live request, in any state, at any of its tokens."""
    with_blocks = [request for request in world.live if request.holds_blocks]
    parents = rng.choice([with_blocks, list(world.live)]) or list(world.live)
    if not parents:
        return
    parent = rng.choice(parents)
    prompt = parent.token_ids[: rng.randint(1, parent.num_tokens)] + tokens(rng, 0, 0, 1, 2)
    if not fits(world, len(prompt), 1):
        return
    requests = make(world, prompt, rng.choice(KINDS), rng, parent.cache_salt, parent.tenant)
    child = requests[0]
    world.scheduler.fork(parent, child)
    assert child.num_computed_tokens < child.num_tokens, "nothing is left to compute"
    world.plans.note_forks()
    world.came(requests)
    world.counts["forks that share" if child.holds_blocks else "forks that share nothing"] += 1


def step(world: World, rng: Random) -> None:
    """One step or several."""
    for index in range(rng.choice([1, 1, 2, 3, 8])):
        if index:
            world.check()
        world.step(rng)


def finish_one(world: World, rng: Random) -> None:
    """Any request in any state: running, waiting, preempted, or a fork whose prompt is not computed."""
    if world.live:
        status = rng.choice([RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_STOPPED])
        world.finish(rng.choice(list(world.live)), status)


def abort(world: World, rng: Random) -> None:
    """All completions of a request."""
    if world.live:
        world.end_generation(rng.choice(list(world.live)).request_id, RequestStatus.FINISHED_ABORTED)


def tick(world: World, rng: Random) -> None:
    """Time passes."""
    world.clock.now += rng.choice([1, 3, 10])


def fail(world: World, rng: Random) -> None:
    """A step raises while it is built, while blocks are moved, or while it runs; or somebody interrupts it."""
    planned = world.plan()
    if not planned.rows:
        world.pool.move(planned.moves)
        return
    states = ["untouched", "moved", "written", "lost", "loads lost", "interrupted"]
    state = rng.choice(states + ["the one before as well"] * bool(world.launched))
    world.counts[f"failures: {state}"] += 1
    if state == "moved":
        world.pool.move(planned.moves)
    if state == "written":
        world.pool.run(planned, lambda: rng.randrange(VOCAB))
    if state == "the one before as well":
        before, _ = world.launched.popleft()
        world.fail(before)
        world.start_over()
    if state != "interrupted":
        world.collect(0)  # what is under way was there before, and is good
        names = world.fail(with_lost_blocks(planned, rng) if state == "loads lost" else planned)
        end_siblings(world, names, rng)
    if state in ("lost", "loads lost", "interrupted"):
        world.start_over()


def with_lost_blocks(planned: ScheduledStep, rng: Random) -> ScheduledStep:
    """The part of a step whose requests need blocks that did not come back from the host."""
    lost = {move.target for move in planned.moves if move.kind is MoveKind.SWAP_IN and rng.randrange(2)}
    rows = [row for row in planned.rows if any(not lost.isdisjoint(table.ids) for table in row[0].tables)]
    return replace(planned, rows=rows)


def end_siblings(world: World, names: list[str], rng: Random) -> None:
    """The engine ends all completions with one; for the scheduler, they may outlive each other."""
    if rng.randrange(2):
        for name in names:
            world.end_generation(name, RequestStatus.FINISHED_ERROR)


def fail_late(world: World, rng: Random) -> None:
    """The error of a step shows when its tokens are collected, or somebody interrupts that."""
    if not world.launched:
        return
    state = rng.choice(["readable", "lost", "interrupted"])
    world.counts[f"late failures: {state}"] += 1
    launched, columns = world.launched.popleft()
    if state == "interrupted":
        for column in columns[: rng.randint(0, len(columns))]:
            world.take(launched, column)
    else:
        end_siblings(world, world.fail(launched), rng)
    if state != "readable":
        world.start_over()


def pin(world: World, rng: Random) -> None:
    """Pins a prefix, or another one under a name in use."""
    stem, name, salt = rng.choice(world.stems), rng.choice("pqr"), rng.choice([None, None, "x"])
    hashes = block_hashes(stem[: rng.randint(1, len(stem))], world.space.block_size, salt=salt)
    keys = [group_key(digest, group) for digest in hashes for group in range(len(world.space.windows))]
    pins, cache = world.space.pins, world.space.cache
    limit = world.space.allocator.num_usable // 2
    if not world.space.enable_prefix_caching or not pins.has_room(name, keys, limit):
        return
    expires = rng.choice([None, world.clock.now + rng.randint(0, 20)])
    assert pins.add(name, keys, expires) == sum(cache.get(key) is not None for key in keys)
    assert pins.num_keys <= limit, "the pins take more than they may"
    world.pins[name] = expires
    world.counts["pins"] += 1


def unpin(world: World, rng: Random) -> None:
    """Ends a pin; it may have expired or given way."""
    name = rng.choice("pqr")
    assert world.space.pins.remove(name) <= (name in world.pins)
    world.pins.pop(name, None)


def observe(world: World, rng: Random) -> None:
    """What steps and transfers take changes, and with it the choice between recomputing and swapping."""
    cost = world.scheduler.preemption.cost
    assert cost is not None
    cost.observe_step(rng.randint(1, 100), rng.choice([0.01, 1.0, 100.0]))
    cost.observe_transfer(rng.randint(1, 1000), rng.choice([0.01, 1.0, 100.0]))


Operation = Callable[[World, Random], None]
# How often each is chosen when somebody chooses at random.
OPERATIONS: dict[Operation, int] = {
    add: 12,
    step: 24,
    fork: 8,
    finish_one: 3,
    abort: 2,
    tick: 3,
    fail: 1,
    fail_late: 1,
    pin: 4,
    unpin: 1,
    observe: 1,
}
