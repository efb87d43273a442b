"""The policy: a vision-language model on megatron-core that is packed, scored, updated, saved and exported here."""
from sophiavl_fast.compat import torchvision_cpu

torchvision_cpu.install()

from sophiavl_fast.policy.policy import Policy, UpdateResult  # noqa: E402  (transformers must find torchvision importable)

__all__ = ["Policy", "UpdateResult"]
