"""Entry point of the command line: says what to install when the extra is missing, else hands over to ``app``."""

import sys

from jaxpaged.serve.extras import missing_extra


def main() -> None:
    """Runs ``jaxpaged``; exits with 2 after a user's mistake, with 1 when something failed."""
    try:
        from jaxpaged.serve.app import app
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    app()
