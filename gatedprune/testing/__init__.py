"""The contract suite: what gating promises, as checks that run on any model.

`case` makes the model that is checked and wakes it up, `oracle` holds the independent static reference,
`choice`, `equivalence`, `training` and `restoring` the checks themselves, and `suite` names them and runs
them.
"""

from .case import Case
from .suite import CHECKS, Check, check_model, parametrize_checks

__all__ = ["CHECKS", "Case", "Check", "check_model", "parametrize_checks"]
