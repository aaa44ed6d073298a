"""Getting gates to choose well: calibration in closed form, without labels and without training.

`contribution` measures what each channel gives to the layers that read it, `moments` accumulates it, `ridge` fits the
predictors, `calibration` puts them into the gates; `oracle` chooses with hindsight, as a yardstick.
"""

from .calibration import Calibration, SiteFit, calibrate, held_out_r2
from .contribution import Contributions
from .oracle import OracleChoice
from .usage import most_used

__all__ = ["Calibration", "Contributions", "OracleChoice", "SiteFit", "calibrate", "held_out_r2", "most_used"]
