"""What has changed between two snapshots, in few numbers: the events of the block feed.

An event is a JSON object. A viewer that has applied every event to its state has the state of the last snapshot. The
first event of a viewer has ``full`` set and is what has changed since a pool in which every block is free, without
requests. Its fields, those that say nothing left out:

* ``time``: when the snapshot was taken; ``full``, ``sizes``: with the first event only.
* ``status``: what the engine does, whole.
* ``blocks``: runs of blocks that changed to one state: flat triples of the number of unchanged blocks since the end of
  the last run, length, state.
* ``arrived``: new requests: number, id, index of the completion, prompt tokens.
* ``progress``: of requests that went on, new ones included: number, then ``RequestView.progress``.
* ``tables``: of requests whose block ids changed: number, group, how many leading ids stay, then flat pairs that
  follow these: first id and length of a run of consecutive ids. A run of 0 is as many zeros.
* ``ended``: numbers of requests that are gone.
* ``steps``: steps since the last event, at most ``MAX_STEPS``, as ``STEP_FIELDS`` says.
* ``seconds``: ``Second`` of those that are new or went on.
* ``counters``: those that changed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpaged.block_trace import FREE
from jaxpaged.records import IterationRecord
from jaxpaged.serve.page.snapshot import Second, Snapshot

Change = dict[str, Any]
MANY = 300  # changed blocks
STEP_FIELDS = (
    "step",
    "num_steps",
    "num_prompt_tokens",
    "num_other_tokens",
    "num_padded_tokens",
    "num_running",
    "num_waiting",
    "milliseconds",
)


def changes(before: Snapshot | None, after: Snapshot) -> Change:
    """What a viewer that has seen ``before``, or nothing, needs to have the state of ``after``; empty if nothing."""
    found: Change = {}
    if before is None or before.sizes != after.sizes:
        free = bytes([FREE]) * len(after.block_states)
        before = Snapshot(block_states=free)
        found |= {"full": True, "sizes": dict(after.sizes)}
    if before.status != after.status:
        found["status"] = dict(after.status)
    if before.block_states != after.block_states:
        found["blocks"] = block_runs(before.block_states, after.block_states)
    found |= _request_changes(before, after)
    num_new = after.num_steps - before.num_steps
    if num_new > 0:
        found["steps"] = [_step_numbers(record) for record in after.steps[-num_new:]]
    if seconds := _new_seconds(before.seconds, after.seconds):
        found["seconds"] = seconds
    counters = {name: v for name, v in after.counters.items() if before.counters.get(name) != v}
    if counters:
        found["counters"] = counters
    if found:
        found["time"] = round(after.time, 3)
    return found


def block_runs(before: bytes, after: bytes) -> list[int]:
    """Flat triples (unchanged blocks before it, length, state) of the runs in ``after`` that differ from ``before``."""
    places = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
    if places.size > MANY:
        return _many_block_runs(places, np.frombuffer(after, np.uint8))
    runs: list[int] = []
    end = state = 0
    for place in places.tolist():
        if runs and place == end and after[place] == state:
            runs[-2] += 1
        else:
            state = after[place]
            runs += (place - end, 1, state)
        end = place + 1
    return runs


def _many_block_runs(places: np.ndarray, after: np.ndarray) -> list[int]:
    """The same by array operations, each of which costs as much as a few changed blocks."""
    states = after[places]
    # A run goes on while the next changed block is the next block and in the same state.
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(states.astype(np.int16)) != 0)) + 1
    first = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((first, [places.size])))
    starts = places[first]
    ends = starts + lengths
    gaps = starts - np.concatenate(([0], ends[:-1]))
    flat: list[int] = np.stack((gaps, lengths, states[first]), axis=1).reshape(-1).tolist()
    return flat


def id_runs(ids: Sequence[int]) -> list[int]:
    """Flat pairs (first id, length) of runs of consecutive ids; runs of 0 are as many zeros."""
    runs: list[int] = []
    expected = -1
    for block in ids:
        if block == expected:
            runs[-1] += 1
        else:
            runs += (block, 1)
        expected = block + 1 if block else 0
    return runs


def table_change(before: Sequence[int], after: Sequence[int]) -> list[int] | None:
    """How many leading ids stay, then ``id_runs`` of the rest; None if nothing changed."""
    length = len(before)
    if before == after:
        return None
    if len(after) > length and after[:length] == before:
        return [length, *id_runs(after[length:])]
    shorter = min(length, len(after))
    same = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    return [same, *id_runs(after[same:])]


def _request_changes(before: Snapshot, after: Snapshot) -> Change:
    arrived: list[list[Any]] = []
    progress: list[list[int]] = []
    tables: list[list[int]] = []
    for number, view in after.requests.items():
        old = before.requests.get(number)
        if old is None:
            arrived.append([number, view.request_id, view.index, view.num_prompt_tokens])
        if old is None or old.progress != view.progress:
            progress.append([number, *view.progress])
        for group, ids in enumerate(view.tables):
            change = table_change([] if old is None else old.tables[group], ids)
            if change is not None:
                tables.append([number, group, *change])
    ended = [number for number in before.requests if number not in after.requests]
    found = {"arrived": arrived, "progress": progress, "tables": tables, "ended": ended}
    return {name: value for name, value in found.items() if value}


def _new_seconds(before: Sequence[Second], after: Sequence[Second]) -> list[Second]:
    """Those that ``before`` lacks or has less of; its last one may have gone on."""
    since = before[-1] if before else None
    return [
        s
        for s in after
        if since is None or s.second > since.second or (s.second == since.second and s != since)
    ]


def _step_numbers(record: IterationRecord) -> list[float]:
    return [
        record.step,
        record.num_steps,
        record.num_prompt_tokens,
        record.num_scheduled_tokens - record.num_prompt_tokens,
        record.num_padded_tokens,
        record.num_running,
        record.num_waiting,
        round(1000 * record.iteration_time, 2),
    ]
