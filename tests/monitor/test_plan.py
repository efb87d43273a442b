"""The memory plan against what a real policy allocates (to the byte, see measured.py), against real parameter counts, and what train makes of it."""
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import measured
import pytest
import tiny
import zoo
from published import MODELS

from sophiavl_fast.config import build, load
from sophiavl_fast.config_checks import check, check_start
from sophiavl_fast.errors import UserError
from sophiavl_fast.monitor import budget, fit, plan, shapes

ROOT = Path(__file__).parents[2]
LAYOUTS = {"TP2": {"tensor": 2}, "TP2+SP": {"tensor": 2, "sequence": True}, "PP2": {"pipeline": 2}, "DP2": {}, "CP2": {"context": 2}}
GROUPS = [2, 60, [(16, 16)], [60] * 4]          # groups, words of the prompt, its images, lengths of the responses
NO_KL = {"algorithm": {"kl_coef": 0.0}}
CASES = {
    "fp32, shared prompt": NO_KL,
    "bf16, reference, recompute": {"model": {"dtype": "bfloat16"}, "policy": {"recompute": True, "tokens_per_row": 10_000}},
}
SLOW_CASES = {
    "own parts": NO_KL | {"checkpoint": {"format": "torch_dist"}},
    "own parts, bf16": NO_KL | {"model": {"dtype": "bfloat16"}, "checkpoint": {"format": "torch_dist"}},
    "bf16": NO_KL | {"model": {"dtype": "bfloat16"}},
    "recompute": NO_KL | {"policy": {"recompute": True, "tokens_per_row": 10_000}},
    "plain packing": NO_KL | {"policy": {"share_prompt": False, "tokens_per_row": 10_000}},
    "frozen tower": NO_KL | {"model": {"freeze_vision": True}},
    "reference": {},
    "reference log-prob": NO_KL | {"policy": {"kernels": "reference", "tokens_per_row": 10_000}},
}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """7 M parameters: nothing but the model's own tensors is counted, so that it need not drown a framework."""
    return measured.model(tmp_path_factory.mktemp("plan") / "small", hidden=256, layers=4, ffn=704, vocab=4096,
                          vision={"depth": 3, "hidden_size": 160, "intermediate_size": 432, "num_heads": 5})


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """70 M parameters."""
    return measured.model(tmp_path_factory.mktemp("plan") / "large", hidden=768, layers=6, ffn=2048, vocab=16384,
                          vision={"depth": 4, "hidden_size": 320, "intermediate_size": 848, "num_heads": 5})


def compare(folder: Path, sections: dict, found: dict, within: float = 0.15) -> None:
    """The peak of a rank, of all phases; so is the update's, the one that is hard to tell."""
    config, row, place = tiny.config(folder, **{"policy": {"tokens_per_row": 10_000}, **sections}), plan.Row(**found["row"]), plan.Place(**found["place"])
    sizes = shapes.read(folder)
    phases = {name: sum(items.values()) for name, items in plan.phases(config, sizes, row, place).items()}
    peak = sum(plan.peak(config, sizes, row, place)[1].values())
    real = found["peaks"]
    shown = {name: f"{phases[name] / 1e6:.1f} of {real[name] / 1e6:.1f} MB" for name in phases if name in real}
    print(sections, place, row, shown)
    assert abs(peak / max(real.values()) - 1) < within, shown
    assert abs(max(phases["update"], phases["optimizer"]) / real["update"] - 1) < within, shown
    assert abs(phases["load"] / real["load"] - 1) < 0.05, shown
    if place.stage:  # a lead's peer: what the lead keeps for its engine is not measured
        assert abs(phases["transfer"] / real["transfer"] - 1) < 0.05, shown


