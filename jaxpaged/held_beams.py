"""Beams that have run and wait until their group says with which token they go on."""

from collections.abc import Collection

from jaxpaged.request import Request


class HeldBeams:
    """The requests that are held, for one scheduler.

    A held beam has nothing to run, but may keep row and blocks, so that it can go on at once. While nobody else can be
    planned it gives both up: a group whose beams do not fit into the pool together computes them one after the other.
    It is paused then, and in no queue.

    Invariants (``check_invariants``): a request is held exactly while it is in one of the lists; those in ``running``
    have a row and all their tokens computed, those in ``paused`` neither row nor blocks.
    """

    def __init__(self) -> None:
        self.running: list[Request] = []
        self.paused: list[Request] = []
        self.rewritten: list[Request] = []  # beams that run and got another one's blocks since the last step

    def hold(self, request: Request) -> None:
        """A beam that runs has caught up."""
        assert request.row, "a beam was pushed out while its step was under way"
        request.is_held = True
        self.running.append(request)

    def pause(self, request: Request) -> None:
        """A held beam has lost its row."""
        self.running.remove(request)
        self.paused.append(request)

    def drop(self, request: Request) -> None:
        """It is held no longer."""
        if request.is_held:
            (self.running if request in self.running else self.paused).remove(request)
            request.is_held = False

    def take_rewritten(self) -> list[Request]:
        """``rewritten``, which is empty then."""
        rewritten, self.rewritten = self.rewritten, []
        return rewritten

    def check_invariants(self, running: Collection[Request], others: Collection[Request]) -> None:
        """Asserts the invariants; ``running`` and ``others`` are all requests of the scheduler."""
        for request in self.running:
            assert request.is_beam, "held, but no beam"
            assert request.num_computed_tokens == request.num_tokens, "held and behind"
        assert {r for r in running if r.is_held} == set(self.running), (
            "held beams that run are not those listed"
        )
        assert {r for r in others if r.is_held} == set(self.paused), (
            "held beams that do not run are not those paused"
        )
        assert not any(r.row or r.holds_blocks for r in self.paused), "paused with row or blocks"
