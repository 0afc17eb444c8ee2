"""What serving costs: a workload through the HTTP server, streamed by its clients, beside the same engine offline.

    python benchmarks/serving.py --size small --workload W1 --repeats 5 --out serving.json

Both sides run on the same cores, in turns (A B A B ...), each in a process that lives through all of them:
``offline`` is ``Engine.generate`` of the whole workload; ``server`` is ``jaxpaged serve`` with ``jaxpaged bench serve``
beside it, one streaming connection a request, all sent at once. Server, clients and kernel share the cores, as they do
when one machine does it all. Neither has a prefix cache: one run would find what the last has left. Prints medians,
their ratio, and the CPU time of the server's event loop for each chunk: all that the loop's thread did from the first
connection to the last byte, parsing of requests included (Linux's schedstat).
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

if __package__:
    from benchmarks.workloads import make_checkpoint, write_workloads
else:
    from workloads import make_checkpoint, write_workloads

from jaxpaged.models import embedded_model_path
from jaxpaged.serve.environment import environment

START_SECONDS = 900


class Offline:
    """The engine in a process of its own, which runs the workload whenever it is told to."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: Path, workloads: Path) -> None:
        command = [sys.executable, __file__, "--offline", str(checkpoint), str(workloads), arguments.workload]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None, "piped"
        return self._process.stdout.readline()

    def run(self) -> dict[str, Any]:
        """Figures of one pass."""
        assert self._process.stdin is not None, "piped"
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)


def run_offline(checkpoint: str, workloads: str, name: str) -> None:
    """The other end of ``Offline``."""
    from jaxpaged import Engine, SamplingParams

    items = json.loads(Path(workloads).read_text())[name]
    params = [SamplingParams(temperature=0.0, max_tokens=item["out"], ignore_eos=True) for item in items]
    with Engine(checkpoint, warmup=True, enable_prefix_caching=False) as engine:
        print("ready", flush=True)
        for _ in sys.stdin:
            begun = time.perf_counter()
            outputs = engine.generate([item["prompt"] for item in items], params)
            seconds = time.perf_counter() - begun
            num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            print(json.dumps({"seconds": seconds, "tokens": num_tokens}), flush=True)


class Served:
    """``jaxpaged serve`` in a process of its own."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: Path, workloads: Path) -> None:
        self._workloads, self._name = workloads, arguments.workload
        command = [sys.executable, "-m", "jaxpaged.serve", "serve", str(checkpoint), "--port", "0"]
        command += ["--no-prefix-caching", *arguments.server_option]
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(command, stderr=self._log)
        port = self._wait_for(r"listening at http://127.0.0.1:(\d+)")
        self._url = f"http://127.0.0.1:{port}"
        self._wait_for(r"(ready) after")

    def _wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + START_SECONDS
        while (found := re.search(pattern, Path(self._log.name).read_text())) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {Path(self._log.name).read_text()}")
            time.sleep(0.05)
        return found[1]

    def _loop_seconds(self) -> float:
        """CPU time of the main thread, which runs the event loop."""
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9

    def run(self) -> dict[str, Any]:
        """Figures of one pass."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "figures.json"
            command = [sys.executable, "-m", "jaxpaged.serve", "bench", "serve", str(self._workloads)]
            command += [
                "-w",
                self._name,
                "--base-url",
                self._url,
                "--json",
                str(target),
                "--num-warmups",
                "0",
            ]
            before = self._loop_seconds()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            spent = self._loop_seconds() - before
            found = json.loads(target.read_text())
            return {"loop_seconds": spent, "result": found["result"], "client": found["client"]}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()


def main() -> None:
    """Prints one table, writes one JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="small", choices=("small", "medium"))
    parser.add_argument("--workload", default="W1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--server-option", action="append", default=[], help="option of jaxpaged serve; repeatable"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(arguments.size, Path(folder) / arguments.size)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # of the same number of tokens
            shutil.copy(embedded_model_path() / name, checkpoint)
        workloads = write_workloads(Path(folder) / "workloads.json")
        with (
            Offline(arguments, checkpoint, workloads) as offline,
            Served(arguments, checkpoint, workloads) as served,
        ):
            sides = [(offline.run(), served.run()) for _ in range(arguments.repeats + 1)][1:]
    record = {
        "command": " ".join(["python", "benchmarks/serving.py", *sys.argv[1:]]),
        **environment(),
        "cores_of_both": len(os.sched_getaffinity(0)),
        "offline": [offline for offline, _ in sides],
        "server": [served for _, served in sides],
    }
    record["median"] = summary(sides)
    print(table(record["median"]))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def summary(sides: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, float]:
    """Medians over the repeats; the ratio is that of neighbouring runs."""
    found = []
    for offline, served in sides:
        result, client = served["result"], served["client"]
        assert result["failed"] == 0, "requests failed"
        assert result["output_tokens"] == offline["tokens"], "the two sides did not do the same"
        rates = offline["tokens"] / offline["seconds"], result["output_tokens_per_second"]
        found.append(
            {
                "offline_tokens_per_second": rates[0],
                "server_tokens_per_second": rates[1],
                "ratio": rates[1] / rates[0],
                "tokens_per_chunk": result["tokens_per_chunk"],
                "loop_microseconds_per_chunk": 1e6 * served["loop_seconds"] / client["chunks"],
                "client_microseconds_per_chunk": 1e6 * client["cpu_per_chunk"],
            }
        )
    return {name: statistics.median(entry[name] for entry in found) for name in found[0]}


def table(median: dict[str, float]) -> str:
    """The medians, a line each."""
    return "\n".join(f"{name.replace('_', ' '):<32}{value:>10.2f}" for name, value in median.items())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--offline"]:
        run_offline(*sys.argv[2:5])
    else:
        main()