@pytest.mark.parametrize("case", CASES)
def test_plan_equals_the_allocator(small, tmp_path, case):
    compare(small, CASES[case], measured.measure(str(small), CASES[case], GROUPS, str(tmp_path)), within=0.05 if case.startswith("fp32") else 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_plan_equals_the_allocator_in_every_option(small, tmp_path, case):
    compare(small, SLOW_CASES[case], measured.measure(str(small), SLOW_CASES[case], GROUPS, str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_vl", "internvl3"])
def test_plan_equals_the_allocator_for_other_families(tmp_path, kind, monkeypatch):
    """Wider and deeper than the zoo's, so that activations count."""
    monkeypatch.setattr(zoo, "TEXT", zoo.TEXT | {"hidden_size": 64, "num_hidden_layers": 8, "vocab_size": 2048})
    folder = zoo.build(kind, tmp_path / "model")
    monkeypatch.setattr(measured, "groups", lambda *shape: zoo.groups(kind) * 8)
    compare(folder, NO_KL, measured.measure(str(folder), NO_KL, [], str(tmp_path / "out")))


@pytest.mark.slow
def test_plan_equals_the_allocator_for_a_larger_model(large, tmp_path):
    compare(large, NO_KL, measured.measure(str(large), NO_KL, GROUPS, str(tmp_path)))


def layouts(folder: Path, out: Path, names: list[str]) -> None:
    """Two processes in each layout, with the reference and rows of a group each."""
    jobs = [{"folder": str(folder), "sections": {"parallel": LAYOUTS[n], "policy": {"tokens_per_row": 600}}, "shape": [4, *GROUPS[1:]], "out": str(out / n)}
            for n in names]
    (out / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(Path(measured.__file__)), str(out / "jobs.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for job, name in zip(jobs, names, strict=True):
        for rank in (0, 1):
            compare(folder, job["sections"], json.loads(Path(f"{out / name}-{rank}.json").read_text()), within=0.08)


@pytest.mark.slow
@pytest.mark.layout
@pytest.mark.timeout(1200)
def test_plan_equals_the_allocator_in_layouts(small, tmp_path):
    layouts(small, tmp_path, list(LAYOUTS))


# -- shapes


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_from_config_json_alone(tmp_path, kind, tied):
    folder = zoo.build(kind, tmp_path / "model", tied=tied)
    assert shapes.read(folder).total == fit.count_parameters(folder)


def test_parameters_of_ranks_add_up(small):
    """Over two stages and two tensor ranks: cut parameters once, norms twice, the tower twice."""
    sizes = shapes.read(small)
    p = build({"parallel": {"tensor": 2, "pipeline": 2}}).parallel
    language = 2 * sum(sizes.on_stage(stage, p)[0] for stage in (0, 1))
    norms = (2 * sizes.language.layers + 1) * sizes.language.hidden
    assert language - norms == sizes.total - sizes.vision.parameters
    assert [sizes.on_stage(stage, p)[1] for stage in (0, 1)] == [sizes.vision.parameters, 0]


@pytest.fixture
def published(tmp_path):
    """Folders with nothing but the published config.json."""
    def write(name: str) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(MODELS[name][0]))
        return str(tmp_path / name)
    return write


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes_without_weights(published, name):
    assert shapes.read(published(name)).total / 1e9 == pytest.approx(MODELS[name][1], abs=6e-4)


@pytest.mark.parametrize("name", MODELS)
def test_shipped_configurations_fit_the_gpus_they_are_written_for(published, name):
    """GPUs of 80 GB, of which torch sees 79.1 GiB; one of 141 GB, 139.8."""
    world = MODELS[name][2]
    config = load(ROOT / "configs" / f"trust_grpo_{name}.yaml", [f"model.path={published(name)}", "thinking.backend=off"], world_size=world)
    budget.require(config, world, gpu(79.1 if world > 1 else 139.8))


def test_the_small_one_also_fits_two_gpus_of_80_gb(published):
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_3b.yaml", [f"model.path={published('qwen2_5_vl_3b')}", "thinking.backend=off", "parallel.tensor=2",
                                                                      "parallel.sequence=true"], world_size=2)
    budget.require(config, 2, gpu(79.1))


def test_the_fullest_row_is_what_packing_can_make(small):
    """No row of a step whose prompts and responses are as long as the config allows holds more than the plan's."""
    from sophiavl_fast.policy import families, packing

    new, prompts = 24, 6
    given = measured.groups(prompts, 40, [(16, 16)], [new] * 3)
    longest = len(given[0].prompt.expanded_ids)
    for budget_tokens in (100, 300, 700, 10_000):
        config = build({"model": {"path": str(small)}, "data": {"train": "x", "max_prompt_tokens": longest}, "policy": {"tokens_per_row": budget_tokens},
                        "rollout": {"n": 3, "max_new_tokens": new, "prompts_per_step": prompts}})
        row = plan.fullest_row(config, shapes.read(small))
        for real in map(measured.row_of, ([b] for b in packing.pack(given, None, families.open_family(small), share_prompt=True, budget=budget_tokens,
                                                                   multiple=1))):
            assert all(getattr(real, key) <= getattr(row, key) for key in ("tokens", "targets", "keys", "scores", "patches")), (real, row)


def test_the_engines_cache_is_the_rollouts_own(small):
    from sophiavl_fast.rollout.arguments import cpu_kv_cache_bytes

    for length in (256, 4000):
        config = build({"model": {"path": str(small)}, "rollout": {"max_new_tokens": 64}, "data": {"max_prompt_tokens": length}})
        assert budget.kv_cache(config, shapes.read(small)) == cpu_kv_cache_bytes(config)


# -- what is made of it


def gpu(gib: float) -> budget.Device:
    return budget.Device(True, gib * budget.GIB, "triton")


def test_a_run_that_cannot_fit_is_refused_with_one_that_does(published):
    """What it advises is parsed back as overrides, and fits."""
    overrides = [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off", "policy.recompute=false"]
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", overrides, world_size=8)
    with pytest.raises(UserError, match=r"does not fit: a rank of pipeline stage 0 needs .* GiB at its peak .* but has 72.0 GiB") as refused:
        budget.require(config, 8, gpu(80))
    line = str(refused.value)
    assert "\n" not in line and "memory.check=warn" in line
    advised = line.split("); ")[1].split(" would fit")[0].split()
    assert advised and all("=" in item for item in advised)
    better = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [*overrides, *advised], world_size=8)
    budget.require(better, 8, gpu(80))


def test_an_engine_that_sleeps_leaves_the_update_its_memory(published):
    """By phase: with the engine, without, and with it in the phases that it is awake in."""
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off",
                                                                      "policy.offload_optimizer=true"], world_size=8)
    sizes, device = shapes.read(config.model.path), gpu(80)
    taken = config.rollout.gpu_memory_utilization * device.bytes
    place = plan.Place(replicas=8 // config.parallel.tensor // config.parallel.pipeline, cuda=True, logprob="triton")
    alone = {name: sum(items.values()) for name, items in plan.phases(config, sizes, plan.fullest_row(config, sizes), place).items()}
    host = budget.Device(False, 2**40, "cpu")
    awake, told = (budget.needs(config, sizes, 8, where)[0] for where in (device, host))
    assert awake.phase == "update" and awake.bytes == pytest.approx(alone["update"] + taken)
    config.rollout.sleep = True
    asleep = budget.needs(config, sizes, 8, device)[0]
    assert asleep.bytes == pytest.approx(max(alone["update"], alone["transfer"] + taken)) and asleep.bytes < awake.bytes - 0.2 * taken
    assert budget.needs(config, sizes, 8, host)[0] == told, "a CPU's engine keeps its memory"


def test_an_engine_that_reads_in_place_holds_every_gathered_tensor(published):
    """ipc on the trainer's GPU, from four ranks or from one: the whole model at once; over nccl two buckets."""
    model = published("qwen2_5_vl_7b")

    def takes(*overrides, world=8):
        config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [f"model.path={model}", "thinking.backend=off", *overrides], world_size=world)
        sizes = shapes.read(config.model.path)
        place = plan.Place(replicas=world // config.parallel.tensor, cuda=True, logprob="triton")
        return plan.phases(config, sizes, plan.fullest_row(config, sizes), place)["transfer"]["transfer"] / (2 * sizes.total)

    assert takes() == 1 and takes("parallel.tensor=1", "parallel.sequence=false") == 1 and takes("rollout.transfer=nccl") < 0.25


def test_an_engine_beside_the_trainer_is_the_first_stages_alone(published):
    """A replica has one, on its lead's GPU, and only the lead keeps what it gathers for it: a layout is refused for no other stage's lack of both."""
    overrides = [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off", "parallel.pipeline=2", "parallel.stages=[4,24]"]
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", overrides, world_size=8)
    sizes, device = shapes.read(config.model.path), gpu(80)
    first, last = budget.needs(config, sizes, 8, device)
    row = plan.fullest_row(config, sizes)
    lead, peer = (plan.phases(config, sizes, row, plan.Place(stage=stage, cuda=True, logprob="triton")) for stage in (0, 1))
    assert first.items["engine"] == config.rollout.gpu_memory_utilization * device.bytes and last.items["engine"] == 0
    assert last.bytes == pytest.approx(max(sum(items.values()) for items in peer.values()))
    assert lead["transfer"]["transfer"] == 2 * sizes.total
    assert peer["transfer"]["transfer"] == 2 * 2 * 152064 * 3584      # of the embedding its parts and the whole
    crowded = gpu(max(first.bytes, last.bytes) * 1.01 / 0.9 / budget.GIB)
    assert not budget.fits([first, dataclasses.replace(last, items=last.items | {"engine": first.items["engine"]})], config, crowded)
    budget.require(config, 8, crowded)


def test_what_no_engine_reads_is_not_kept(published):
    """A replay gathers and lets go; a server that a hand started on the trainer's GPU (ipc with rollout.urls) reads in place."""
    def takes(*overrides):
        config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [f"model.path={model}", "thinking.backend=off", *overrides], world_size=8)
        sizes = shapes.read(model)
        found = plan.phases(config, sizes, plan.fullest_row(config, sizes), plan.Place(replicas=2, cuda=True, logprob="triton"))
        return found["transfer"]["transfer"] / (2 * sizes.total)

    model = published("qwen2_5_vl_7b")
    assert takes("debug.replay=somewhere") < 0.15 and takes("rollout.urls=[http://a:1,http://b:1]") < 0.25
    assert takes("rollout.urls=[http://a:1,http://b:1]", "rollout.transfer=ipc") == 1


def test_a_judge_on_the_same_gpu_counts_where_it_is_awake(published):
    """Served: its share of the GPU; asleep: only before and during the rollouts; in-process: its weights; elsewhere: nothing."""
    model = published("qwen2_5_vl_7b")
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [f"model.path={model}", "thinking.backend=endpoint", "thinking.serve=true",
                                                                      f"thinking.path={model}", "thinking.url=''", "rollout.sleep=true"], world_size=8)
    sizes, device = shapes.read(config.model.path), gpu(80)
    assert budget.judge(config, device, "update") == budget.judge(config, device, "transfer") == pytest.approx(0.3 * device.bytes)
    assert budget.needs(config, sizes, 8, device)[0].items["judge"] == pytest.approx(0.3 * device.bytes)
    config.thinking.sleep = True
    assert budget.judge(config, device, "update") == 0 and budget.judge(config, device, "transfer") == pytest.approx(0.3 * device.bytes)
    config.thinking.sleep, config.thinking.gpus = False, [7]
    assert budget.judge(config, device, "update") == 0
    config.thinking.serve, config.thinking.backend = False, "local"
    assert budget.judge(config, device, "update") == 2 * sizes.total
    config.algorithm.name = "grpo"
    assert budget.judge(config, device, "update") == 0


