"""From published weights to the published table: imported, exported, indexed, evaluated by protocol (docs/published-models.md)."""

from .run import Wish, reproduce

__all__ = ["Wish", "reproduce"]
