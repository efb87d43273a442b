"""The policy: a vision-language model on megatron-core that is packed, scored, updated, saved and exported here."""
from sophiavl_fast.compat import torchvision_cpu

torchvision_cpu.install()  # before anything imports transformers

from sophiavl_fast.compat import megatron_cpu  # noqa: E402, F401  (its warning filters, before anything imports megatron)
from sophiavl_fast.policy.policy import Policy, UpdateResult  # noqa: E402

__all__ = ["Policy", "UpdateResult"]