def test_sleep_is_advised_where_it_is_what_a_run_lacks(published):
    overrides = [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off", "policy.offload_optimizer=true", "policy.offload_reference=true",
                 "rollout.transfer=nccl"]   # ipc holds every gathered tensor, asleep or not
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", overrides, world_size=8)
    sizes, awake = shapes.read(config.model.path), budget.needs
    tight = gpu(1.01 * max(n.bytes - n.items["engine"] for n in awake(config, sizes, 8, gpu(80))) / 0.9 / budget.GIB)
    with pytest.raises(UserError, match=r"rollout.sleep=true would fit"):
        budget.require(config, 8, tight)


def test_nothing_fits_a_device_that_is_too_small(published):
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off"], world_size=8)
    with pytest.raises(UserError, match="no layout of up to 64 such devices fits either"):
        budget.require(config, 8, gpu(4))


def test_warn_and_off(published, capsys):
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off", "memory.check=warn"],
                  world_size=8)
    budget.require(config, 8, gpu(4))
    assert "does not fit" in capsys.readouterr().err
    config.memory.check = "off"
    budget.require(config, 8, gpu(4))
    assert capsys.readouterr().err == ""


def test_train_refuses_before_it_starts(published, tmp_path):
    """On a CPU the host's free memory decides: a share of it that nothing fits in."""
    from sophiavl_fast import cli

    (tmp_path / "c.yaml").write_text(f"device: cpu\nmodel: {{path: {published('qwen2_5_vl_3b')}}}\ndata: {{train: x}}\nmemory: {{fraction: 1.0e-6}}\n"
                                     f"run: {{dir: {tmp_path / 'run'}}}\n")
    assert cli.main(["train", str(tmp_path / "c.yaml")]) == 2
    assert not (tmp_path / "run").exists()


