"""The Ray cluster that this process works on: that of RAY_ADDRESS, else one that is started here."""

from __future__ import annotations

from typing import Any

from dqe_engine.errors import BackendError


def connect(asked_by: str, *, remedy: str = "") -> Any:
    """The module `ray`, connected. asked_by: begins the message; remedy: what else one can do without Ray. Raises BackendError."""
    try:
        import ray
    except ImportError as error:
        raise BackendError(f"{asked_by}: Ray is not installed; pip install 'dqe-engine[ray]'{remedy}") from error
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except Exception as error:  # Ray raises this very class where a start takes longer than 30 s
            ray.shutdown()
            raise BackendError(
                f"{asked_by}: cannot connect to a cluster ({' '.join(str(error).split())[:200]}); check RAY_ADDRESS and the cluster's token"
            ) from error
    return ray
