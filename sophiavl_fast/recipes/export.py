"""`export CHECKPOINT OUT`: a checkpoint as a Hugging Face folder."""
from __future__ import annotations

import json
from pathlib import Path

from sophiavl_fast import config as tree
from sophiavl_fast import config_checks, model_folder
from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import Policy, checkpoint
from sophiavl_fast.recipes import setup


def export(folder: Path, out: Path) -> int:
    """Rebuild the policy that the checkpoint describes, load it and write `out`; returns the exit code.

    In host memory, once the model's weights: the run's GPUs may be of another machine. Raises UserError: `out` is taken or cannot be made, no usable
    checkpoint or model.
    """
    out = out.absolute()  # "." has no name
    config_checks.refuse_no_place(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' exists and is not an empty folder")
    state = setup.read_state(folder)
    config = tree.build(state["config"], str(folder))
    config.parallel, config.device, config.policy = tree.Parallel(), "cpu", tree.PolicyConf()
    model_folder.refuse_unreadable(config.model.path)
    checkpoint.refuse_unusable(folder, config)
    policy = Policy.create(config, reference=False, total_steps=1, trained=False)
    try:
        checkpoint.load(policy, folder, optimizer=False)
        policy.export(out)
    finally:
        policy.close()
    print(json.dumps({"step": state["step"], "out": str(out)}))
    return 0
