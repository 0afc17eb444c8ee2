"""Whether an engine that fails can go on: it steps, and after failures in a row it proves that it still works."""

import logging
import secrets

from jaxpaged import Engine, RequestOutput, SamplingParams

logger = logging.getLogger(__name__)

# Steps in a row that bring nothing but errors, after which the engine has to prove itself.
MAX_BARREN_STEPS = 3
# So many, and nothing else is to join until it has: it would never be alone where requests come all the time.
MAX_BARREN_STEPS_IN_COMPANY = 12
# Exceptions in a row that leave ``Engine.step`` itself; those of a request never do.
MAX_STEP_EXCEPTIONS = 3
_PROOF = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, ignore_eos=True)


class EngineHealth:
    """Steps an engine for its thread.

    A step that fails ends the requests in it and no others, so one failure says nothing about the engine. When several
    in a row bring only errors, a request of our own joins, of one token: if it fails although it was alone, the
    engine is beyond help and ``step`` raises. If it was not alone, the others may be at fault, and have ended; it
    is tried again.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._num_barren = 0
        self._num_exceptions = 0
        self._proof: str | None = None  # our own request while it is under way
        self._was_alone = True  # in every step since it came

    @property
    def is_in_doubt(self) -> bool:
        """Whether no request should join until it is known whether the engine works."""
        if self._proof is None or self._num_barren < MAX_BARREN_STEPS_IN_COMPANY:
            return False
        return self._engine.has_unfinished_requests

    def step(self) -> list[RequestOutput]:
        """The outputs of a step; none of one that raised and may be tried again.

        Raises:
          Exception: what the engine fails with, and will again.
        """
        if self._proof is not None and len(self._engine.block_tables()) > 1:
            self._was_alone = False
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._num_exceptions += 1
            if self._num_exceptions >= MAX_STEP_EXCEPTIONS:
                raise
            logger.error("a step raised and is tried again: %s", error, exc_info=error)
            return []
        self._num_exceptions = 0
        if any(output.error is None for output in outputs):
            self._num_barren = 0
        elif outputs:
            self._num_barren += 1
        if self._proof is not None:
            self._take_proof(outputs)
        if self._proof is None and self._num_barren >= MAX_BARREN_STEPS:
            self._ask_for_proof()
        return outputs

    def _ask_for_proof(self) -> None:
        logger.warning("%d steps in a row have failed: does the engine still work?", self._num_barren)
        self._proof, self._was_alone = f"proof-of-health-{secrets.token_hex(8)}", True
        self._engine.add_request(self._proof, [0], _PROOF)

    def _take_proof(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id != self._proof or not output.finished:
                continue
            self._proof = None
            if output.error is None:
                logger.warning("the engine still works")
            elif self._was_alone:
                raise output.error