def test_advice_is_never_a_layout_that_cannot_run(published):
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off"], world_size=8)
    sizes = shapes.read(config.model.path)
    tried = list(budget._neighbours(config, sizes, 8, gpu(80)))
    assert len(tried) > 50
    for _, _, processes, other in tried:
        check(other, processes)
        assert 4 % other.parallel.tensor == 0 and 28 % other.parallel.pipeline == 0   # key heads, layers


def test_context_parallelism_is_advised_where_responses_are_what_does_not_fit(published):
    overrides = [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off", "rollout.engine=server", "rollout.max_new_tokens=32768", "rollout.n=16",
                 "rollout.sleep=false", "rollout.urls=[" + ",".join(f"http://10.0.0.{i}:8000" for i in range(8)) + "]"]
    read = lambda *more: load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [*overrides, *more], world_size=8)
    config = read()
    with pytest.raises(UserError, match="does not fit"):
        budget.require(config, 8, gpu(80))
    changes = budget.advice(config, shapes.read(config.model.path), 8, gpu(80)).split(" would fit")[0].split()
    assert "parallel.context=2" in changes
    budget.require(read(*changes), 8, gpu(80))


def test_advice_leaves_the_engines_their_own_gpus(published, monkeypatch):
    """rollout.gpus = [2, 3] are the trainer's on 4 processes, as train says: they move behind, and where a node has none there, no such advice is given."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    overrides = [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off", "parallel.tensor=2", "rollout.gpus=[2,3]", "rollout.tensor_parallel=2"]
    read = lambda more, world: load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [*overrides, *more], world_size=world)
    config = read([], 2)
    sizes = shapes.read(config.model.path)
    advised, _, more = budget.advice(config, sizes, 2, gpu(80)).partition(" on ")
    better = read(advised.split(), processes := int(more.split()[0]))
    assert (processes, better.rollout.gpus) == (4, [4, 5])
    launched = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    check_start(better, launched)
    with pytest.raises(UserError, match=r"rollout.gpus = \[2, 3\]: the trainer's processes are on the first 4 GPUs"):
        check_start(read(["parallel.tensor=4"], 4), launched)
    for _, _, count, other in budget._neighbours(config, sizes, 2, gpu(80)):
        check_start(other, {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(min(count, 8))})
    with pytest.raises(UserError, match=r"beside engines on GPUs of the same node \(rollout.gpus = \[2, 3\]\) fits either"):
        budget.require(config, 2, gpu(20))


def test_what_is_needed_with_the_engines_elsewhere_is_what_that_configuration_needs(published):
    """Every phase without the engine, and without ipc's copies: the number that `train` with rollout.urls would find."""
    overrides = [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off", "rollout.sleep=true", "rollout.engine=server"]
    read = lambda *more: load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [*overrides, *more], world_size=8)
    config = read("rollout.gpu_memory_utilization=0.9")
    sizes = shapes.read(config.model.path)
    line = budget.advice(config, sizes, 8, gpu(200))
    apart = budget.needs(read("rollout.sleep=false", "rollout.urls=[" + ",".join(f"http://10.0.0.{i}:8000" for i in range(8)) + "]"), sizes, 8, gpu(200))
    assert line == f"with the engines on other GPUs (rollout.urls) a rank would need {budget.gib(max(n.bytes for n in apart))} GiB"


