"""Getting gates to choose well: calibration in closed form, and what a training loop needs beside `penalty()`.

`contribution` measures what each channel gives to the layers that read it, `moments` accumulates it, `ridge` fits the
predictors, `calibration` puts them into the gates; `oracle` chooses with hindsight, as a yardstick. For training,
`schedule` raises the ratio and `distillation` compares with the dense model.
"""

from .calibration import Calibration, SiteFit, calibrate, held_out_r2
from .contribution import Contributions
from .distillation import Distillation, feature_loss, logit_loss, map_loss
from .oracle import OracleChoice
from .schedule import RatioSchedule

__all__ = [
    "Calibration",
    "Contributions",
    "Distillation",
    "OracleChoice",
    "RatioSchedule",
    "SiteFit",
    "calibrate",
    "feature_loss",
    "held_out_r2",
    "logit_loss",
    "map_loss",
]
