"""The config tree: every shipped file loads, unknown keys name their neighbour, impossible combinations are refused in one line."""
import re
import shlex
from pathlib import Path

import pytest
import yaml

from sophiavl_fast import cli, config, config_checks, config_ranges
from sophiavl_fast.errors import UserError
from sophiavl_fast.monitor import fit

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WORLD = {"trust_grpo_qwen3_vl_4b.yaml": 8, "trust_grpo_qwen3_vl_8b.yaml": 8, "trust_grpo_qwen3_vl_32b.yaml": 16, "trust_grpo_internvl3_2b.yaml": 8,
         "trust_grpo_internvl3_8b.yaml": 8, "trust_grpo_internvl3_38b.yaml": 16, "trust_grpo_qwen2_5_vl_3b.yaml": 1, "trust_grpo_repo.yaml": 8,
         "trust_grpo_qwen2_5_vl_7b.yaml": 8}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_shipped_config_loads(path):
    tree = config.load(path, world_size=8 if path.parent.name == "ablations" else WORLD.get(path.name, 1))
    assert config.build(yaml.safe_load(config.dump(tree))) == tree  # the resolved file reads back as the same tree


def test_paper_config_says_what_the_paper_says():
    c = config.load(CONFIGS / "trust_grpo_qwen2_5_vl_7b.yaml", world_size=8)
    assert (c.rollout.prompts_per_step, c.rollout.n, c.run.steps) == (8, 8, 1500)
    assert (c.trust.alpha, c.trust.mode, c.trust.anneal, c.algorithm.kl_coef, c.optim.lr) == (0.3, "paper", "exp", 0.04, 5e-7)
    assert (c.data.max_prompt_tokens, c.rollout.max_new_tokens, c.model.freeze_vision) == (8192, 1024, False)
    assert (c.model.min_pixels, c.model.max_pixels) == (262144, 4194304)


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


GOOD = "model: {path: m}\ndata: {train: d}\n"