def test_the_doctors_layout_is_one_that_train_takes(published, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [f"model.path={published('qwen2_5_vl_7b')}", "rollout.gpus=[0,1,2,3]",
                                                                      "rollout.tensor_parallel=4"], world_size=4)
    row = lambda world: fit._layout(config, world, shapes.read(config.model.path), [])
    assert row(4).status == "FAIL" and row(4).found.endswith("the trainer's processes are on the first 4 GPUs, so GPU 0 is no engine's own; begin at 4")
    config.rollout.gpus = [4, 5, 6, 7]
    assert row(4).status == "OK"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")    # the trainer's, as train takes it: the engines' are numbers among others
    config.rollout.gpus = [0, 1, 2, 3]
    assert row(4).status == "OK"
    config.parallel.pipeline, config.rollout.gpus = 4, [4, 5, 6, 7]
    assert "the GPUs of one node, but this run's 16 processes are on several, 8 on this one" in row(16).found


def test_what_a_new_layout_contradicts_is_taken_back_by_the_advice(published):
    """parallel.data and stages are for the old one; where only processes change the line says so."""
    model = f"model.path={published('internvl3_2b')}"

    def advised(gib, world, *overrides):
        config = load(ROOT / "configs" / "trust_grpo_internvl3_2b.yaml", [model, "thinking.backend=off", *overrides], world_size=world)
        line = budget.advice(config, shapes.read(config.model.path), world, gpu(gib))
        *changes, rest = line.split(" would fit")[0].partition(" on ")
        words, processes = [w for w in changes[0].split() if "=" in w], int(rest.split()[0]) if rest else world
        better = load(ROOT / "configs" / "trust_grpo_internvl3_2b.yaml", [model, "thinking.backend=off", *overrides, *words], world_size=processes)
        budget.require(better, processes, gpu(gib))
        return line

    frugal = ["rollout.sleep=true", "policy.recompute=true", "policy.offload_reference=true", "policy.offload_optimizer=true"]
    assert "parallel.tensor=2 rollout.sleep=true parallel.data=null would" in advised(20, 8, "parallel.data=8")
    assert "null" not in advised(14, 8, "parallel.data=8")                  # 8 still, on 16 processes
    assert advised(14, 8, "parallel.tensor=2", "parallel.sequence=true", *frugal).startswith("the same on 16 processes would fit")
    assert "parallel.pipeline=1 parallel.stages=null" in advised(20, 4, "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2",
                                                                 "parallel.stages=[27,1]", *frugal)


