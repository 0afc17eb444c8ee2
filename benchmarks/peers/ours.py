"""This project's engine, measured the way the peers are: one process, the engine's own defaults for a CPU."""

from __future__ import annotations

import dataclasses
import time

import _common

MAX_MODEL_LEN = 1024  # of all workloads, so that they share their compiled programs


class Ours:
    """Requests through ``add_request`` and ``step``, prefix caching in W3 only, as for the peers."""

    def __init__(self, args: _common.Arguments) -> None:
        import jaxpaged

        self.version = jaxpaged.__version__
        self._jaxpaged = jaxpaged
        self._steps: list[dict[str, float]] = []
        self.engine = jaxpaged.Engine(
            args.checkpoint,
            dtype=args.dtype,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=args.workload == "W3",
            warmup=True,
            # Programs are kept beside the checkpoint: only the first start of a checkpoint compiles.
            compilation_cache_dir=args.checkpoint.parent / "compiled",
        )

    def serve(self, requests: list[_common.Request]) -> tuple[float, list[_common.Served]]:
        """Submit all requests and step until the last one is done."""
        engine, params, kind = self.engine, self._jaxpaged.SamplingParams, self._jaxpaged.RequestOutputKind
        engine.reset_prefix_cache()
        before, done = engine.stats(), {}
        start = time.monotonic()
        for index, request in enumerate(requests):
            engine.add_request(
                str(index),
                request.prompt,
                params(
                    temperature=0.0,
                    ignore_eos=True,
                    max_tokens=request.out,
                    detokenize=False,
                    output_kind=kind.FINAL_ONLY,
                ),
            )
        while engine.has_unfinished_requests:
            for output in engine.step():
                done[output.request_id] = output
        elapsed = time.monotonic() - start
        self._note(before, engine.stats())
        served = []
        for index in range(len(requests)):
            output = done[str(index)]
            metrics = output.metrics
            first, last = metrics.first_token_time - start, metrics.last_token_time - start
            served.append(_common.Served(output.outputs[0].token_ids, first, last))
        return elapsed, served

    def _note(self, before: object, after: object) -> None:
        old, new = dataclasses.asdict(before), dataclasses.asdict(after)  # type: ignore[call-overload]
        delta = {name: new[name] - old[name] for name in new if isinstance(new[name], int | float)}
        steps = max(1, delta["num_steps"])
        self._steps.append(
            {
                "steps": steps,
                "schedule_us": 1e6 * delta["schedule_time"] / steps,
                "build_us": 1e6 * delta["build_time"] / steps,
                "update_us": 1e6 * delta["update_time"] / steps,
                "device_ms": 1e3 * delta["device_time"] / steps,
                "padding_waste": delta["num_padded_tokens"]
                / (delta["num_tokens"] + delta["num_padded_tokens"]),
                "preemptions": delta["num_preemptions"],
                "compiles": delta["num_compiles"],
                "prefix_hit_tokens": delta["prefix_cache_hits"],
            }
        )

    def details(self) -> dict[str, float]:
        """Per-step figures of the last repeat."""
        return {name: round(value, 4) for name, value in self._steps[-1].items()}


def main() -> None:
    """Measure this engine."""
    args = _common.parse_arguments(__doc__)
    _common.measure("jaxpaged", Ours(args), args)


if __name__ == "__main__":
    main()
