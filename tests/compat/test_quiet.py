"""What a terminal sees of the engines' imports: nothing, in a process that has asked for it."""
import os
import subprocess
import sys

from sophiavl_fast.compat.quiet import NO_CUDA


def test_imports_say_nothing():
    environment = {k: v for k, v in os.environ.items() if k not in NO_CUDA}
    code = "from sophiavl_fast.compat.quiet import quiet; quiet(); import torchao, vllm.triton_utils"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
