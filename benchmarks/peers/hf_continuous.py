"""Hugging Face transformers, continuous batching over a paged cache with sdpa attention."""

from __future__ import annotations

import time

import _common

PAGE_SIZE = 16
MAX_SEQUENCES = 32
MAX_BATCH_TOKENS = 2048


class Continuous:
    """Serve requests through one continuous batching manager that lives as long as the process."""

    def __init__(self, args: _common.Arguments) -> None:
        import torch
        import transformers

        torch.set_num_threads(len(args.cores))
        transformers.utils.logging.set_verbosity_error()
        self.version = transformers.__version__
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            args.checkpoint, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
        ).eval()
        self.share = args.workload == "W3"
        self.settings = transformers.ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=MAX_SEQUENCES * (args.context // PAGE_SIZE + 2),
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_requests_per_batch=MAX_SEQUENCES,
            allow_block_sharing=self.share,
            use_async_batching=False,
            auto_switch_to_flash=False,
            use_cuda_graph=False,
        )
        self.generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def serve(self, requests: list[_common.Request]) -> tuple[float, list[_common.Served]]:
        """Serve the requests with a fresh, and so empty, cache; setting it up is not timed."""
        manager = self.model.init_continuous_batching(
            generation_config=self.generation, continuous_batching_config=self.settings
        )
        manager.start()
        try:
            return self._serve(manager, requests)
        finally:
            manager.stop(block=True)

    @staticmethod
    def _serve(manager: object, requests: list[_common.Request]) -> tuple[float, list[_common.Served]]:
        """Submit all requests and collect them as they finish."""
        start = time.perf_counter()
        ids = [
            manager.add_request(r.prompt, max_new_tokens=r.out, eos_token_id=-1, record_timestamps=True)
            for r in requests
        ]
        done: dict[str, _common.Served] = {}
        while len(done) < len(requests):
            result = manager.get_result(timeout=1.0)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the generation thread ended early")
                continue
            if result.error:
                raise RuntimeError(result.error)
            if result.is_finished():
                times = [stamp - start for stamp in result.timestamps or ()]
                ends = (times[0], times[-1]) if times else (None, None)
                done[result.request_id] = _common.Served(list(result.generated_tokens), *ends)
        return time.perf_counter() - start, [done[request_id] for request_id in ids]


def main() -> None:
    """Measure continuous batching."""
    args = _common.parse_arguments(__doc__)
    _common.measure("hf_continuous", Continuous(args), args)


if __name__ == "__main__":
    main()