@pytest.mark.parametrize("text,overrides,expected", [
    ("rollot: {n: 2}", [], "unknown key 'rollot'; did you mean 'rollout'?"),
    (GOOD, ["rollout.promts_per_step=4"], "unknown key 'rollout.promts_per_step'; did you mean 'rollout.prompts_per_step'?"),
    (GOOD, ["lr=1"], "valid: optim.lr"),
    (GOOD, ["run=3"], "'run' is a section"),
    (GOOD, ["run.steps"], "expected key=value"),
    (GOOD, ["run.steps=ten"], "run.steps = 'ten'"),
    (GOOD, ["run.steps=0"], "run.steps = 0: must be at least 1"),
    (GOOD, ["trust.mode=papr"], "trust.mode = 'papr'"),
    (GOOD, ["rollout.prompts_per_step=6", "algorithm.mini_batches=4"], "algorithm.mini_batches = 4"),
    (GOOD, ["parallel.tensor=2"], "does not divide the 1 processes"),
    (GOOD, ["parallel.context=2"], "parallel.tensor x pipeline x context = 2 does not divide the 1 processes"),
    (GOOD, ["parallel.data=3"], "parallel.data = 3"),
    (GOOD, ["parallel.sequence=true"], "needs parallel.tensor > 1"),
    (GOOD, ["rollout.engine=inline", "rollout.urls=[http://127.0.0.1:8000]"], "rollout.urls is set"),
    (GOOD, ["rollout.engine=inline", "rollout.transfer=gloo"], "inline uses inproc"),
    (GOOD, ["thinking.backend=local"], "needs thinking.path"),
    (GOOD, ["thinking.backend=endpoint"], "OPENAI_API_URL"),
    (GOOD, ["thinking.quorum=0"], "thinking.quorum = 0"),
    (GOOD, ["algorithm.sigma_filter=3"], "needs algorithm.normalize: batch"),
    (GOOD, ["eval.every=5"], "data.eval names no dataset"),
    (GOOD, ["rollout.temperature=0.005"], "rollout.temperature = 0.005: must be at least 0.01"),
    (GOOD, ["eval.temperature=0.005"], "eval.temperature = 0.005: must be 0 or at least 0.01"),
    (GOOD, ["rollout.engines=0"], "rollout.engines = 0: must be at least 1"),
    (GOOD, ["rollout.max_restarts=-1"], "rollout.max_restarts = -1: must be at least 0"),
    (GOOD, ["rollout.engine=inline", "rollout.engines=2"], "are for spawned servers; use rollout.engine=server"),
    (GOOD, ["rollout.engines=2", "rollout.urls=[http://127.0.0.1:8000]"], "rollout.engines and rollout.gpus have nothing to act on"),
    (GOOD, ["rollout.engines=2", "rollout.gpus=[1]"], "need 2 different GPUs"),
    (GOOD, ["rollout.gpus=[1]", "rollout.transfer=ipc"], "ipc reaches engines on the trainer's own GPU only"),
    (GOOD, ["rollout.engine=inline", "rollout.tensor_parallel=2"], "rollout.tensor_parallel = 2: rollout.engine: inline is an engine of one device"),
    (GOOD, ["device=cpu", "rollout.transfer=nccl"], "rollout.transfer = nccl needs a GPU; on device: cpu use gloo (or auto)"),
    (GOOD, ["policy.attention=flash_attn", "device=cpu"], "policy.attention = flash_attn is for bf16 on a GPU (here device: cpu"),
    (GOOD, ["policy.attention=flash_attn", "model.dtype=float32"], "model.dtype: float32); use varlen"),
    (GOOD, ["device=cpu", "rollout.transfer=ipc"], "rollout.transfer = ipc needs a GPU"),
    (GOOD, ["rollout.urls=[127.0.0.1:8000]"], "rollout.urls: '127.0.0.1:8000' is no server's URL, such as http://127.0.0.1:8000"),
    (GOOD, ["rollout.urls=['http://h:1/v1']"], "rollout.urls: 'http://h:1/v1' is no server's URL"),
    (GOOD, ["rollout.urls=['http://h:1?x']"], "rollout.urls: 'http://h:1?x' is no server's URL"),
    (GOOD, ["rollout.urls=['http://h:1','http://h:1']"], "rollout.urls names 'http://h:1' twice"),
    (GOOD, ["rollout.urls=['http://[::1]:8000']"], "rollout.urls: 'http://[::1]:8000' is an IPv6 address, but weights travel by IPv4"),
    (GOOD, ["rollout.urls=['http://']"], "rollout.urls: 'http://' is no server's URL"),
    (GOOD, ["rollout.urls=[ftp://h:1]"], "rollout.urls: 'ftp://h:1' is no server's URL"),
    (GOOD, ["rollout.urls=['http://h:80a']"], "rollout.urls: 'http://h:80a' is no server's URL"),
    (GOOD, ["rollout.sleep=true", "rollout.staleness=1"], "rollout.sleep: true needs rollout.staleness: 0 (it is 1)"),
    (GOOD, ["rollout.sleep=true", "rollout.urls=[http://127.0.0.1:8000]"], "rollout.sleep: true needs engines on the trainer's own GPUs"),
    (GOOD, ["rollout.sleep=true", "rollout.gpus=[1]"], "the memory of those on rollout.gpus is of no use"),
    (GOOD, ["rollout.staleness=-1"], "rollout.staleness = -1: must be at least 0"),
    (GOOD, ["rollout.staleness=1", "rollout.engine=inline"], "needs rollout.engine: server"),
    (GOOD, ["debug.replay=r", "debug.record=r"], "debug.replay starts no engine"),
    (GOOD, ["debug.replay=nowhere", "eval.every=2", "data.eval=e"], "debug.replay = 'nowhere' holds no recorded step"),
    (GOOD, ["debug.replay="], "debug.replay = '' names no folder; name one, or null for none"),
    (GOOD, ["debug.record=''"], "debug.record = '' names no folder"),
    (GOOD, ["run.steps="], "run.steps = '': input should be a valid integer"),
    (GOOD, ["algorithm.mismatch_cap=1"], "algorithm.mismatch_cap = 1"),
    ("data: {train: d}", [], "model.path is empty"),
    ("model: {path: m}", [], "data.train is empty"),
    ("- 1", [], "must hold a mapping"),
    ("a: [", [], "is not YAML"),
    ("base: 5", [], "base = 5, expected the name of a file beside it"),
    ("base: [a.yaml]", [], "base = ['a.yaml'], expected the name"),
    ("base: c.yaml", [], "base = 'c.yaml' leads back to itself"),
    ('base: "a\\0b"', [], "expected the name of a file beside it"),
    (GOOD, ["run.steps=true"], "run.steps = true: expected a number"),
    (GOOD, ["optim.lr=.nan"], "optim.lr = nan: must be a finite number"),
    (GOOD, ["trust.alpha=.inf"], "trust.alpha = inf: must be a finite number"),
    (GOOD, ["rollout.max_logprob_diff=.nan"], "rollout.max_logprob_diff = nan: must be a finite number"),
    (GOOD, ["thinking.samples=0"], "thinking.samples = 0: must be at least 1"),
    (GOOD, ["eval.limit=-1"], "eval.limit = -1: must be at least 1"),
    (GOOD, ["optim.beta1=1"], "optim.beta1 = 1.0: must lie in [0, 1)"),
    (GOOD, ["run.seed=-1"], "run.seed = -1: must lie in [0, 2^32)"),
    (GOOD, ["rollout.port=99999"], "rollout.port = 99999: must lie in [0, 65535]"),
    (GOOD, ["rollout.gpu_memory_utilization=5"], "rollout.gpu_memory_utilization = 5.0: must lie in (0, 1]"),
    (GOOD, ["algorithm.dual_clip=1"], "algorithm.dual_clip = 1.0: must be greater than 1"),
    (GOOD, ["data.train={demo: {a: 1}}"], "data.train.demo: key 'a': input should be a valid integer"),
    (GOOD, ["data.train={a: 1, b: {0: x}}"], "data.train.b.0 = 'x': input should be a valid number"),
    (GOOD, ["data.train={a: x}"], "data.train.a = 'x': input should be a valid number"),
    (GOOD, ["data.train={a: null}"], "data.train.a = None: input should be a valid number"),
    (GOOD, ["data.train={a: [1]}"], "data.train.a = [1]: input should be a valid number"),
    (GOOD, ["data.train={null: 1}"], "data.train: key None: input should be a valid string"),
    (GOOD, ["data.train={a: {0.5: 1}}"], "data.train.a: key 0.5: input should be a valid integer"),
    (GOOD, ["data.train={3: 1}"], "data.train: key 3: input should be a valid string"),
    (GOOD, ["data.train=3"], "data.train = 3: input should be a valid string"),
    (GOOD, ["data.train={true: 1}"], "data.train: key true: quote it where a name is meant"),
    (GOOD, ["data.train={on: {0: 1}}"], "data.train: key true: quote it"),
    (GOOD, ["data.train={a: {true: 1}}"], "data.train.a: key true: quote it"),
    (GOOD, ["data.train={a: true}"], "data.train.a = true: expected a number"),
    (GOOD, ["data.train={a: {0: no}}"], "data.train.a.0 = false: expected a number"),
    (GOOD, ["rollout.gpus=[0, true]"], "rollout.gpus.1 = true: expected a number"),
    (GOOD, ["rollout.gpus=[x]"], "rollout.gpus.0 = 'x': input should be a valid integer"),
    (GOOD, ["rollout.urls=[true]"], "rollout.urls.0 = True: input should be a valid string"),
    (GOOD, ["model.min_pixels=9", "model.max_pixels=8"], "model.min_pixels = 9 is more than model.max_pixels = 8"),
])
def test_bad_input_is_one_line(tmp_path, text, overrides, expected):
    with pytest.raises(UserError) as error:
        config.load(write(tmp_path, text), overrides, environ={})
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_what_is_wrong_with_a_recording_comes_before_what_it_asks_for(tmp_path):
    over = [f"debug.replay={tmp_path}/kept", "eval.every=2", "data.eval=e"]
    with pytest.raises(UserError, match=r"debug.replay = '.*kept' holds no recorded step"):
        config.load(write(tmp_path, GOOD), over)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "step_1-0.jsonl").touch()
    with pytest.raises(UserError, match=r"^debug.replay starts no engine, .* set eval.every=0 .it is 2.$"):
        config.load(write(tmp_path, GOOD), over)


