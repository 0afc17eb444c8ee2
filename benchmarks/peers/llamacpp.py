"""llama.cpp through its low-level batch interface: continuous batching over up to 32 parallel sequences.

Each step is one ``llama_decode`` over the next token of every running sequence plus as many prompt tokens of
waiting requests as fit. The prompts' common prefix, if there is one (W3), is computed once and shared by all.

Everything else is llama.cpp's default; of the settings tried none was clearly better: flash attention
where it can and a cache in float16, whatever the weights are. So float32 tokens can leave
those of the other peers at a near tie; with a float32 cache and flash attention off they are the same.
"""

from __future__ import annotations

import ctypes
import dataclasses
import heapq
import time

import _common
import _gguf

MAX_SEQUENCES = 32
BATCH_TOKENS = 2048
MICRO_BATCH_TOKENS = 512
MIN_SHARED_PREFIX = 64


@dataclasses.dataclass
class _Running:
    """One request on its way: which sequence it holds and how much of its prompt is in the cache."""

    request: _common.Request
    served: _common.Served
    sequence: int
    position: int

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.position >= len(self.request.prompt)


def common_prefix(requests: list[_common.Request]) -> int:
    """Return how many leading tokens all prompts share, leaving one own token to each; 0 if too few."""
    if len(requests) < 2:
        return 0
    count = 0
    for column in zip(*(r.prompt[:-1] for r in requests), strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count if count >= MIN_SHARED_PREFIX else 0


class LlamaCpp:
    """A llama.cpp context and the loop that keeps its batch full."""

    def __init__(self, args: _common.Arguments) -> None:
        model_path = _gguf.convert(args.checkpoint, args.dtype)
        import llama_cpp
        import numpy

        self.lib, self.np = llama_cpp, numpy
        self.version = llama_cpp.__version__
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(model_path).encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model_path}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.parallel = min(MAX_SEQUENCES, len(args.requests))
        self.context = llama_cpp.llama_init_from_model(self.model, self._context_params(args))
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def _context_params(self, args: _common.Arguments) -> object:
        """Describe the context: one cache for all sequences where they share a prefix, else one each."""
        params = self.lib.llama_context_default_params()
        params.kv_unified = common_prefix(args.requests) > 0
        params.n_seq_max = self.parallel + 1  # one more holds the shared prefix
        params.n_ctx = params.n_seq_max * -(-args.context // 256) * 256
        params.n_batch, params.n_ubatch = BATCH_TOKENS, MICRO_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = len(args.cores)
        params.no_perf = True
        return params

    def _put(self, index: int, token: int, position: int, sequence: int, want_logits: bool) -> None:
        """Write one token into the batch."""
        batch = self.batch
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = want_logits

    def _decode(self, count: int, outputs: int) -> list[int]:
        """Run the batch and return the likeliest next token for each row that asked for logits."""
        self.batch.n_tokens = count
        status = self.lib.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        if not outputs:
            return []
        logits = self.np.ctypeslib.as_array(
            self.lib.llama_get_logits(self.context), (outputs, self.vocab_size)
        )
        return logits.argmax(axis=1).tolist()

    def _prefill_shared(self, tokens: list[int]) -> None:
        """Compute the common prefix once, in the last sequence."""
        for begin in range(0, len(tokens), BATCH_TOKENS):
            part = tokens[begin : begin + BATCH_TOKENS]
            for index, token in enumerate(part):
                self._put(index, token, begin + index, self.parallel, False)
            self._decode(len(part), 0)

    def _step(self, running: list[_Running]) -> list[tuple[_Running, int]]:
        """Fill one batch, run it and return each sequence that got a token, with the token.

        The batch is in the order of the sequences: llama.cpp computes neighbours together and splits at gaps.
        """
        count, asked = 0, []
        room = BATCH_TOKENS - sum(item.decoding for item in running)
        for item in sorted(running, key=lambda item: item.sequence):
            if item.decoding:
                part = item.served.tokens[-1:]
            else:
                part = item.request.prompt[item.position : item.position + room]
                room -= len(part)
            for token in part:
                self._put(
                    count, token, item.position, item.sequence, item.position + 1 >= len(item.request.prompt)
                )
                item.position += 1
                count += 1
            if part and item.decoding:
                asked.append(item)
        return list(zip(asked, self._decode(count, len(asked)), strict=True))

    def _admit(
        self, served: _common.Served, request: _common.Request, sequence: int, shared: int
    ) -> _Running:
        """Give a waiting request a free sequence."""
        if shared:
            self.lib.llama_memory_seq_cp(self.memory, self.parallel, sequence, 0, shared)
        return _Running(request, served, sequence, shared)

    def serve(self, requests: list[_common.Request]) -> tuple[float, list[_common.Served]]:
        """Serve the requests, filling a sequence again as soon as it falls free."""
        self.lib.llama_memory_clear(self.memory, True)
        start = time.perf_counter()
        shared = common_prefix(requests)
        self._prefill_shared(requests[0].prompt[:shared])
        served = [_common.Served([]) for _ in requests]
        waiting = list(zip(served, requests, strict=True))[::-1]
        free, running = list(range(self.parallel)), []  # a heap: low sequences first leaves fewer gaps
        while waiting or running:
            while waiting and free:
                running.append(self._admit(*waiting.pop(), heapq.heappop(free), shared))
            results = self._step(running)
            now = time.perf_counter() - start
            for item, token in results:
                item.served.tokens.append(token)
                item.served.first = now if item.served.first is None else item.served.first
                if len(item.served.tokens) == item.request.out:
                    item.served.last = now
                    self.lib.llama_memory_seq_rm(self.memory, item.sequence, -1, -1)
                    heapq.heappush(free, item.sequence)
                    running.remove(item)
        return time.perf_counter() - start, served


def main() -> None:
    """Measure llama.cpp."""
    args = _common.parse_arguments(__doc__)
    _common.measure("llamacpp", LlamaCpp(args), args)


if __name__ == "__main__":
    main()
