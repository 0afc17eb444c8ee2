"""The server that the checks talk to, and what it says about itself. Standard library only."""

import json
import os
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

VARIABLE = "JAXPAGED_SERVED"  # by which tests.clients.run tells the checks where the server is
PROMPT = "def main("
DEADLINE = 30.0
COUNTERS = ("request_success", "prompt_tokens", "generation_tokens")


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
      url: without a path, such as "http://127.0.0.1:8000".
      key: its only API key.
      model: the name of its model.
      folder: of the model's checkpoint.
      capacity: sequences that it takes at a time, those that wait included.
      max_model_len: tokens of a sequence.
      scores: file with what the engine itself says of the local tasks; only for the client that has them.
    """

    url: str
    key: str
    model: str
    folder: str
    capacity: int
    max_model_len: int
    scores: str

    @staticmethod
    def from_environment() -> "Served":
        """The server that ``tests.clients.run`` has started."""
        return Served(**json.loads(os.environ[VARIABLE]))

    def environment(self) -> dict[str, str]:
        """The variable by which a check finds the server."""
        return {VARIABLE: json.dumps(asdict(self))}

    @property
    def api(self) -> str:
        """What OpenAI's clients call the base URL."""
        return f"{self.url}/v1"

    def get(self, path: str) -> str:
        """The body of an answer with a status of success."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
            return answer.read().decode()

    def metrics(self) -> dict[str, float]:
        """All samples of ``/metrics`` by name, those of one name added up; the prefix is left out."""
        found: dict[str, float] = {}
        for line in self.get("/metrics").splitlines():
            if line.startswith("jaxpaged:"):
                sample, _, value = line.removeprefix("jaxpaged:").rpartition(" ")
                name = sample.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def counted_since(self, before: dict[str, float]) -> dict[str, float]:
        """How much the counters of requests and tokens have grown, once all that was asked has ended."""
        self.wait_until_idle()
        after = self.metrics()
        return {name: after[f"{name}_total"] - before[f"{name}_total"] for name in COUNTERS}

    def wait_until_idle(self) -> None:
        """Returns once no request is under way; fails when one stays."""
        wait_until(lambda: not sum(self.metrics()[f"num_requests_{kind}"] for kind in ("running", "waiting")))


def wait_until(holds: Callable[[], Any]) -> None:
    """Returns once something holds; fails when it never does."""
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end, f"not within {DEADLINE:g} seconds"
        time.sleep(0.05)
