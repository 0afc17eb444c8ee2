"""Streams of chunks: from the engine's outputs to events, for one prompt or several at once."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from jaxpaged import RequestOutput
from jaxpaged.serve.async_engine import OutputStream
from jaxpaged.serve.server.event_stream import (
    DONE,
    KEEP_ALIVE,
    EventStream,
    Write,
    event,
    unless_client_leaves,
)
from jaxpaged.serve.server.failures import RequestFailure
from jaxpaged.serve.server.jobs import Job
from jaxpaged.serve.server.responses import Chunk


class Chunks(Protocol):
    """Writes outputs as chunks."""

    def opening(self, number: int) -> bytes:
        """What comes before the first output of prompt ``number``; may be empty."""

    def events(self, number: int, output: RequestOutput) -> bytes:
        """What an output of prompt ``number`` brings; may be empty."""

    def usage(self) -> bytes:
        """A chunk without choices, with the usage of the whole request."""


class ChunkEvents:
    """Chunks of one answer as events: what they have in common, and the usage where a client wants it."""

    def __init__(self, job: Job, kind: str) -> None:
        self._job = job
        self.encode = msgspec.json.Encoder().encode
        options = job.body.stream_options
        usage = None if options is not None and options.include_usage else msgspec.UNSET
        self._chunk = Chunk(job.id, kind, job.service.created_now(), job.model, [], usage)
        self.has_usage = options is not None and options.continuous_usage_stats

    def event(self, choices: list[Any]) -> bytes:
        """A chunk with some choices."""
        self._chunk.choices = choices
        if self.has_usage:
            self._chunk.usage = self._job.chunk_usage()
        return event(self.encode(self._chunk))

    def usage(self) -> bytes:
        """The last chunk, with the usage of the whole request and no choices."""
        self._chunk.choices, self._chunk.usage = [], self._job.chunk_usage()
        return event(self.encode(self._chunk))


async def answer(
    job: Job,
    prompts: Sequence[Sequence[int]],
    request: Request,
    whole: Callable[[Sequence[RequestOutput]], BaseModel],
    chunks: Chunks,
) -> Response:
    """Has the engine do a job and answers with the ``whole`` of it or with a stream of ``chunks``.

    What is wrong before the first token has a status of its own in either case.

    Raises:
      RequestFailure: the job failed.
      ClientLeftError: nobody waits for it any more.
    """
    try:
        job.submit(prompts, request.scope["state"].get("tenant", ""))
        if not job.body.stream:
            outputs = await unless_client_leaves(request.receive, job.results())
            return Response(whole(outputs).model_dump_json(), media_type="application/json")
        await unless_client_leaves(request.receive, job.first())
    except BaseException:
        job.close()
        raise
    return event_stream(job, chunks)


def event_stream(job: Job, chunks: Chunks) -> EventStream:
    """The answer to a request that streams."""

    async def produce(write: Write) -> None:
        try:
            with job.failing():
                if len(job.streams) == 1:
                    await _pump(job, 0, job.streams[0], chunks, write)
                else:
                    pumps = (_pump(job, i, stream, chunks, write) for i, stream in enumerate(job.streams))
                    await _all_or_none([asyncio.create_task(pump) for pump in pumps])
            if job.body.stream_options is not None and job.body.stream_options.include_usage:
                await write(chunks.usage())
        except RequestFailure as failure:
            await write(event(failure.body()))
        finally:
            job.close()
        await write(DONE)

    return EventStream(produce)


async def _pump(job: Job, number: int, stream: OutputStream, chunks: Chunks, write: Write) -> None:
    """Writes the outputs of one prompt as they come, and comments while none do."""
    interval = job.service.options.keep_alive_interval
    opening = chunks.opening(number)
    while True:
        try:
            output = await stream.next_within(interval)
        except StopAsyncIteration:
            return
        if output is None:
            await write(KEEP_ALIVE)
            continue
        job.note(output)
        data = chunks.events(number, output)
        if opening:
            data, opening = opening + data, b""
        if data:
            await write(data)
        if output.finished:
            for completion in output.outputs:
                job.check_end(completion)
            return


def finish_reason(reason: str | None) -> str | None:
    """OpenAI's finish reason; None for what is answered by an error instead."""
    return reason if reason in ("stop", "length") else None


async def _all_or_none(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Waits for all; when one raises, the others are cancelled."""
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
