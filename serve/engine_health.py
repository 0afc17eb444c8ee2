"""Whether an engine that fails can go on: it steps, and after failures in a row it proves that it still works."""

import itertools
import logging

from jaxpaged import Engine, RequestOutput, SamplingParams

logger = logging.getLogger(__name__)

# Steps in a row that bring nothing but errors, after which the engine has to prove itself.
MAX_BARREN_STEPS = 3
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
        self._numbers = itertools.count()

    def step(self) -> list[RequestOutput]:
        """The outputs of a step; none of one that raised and may be tried again.

        Raises:
          Exception: what the engine fails with, and will again.
        """
        alone = self._proof is not None and len(self._engine.block_tables()) == 1
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._num_exceptions += 1
            if self._num_exceptions >= MAX_STEP_EXCEPTIONS:
                raise
            logger.error("a step raised and is tried again: %s", error, exc_info=error)
            return []
        self._num_exceptions = 0
        if self._proof is not None:
            self._take_proof(outputs, alone)
        if any(output.error is None for output in outputs):
            self._num_barren = 0
        elif outputs:
            self._num_barren += 1
            if self._num_barren >= MAX_BARREN_STEPS and self._proof is None:
                self._ask_for_proof()
        return outputs

    def _ask_for_proof(self) -> None:
        logger.warning("%d steps in a row have failed: does the engine still work?", self._num_barren)
        self._proof = f"proof-of-health-{next(self._numbers)}"
        self._engine.add_request(self._proof, [0], _PROOF)

    def _take_proof(self, outputs: list[RequestOutput], alone: bool) -> None:
        for output in outputs:
            if output.request_id != self._proof or not output.finished:
                continue
            self._proof = None
            if output.error is None:
                logger.warning("the engine still works")
            elif alone:
                raise output.error
            else:
                self._ask_for_proof()
