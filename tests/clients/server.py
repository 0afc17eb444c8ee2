"""One ``jaxpaged serve`` for all clients: the embedded model, small sizes, a key."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

from jaxpaged.models import embedded_model_path
from tests.clients.served import Served
from tests.support.repository import ROOT

KEY = "key-of-the-client-tests"
MODEL = "embedded"
NUM_SEQS, QUEUE_LENGTH, MODEL_LEN = 8, 64, 512
SIZES = {
    "--max-num-seqs": NUM_SEQS,
    "--max-num-batched-tokens": 256,
    "--num-scheduler-steps": 1,
    "--max-model-len": MODEL_LEN,
    "--max-queue-length": QUEUE_LENGTH,
}
START_TIMEOUT = 900.0  # seconds; programs that are not cached yet are compiled
STOP_TIMEOUT = 60.0
LISTENING = re.compile(r"^listening at (http://\S+)$", re.MULTILINE)


class ServerProcess:
    """A server in a process of its own, whose log is a file in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "server.log"
        self.scores = folder / "engine_scores.json"
        keys = folder / "keys.txt"
        keys.write_text(KEY, encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "jaxpaged.serve",
            "serve",
            "--port",
            "0",
            "--api-key-file",
            str(keys),
        ]
        for name, value in SIZES.items():
            command += [name, str(value)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_until_ready(self) -> Served:
        """Returns once ``/health`` answers 200; RuntimeError with the log when that does not come."""
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end and self.process.poll() is None:
            found = LISTENING.search(self._text())
            if found is not None:
                served = self._served(found.group(1))
                try:
                    served.get("/health")
                except urllib.error.HTTPError as answer:  # 503: it compiles
                    answer.close()
                else:
                    return served
            time.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{self._text()}")

    def _served(self, url: str) -> Served:
        folder = os.fspath(embedded_model_path())
        return Served(url, KEY, MODEL, folder, NUM_SEQS + QUEUE_LENGTH, MODEL_LEN, os.fspath(self.scores))

    def _text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def problems(self, served: Served) -> list[str]:
        """What is wrong with the server after all clients have left; ends it."""
        found = []
        try:
            served.wait_until_idle()
            served.get("/health")
            metrics = served.metrics()
            if metrics["num_free_blocks"] != metrics["num_blocks"]:
                found.append("blocks of the KV pool are held by nobody")
        except (AssertionError, OSError) as error:
            found.append(f"{type(error).__name__}: {error}")
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_TIMEOUT)
            if status not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
                found.append(f"it exited with status {status}")
        except subprocess.TimeoutExpired:
            found.append("SIGTERM did not end it")
        if re.search(r"^(Traceback|ERROR)", self._text(), re.MULTILINE):
            found.append(f"its log has errors:\n{self._text()}")
        return found

    def kill(self) -> None:
        """Ends it at once, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
