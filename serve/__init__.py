"""Serving: the command line, the HTTP server, and an engine in a thread of its own for asyncio and for threads."""

from typing import TYPE_CHECKING

from jaxpaged.models.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from jaxpaged.serve.async_engine import AsyncEngine, OutputStream
    from jaxpaged.serve.executor import Executor, ExecutorRequest

__all__ = ["AsyncEngine", "Executor", "ExecutorRequest", "OutputStream"]

# The command line should not wait for jax before it can say what its options are.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "AsyncEngine": "jaxpaged.serve.async_engine",
        "Executor": "jaxpaged.serve.executor",
        "ExecutorRequest": "jaxpaged.serve.executor",
        "OutputStream": "jaxpaged.serve.async_engine",
    },
)
