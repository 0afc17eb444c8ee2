"""Random operations on schedulers of random configurations over simulated memory, all invariants on.

    python benchmarks/scheduler_soak.py --operations 100000 --seed 0

Prints operations a second (the checks take most of the time) and how often what happened, and exits with 1 when an
invariant is violated. ``tests/core/scheduler_operations.py`` has the operations; ``test_scheduler_machine.py`` searches
them with hypothesis, which finds shorter examples. A run is decided by its seed; ``--world`` repeats one world of it.
"""

import argparse
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.core.scheduler_operations import OPERATIONS
from tests.core.scheduler_settings import Settings
from tests.core.scheduler_world import World

LONGEST = 400  # operations of a world, at most


def run_world(seed: int, index: int, max_operations: int) -> tuple[Counter[str], int, bool]:
    """Runs one world; what was counted in it, its operations, and whether all invariants held."""
    rng = Random(f"{seed}/{index}")
    settings = Settings.draw(rng)
    chosen, weights = list(OPERATIONS), list(OPERATIONS.values())
    num_operations, recent = min(max_operations, rng.randint(20, LONGEST)), deque[str](maxlen=8)
    world, done, holds = World(settings, rng), 0, True
    try:
        while done < num_operations:
            done += 1
            (operation,) = rng.choices(chosen, weights)
            recent.append(operation.__name__)
            operation(world, rng)
            world.check()
        recent.append("finish_all")
        world.finish_all(rng)
    except Exception:
        holds = False
        traceback.print_exc()
        print(f"seed {seed}, world {index}, operation {done}: {settings}", file=sys.stderr)
        print(f"the last operations: {', '.join(recent)}", file=sys.stderr)
    finally:
        world.close()
    return _counts(world), done, holds


def _counts(world: World) -> Counter[str]:
    counts = Counter(world.counts)
    stats, preemption = asdict(world.space.stats), world.scheduler.preemption
    counts.update({f"blocks {name}": value for name, value in stats.items() if "prefix" not in name})
    counts.update({f"preemptions: {kind}": value for kind, value in preemption.counts.items()})
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs worlds until there were enough operations; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, help="run only this one")
    args = parser.parse_args(arguments)
    counts, done, index, started = Counter[str](), 0, args.world or 0, time.perf_counter()
    holds = True
    while holds and done < args.operations:
        found, num_operations, holds = run_world(args.seed, index, args.operations - done)
        counts += found
        done += num_operations
        index += 1
        if args.world is not None:
            break
    seconds = time.perf_counter() - started
    worlds = 1 if args.world is not None else index
    print(f"{done} operations, {worlds} worlds, {done / seconds:.0f} operations/s")
    for name, count in sorted(counts.items()):
        print(f"  {name:36} {count:9}")
    print("all invariants held" if holds else "VIOLATED")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
