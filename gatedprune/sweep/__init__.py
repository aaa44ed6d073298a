"""The contract suite on one model of every timm family, and site discovery on every timm architecture.

`python -m gatedprune.sweep families`, `… architectures`, `… page`. `catalogue` says which models, `jobs` what is done
with one, `runner` does it in a process each and writes tables, `page` makes docs/families.md of them.
"""

from .catalogue import Entry, catalogue, smallest
from .jobs import architecture_job, family_job
from .page import families_page
from .runner import Table, run_all

__all__ = ["Entry", "Table", "architecture_job", "catalogue", "families_page", "family_job", "run_all", "smallest"]
