"""The worker behind Ray Serve: replicas on several machines, one address for Immich.

    pip install 'immich-ml-metal[ray]'
    serve run --address auto ray_serve:service        # in this folder

Each replica is the ordinary worker app with its own models; Ray places the replicas, checks their
health, restarts them and updates them one after the other. Settings come from the environment of
the Ray workers (`ML_*`), or from the TOML file that ML_CONFIG_FILE names there. Every machine needs
the models on its own disk, or reaches the hub.
"""

from typing import Any

from ray import serve

from immich_ml_metal.logs import configure_logging
from immich_ml_metal.settings_sources import load_settings
from immich_ml_metal.worker.compose import build_app

HEALTH_PERIOD_S = 10
HEALTH_TIMEOUT_S = 30
# Immich gives up after 300 s; a replica that is replaced first answers what it has.
DRAIN_S = 130
# Enough to form batches, and few enough that the other replicas get their share.
REQUESTS_PER_REPLICA = 32


def build() -> Any:
    """Build the app inside the replica: its threads and models cannot travel."""
    settings = load_settings()
    configure_logging(settings, "worker")
    return build_app(settings)


Replica = serve.deployment(
    name="immich-ml",
    num_replicas=1,
    max_ongoing_requests=REQUESTS_PER_REPLICA,
    health_check_period_s=HEALTH_PERIOD_S,
    health_check_timeout_s=HEALTH_TIMEOUT_S,
    graceful_shutdown_timeout_s=DRAIN_S,
)(serve.ingress(build)())

service = Replica.bind()
