"""A Ray cluster of this machine with the application on it, in a process of its own.

Ray reads its environment when it is imported, and warns of what it leaves running: neither belongs into the process
of the tests. Started as ``python -m tests.serve.ray_cluster OPTIONS`` it says ``@ready``, takes ``kill REPLICA`` on
standard input, answers ``@killed``, and shuts down at the end of its input.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tests.support.repository import ROOT

NAME = "jaxpaged"
START_TIMEOUT = 240.0
STOP_TIMEOUT = 60.0


class RayCluster:
    """The process, from the outside."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def expect(self, word: str) -> None:
        """Waits until the process says ``word``."""
        timer = threading.Timer(START_TIMEOUT, self._process.kill)
        timer.start()
        try:
            for line in _open(self._process.stdout):
                if line.strip() == f"@{word}":
                    return
        finally:
            timer.cancel()
        raise AssertionError(f"the cluster never said {word}:\n{self._log.read_text()[-4000:]}")

    def kill(self, replica: str) -> None:
        """Ends the process of a replica at once."""
        stdin = _open(self._process.stdin)
        stdin.write(f"kill {replica}\n")
        stdin.flush()
        self.expect("killed")


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None, "not a pipe"
    return stream


@contextlib.contextmanager
def ray_cluster(log: Path, **options: Any) -> Iterator[RayCluster]:
    """A cluster whose application has been told ``options``, those of ``deploy``."""
    environment = {
        **os.environ,
        # Ray's processes know each other by a token: one of this run, not the file in the home folder.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-m", "tests.serve.ray_cluster", json.dumps(options, default=str)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        cluster = RayCluster(process, log)
        cluster.expect("ready")
        yield cluster
    finally:
        with contextlib.suppress(BrokenPipeError):
            _open(process.stdin).close()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _open(process.stdout).close()


def main(options: dict[str, Any]) -> None:
    """Serves until the end of standard input."""
    import ray
    from ray import serve

    from jaxpaged.serve.ray_app import deploy

    memory = 128 * 2**20  # nothing large is passed; Ray would take a third of the machine's
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=memory)
    try:
        deploy(name=NAME, **options)
        print("@ready", flush=True)
        for line in sys.stdin:
            replica = line.split()[1]
            ray.kill(ray.get_actor(f"SERVE_REPLICA::{NAME}#Replica#{replica}", namespace="serve"))
            print("@killed", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
