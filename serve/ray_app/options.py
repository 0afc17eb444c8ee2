"""What a Ray Serve application is told: the options of the engine, of the server, and of the replicas."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from jaxpaged.config import EngineConfig
from jaxpaged.serve.options import EngineOptions
from jaxpaged.serve.prefix_routing import LoadBound
from jaxpaged.serve.server.options import ServerOptions

# Options of ``jaxpaged serve`` about connections, which are those of Ray's proxies here.
OF_THE_PROXIES = ("port", "header_timeout", "send_timeout", "max_connections")
# The page shows the memory of one engine, and its feed never ends; Ray buffers without a bound for slow readers.
SERVER_DEFAULTS = {"no_page": True}
# A batch that is a quarter full takes one more sequence almost for free.
ALLOWANCE_OF_BATCH = 0.25
# Room for what comes while a new replica starts.
TARGET_OF_BATCH = 0.75
ANY_LENGTH = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Replicas, what each of them gets, and who goes to which; times are seconds.

    Raises ValueError naming an option that is out of bounds.

    Attributes:
      num_replicas: replicas; with ``max_replicas`` the fewest. 0 stops all of them when nothing is to do.
      max_replicas: the most, as the load asks for them; None for no autoscaling.
      target_sequences: sequences, waiting and running, that a replica is to have; None for three quarters of
        ``max_num_seqs``.
      upscale_delay, downscale_delay: how long more or fewer replicas have to be wanted.
      num_gpus: of a replica; None for 1 where the cluster has GPUs, else 0.
      num_cpus: of a replica.
      num_ingresses: processes between Ray's proxies and the replicas; all chunks of all streams pass through them.
      load_factor, load_allowance: the bound within which a prompt's beginning decides (``LoadBound``), in requests;
        None allows a quarter of ``max_num_seqs``.
      replica_wait: how long a request waits for a replica that takes it; then it fails with 503.
      health_period: how often replicas are asked whether their engine lives; one that is dead is replaced.
    """

    num_replicas: int = 1
    max_replicas: int | None = None
    target_sequences: float | None = None
    upscale_delay: float = 30.0
    downscale_delay: float = 600.0
    num_gpus: float | None = None
    num_cpus: float = 1.0
    num_ingresses: int = 1
    load_factor: float = 1.25
    load_allowance: int | None = None
    replica_wait: float = 30.0
    health_period: float = 10.0

    def __post_init__(self) -> None:
        lowest = {"num_replicas": 0 if self.max_replicas else 1, "max_replicas": max(1, self.num_replicas)}
        lowest |= {"num_ingresses": 1, "load_factor": 1, "load_allowance": 1}
        lowest |= dict.fromkeys(("num_gpus", "num_cpus", "upscale_delay", "downscale_delay"), 0)
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"{name}={value}: must be at least {low}")
        for name in ("target_sequences", "replica_wait", "health_period"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be positive")

    def load_bound(self, max_num_seqs: int) -> LoadBound:
        """How busy a replica may be and still get the prompts whose beginnings it knows."""
        allowance = self.load_allowance or max(1, int(ALLOWANCE_OF_BATCH * max_num_seqs))
        return LoadBound(factor=self.load_factor, allowance=allowance)

    def target(self, max_num_seqs: int) -> float:
        """Sequences that a replica is to have."""
        return self.target_sequences or max(1.0, TARGET_OF_BATCH * max_num_seqs)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """All options of an application."""

    engine: EngineOptions
    server: ServerOptions
    ray: RayOptions

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Arguments":
        """Options by name; a text becomes what its option is, as ``serve run ... max_num_seqs=8`` needs it.

        Raises:
          ValueError: an option does not exist, is not one here, or does not fit.
        """
        groups = (EngineOptions, ServerOptions, RayOptions)
        unknown = set(given) - {field.name for group in groups for field in dataclasses.fields(group)}
        if unknown:
            raise ValueError(f"unknown options: {', '.join(sorted(unknown))}")
        for name in OF_THE_PROXIES:
            if name in given:
                raise ValueError(f"{name}={given[name]!r}: is for Ray's proxies to know; see serve.start")
        values = SERVER_DEFAULTS | dict(given)
        engine, server, ray = (
            _parse(EngineOptions, values),
            _parse(ServerOptions, values),
            _parse(RayOptions, values),
        )
        if engine.model is not None and engine.model.exists():
            # Replicas have working directories of their own.
            engine = dataclasses.replace(engine, model=engine.model.resolve())
        return cls(engine, server, ray)

    def max_num_seqs(self, num_gpus: float) -> int:
        """Sequences of one step of a replica's engine."""
        sizes = {name: getattr(self.engine, name) for name in ("max_num_seqs", "max_num_batched_tokens")}
        platform = "cuda" if num_gpus else "cpu"
        return EngineConfig.resolve(sizes, platform=platform, max_position_embeddings=ANY_LENGTH).max_num_seqs


def _parse[T](group: type[T], given: Mapping[str, Any]) -> T:
    values = {}
    for field in dataclasses.fields(group):  # type: ignore[arg-type]
        if field.name in given:
            value = given[field.name]
            is_list = any(getattr(kind, "__origin__", None) is list for kind in _kinds(field.type))
            values[field.name] = [value] if is_list and isinstance(value, str) else value
    try:
        return TypeAdapter(group).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # the dataclass's own words
            raise ValueError(str(first["ctx"]["error"])) from None
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"{name}={first['input']!r}: {first['msg']}") from None


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation ``Annotated[A | B, ...]``."""
    kind = get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
    return get_args(kind) or (kind,)
