"""Keeps what belongs to an engine row, on the host and on the device, that of the request that has the row."""

import time
from typing import Protocol

import numpy as np

from jaxpaged.batch import BatchBuilder
from jaxpaged.generation import Generation
from jaxpaged.request import Request
from jaxpaged.runner import Runner
from jaxpaged.sampling_rows import needs_state, output_counts_row, prompt_mask_row
from jaxpaged.step_plan import ScheduledStep


class Home(Protocol):
    """Finds the generation that a request belongs to."""

    def __call__(self, request: Request) -> Generation: ...


class DeviceRows:
    """The builder's line and the sampler's state of each row in use.

    Invariant: those of a row in a step that runs are of the request in ``_owners``, as it was when it was last
    admitted.
    """

    def __init__(self, builder: BatchBuilder, runner: Runner, home: Home, vocab_size: int) -> None:
        self._builder = builder
        self._runner = runner
        self._home = home
        self._vocab_size = vocab_size
        # Row to (request, its admissions): who the row was last set for.
        self._owners: dict[int, tuple[Request, int]] = {}
        self._bias_keys: dict[int, object] = {}

    def prepare(self, step: ScheduledStep) -> None:
        """Brings everything up to date for the rows of a step."""
        for request in step.rewritten:
            self._builder.rewrite_row(request.row)
        owners, bias_keys = self._owners, self._bias_keys
        for request, _ in step.rows:
            row = request.row
            owner = owners.get(row)
            if owner is None or owner[0] is not request or owner[1] != request.num_admissions:
                self._bind(request)
            if bias_keys and row in bias_keys:
                self._sync_bias(request)

    def forget(self) -> None:
        """The device's state was lost: every row is set anew."""
        self._owners.clear()

    def _bind(self, request: Request) -> None:
        row, generation = request.row, self._home(request)
        self._owners[row] = (request, request.num_admissions)
        self._bias_keys.pop(row, None)
        self._builder.clear_row(row)
        self._builder.sampling.set(row, request.params, generation.completions[request.index].seed)
        if generation.metrics.first_scheduled_time is None:
            generation.metrics.first_scheduled_time = time.monotonic()
        if not needs_state(request.params):
            return
        prompt = request.token_ids[: request.num_prompt_tokens]
        bias = None if generation.rules is None else generation.rules.row(request.output_token_ids)
        self._runner.set_sampler_row(
            row,
            output_counts_row(request.output_token_ids, self._vocab_size),
            prompt_mask_row(prompt, self._vocab_size),
            np.zeros(self._vocab_size, np.float32) if bias is None else bias,
        )
        self._builder.sampling.set_bias(row, bias is not None)
        if generation.rules is not None:
            self._bias_keys[row] = generation.rules.key(request.output_token_ids)

    def _sync_bias(self, request: Request) -> None:
        rules = self._home(request).rules
        assert rules is not None, "a bias key without rules"
        outputs = request.output_token_ids
        key = rules.key(outputs)
        if key == self._bias_keys[request.row]:
            return
        self._bias_keys[request.row] = key
        bias = rules.row(outputs)
        if bias is not None:
            self._runner.set_sampler_bias(request.row, bias)
        self._builder.sampling.set_bias(request.row, bias is not None)