def test_an_empty_override_is_an_empty_text(tmp_path):
    c = config.load(write(tmp_path, GOOD + "debug: {record: kept}\n"), ["data.eval=", "debug.record=null"])
    assert (c.data.eval, c.debug.record) == ("", None)


def test_every_replica_has_a_server_of_its_own(tmp_path):
    path, servers = write(tmp_path, GOOD), "rollout.urls=[http://a:1,https://b]"
    config.load(path, [servers, "parallel.tensor=2"], world_size=4)
    config.load(path, [servers, "debug.replay=r"], world_size=4)      # starts none
    with pytest.raises(UserError, match=r"rollout.urls names 2 servers for 4 data-parallel replicas; each replica needs its own$"):
        config.load(path, [servers], world_size=4)


@pytest.mark.parametrize("overrides,environ,expected", [
    (["device=cuda", "rollout.engines=2"], {}, "rollout.engines = 2: beside the trainer a replica has one engine, .* rollout.gpus"),
    (["device=cuda", "rollout.tensor_parallel=2", "rollout.engines=2"], {}, "rollout.tensor_parallel = 2: beside the trainer .* rollout.urls$"),
    (["rollout.urls=[http://a:1]"], {}, "not the environment variable SOPHIAVL_ROLLOUT_TOKEN with the servers' token: the one that "
     "`python -m sophiavl_fast.rollout.serve CONFIG` was started with$"),
    (["device=cuda", "rollout.urls=[http://a:1]", "rollout.tensor_parallel=2"], {config_checks.TOKEN_VARIABLE: "t"}, None),
    (["device=cuda", "rollout.engines=2", "rollout.tensor_parallel=2", "rollout.gpus=[4,5,6,7]"], {}, None),
    (["device=cuda", "rollout.transfer=nccl"], {}, "rollout.transfer = nccl reaches engines on GPUs of their own: .* takes ipc"),
    (["device=cuda", "rollout.gpus=[1]"], {"LOCAL_WORLD_SIZE": "2"}, "the trainer's processes are on the first 2 GPUs, so GPU 1 .* begin at 2$"),
    (["device=cuda", "rollout.gpus=[1]"], {"LOCAL_WORLD_SIZE": "1"}, None),
    (["device=cuda", "rollout.gpus=[2]"], {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, r"\[2\] are the GPUs of one node, but this run's 4 .*2 on"),
    (["device=cuda", "rollout.gpus=[0]"], {"CUDA_VISIBLE_DEVICES": "4"}, None),       # numbers among others
    (["device=cuda", "rollout.engines=2", "debug.replay=r"], {}, None),
    (["device=cuda", "rollout.engines=2", "recipe=sft"], {}, None),
    (["device=cuda"], {}, None),
    (["device=cpu", "rollout.engines=2", "rollout.tensor_parallel=2"], {}, None),     # shares of its cores
], ids=str)
def test_engines_have_a_place_before_a_run_starts(tmp_path, overrides, environ, expected):
    """What `train` refuses of a configuration that may well be read, on machines without its GPUs and servers."""
    tree = config.load(write(tmp_path, GOOD), overrides)
    if expected is None:
        return config_checks.check_start(tree, environ)
    with pytest.raises(UserError, match=expected):
        config_checks.check_start(tree, environ)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_the_doctor_reads_every_shipped_configuration_without_its_processes(path, monkeypatch):
    """On a laptop, for as many processes as the layout asks for, or as WORLD_SIZE says."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tree = config.load(path, world_size=None)
    row = next(row for row in fit.rows(tree, []) if row.name == "layout")
    assert row.status == "OK" and row.found.startswith(f"{config_checks.least_processes(tree)} processes = tensor {tree.parallel.tensor}")


@pytest.mark.parametrize("overrides,processes", [
    (["parallel.tensor=2", "rollout.engines=2", "rollout.gpus=[4,5,6,7]"], 4),     # half the node; two replicas, an engine a GPU
    (["parallel.tensor=4", "parallel.pipeline=4"], 16),                            # two such nodes
    (["parallel.tensor=2", "parallel.data=2"], 4),
    (["parallel.tensor=2"], 8),
    (["rollout.engine=inline"], 1),
], ids=str)
def test_the_doctor_counts_processes_as_a_node_of_eight_gpus_would_run_them(tmp_path, monkeypatch, overrides, processes):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tree = config.load(write(tmp_path, GOOD), ["device=cuda", "rollout.prompts_per_step=32", *overrides], world_size=None)
    row = next(row for row in fit.rows(tree, [{"name": "GPU", "bytes": 80 << 30}] * 8) if row.name == "layout")
    assert (row.status, row.found.partition(" ")[0]) == ("OK", str(processes)), row


@pytest.mark.parametrize("text", ["", "0", "-1", "8x"])
def test_a_number_of_processes_that_is_none(monkeypatch, capsys, text):
    monkeypatch.setenv("WORLD_SIZE", text)
    assert cli.main(["train", str(CONFIGS / "demo.yaml")]) == 2
    assert f"the environment variable WORLD_SIZE = '{text}': expected a whole number of at least 1" in capsys.readouterr().err


MEETING = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("change,expected", [
    ({"RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None}, "WORLD_SIZE = 2 is set without RANK, MASTER_ADDR, MASTER_PORT: each of 2 processes"),
    ({"MASTER_PORT": None, "RANK": "0"}, "WORLD_SIZE = 2 is set without MASTER_PORT"),
    ({"RANK": "2"}, "RANK = '2': expected a whole number from 0 to 1 (WORLD_SIZE - 1)"),
    ({"RANK": "first"}, "RANK = 'first': expected a whole number from 0 to 1"),
    ({"MASTER_PORT": "0", "RANK": "0"}, "MASTER_PORT = '0': expected a port"),
    ({"MASTER_ADDR": None}, None),        # the first rank says it
], ids=str)
def test_processes_that_cannot_meet_are_refused(monkeypatch, capsys, change, expected):
    """Whoever started them: each would train alone, in the others' folder."""
    for name, value in (MEETING | change).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert cli.main(["train", str(CONFIGS / "demo.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (expected is not None) and all(expected in line for line in lines), lines


@pytest.mark.parametrize("overrides,processes,asked", [
    (["parallel.tensor=2"], 2, "parallel.tensor = 2"), (["parallel.data=2", "parallel.pipeline=2"], 4, "parallel.pipeline = 2, parallel.data = 2"),
    (["parallel.context=2", "run.dir=my runs"], 2, "parallel.context = 2"),
    (["parallel.tensor=2", "rollout.gpus=[4,5]", "rollout.engine=server", "rollout.prompts_per_step=8"], 4, "parallel.tensor = 2")], ids=str)
def test_a_layout_that_nothing_launched_names_its_launch(tmp_path, monkeypatch, capsys, overrides, processes, asked):
    """With a launcher's WORLD_SIZE, and in the doctor, it is the number of processes that is wrong."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = write(tmp_path, GOOD)
    command = ["train", str(path), *overrides]
    assert cli.main(command) == 2
    assert capsys.readouterr().err == (f"sophiavl-fast: {asked}: this needs {processes} processes, but it was started as one, without a launcher; "
                                       f"start it by `torchrun --nproc-per-node {processes} -m sophiavl_fast {shlex.join(command)}`\n")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(command) == 2
    assert re.search(r"does not divide the 1 processes$", line := capsys.readouterr().err.strip()) and "torchrun" not in line
    row = fit._layout(config.load(path, overrides, world_size=None), 1, None, [])
    assert row.status == "FAIL" and "torchrun" not in row.found


def test_what_one_process_cannot_be_given_is_still_refused_without_a_launcher(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main(["train", str(write(tmp_path, GOOD)), "rollout.gpus=[1,2]"]) == 2
    assert "1 engines x rollout.tensor_parallel 1 x 1 replicas need 1 different GPUs" in capsys.readouterr().err
    assert cli.main(["train", str(write(tmp_path, GOOD)), "rollout.gpus=[1,2,3]", "rollout.engine=server"]) == 2   # and not that prompts do not divide by 3
    assert "1 replicas need 1 different GPUs" in capsys.readouterr().err
    tree = config.load(write(tmp_path, GOOD), ["recipe=sft", "sft.batch_size=6", "rollout.engine=server", "rollout.gpus=[4,5,6,7]"], world_size=None)
    assert config_checks.least_processes(tree) == 1    # no engines, no replicas for them


def test_processes_that_can_meet():
    assert config_checks.launched(MEETING) == 2 and config_checks.launched({}) == config_checks.launched({"WORLD_SIZE": "1"}) == 1
    assert not config_checks.speaks(MEETING) and config_checks.speaks(MEETING | {"RANK": "0"}) and config_checks.speaks({})


def test_a_server_of_an_ipv6_address_needs_the_way_of_its_weights(tmp_path):
    config.load(write(tmp_path, GOOD), ["rollout.urls=['http://[::1]:8000']", "rollout.transfer_host=10.0.0.1"])


def test_train_asks_for_the_token_first(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(config_checks.TOKEN_VARIABLE, raising=False)
    assert cli.main(["train", str(write(tmp_path, GOOD)), "rollout.urls=[http://127.0.0.1:1]", f"run.dir={tmp_path / 'run'}"]) == 2
    assert config_checks.TOKEN_VARIABLE in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_every_range_is_of_a_number_that_exists():
    tree = config.Config().model_dump()
    for _, keys in config_ranges.RANGES.values():
        for key in keys.split():
            node = tree
            for part in key.split("."):
                assert part in node, key
                node = node[part]
            assert node is None or (isinstance(node, int | float) and not isinstance(node, bool)), key
    every = [key for _, keys in config_ranges.RANGES.values() for key in keys.split()]
    free = {key for key, _ in config_ranges._numbers(tree, "")} - set(every)
    assert len(every) == len(set(every)) and free <= {"trust.threshold", "rewards.overlong_cache"}, "a number without a range: name it in one, or here"


def test_missing_file_names_a_neighbour(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"did you mean '.*c\.yaml'"):
        config.load(tmp_path / "d.yaml")


def test_environment_speaks_only_where_the_config_is_silent(tmp_path):
    environ = {"OPENAI_API_URL": "http://h/v1", "REWARD_MODEL": "judge", "OPENAI_API_KEY": "secret"}
    c = config.load(write(tmp_path, GOOD), ["thinking.backend=endpoint", "thinking.model=mine"], environ=environ)
    assert (c.thinking.url, c.thinking.model) == ("http://h/v1", "mine")
    assert "secret" not in config.dump(c)


def test_a_base_file_is_changed_key_by_key(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD + "rollout: {n: 4, temperature: 0.7}\n")
    c = config.load(write(tmp_path, "base: base.yaml\nrollout: {n: 2}\ndata: {train: {a: 1, b: 3}}\n"))
    assert (c.rollout.n, c.rollout.temperature, c.data.train) == (2, 0.7, {"a": 1.0, "b": 3.0})


def test_sampling_ahead_is_corrected_unless_the_file_says_how(tmp_path):
    assert config.load(write(tmp_path, GOOD)).algorithm.tis_cap is None
    assert config.load(write(tmp_path, GOOD), ["rollout.staleness=1"]).algorithm.tis_cap == 2.0
    assert config.load(write(tmp_path, GOOD), ["rollout.staleness=1", "algorithm.tis_cap=5"]).algorithm.tis_cap == 5.0


def test_an_unquoted_off_means_off(tmp_path):
    c = config.load(write(tmp_path, GOOD + "trust: {mode: off}\n"), ["thinking.backend=off"])
    assert (c.trust.mode, c.thinking.backend) == ("off", "off")


def test_a_place_where_no_export_can_be_made(tmp_path):
    """run.export is written after the last step: hours of work must not end there."""
    (tmp_path / "file").touch()
    for place in ("file", "file/below", "file/far/below"):
        with pytest.raises(UserError, match=rf"run.export = '{tmp_path}/{place}' cannot be made: '{tmp_path}/file' is a file"):
            config_checks.check_start(config.build({"run": {"export": f"{tmp_path}/{place}"}}, "test"), {})
    config_checks.check_start(config.build({"run": {"export": f"{tmp_path}/new/folder"}}, "test"), {})
    assert not (tmp_path / "new").exists()
