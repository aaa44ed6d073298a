"""Getting gates to choose well: calibration in closed form, and what a training loop needs beside `penalty()`.

`contribution` measures what each channel gives to the layers that read it (`reader`), `moments` accumulates it, `ridge`
fits the predictors, `matching` follows what suppression does to batch norms, `passes` goes through the data with all of
these, `calibration` puts it in place; `norms` does for statically pruned models what `matching` does for gated ones.
`divergence` says how far an output moved, and `tempering`, by that, how far gates may go by the image. `allocation`
gives each site its ratio, `thresholds` its T; `oracle` chooses with hindsight, as a yardstick. For training, `rates`
gives predictors their learning rates, `schedule` raises the ratio, `distillation` compares with the dense model, and
`interrupt` makes Ctrl-C a request.
"""

from .allocation import Allocation, allocate
from .calibration import Calibration, SiteFit, bake_norms, calibrate, held_out_r2, match_norms
from .contribution import Contributions
from .distillation import Distillation, feature_loss, logit_loss, map_loss
from .interrupt import Interrupted, stop_on_signal
from .norms import reestimate_norms
from .oracle import OracleChoice
from .rates import parameter_groups, predictor_rates
from .schedule import RatioSchedule
from .thresholds import SiteThreshold, ThresholdFit, fit_thresholds
from .usage import most_used

__all__ = [
    "Allocation",
    "Calibration",
    "Contributions",
    "Distillation",
    "Interrupted",
    "OracleChoice",
    "RatioSchedule",
    "SiteFit",
    "SiteThreshold",
    "ThresholdFit",
    "allocate",
    "bake_norms",
    "calibrate",
    "feature_loss",
    "fit_thresholds",
    "held_out_r2",
    "logit_loss",
    "map_loss",
    "match_norms",
    "most_used",
    "parameter_groups",
    "predictor_rates",
    "reestimate_norms",
    "stop_on_signal",
]
