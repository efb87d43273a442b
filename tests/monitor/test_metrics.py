"""The run's logs: what a resumed or killed run leaves behind is exactly the steps up to its checkpoint."""
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sophiavl_fast.config import Config, Monitor
from sophiavl_fast.errors import UserError
from sophiavl_fast.monitor import jsonl
from sophiavl_fast.monitor.metrics import RunLog

QUIET = Config(monitor=Monitor(tensorboard=False))


def lines(path):
    return [json.loads(x, parse_constant=pytest.fail) for x in path.read_text().splitlines()]


def write_steps(run_dir, first, last, resume_step=None):
    log = RunLog(run_dir, QUIET, resume_step)
    for step in range(first, last + 1):
        log.samples([{"step": step, "id": f"p{i}"} for i in range(3)])
        log.metrics(step, {"loss": step / 7})
    log.close()


def test_resume_cuts_both_files_back_to_the_checkpoint(tmp_path):
    write_steps(tmp_path, 0, 9)
    before = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "samples.jsonl").read_bytes()
    write_steps(tmp_path, 6, 9, resume_step=5)
    assert before == ((tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "samples.jsonl").read_bytes())
    RunLog(tmp_path, QUIET, 5).close()
    assert [x["step"] for x in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert [x["step"] for x in lines(tmp_path / "samples.jsonl")] == [s for s in range(6) for _ in range(3)]


def test_a_new_run_starts_both_files_anew(tmp_path):
    write_steps(tmp_path, 0, 3)
    RunLog(tmp_path, QUIET, None).close()
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text() == ""


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4}', "\0\0\0\0"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write_steps(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write_steps(tmp_path, 4, 5, resume_step=4)
    assert [x["step"] for x in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_damage_before_the_last_line_is_an_error_with_its_line(tmp_path):
    write_steps(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 1,', '{"step" 1,'))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 "):
        RunLog(tmp_path, QUIET, 3)


def test_nan_and_infinity_become_null_and_numbers_keep_their_kind(tmp_path):
    log = RunLog(tmp_path, QUIET, None)
    log.metrics(1, {"nan": math.nan, "inf": -math.inf, "int": 7, "np_int": np.int64(8), "np": np.float32(0.5), "t": torch.tensor(2.5),
                    "t_nan": torch.tensor(math.nan), "list": [1, math.nan], "flag": True})
    log.samples([{"step": 1, "thinking": math.nan, "response": "a\u2028b \ud800 é"}])
    log.close()
    raw = (tmp_path / "metrics.jsonl").read_text()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "nan": None, "inf": None, "int": 7, "np_int": 8, "np": 0.5, "t": 2.5, "t_nan": None,
                                                  "list": [1, None], "flag": True}]
    assert '"int": 7,' in raw and '"np_int": 8,' in raw and '"step": 1,' in raw
    sample = json.loads((tmp_path / "samples.jsonl").read_text())
    assert sample["thinking"] is None and sample["response"] == "a\u2028b \ud800 é"


def test_no_step_is_written_twice(tmp_path):
    write_steps(tmp_path, 0, 3)
    log = RunLog(tmp_path, QUIET, 3)
    for step in (2, 3):
        with pytest.raises(ValueError, match="after those of step 3"):
            log.metrics(step, {})
    with pytest.raises(ValueError, match="after those of step 3"):
        log.samples([{"step": 2}])
    log.close()


def test_what_was_written_survives_a_kill(tmp_path):
    code = """
import os, sys
from sophiavl_fast.config import Config, Monitor
from sophiavl_fast.monitor.metrics import RunLog
log = RunLog(sys.argv[1], Config(monitor=Monitor(tensorboard=False)), None)
log.metrics(1, {"loss": 0.5}); log.samples([{"step": 1}]); os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}] and lines(tmp_path / "samples.jsonl") == [{"step": 1}]


def test_samples_can_be_turned_off(tmp_path):
    log = RunLog(tmp_path, Config(monitor=Monitor(tensorboard=False, samples=False)), None)
    log.samples([{"step": 1}])
    log.close()
    assert (tmp_path / "samples.jsonl").read_text() == ""


def test_records_are_found_again_by_their_first_byte(tmp_path):
    write_steps(tmp_path, 0, 4)
    path = tmp_path / "samples.jsonl"
    starts = [start for start, _, record in jsonl.scan(path) if record["id"] == "p1"]
    assert [r["step"] for r in jsonl.at(path, starts)] == [0, 1, 2, 3, 4]


def test_tensorboard_holds_the_same_numbers_and_forgets_purged_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(resume_step, steps, shift):
        log = RunLog(tmp_path, Config(), resume_step)
        for step in steps:
            log.metrics(step, {"loss": step + shift, "missing": math.nan})
        log.close()

    run(None, range(6), 0.0)
    time.sleep(1.1)  # event files are named, and read in order, by the second
    run(3, range(4, 6), 0.25)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4.25), (5, 5.25)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_one_clear_line(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"monitor.{name}: true, but {name} cannot be imported") as error:
        RunLog(tmp_path, Config(monitor=Monitor(tensorboard=False, **{name: True})), None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("environ", "refused"), [({}, True), ({"WANDB_API_KEY": "0" * 40}, False), ({"WANDB_MODE": "offline"}, False)])
def test_wandb_that_would_ask_who_logs_is_refused_before_weights_load(tmp_path, environ, refused):
    """In a process of its own: wandb reads its settings once."""
    pytest.importorskip("wandb", reason="an optional logger")
    code = ("from sophiavl_fast.config import Config, Monitor; from sophiavl_fast.monitor.loggers import refuse_missing_loggers\n"
            "refuse_missing_loggers(Config(monitor=Monitor(tensorboard=False, wandb=True)))")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept | {"HOME": str(tmp_path)} | environ)
    assert ("UserError: monitor.wandb: true, but wandb has no API key" in done.stderr) is refused and (done.returncode != 0) is refused


def test_a_record_without_its_step_is_named_when_a_run_is_resumed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 2.0}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2: no step"):
        jsonl.cut(path, 1)
    assert path.read_text().count("\n") == 2
