"""Steps sampled ahead: how long the engines worked on each, counted once, and what a checkpoint between them goes on from."""
import threading

import pytest

from sophiavl_fast.recipes import ahead
from sophiavl_fast.recipes.ahead import Ahead


class Drawn:
    """Counts what was drawn, as the loader's state does."""

    def __init__(self) -> None:
        self.count = 0

    def draw(self) -> list:
        self.count += 1
        return [f"prompt {self.count}"]

    def state(self) -> dict:
        return {"cursor": self.count}


@pytest.fixture
def clock(monkeypatch):
    """The time as the room sees it; a test sets it."""
    now = [0.0]
    monkeypatch.setattr(ahead.time, "perf_counter", lambda: now[0])
    return now


def test_work_on_two_steps_at_once_is_counted_once(clock):
    source, finish, begun = Drawn(), {step: threading.Event() for step in (1, 2, 3)}, {step: threading.Event() for step in (1, 2, 3)}

    def generate(prompts, step):
        begun[step].set()
        assert finish[step].wait(20)
        return prompts

    run = Ahead(source, source.draw, generate, depth=2, first=1, last=3)
    clock[0] = 10.0
    threading.Thread(target=lambda: (begun[1].wait(20), clock.__setitem__(0, 11.0), finish[1].set())).start()
    assert run.take(1, lambda: None) == (["prompt 1"], 1.0)
    assert all(begun[step].wait(20) for step in (2, 3))
    clock[0] = 14.0
    finish[2].set()
    assert run.take(2, lambda: None) == (["prompt 2"], 3.0)
    clock[0] = 16.0
    finish[3].set()
    assert run.take(3, lambda: None) == (["prompt 3"], 2.0), "from 11 to 14 the engines' work was step 2's"
    assert run.loader_state(3) == {"cursor": 3} and source.count == 3
    run.close()


def test_a_checkpoint_goes_on_from_the_step_that_was_taken():
    source = Drawn()
    run = Ahead(source, source.draw, lambda prompts, step: prompts, depth=1, first=5, last=7)
    for step in (5, 6):
        assert run.take(step, lambda: None)[0] == [f"prompt {step - 4}"]
        assert run.loader_state(step) == {"cursor": step - 4} and source.count == step - 3
    run.close()


def test_a_failure_is_the_takers_and_engines_are_tended_meanwhile():
    source, tended = Drawn(), threading.Event()

    def generate(prompts, step):
        assert tended.wait(20)
        raise RuntimeError("the wheel came off")

    run = Ahead(source, source.draw, generate, depth=1, first=1, last=2)
    with pytest.raises(RuntimeError, match="the wheel came off"):
        run.take(1, tended.set)
    run.close()
