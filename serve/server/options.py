"""What ``jaxpaged serve`` is told besides the engine's options: where it listens, who may ask, and for how much."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

SERVER, LIMITS, WATCH = "Server", "Limits", "Observation"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the server; times are seconds.

    Raises ValueError naming an option that is out of bounds.
    """

    host: Annotated[str, _option(SERVER, help="Address to listen at.")] = "127.0.0.1"
    port: Annotated[int, _option(SERVER, help="Port; 0 takes a free one.")] = 8000
    served_model_name: Annotated[
        list[str] | None,
        _option(SERVER, help="Name of the model in requests; repeatable. [dim]Default: the folder's.[/]"),
    ] = None
    chat_template: Annotated[
        Path | None, _option(SERVER, help="A jinja2 file instead of the checkpoint's chat template.")
    ] = None
    api_key: Annotated[
        list[str] | None,
        _option(SERVER, help="Key that requests must carry; repeatable. --api-key-file is safer."),
    ] = None
    api_key_file: Annotated[Path | None, _option(SERVER, help="File with a key a line.")] = None
    allowed_origin: Annotated[
        list[str] | None, _option(SERVER, help="Origin whose pages may ask (CORS), or *; repeatable.")
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        _option(SERVER, help="Name by which a server at localhost may be called; repeatable."),
    ] = None
    no_page: Annotated[bool, _option(SERVER, "--no-page", help="Leave out the page at /.")] = False
    no_warmup: Annotated[
        bool,
        _option(
            SERVER, "--no-warmup", help="Compile a bucket when a request first needs it, which then waits."
        ),
    ] = False
    share_prefixes: Annotated[
        bool,
        _option(SERVER, "--share-prefixes", help="Let requests of different API keys share cached prefixes."),
    ] = False
    trust_priority: Annotated[
        bool,
        _option(
            SERVER,
            "--trust-priority",
            help="Let clients go before others by a negative priority; else they can only step back.",
        ),
    ] = False
    drain_timeout: Annotated[
        float, _option(SERVER, help="On SIGTERM, seconds in which requests may still end.")
    ] = 30.0
    max_queue_length: Annotated[
        int, _option(LIMITS, help="Sequences that may wait beyond those that run; more get 429.")
    ] = 1024
    max_body_bytes: Annotated[int, _option(LIMITS, help="Bytes of a request's body.")] = 16 * 2**20
    max_prompts: Annotated[int, _option(LIMITS, help="Prompts of one request.")] = 256
    max_prompt_tokens: Annotated[
        int | None, _option(LIMITS, help="Tokens of a prompt. [dim]Default: what the model takes.[/]")
    ] = None
    max_n: Annotated[int, _option(LIMITS, help="Completions of a prompt (n and best_of).")] = 32
    max_stop: Annotated[int, _option(LIMITS, help="Stop strings of a request.")] = 16
    max_logprobs: Annotated[int, _option(LIMITS, help="Candidates at each place (logprobs).")] = 20
    request_timeout: Annotated[
        float, _option(LIMITS, help="Seconds a request may take; then it fails with 504.")
    ] = 600.0
    max_queue_time: Annotated[
        float | None,
        _option(LIMITS, help="Seconds a request may wait before it begins. [dim]Default: no limit.[/]"),
    ] = None
    header_timeout: Annotated[float, _option(LIMITS, help="Seconds for a request's headers.")] = 10.0
    body_timeout: Annotated[float, _option(LIMITS, help="Seconds for a request's body.")] = 30.0
    send_timeout: Annotated[
        float, _option(LIMITS, help="Seconds that a reader may take nothing while much waits for it.")
    ] = 60.0
    max_connections: Annotated[int, _option(LIMITS, help="Open connections.")] = 4096
    keep_alive_interval: Annotated[
        float, _option(LIMITS, help="Seconds without a token after which a stream gets a comment.")
    ] = 15.0
    access_log: Annotated[
        str, _option(WATCH, help="A JSON line a request: a file, - for stdout, or off.")
    ] = "off"
    tensorboard: Annotated[Path | None, _option(WATCH, help="Folder for TensorBoard's event files.")] = None
    attention_probe: Annotated[
        float, _option(WATCH, help="Time the attention kernel alone every so many seconds; 0 is off.")
    ] = 30.0

    def __post_init__(self) -> None:
        for name, low in (("max_queue_length", 0), ("max_body_bytes", 1), ("max_prompts", 1), ("max_n", 1)):
            self._check(name, low)
        for name, low in (("max_stop", 0), ("max_logprobs", 0), ("max_connections", 1), ("port", 0)):
            self._check(name, low)
        for name in (
            "request_timeout",
            "header_timeout",
            "body_timeout",
            "send_timeout",
            "keep_alive_interval",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("drain_timeout", "attention_probe"):
            self._check(name, 0)
        if self.port > 65535:
            raise ValueError(f"port={self.port}: must be at most 65535")
        for name in ("max_prompt_tokens", "max_queue_time"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")

    @property
    def page(self) -> bool:
        """Whether there is the page at ``/``."""
        return not self.no_page

    def _check(self, name: str, low: int) -> None:
        if not getattr(self, name) >= low:
            raise ValueError(f"{name}={getattr(self, name)}: must be at least {low}")
