"""The whole service as an application of Ray Serve, for KubeRay: `serve run app.distributed.ingress:application`.

    client -> HTTP proxy of Ray Serve -> replica of the deployment `api`: `create_app` -> replicas of the models

Each replica of `api` is one service without the HTTP server of `app.server`. Its settings come from the environment of
its node. With CIFAR100_CLUSTER=auto, it deploys the models to the same cluster; without it, it computes them itself.
"""

from fastapi import FastAPI
from ray import serve

from app.main import create_app
from app.settings import Settings


def create_replica() -> FastAPI:
    """Create the application of a replica. No request counts as local, because the proxy may listen on any address."""
    return create_app(Settings(host="0.0.0.0"))  # noqa: S104


application = serve.deployment(name="api")(serve.ingress(create_replica)()).bind()
