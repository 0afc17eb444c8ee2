"""Hugging Face transformers, ``generate`` over static, left-padded batches of 16 in arrival order."""

from __future__ import annotations

import time

import _common

BATCH = 16


class StaticBatches:
    """Serve requests sixteen at a time; a batch runs until its longest request is done."""

    def __init__(self, args: _common.Arguments) -> None:
        import torch
        import transformers

        torch.set_num_threads(len(args.cores))
        transformers.utils.logging.set_verbosity_error()
        self.torch = torch
        self.version = transformers.__version__
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            args.checkpoint, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
        ).eval()

    def _generate(self, batch: list[_common.Request], start: float) -> list[_common.Served]:
        """Run one batch and cut each row to the length asked for."""
        torch = self.torch
        width, steps = max(len(r.prompt) for r in batch), max(r.out for r in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        times: list[float] = []
        never = torch.zeros(len(batch), dtype=torch.bool)

        def record(input_ids: object, scores: object, **_: object) -> object:
            """Note when each step ends; as a stopping criterion it never stops."""
            times.append(time.perf_counter() - start)
            return never

        out = self.model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[record],
        )
        rows = out[:, width:].tolist()
        return [
            _common.Served(row[: r.out], times[0], times[r.out - 1])
            for row, r in zip(rows, batch, strict=True)
        ]

    def serve(self, requests: list[_common.Request]) -> tuple[float, list[_common.Served]]:
        """Serve the requests batch after batch."""
        start = time.perf_counter()
        served: list[_common.Served] = []
        with self.torch.inference_mode():
            for index in range(0, len(requests), BATCH):
                served += self._generate(requests[index : index + BATCH], start)
        return time.perf_counter() - start, served


def main() -> None:
    """Measure static batches."""
    args = _common.parse_arguments(__doc__)
    _common.measure("hf_static", StaticBatches(args), args)


if __name__ == "__main__":
    main()
