"""The most likely ways to end a line of Python: a tree search over the embedded model, by ``Engine.fork``.

    python docs/examples/tree_search.py

Branch and bound. A branch is a request that follows the most likely token. At every token it leaves the other
candidates behind, in a heap by the log-probability of the text up to and with them; the best one becomes the next
branch. It shares the KV blocks of its parent instead of computing them again or, if that has ended, finds them in the
prefix cache. Log-probabilities only fall, so whatever is below the worst of the lines to return cannot become one of
them: such branches are cut, and when nothing better is left in the heap the lines found are the most likely ones among
all that the candidates span.
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxpaged import Engine, RequestOutput, RequestOutputKind, SamplingParams
from jaxpaged.errors import UnknownRequestError
from jaxpaged.models import embedded_model_path

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self."


@dataclass(frozen=True, order=True)
class Candidate:
    """A branch that was not taken: ``tokens`` end with the token that leads away from ``parent``."""

    cost: float  # minus the log-probability of what comes after the prompt
    number: int
    parent: str = field(compare=False)
    tokens: tuple[int, ...] = field(compare=False)


@dataclass(frozen=True)
class Line:
    """A finished line and its log-probability."""

    logprob: float
    text: str
    tokens: tuple[int, ...]


class TreeSearch:
    """The ``num_lines`` most likely continuations of a prompt up to the end of the line.

    Args:
      engine: with a tokenizer.
      prompt: token ids.
      num_lines: how many lines to find.
      max_tokens: a line is cut after so many tokens.
      num_candidates: most likely tokens to consider at each place.
      max_branches: requests at one time.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        *,
        num_lines: int = 5,
        max_tokens: int = 12,
        num_candidates: int = 8,
        max_branches: int = 8,
    ) -> None:
        assert engine.tokenizer is not None, "lines need a tokenizer"
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.num_lines = num_lines
        self.max_tokens = max_tokens
        self.num_candidates = num_candidates
        self.max_branches = max_branches
        self.num_prompt_tokens = len(prompt)
        self.num_branches = 0
        self.num_forks = 0  # those that began with the blocks of a live parent
        self.lines: list[Line] = []  # best first
        self._numbers = itertools.count()
        self._heap = [Candidate(0.0, next(self._numbers), "", tuple(prompt))]
        # Live branches by name: all tokens so far, and minus their log-probability.
        self._branches: dict[str, tuple[tuple[int, ...], float]] = {}

    def run(self) -> list[Line]:
        """The lines, best first."""
        while self._heap or self._branches:
            while self._heap and len(self._branches) < self.max_branches:
                self._begin(heapq.heappop(self._heap))
            for output in self.engine.step():
                self._take(output)
        return self.lines

    @property
    def _bound(self) -> float:
        """What costs as much as this cannot be among the lines any more."""
        return -self.lines[-1].logprob if len(self.lines) == self.num_lines else float("inf")

    def _begin(self, candidate: Candidate) -> None:
        """A new branch, unless the candidate ends the line itself or came too late."""
        if candidate.cost >= self._bound:
            self._heap.clear()  # the others cost more
            return
        tokens = candidate.tokens
        num_left = self.max_tokens - (len(tokens) - self.num_prompt_tokens)
        if num_left == 0 or self._ends_line(tokens):
            self._finish(tokens, candidate.cost)
            return
        params = SamplingParams(
            temperature=0.0,
            max_tokens=num_left,
            stop="\n",
            logprobs=self.num_candidates,
            output_kind=RequestOutputKind.DELTA,
        )
        name = f"branch-{candidate.number}"
        self.num_branches += 1
        try:
            self.engine.fork(
                candidate.parent, name, at=len(tokens) - 1, append_token_ids=tokens[-1:], params=params
            )
            self.num_forks += 1
        except UnknownRequestError:  # the parent has ended
            self.engine.add_request(name, tokens, params)
        self._branches[name] = (tokens, candidate.cost)

    def _take(self, output: RequestOutput) -> None:
        """Follows a branch by the tokens it got, and notes what it passed by."""
        name, (completion,) = output.request_id, output.outputs
        if name not in self._branches:
            return  # it was cut
        tokens, cost = self._branches[name]
        for token, found in zip(completion.token_ids, completion.logprobs or (), strict=True):
            for other, candidate in found.items():
                other_cost = cost - candidate.logprob
                if other != token and other_cost < self._bound:
                    branch = Candidate(other_cost, next(self._numbers), name, (*tokens, other))
                    heapq.heappush(self._heap, branch)
            tokens, cost = (*tokens, token), cost - found[token].logprob
        self._branches[name] = (tokens, cost)
        if output.finished:
            del self._branches[name]
            self._finish(tokens, cost)
        elif cost >= self._bound:
            del self._branches[name]
            self.engine.abort_request(name)

    def _ends_line(self, tokens: Sequence[int]) -> bool:
        return "\n" in self.tokenizer.decode(tokens[self.num_prompt_tokens :])

    def _finish(self, tokens: tuple[int, ...], cost: float) -> None:
        own = tokens[self.num_prompt_tokens :]
        text = self.tokenizer.decode(own).partition("\n")[0]
        found = {line.text: line for line in [*self.lines, Line(-cost, text, own)]}
        for line in self.lines:  # a text can come of different tokens: its most likely ones count
            if line.logprob > found[line.text].logprob:
                found[line.text] = line
        self.lines = sorted(found.values(), key=lambda line: -line.logprob)[: self.num_lines]


def main() -> None:
    """Prints the lines that the embedded model finds most likely."""
    sizes = {"max_model_len": 256, "num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    with Engine(embedded_model_path(), **sizes) as engine:
        assert engine.tokenizer is not None
        search = TreeSearch(engine, engine.tokenizer.encode(PROMPT))
        for line in search.run():
            print(f"{line.logprob:7.2f}  {PROMPT.rpartition(chr(10))[2]}{line.text}")
        print(f"{search.num_branches} branches, {search.num_forks} of them forks of live ones")
        print(f"{engine.stats().num_tokens} tokens computed, {engine.stats().blocks_copied} blocks copied")


if __name__ == "__main__":
    main()