@pytest.mark.parametrize("overrides,expected", [
    (["parallel.tensor=3"], "parallel.tensor = 3 does not divide the model's num_attention_heads = 28; valid: 1, 2, 4"),
    (["parallel.tensor=7"], "parallel.tensor = 7 does not divide the model's num_query_groups = 4; valid: 1, 2, 4"),
    (["parallel.pipeline=40"], "parallel.pipeline = 40 is more than the model's 28 layers; at most 28 stages hold one each"),
    (["parallel.pipeline=3"], r"does not divide the model's 28 layers; set the shares by parallel.stages=\[9, 9, 10\]"),
    (["parallel.pipeline=2", "parallel.stages=[28]"], r"parallel.stages = \[28\]: parallel.pipeline = 2 wants 2 shares .* such as \[14, 14\]"),
    (["parallel.pipeline=2", "parallel.stages=[30,-2]"], r"parallel.stages = \[30, -2\]: .* 28 in all, such as \[14, 14\]"),
    (["parallel.pipeline=2", "parallel.stages=[9,9]"], r"parallel.stages = \[9, 9\]"),
    (["parallel.pipeline=2", "parallel.stages=[12,16]"], None),
    (["parallel.stages=[]"], None),
], ids=str)
def test_a_layout_that_the_model_rules_out_is_refused_from_its_sizes(published, overrides, expected):
    """By train, whatever memory.check says, and in the doctor's row."""
    world = 84
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml",
                  [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off", "memory.check=off", "rollout.prompts_per_step=840", "parallel.tensor=1",
                   "parallel.sequence=false", *overrides], world_size=world if "parallel.pipeline=40" not in overrides else (world := 40))
    row = fit._layout(config, world, shapes.read(config.model.path), [])
    if expected is None:
        budget.require(config, world, gpu(80))
        assert row.status == "OK"
        return
    with pytest.raises(UserError, match=expected) as refused:
        budget.require(config, world, gpu(80))
    assert "\n" not in str(refused.value) and (row.status, row.found) == ("FAIL", str(refused.value))


def test_the_first_stage_holds_deepstacks_layers(published):
    """Qwen3-VL: three of them; what is proposed in place of the shares is itself a layout that passes."""
    sizes = shapes.read(published("qwen3_vl_4b"))
    for pipeline, stages in ((2, [2, 34]), (16, None), (36, None)):
        parallel = build({"parallel": {"pipeline": pipeline, "stages": stages}}).parallel
        with pytest.raises(UserError, match=r"first 3 \(DeepStack\)|set the shares") as refused:
            shapes.check_layout(sizes, parallel)
        proposed = str(refused.value).rpartition("[")[2].partition("]")[0]
        if pipeline == 36:
            assert "[" not in str(refused.value)
        else:
            shapes.check_layout(sizes, parallel.model_copy(update={"stages": [int(x) for x in proposed.split(",")]}))


def test_a_configuration_for_gpus_is_planned_without_one(published):
    """On a laptop: for GPUs of 80 GiB, and says so. train leaves it to the policy to say that there is no GPU."""
    config = load(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml", [f"model.path={published('qwen2_5_vl_7b')}", "thinking.backend=off"], world_size=8)
    rows = fit._memory(config, shapes.read(config.model.path), 8, [])
    assert [r.name for r in rows] == ["memory of a rank", "engine memory"] and "0.9 of its assumed GPU" in rows[0].found
    assert all(r.status == "OK" for r in rows) and all(item in rows[0].found for item in ("weights", "activations", "engine"))
