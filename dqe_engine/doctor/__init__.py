"""What of this machine works for the engine: `examine` finds out, `dqe-doctor` prints it.

Every probe runs in a process of its own (`isolation`), so this package imports nothing but the standard library.
"""

from .description import Description, describe, first_lines
from .examination import all_findings, examine
from .findings import Finding, Status

__all__ = ["Description", "Finding", "Status", "all_findings", "describe", "examine", "first_lines"]
