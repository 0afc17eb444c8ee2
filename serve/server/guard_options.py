"""What the guards are given, of the options of a server."""

import dataclasses

from jaxpaged.serve.page.routes import public_paths
from jaxpaged.serve.server.guards.api_key import PUBLIC_PATHS, read_api_keys
from jaxpaged.serve.server.guards.stack import GuardOptions
from jaxpaged.serve.server.options import ServerOptions

# Bodies that are being read at once, in times of the largest one.
MAX_BODIES = 16


def guard_options(options: ServerOptions) -> GuardOptions:
    """The guards' options among those of a server.

    Raises:
      ValueError: the file of API keys cannot be read.
    """
    keys = list(options.api_key or ())
    if options.api_key_file is not None:
        keys += read_api_keys(options.api_key_file)
    return GuardOptions(
        api_keys=tuple(keys),
        public_paths=PUBLIC_PATHS + (tuple(public_paths()) if options.page else ()),
        bind_host=options.host,
        allowed_hosts=tuple(options.allowed_host or ()),
        allowed_origins=tuple(options.allowed_origin or ()),
        max_body_bytes=options.max_body_bytes,
        max_total_body_bytes=MAX_BODIES * options.max_body_bytes,
        body_timeout=options.body_timeout,
    )


def without_access_checks(options: GuardOptions) -> GuardOptions:
    """The same for who gets only what has passed those guards elsewhere: bounds, but no keys, hosts or origins."""
    return dataclasses.replace(options, api_keys=(), allowed_hosts=("*",), allowed_origins=())
