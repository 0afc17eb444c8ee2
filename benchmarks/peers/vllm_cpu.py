"""vLLM on CPU: in-process engine, at most 32 sequences, prefix caching where prompts share a prefix (W3)."""

from __future__ import annotations

import os
import time

import _common


def _set_environment(args: _common.Arguments) -> None:
    """Set what vLLM reads when it is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, args.cores)))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Vllm:
    """Serve requests through ``vllm.LLM``."""

    def __init__(self, args: _common.Arguments) -> None:
        _set_environment(args)
        import vllm

        self.vllm = vllm
        self.version = vllm.__version__
        self.prefix_caching = args.workload == "W3"
        self.llm = vllm.LLM(
            model=str(args.checkpoint),
            skip_tokenizer_init=True,
            dtype=args.dtype,
            max_model_len=1024,
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            enable_prefix_caching=self.prefix_caching,
            disable_log_stats=False,  # needed for the times of the first and the last token
            seed=0,
        )

    def serve(self, requests: list[_common.Request]) -> tuple[float, list[_common.Served]]:
        """Serve the requests in one call; an earlier repeat's cached prefixes are dropped first."""
        if self.prefix_caching:
            self.llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        sampling = [
            self.vllm.SamplingParams(
                temperature=0.0, max_tokens=r.out, min_tokens=r.out, ignore_eos=True, detokenize=False
            )
            for r in requests
        ]
        start, start_wall = time.perf_counter(), time.time()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        elapsed = time.perf_counter() - start
        return elapsed, [self._served(output, start_wall) for output in outputs]

    @staticmethod
    def _served(output: object, start_wall: float) -> _common.Served:
        """Take the tokens and, where the engine kept them, the times out of one output."""
        tokens, metrics = list(output.outputs[0].token_ids), output.metrics
        if metrics is None or not metrics.first_token_latency:
            return _common.Served(tokens)
        first = metrics.arrival_time - start_wall + metrics.first_token_latency
        return _common.Served(tokens, first, first + metrics.last_token_ts - metrics.first_token_ts)


def main() -> None:
    """Measure vLLM."""
    args = _common.parse_arguments(__doc__)
    _common.measure("vllm", Vllm(args), args)


if __name__ == "__main__":
    main()
