"""The program starts itself again with glibc's heap in huge pages: once, as the same process, with the same arguments."""
import os
import subprocess
import sys

import pytest

from sophiavl_fast.compat import heap

CODE = ("import os, sys; print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.argv[1:], flush=True); "
        "from sophiavl_fast.compat.heap import restart_with_huge_pages as restart; restart(); print('on', flush=True)")


def run(**environment):
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", CODE, "train", "a b"], capture_output=True, text=True, env=clean | environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not heap._available() or os.path.exists("/dev/nvidiactl"), reason="no transparent huge pages here, or a GPU")
def test_it_starts_again_once_as_the_same_process():
    first, second, last = run()
    pid = first.split()[0]
    assert first == f"{pid} None ['train', 'a b']"
    assert second == f"{pid} {heap.TUNABLE} ['train', 'a b']"
    assert last == "on"


def test_tunables_of_the_users_own_stay():
    line, last = run(GLIBC_TUNABLES="glibc.malloc.check=0")
    assert "glibc.malloc.check=0" in line and last == "on"


def test_a_system_without_them_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for mode in ("always madvise [never]", None):
        monkeypatch.setattr(heap, "MODE", tmp_path / "enabled")
        if mode:
            (tmp_path / "enabled").write_text(mode)
        else:
            (tmp_path / "enabled").unlink()
        heap.restart_with_huge_pages()
        assert "GLIBC_TUNABLES" not in os.environ


def test_what_the_user_says_of_the_caches_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"LRU_CACHE_CAPACITY": "7"})
    heap.bound_caches()
    assert os.environ == {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": heap.CACHES["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]}
