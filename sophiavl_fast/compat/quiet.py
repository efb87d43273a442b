"""The engines' notes about each other, kept off the terminal; what they fail with still comes through."""
from __future__ import annotations

import logging
import os
import warnings

NO_CUDA = {
    "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",   # torchao's CUDA libraries, each with a line of complaint
    "TORCH_CPP_LOG_LEVEL": "ERROR",               # on which NUMA node vLLM's CPU build puts its memory
}
LOGGERS = ("torch.utils._pytree", "torchao", "vllm.triton_utils.importing")


def quiet() -> None:
    """Before the first import of torch, in a program's own process; the user's environment wins."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|megatron|transformers)\b")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not os.path.exists("/dev/nvidiactl"):
        for name, value in NO_CUDA.items():
            os.environ.setdefault(name, value)
