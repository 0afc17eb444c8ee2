"""Puts ingress and replicas together, for ``serve run`` and for Python."""

from collections.abc import Mapping
from typing import Any

try:
    import ray
    from ray import serve
except ModuleNotFoundError as error:
    missing = f"the Ray Serve application needs {error.name}: pip install 'jaxpaged[ray]'"
    raise ModuleNotFoundError(missing, name=error.name) from None
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from jaxpaged.serve.ray_app.autoscaling import wanted_replicas
from jaxpaged.serve.ray_app.ingress import Ingress
from jaxpaged.serve.ray_app.options import Arguments, RayOptions
from jaxpaged.serve.ray_app.replica import Replica
from jaxpaged.serve.ray_app.request_router import PrefixRouter
from jaxpaged.serve.server.run import served_names

# The engine refuses what is too much, with advice when to try again; Ray would let it wait.
ROOM_FOR_REFUSALS = 256
# Between the end of what was under way and that of the process.
CLOSE_TIMEOUT = 15.0
# Requests are for the access log of the server's options.
LOGGING = {"enable_access_log": False}


def build_app(arguments: Mapping[str, Any]) -> serve.Application:
    """The application, for ``serve run jaxpaged.serve.ray_app:build_app NAME=VALUE ...`` and for ``import_path``.

    Args:
      arguments: options of ``jaxpaged serve`` as ``model`` or ``max_num_seqs`` (but those of connections, which Ray's
        proxies have), and fields of ``RayOptions``. ``host`` is where the proxies listen: it decides which Host
        headers are believed. ``api_key`` is kept by Ray with the application; ``api_key_file`` is read by the ingress.

    Raises:
      ValueError: an option does not exist or does not fit.
    """
    options = Arguments.parse(arguments)
    names = served_names(options.server, options.engine)
    num_gpus = gpus_of_a_replica(options.ray)
    max_num_seqs = options.max_num_seqs(num_gpus)
    bound = options.ray.load_bound(max_num_seqs)
    end = options.server.drain_timeout + CLOSE_TIMEOUT
    replica = serve.deployment(Replica).options(
        **_number(options.ray, max_num_seqs),
        ray_actor_options={"num_cpus": options.ray.num_cpus, "num_gpus": num_gpus},
        max_ongoing_requests=max_num_seqs + options.server.max_queue_length + ROOM_FOR_REFUSALS,
        health_check_period_s=options.ray.health_period,
        graceful_shutdown_timeout_s=end,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=LOGGING,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={"factor": bound.factor, "allowance": bound.allowance},
        ),
    )
    ingress = serve.deployment(Ingress).options(
        num_replicas=options.ray.num_ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=options.server.max_connections,
        graceful_shutdown_timeout_s=end,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=LOGGING,
    )
    replicas = replica.bind(options.engine, options.server, names)
    return ingress.bind(replicas, options.server, names, options.ray.replica_wait)


def deploy(
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "jaxpaged",
    route_prefix: str = "/",
    **arguments: Any,
) -> serve.handle.DeploymentHandle:
    """Starts Ray Serve, where it does not run yet, and the application; returns once it takes requests.

    Args:
      host, port: where Ray's proxies listen, if Ray Serve is started here.
      name: of the application, for ``ray.serve.delete``.
      route_prefix: path below which it answers.
      arguments: as of ``build_app``.

    Raises:
      ValueError: an option does not exist or does not fit.
      RuntimeError: no replica could be started, and why.
    """
    application = build_app({**arguments, "host": host})
    serve.start(http_options={"host": host, "port": port})
    try:
        return serve.run(application, name=name, route_prefix=route_prefix)
    except RuntimeError as error:
        failed = serve.status().applications[name].deployments
        reasons = [status.message for status in failed.values() if status.message]
        raise RuntimeError("\n".join([str(error), *reasons])) from error


def gpus_of_a_replica(options: RayOptions) -> float:
    """As asked for, or else 1 where the cluster has GPUs."""
    if options.num_gpus is not None:
        return options.num_gpus
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def _number(options: RayOptions, max_num_seqs: int) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.num_replicas}
    policy = AutoscalingPolicy(policy_function=wanted_replicas)
    config = AutoscalingConfig(
        min_replicas=options.num_replicas,
        max_replicas=options.max_replicas,
        target_ongoing_requests=options.target(max_num_seqs),
        upscale_delay_s=options.upscale_delay,
        downscale_delay_s=options.downscale_delay,
        policy=policy,
    )
    return {"autoscaling_config": config}
