"""Many replicas of the server on a Ray cluster: ``serve run jaxpaged.serve.ray_app:build_app model=FOLDER``.

::

    clients -- Ray's HTTP proxies -- Ingress -- PrefixRouter --+-- Replica 1: the server's application, an engine
                                                               +-- Replica 2
                                                               +-- ...

Each ``Replica`` runs the whole application of ``jaxpaged serve``, so requests, errors, streams and metrics are the
same. The ``Ingress`` guards (keys, sizes, hosts), reads what a prompt begins with, and passes the answer through;
``PrefixRouter`` chooses the replica. Needs the extra ``ray``.

Ray carries chunks from process to process. With the variable ``RAY_SERVE_USE_GRPC_BY_DEFAULT=1``, which is Ray's and
has to be set when the cluster is started, that costs less.
"""

from typing import TYPE_CHECKING

from jaxpaged.models.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from jaxpaged.serve.ray_app.application import build_app, deploy
    from jaxpaged.serve.ray_app.options import RayOptions

__all__ = ["RayOptions", "build_app", "deploy"]

# What of this package works without Ray is tested without it.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "RayOptions": "jaxpaged.serve.ray_app.options",
        "build_app": "jaxpaged.serve.ray_app.application",
        "deploy": "jaxpaged.serve.ray_app.application",
    },
)
