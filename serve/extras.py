"""What to install when the command line's extra is missing; imports nothing that could be missing itself."""

NEEDED = (
    "fastapi",
    "httptools",
    "msgspec",
    "prometheus_client",
    "prompt_toolkit",
    "pydantic",
    "rich",
    "starlette",
    "tensorboardX",
    "typer",
    "uvicorn",
    "uvloop",
)


def missing_extra(error: BaseException) -> str | None:
    """A message for an import that failed because the extra ``serve`` is not installed; None for any other error."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    missing = (error.name or "").partition(".")[0]
    if missing not in NEEDED:
        return None
    return f"the command line needs {missing}, which is not installed: pip install 'jaxpaged[serve]'"
