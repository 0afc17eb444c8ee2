"""How many replicas the load asks for.

Ray counts HTTP requests. What fills an engine are sequences: a request for four prompts with two completions each has
eight. So replicas report theirs, and requests that still look for a replica count one each.

Ray carries this module to its controller as it is, so it imports nothing of this package.
"""

from typing import Any

SEQUENCES = "sequences"  # name of what replicas report


def wanted_replicas(context: Any) -> tuple[float, dict[str, Any]]:
    """A policy for Ray's ``AutoscalingConfig``, which adds bounds and delays.

    Args:
      context: ``ray.serve.config.AutoscalingContext``.

    Returns:
      Replicas, not rounded, and no state.
    """
    reported = sum((context.aggregated_metrics or {}).get(SEQUENCES, {}).values())
    # A replica that has just started has not reported; Ray knows how many requests it sent there.
    load = max(reported + context.total_queued_requests, context.total_num_requests)
    return load / context.config.target_ongoing_requests, {}
