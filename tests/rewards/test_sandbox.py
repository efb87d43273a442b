import contextlib
import os
import resource
import subprocess
import sys
import threading

import psutil

from sophiavl_fast.config import Rewards as RewardsConfig
from sophiavl_fast.rewards.graders.task import Task
from sophiavl_fast.rewards.outcome import OutcomeScorer
from sophiavl_fast.rewards.sandbox import Sandbox
from tests.rewards.helpers import group

HANGS = Task("numerical", "10^{10^{10^{10}}}", "12")


def workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "sophiavl_fast.rewards.worker" in p.cmdline()]


def test_a_grader_that_hangs_is_killed_and_the_others_survive():
    tasks = [Task("numerical", "\\sqrt{144}", "12"), HANGS, Task("numerical", "x=12", "12"), Task("numerical", "x=13", "12"), HANGS._replace(gold="13"),
             Task("numerical", "12 cm", "12")]
    with Sandbox(workers=2, timeout_s=3, memory_mb=2048) as sandbox:
        grades = [f.result() for f in [sandbox.submit(t) for t in tasks]]
    assert [g.outcome for g in grades] == [1, 0, 1, 0, 0, 1]
    assert [bool(g.killed) for g in grades] == [False, True, False, False, True, False]
    assert "killed after 3 s" in grades[1].killed
    assert workers() == []


def test_graders_hold_no_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-user")
    monkeypatch.setenv("HARMLESS", "yes")
    with Sandbox(workers=1, timeout_s=30, memory_mb=2048) as sandbox:
        assert sandbox.submit(Task("numerical", "12", "12")).result().outcome == 1
        (worker,) = workers()
        assert "sk-of-the-user" not in worker.environ().values() and worker.environ()["HARMLESS"] == "yes"


def test_a_grader_that_eats_memory_is_ended_and_replaced():
    eater = Task("text", "a " * 40_000, "b " * 40_000)  # the table of its longest common subsequence wants 12 GB
    with Sandbox(workers=1, timeout_s=60, memory_mb=1200) as sandbox:
        hungry, after = sandbox.submit(eater), sandbox.submit(Task("numerical", "\\sqrt{144}", "12"))
        assert "memory limit 1200 MB" in hungry.result().killed
        assert after.result().outcome == 1


def test_a_worker_killed_from_outside_costs_one_grade():
    with Sandbox(workers=1, timeout_s=30, memory_mb=2048) as sandbox:
        assert sandbox.submit(Task("numerical", "x=12", "12")).result().outcome == 1
        (worker,) = workers()
        worker.kill()
        worker.wait()
        assert sandbox.submit(Task("numerical", "x=12", "12")).result().killed
        assert sandbox.submit(Task("numerical", "x=12", "12")).result().outcome == 1


def test_a_process_with_many_open_files_grades():
    """select() refuses descriptors from 1024 on; a trainer that holds a vLLM engine may have them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= 2048
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
        for _ in range(1100):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        with Sandbox(workers=1, timeout_s=30, memory_mb=2048) as sandbox:
            assert sandbox.submit(Task("numerical", "x=12", "12")).result().outcome == 1


def test_close_does_not_wait_for_a_hanging_grade():
    sandbox = Sandbox(workers=1, timeout_s=500, memory_mb=2048)
    assert sandbox.submit(Task("numerical", "x=12", "12")).result().outcome == 1
    running, waiting = sandbox.submit(HANGS), sandbox.submit(HANGS)
    sandbox.close()
    assert running.done() and waiting.cancelled()
    assert workers() == []


def test_grading_works_off_the_main_thread():
    """verl 5635: signal.alarm off the main thread made every math reward 0."""
    found: list[float] = []

    def work() -> None:
        with OutcomeScorer(RewardsConfig(workers=1)) as scorer:
            found.extend(scorer.score([group("numerical", "0.5", ["\\sqrt{0.25}", "\\sqrt{0.5}"])]).outcome.tolist())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1.0, 0.0]


def test_workers_end_with_their_parent(tmp_path):
    """A trainer that is killed outright leaves no grader behind, not even a hanging one."""
    code = ("import os, time; from sophiavl_fast.rewards.sandbox import Sandbox; from sophiavl_fast.rewards.graders.task import Task\n"
            "s = Sandbox(1, 2.0, 2048); s.submit(Task('numerical', 'x=1', '1')).result(); s.submit(Task('numerical', '10^{10^{10^{10}}}', '1'))\n"
            "print(s._workers[0]._process.pid, flush=True); time.sleep(0.3); os._exit(1)")
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120).stdout)
    if psutil.pid_exists(pid):
        gone, _ = psutil.wait_procs([psutil.Process(pid)], timeout=60)
        assert gone, "the kernel's processor limit did not end the orphan"


def test_odd_answers_are_wrong_and_harmless():
    noise = ['{"x": 1}', "1e999", "NaN", "\x00", "\ud800", "\\" * 5000, "{" * 5000, "(" * 5000, "\n" * 10]
    with OutcomeScorer(RewardsConfig(workers=1, timeout_s=2)) as scorer:
        assert scorer.score([group("numerical", "12", [*noise, "x=12"])]).outcome.tolist() == [0.0] * len(noise) + [1.0]
