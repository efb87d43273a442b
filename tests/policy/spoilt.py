"""Two checkpoints of a run, the second to be spoilt, and what must come of it."""
import json
import zlib

import pytest
import torch

from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import checkpoint


def two_checkpoints(create, folder, out, form):
    """A policy and its second checkpoint; the weights changed between the two."""
    policy = create(folder, checkpoint={"format": form})
    checkpoint.save(policy, out, 1, {}, keep=9)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(1)
    return policy, checkpoint.save(policy, out, 2, {}, keep=9)


def weights(policy):
    return {name: t.clone() for name, t in policy.weights()}


def refused(policy, path, message, *, before_weights=False):
    """By `load`, with nothing changed, and where asked by refuse_unusable: in one line that names the other checkpoint."""
    before = weights(policy)
    attempts = [lambda: checkpoint.load(policy, path)] + [lambda: checkpoint.refuse_unusable(path, policy.config)] * before_weights
    for attempt in attempts:
        with pytest.raises(UserError, match=f"(?s)^checkpoint '{path}': .*{message}.*; another one is '{path.parent}/step_1'$") as told:
            attempt()
        assert "\n" not in str(told.value)
    assert all(torch.equal(t, before[n]) for n, t in policy.weights())


def agree(path):
    """Make the manifest's sizes and CRCs those of the files as they are: of a folder that was written that way."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: [len(data := (path / name).read_bytes()), zlib.crc32(data)] for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))
