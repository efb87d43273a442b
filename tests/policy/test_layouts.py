"""Every family in tensor, sequence, pipeline and data parallel runs under torchrun (gloo), against Hugging Face and a single process.

Jobs of one number of processes share one torchrun. `write_parity.py` puts the same jobs' numbers into docs/parity.md.
"""
import matrix
import pytest
from matrix import Job, Measured
from safetensors.torch import load_file
from zoo import FAMILIES

from sophiavl_fast.policy import checkpoint

pytestmark = pytest.mark.layout
QUICK = [Job(kind, layout) for kind in FAMILIES for layout in ("TP2+SP", "PP2")] + [Job("qwen3_vl", "CP2")]
BROKEN = [Job("internvl3", "TP2", broken="no-head-sum"), Job("qwen2_5_vl", "DP2", broken="no-replica-sum")]
SLOW_BROKEN = [Job("qwen3_vl", "TP2", broken="no-row-sum"), Job("qwen2_5_vl", "TP2+SP", broken="no-norm-sum"),
               Job("internvl3", "CP2", broken="no-key-sum"), Job("qwen3_vl", "TP2", broken="no-norm-sum"), Job("qwen3_vl", "TP2+SP", broken="no-deepstack-sum")]


def LONG(test):
    """Only in `make test-all`; the first of them waits for all its jobs."""
    return pytest.mark.slow(pytest.mark.timeout(1800)(test))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def quick(root):
    return ran(root, QUICK + BROKEN)


@pytest.fixture(scope="module")
def two(root):
    return ran(root, [j for j in matrix.FULL if processes(j) == 2] + SLOW_BROKEN)


@pytest.fixture(scope="module")
def four(root):
    return ran(root, [j for j in matrix.FULL if processes(j) == 4])


def processes(job):
    return matrix.LAYOUTS[job.layout][0]


def ran(root, jobs):
    matrix.run(list({Job(j.kind, "TP1", j.tied) for j in jobs}), root)
    matrix.run(jobs, root)
    return root


def check(found: Measured):
    assert found.logprob < 1e-5
    assert found.gradient < 1e-5
    assert found.export
    assert found.update < 1e-3


def name(job):
    return job.name


@pytest.mark.parametrize("job", QUICK, ids=name)
def test_layout_equals_hf(quick, job):
    check(matrix.measure(job, quick))


@pytest.mark.parametrize("job", QUICK, ids=name)
def test_statistics_equal_the_single_process(quick, job):
    """The loss and counts over all micro-batches and replicas, and the global gradient norm."""
    found, alone = (load_file(quick / j.name / "result.safetensors") for j in (job, Job(job.kind, "TP1", job.tied)))
    for key, value in alone.items():
        assert (found[key] - value).norm() < 1e-5 * value.norm(), key


def test_one_process_goes_on_from_a_layouts_checkpoint(quick, create):
    job = QUICK[2]  # Qwen3-VL, tensor and sequence parallel
    policy = create(matrix.folder(quick, job.kind, job.tied), **job.sections() | {"parallel": {}})
    assert checkpoint.load(policy, checkpoint.newest(quick / job.name)) == {"from": job.sections()["parallel"]}
    assert policy.updates == 1


@pytest.mark.parametrize("job", BROKEN, ids=name)
def test_a_missing_reduction_shows(quick, job):
    assert matrix.measure(job, quick).gradient > 1e-2


@LONG
@pytest.mark.parametrize("job", [j for j in matrix.FULL if processes(j) == 2 and j not in QUICK], ids=name)
def test_two_processes(two, job):
    check(matrix.measure(job, two))


@LONG
@pytest.mark.parametrize("job", [j for j in matrix.FULL if processes(j) == 4], ids=name)
def test_four_processes(four, job):
    check(matrix.measure(job, four))


@LONG
@pytest.mark.parametrize("job", SLOW_BROKEN, ids=name)
def test_other_missing_reductions_show(two, job):
    assert matrix.measure(job, two).gradient > 1e-2


@LONG
@pytest.mark.parametrize("kind", FAMILIES)
def test_checkpoint_moves_between_layouts(two, kind):
    """Moments saved by TP2+SP equal, tensor by tensor, those saved by one process after the same update, up to rounding."""
    read = lambda job: {n: t for f in checkpoint.newest(two / job.name).glob("*.safetensors") for n, t in load_file(f).items()}
    found, expected = read(Job(kind, "TP2+SP")), read(Job(kind, "TP1"))
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        if key.startswith("exp_avg"):
            assert (found[key] - tensor).norm() <= 2e-5 * tensor.norm() + 1e-9, key
