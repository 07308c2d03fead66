"""Published models of this family, imported as checkpoints (docs/published-models.md)."""

from .importer import LAYOUTS, ImportOptions, Plan, import_model, plan_import

__all__ = ["LAYOUTS", "ImportOptions", "Plan", "import_model", "plan_import"]
