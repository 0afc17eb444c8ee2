"""The example told in docs/architecture.md is what scheduler and batch builder really do."""

import re
from collections.abc import Iterator

from jaxpaged import SamplingParams
from jaxpaged.batch import BatchBuilder
from jaxpaged.block_space import BlockSpace
from jaxpaged.buckets import token_buckets
from jaxpaged.request import Request
from jaxpaged.scheduler import ScheduledStep, Scheduler
from tests.support.repository import ROOT

BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_SEQS, BUDGET = 4, 8, 4, 12
SHOWN_BUFFER = ("token_ids", "positions", "rows", "slots", "query_start_loc", "seq_lens", "sample_at")


class Story:
    """Three requests in a pool of seven blocks; the tokens that a model would sample are made up."""

    def __init__(self) -> None:
        self.space = BlockSpace(NUM_BLOCKS, BLOCK_SIZE)
        self.scheduler = Scheduler(self.space, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=BUDGET)
        self.builder = BatchBuilder(
            buckets=token_buckets(BUDGET, MAX_NUM_SEQS),
            max_num_seqs=MAX_NUM_SEQS,
            table_width=4,
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
        )
        self.owners: dict[int, tuple[Request, int]] = {}
        self.names: dict[Request, str] = {}
        common = list(range(10, 18))
        a = self.request("A", [*common, 18, 19], 6)
        b = self.request("B", [*common, 28, 29, 30], 3)
        first, second = (self.request("C", [40, 41, 42, 43, 44, 45], 4, index) for index in (0, 1))
        first.forks = [second]
        for request in (a, b, first):
            self.scheduler.add(request)

    def request(self, name: str, prompt: list[int], max_tokens: int, index: int = 0) -> Request:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        request = Request(name, prompt, params, block_size=BLOCK_SIZE, max_tokens=max_tokens, index=index)
        self.names[request] = f"C{index}" if name == "C" else name
        return request

    def sample(self, request: Request) -> int:
        """A made-up token that tells whose it is and which: A0 is 100, A1 is 101; C1's first is 400."""
        order = ("A", "B", "C0", "C1")
        return 100 * (1 + order.index(self.names[request])) + request.num_output_tokens

    def steps(self) -> Iterator[str]:
        """One block of text for each step until nothing is left."""
        number = 0
        while self.scheduler.has_unfinished:
            number += 1
            step = self.scheduler.schedule()
            yield "\n".join(self.step(number, step))
            self.scheduler.check_invariants()

    def step(self, number: int, step: ScheduledStep) -> Iterator[str]:
        for request in step.rewritten:
            self.builder.rewrite_row(request.row)
        for request, _ in step.rows:
            owner = (request, request.num_preemptions)
            if self.owners.get(request.row) != owner:
                self.owners[request.row] = owner
                self.builder.clear_row(request.row)
        bucket, buffer = self.builder.build(step)
        layout = self.builder.layout(bucket)
        yield f"step {number}: {step.num_tokens} tokens, bucket T={bucket} B={layout.num_rows}"
        for request in step.preempted:
            yield f"  preempted  {self.names[request]}"
        for source, target in step.copies:
            yield f"  copy       block {source} -> {target}"
        for request, count in step.rows:
            done = request.num_computed_tokens
            positions = f"{done}" if count == 1 else f"{done}..{done + count - 1}"
            table = " ".join(map(str, request.table))
            yield f"  {self.names[request]:<3} row {request.row}  positions {positions:<6} table [{table}]"
        if number == 1:
            fields = layout.views(buffer)
            for name in SHOWN_BUFFER:
                yield f"  {name:<16} {' '.join(map(str, fields[name].reshape(-1)))}"
            for row in range(layout.num_rows):
                label = "block_tables" if row == 0 else ""
                yield f"  {label:<16} {' '.join(map(str, fields['block_tables'][0, row]))}"
            for request, _ in step.rows:
                digests = " ".join(digest.hex()[:8] for digest in request.block_hashes)
                yield f"  hashes of {self.names[request]:<6} {digests}"
        allocator, space = self.space.allocator, self.space
        live = [b for b in range(1, NUM_BLOCKS) if not allocator.is_free(b)]
        yield "  held       " + (" ".join(f"{b}x{allocator.count(b)}" for b in live))
        sampled = [self.sample(request) for request, _ in step.rows]
        advanced = self.scheduler.update(step, sampled)
        yield "  sampled    " + " ".join(
            f"{self.names[r]}:{r.token_ids[-1]}" + (" (done)" if r.status.is_finished else "")
            for r in advanced
        )
        free = [b for b in range(1, NUM_BLOCKS) if allocator.is_free(b)]
        yield (
            "  after      free "
            + (" ".join(map(str, free)) or "none")
            + ", findable "
            + " ".join(str(b) for b in range(1, NUM_BLOCKS) if b in space.cache)
        )


def test_the_example_is_what_happens() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = re.findall(r"^```text\n(step \d.*?)\n```", text, re.DOTALL | re.MULTILINE)
    assert told == list(Story().steps())
