"""What engines are told by environment variables, and that the tools read them so."""
import os
import subprocess
import sys

import pytest

from sophiavl_fast.rollout.environment import child_environment, engine_variables

# vLLM's fp32 attention on a GPU in one line: a product whose precision nobody names
KERNEL = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def product(a, b, out):
    i = tl.arange(0, 32)
    at = i[:, None] * 32 + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))

compiled = triton.compile(ASTSource(product, {"a": "*fp32", "b": "*fp32", "out": "*fp32"}), target=GPUTarget("cuda", ARCH, 32))
print("tf32" if ".tf32" in compiled.asm["ptx"] else "fp32")
"""


@pytest.mark.parametrize("arch", [80, 90])
def test_engines_on_a_gpu_multiply_fp32_in_fp32(tmp_path, arch):
    """Log-probs of an fp32 engine are compared with the trainer's at 1e-4; TF32's ten bits are 3e-3 of a log-prob."""
    (tmp_path / "kernel.py").write_text(KERNEL.replace("ARCH", str(arch)))
    plain = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_F32_DEFAULT")} | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    precision = lambda env: subprocess.run([sys.executable, str(tmp_path / "kernel.py")], env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert precision(plain) == "tf32", "Triton's own default, which is why the variable is needed"
    assert precision(plain | engine_variables("cuda")) == "fp32"


def test_a_server_inherits_them_and_the_user_has_the_last_word():
    assert child_environment("cuda", {}, {})["TRITON_F32_DEFAULT"] == "ieee"
    assert child_environment("cuda", {"TRITON_F32_DEFAULT": "tf32x3"}, {})["TRITON_F32_DEFAULT"] == "tf32x3"
    assert "TRITON_F32_DEFAULT" not in child_environment("cpu", {}, {})
