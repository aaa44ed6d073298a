"""Fine-tuning a gated, a pruned or a dense model with one recipe: timm's parts on Hugging Face Accelerate.

`options` say what to do, `data` and `models` make what is trained and on what, `loop` trains, `checkpoint` keeps the
state, `chance` makes every random draw a function of its place, `command` puts them together; `trials` are several
trainings that are to be compared. Needs the extra `train`.
"""

try:
    import accelerate as _accelerate  # noqa: F401
    import tqdm as _tqdm  # noqa: F401
except ImportError as error:
    raise ImportError("Fine-tuning needs accelerate and tqdm: pip install 'gatedprune[train]'.") from error

from ..training import Interrupted
from .command import RESULT, Finetuned, finetune
from .loop import DivergedError, Trainer, is_main_process
from .models import load_finetuned
from .options import CALIBRATIONS, PRECISIONS, FinetuneConfig
from .trials import WAYS, Trial, Trials

__all__ = [
    "CALIBRATIONS",
    "PRECISIONS",
    "RESULT",
    "WAYS",
    "DivergedError",
    "FinetuneConfig",
    "Finetuned",
    "Interrupted",
    "Trainer",
    "Trial",
    "Trials",
    "finetune",
    "is_main_process",
    "load_finetuned",
]
