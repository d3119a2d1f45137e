"""The application that Ray Serve runs: an ingress and engines; `build` is what its configuration files name."""

from __future__ import annotations

import os
from dataclasses import asdict

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from uso_engine.config import EngineConfig, load_config

from .arguments import ApplicationArguments, ReplicaArguments, ingress_bounds, read_arguments, server_settings
from .autoscaling import WorkScaling
from .ingress import Ingress
from .replica import EngineReplica
from .router import WorkRouter

_MARGIN_S = 30.0
"""Beyond the time that a request has, for what is still told and stored when a process is to end."""


def build(table: dict[str, object]) -> serve.Application:
    """An application from the ``args`` of a Serve configuration file.

    Args:
        table: fields of `ApplicationArguments`.

    Raises:
        ConfigError, MissingFileError: what cannot be used.
    """
    arguments = read_arguments(table)
    return application(arguments, load_config(arguments.config))


def application(arguments: ApplicationArguments, config: EngineConfig) -> serve.Application:
    """An application.

    Args:
        arguments: of it.
        config: of its engines.

    Raises:
        ConfigError: settings that contradict each other.
    """
    has_keys = arguments.keys is not None or bool(os.environ.get("USO_API_KEYS"))
    settings = server_settings(arguments.server, has_keys=has_keys)
    deadline_s = settings.bounds.deadline_s
    engines = engine_deployment(arguments.replicas, config, deadline_s)
    most_ongoing, most_held = ingress_bounds(settings, arguments.ingresses)
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=arguments.ingresses,
        max_ongoing_requests=most_ongoing,
        max_queued_requests=most_held,
        # It takes no GPU, so the new one is there before the old one goes.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=deadline_s + _MARGIN_S,
        ray_actor_options={"num_cpus": 0},  # It mostly waits.,
    )
    return ingress.bind(arguments, config, engines.bind(config, arguments.replicas.options, arguments.replicas.weights))


def engine_deployment(replicas: ReplicaArguments, config: EngineConfig, deadline_s: float) -> serve.Deployment:
    """The engines.

    Args:
        replicas: how many, and on what.
        config: of each.
        deadline_s: seconds that a request has.
    """
    scaling = AutoscalingConfig(
        min_replicas=replicas.least,
        max_replicas=replicas.most,
        initial_replicas=replicas.least,
        upscale_delay_s=replicas.upscale_s,
        downscale_delay_s=replicas.downscale_s,
        metrics_interval_s=max(0.5, replicas.report_s),
        look_back_period_s=max(2.0, 5 * replicas.report_s),
        policy=AutoscalingPolicy(policy_function=WorkScaling, policy_kwargs=asdict(replicas.scaling)),
    )
    return serve.deployment(
        EngineReplica,
        name="engines",
        autoscaling_config=scaling,
        # As many as the engine itself takes.
        max_ongoing_requests=config.queue.max_requests,
        max_queued_requests=replicas.most_unassigned(config),
        request_router_config=RequestRouterConfig(
            request_router_class=WorkRouter,
            request_router_kwargs=asdict(replicas.routing),
            request_routing_stats_period_s=replicas.report_s,
        ),
        graceful_shutdown_timeout_s=deadline_s + _MARGIN_S,
        health_check_period_s=5.0,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus_of(config)},
    )
