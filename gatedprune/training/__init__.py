"""Getting gates to choose well: calibration in closed form, without labels and without training.

`contribution` measures what each channel gives to the layers that read it (`reader`), `moments` accumulates it, `ridge`
fits the predictors, `matching` follows what suppression does to batch norms, and `calibration` puts it all in place.
`allocation` gives each site its ratio; `oracle` chooses with hindsight, as a yardstick.
"""

from .allocation import Allocation, allocate
from .calibration import Calibration, SiteFit, calibrate, held_out_r2, match_norms
from .contribution import Contributions
from .oracle import OracleChoice
from .thresholds import SiteThreshold, ThresholdFit, fit_thresholds

__all__ = [
    "Allocation", "Calibration", "Contributions", "OracleChoice", "SiteFit", "SiteThreshold", "ThresholdFit",
    "allocate", "calibrate", "fit_thresholds", "held_out_r2", "match_norms",
]  # fmt: skip
