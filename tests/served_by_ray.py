"""A server on Ray as a process, for tests: ``python served_by_ray.py ARGUMENTS`` with the application's arguments as JSON.

On SIGUSR1 it rolls out a configuration that differs in its description.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path

# A machine that others use takes longer than Ray waits by default, and gives its workers little.
SLOW_MACHINE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "600",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "300",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "5",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "20",
}


def replica_processes(server: int) -> list[int]:
    """Identifiers of the processes of engine replicas below a server's."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # It has ended meanwhile.
            if title.startswith(b"ray::ServeReplica:uso-engine:engines"):
                found.append(int(entry.name))

    def is_below(process: int) -> bool:
        while process in parents and process != server:
            process = parents[process]
        return process == server

    return sorted(filter(is_below, found))


def _main(table: str) -> None:
    from uso_engine.config import load_config
    from uso_engine.serving.json_log import log_as_json
    from uso_engine.serving.ray.application import application
    from uso_engine.serving.ray.arguments import read_arguments
    from uso_engine.serving.ray.start import NAME, serve_on_ray

    arguments = read_arguments(json.loads(table))
    config = load_config(arguments.config)

    def roll(*_: object) -> None:
        from ray import serve

        serve.run(
            application(arguments, config.model_copy(update={"description": "the next one"})), name=NAME, route_prefix="/"
        )
        logging.getLogger("uso_engine.test").info("rolled out")

    signal.signal(signal.SIGUSR1, roll)
    log_as_json()
    serve_on_ray(arguments, config, has_keys=False)


if __name__ == "__main__":
    _main(sys.argv[1])
