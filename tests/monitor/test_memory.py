"""Memory counts the engines and graders that the trainer started."""
import subprocess
import sys

from sophiavl_fast.monitor import memory

CHILD = "x = bytearray(b'1' * (256 << 20)); {release}print('ready', flush=True); input()"


def child(release=""):
    process = subprocess.Popen([sys.executable, "-c", CHILD.format(release=release)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def test_a_child_counts_while_it_lives():
    before = memory.host_gib()
    process = child()
    during = memory.host_gib()
    process.communicate("\n", timeout=30)
    assert 0.25 <= during - before < 0.6
    assert memory.host_gib() - before < 0.1


def test_the_peak_remembers_what_was_given_back():
    process = child(release="x = None; ")
    assert memory.peak_gib() - memory.host_gib() >= 0.2
    process.communicate("\n", timeout=30)


def test_metrics_without_a_gpu_hold_the_host_alone():
    found = memory.metrics()
    assert 0 < found["mem/host_gib"] <= found["mem/peak_gib"]
    assert memory.gpu_peak_gib() is None or "mem/gpu_peak_gib" in found


def test_freed_pages_go_back_to_the_system():
    """Blocks below one that still lives: glibc keeps them by itself."""
    script = """
from sophiavl_fast.monitor import memory
blocks = [bytearray(b"1" * 60_000) for _ in range(4000)]
last, blocks = bytearray(b"1" * 60_000), None
before = memory.host_gib()
with memory.released_meanwhile():
    pass
print(before - memory.host_gib())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.15
