"""Records on disk -> Prompt: registry, record formats, prompt templates, images, the resumable loader, the check."""
from sophiavl_fast.data.check import check_before_training, check_dataset
from sophiavl_fast.data.loader import Loader, open_eval
from sophiavl_fast.data.processor import Processor

__all__ = ["Loader", "Processor", "check_before_training", "check_dataset", "open_eval"]
