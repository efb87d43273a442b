"""What a recipe refuses before it loads anything."""
import pytest

from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError
from sophiavl_fast.recipes import setup


def conf(**sections) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "data": {"train": "d"}} | sections)


def test_a_run_dir_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=rf"run.dir = '{place}' cannot be made: (File exists|Not a directory)"):
            setup.resume_point(conf(run={"dir": str(place)}))
    assert setup.resume_point(conf(run={"dir": str(tmp_path / "new" / "run")})) is None and (tmp_path / "new" / "run").is_dir()


def test_a_judge_that_is_not_there_is_named_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match=r"thinking.path = '.*none' is no model folder"):
        setup.refuse_missing_judge(conf(thinking={"backend": "local", "path": str(tmp_path / "none")}))
    with pytest.raises(UserError, match=r"thinking.template 'demo_jugde'.*did you mean 'demo_judge'"):
        setup.refuse_missing_judge(conf(thinking={"backend": "endpoint", "url": "http://h", "model": "m", "template": "demo_jugde"}))
    setup.refuse_missing_judge(conf(thinking={"backend": "local", "path": "none"}, algorithm={"name": "grpo"}))
    setup.refuse_missing_judge(conf(thinking={"path": "none", "template": "none"}))
