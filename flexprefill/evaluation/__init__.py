"""Does sparse attention still answer? Questions for pretrained models and for a small one of our own, and scores."""

from flexprefill.evaluation.calibration import calibrate, calibrate_decoder
from flexprefill.evaluation.model import Decoder, ModelSizes, load_model, save_model
from flexprefill.evaluation.scoring import Share, ask, right_answers, text_loss
from flexprefill.evaluation.tasks import TASKS, Samples
from flexprefill.evaluation.text import babble, passages, read_text

__all__ = [
    "TASKS",
    "Decoder",
    "ModelSizes",
    "Samples",
    "Share",
    "ask",
    "babble",
    "calibrate",
    "calibrate_decoder",
    "load_model",
    "passages",
    "read_text",
    "right_answers",
    "save_model",
    "text_loss",
]
