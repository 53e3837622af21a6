"""A cluster's faults, done to a run on a real scheduler: it is complete in the end, as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from crate_dist.checkpoint.loading import list_checkpoints
from crate_dist.run.exit_status import NEEDS_A_PERSON
from crate_dist.run.folder import RunFolder, read_recipe
from crate_dist.world import expand_nodelist
from tests.cluster.runs import (
    ONE_THREAD,
    Arguments,
    check_finished,
    losses,
    rank_process,
    starts,
    steps,
    submit,
    totals,
    wait_for_step,
    weights,
)
from tests.cluster.testbed import Cluster, ClusterError, Job, wait_until
from tests.conftest import SMALL_RECIPE
from tests.ranks import lock_is_free, train_to_the_end

pytestmark = pytest.mark.slurm

LAST_STEP = 750  # 90 epochs of 200 samples in batches of 24
SAVE_EVERY = 20
TWO_NODES = ("--nodes", "2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, cast_shards: Path) -> Arguments:
    """A run that is long enough to be hit in its middle."""
    path = tmp_path_factory.mktemp("recipe") / "long.toml"
    path.write_text(SMALL_RECIPE)
    settings = ["train.epochs=90", "log.eval_every_epochs=90", f"checkpoint.every_steps={SAVE_EVERY}"]
    settings.append("train.precision=fp32")  # a third of the time; a CPU's bf16 is resumed in tests/training
    return ["--config", path, "--data", cast_shards, *(word for text in settings for word in ("--set", text))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe: Arguments) -> Path:
    """The folder of the same run on two ranks that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_to_the_end([*recipe, "--run-dir", run_dir], world_size=2)
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of this test's run."""
    return tmp_path / "run"


def start(cluster: Cluster, recipe: Arguments, run_dir: Path, *more: str | Path) -> str:
    """Submits the run, on two nodes unless `more` says otherwise; gives the job id."""
    shape = ["--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "2"]
    return submit(cluster, [*recipe, "--run-dir", run_dir, *TWO_NODES, *shape, *more], cwd=run_dir.parent)[0]


def in_each_rank(run_dir: Path, variable: str, value: str, code: str) -> Arguments:
    """Flags by which each rank whose environment has `value` runs `code` first; wait() waits for RUN/break to be there,
    and removes it."""
    folder = run_dir.parent / "first"
    folder.mkdir()
    lines = [
        "import os, pathlib, threading, time",
        "def wait():",
        f"    file = pathlib.Path({str(run_dir / 'break')!r})",
        "    while not file.exists(): time.sleep(0.1)",
        "    file.unlink()",
        f"if os.environ.get({variable!r}) == {value!r} and 'SLURM_PROCID' in os.environ: {code}",
    ]
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return ["--setup", f"export PYTHONPATH={folder}"]


def wait_for_start(run_dir: Path, restarts: int) -> None:
    """Waits until the run has begun once more, after `restarts` restarts."""
    wait_until(lambda: RunFolder(run_dir).record_file.exists() and len(starts(run_dir)) > restarts, "next start")


def wait_for_next_steps(run_dir: Path, count: int = 2 * SAVE_EVERY + 10) -> None:
    """Waits until the newest start has made some steps; unless said otherwise, and saved."""
    wait_for_step(run_dir, starts(run_dir)[-1]["step"] + count)


def finish(cluster: Cluster, job_id: str, restarts: int) -> Job:
    """Waits for the end of a run that was restarted `restarts` times, by itself."""
    job = cluster.wait_for(job_id, "COMPLETED", restarts=restarts, timeout_s=240)
    assert job.restarts == restarts
    return job


def nodes(job: Job) -> list[str]:
    """Returns the nodes that it runs on."""
    return expand_nodelist(job.nodes)


def check_as_if_nothing_had_been(run_dir: Path, undisturbed: Path, starts: int) -> None:
    check_finished(run_dir, ranks=2, launcher="slurm", last_step=LAST_STEP, starts=starts)
    assert losses(run_dir) == losses(undisturbed)
    here, there = weights(run_dir), weights(undisturbed)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in there)


def check_at_most_the_last_interval_was_made_twice(run_dir: Path) -> None:
    """Checks what each interruption without a warning has cost."""
    resumed_at = [start["step"] for start in starts(run_dir)[1:]]
    assert all(step > 0 for step in resumed_at)
    # One save may have been on its way: it is written beside the training.
    assert totals(run_dir).steps_redone < 2 * SAVE_EVERY * len(resumed_at)


def preempt(cluster: Cluster) -> None:
    """Submits what takes all nodes from everything else, for a moment."""
    cluster.run(["sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"])


def test_a_run_that_is_warned_of_every_interruption_loses_nothing(
    cluster: Cluster, recipe: Arguments, cast_shards: Path, undisturbed: Path, run_dir: Path
) -> None:
    """A signal while the ranks are starting, the time limit, a preemption, a signal to the ranks, a node to be left.

    What recipe.toml does not keep, a command, is there after each requeue.
    """
    data = ["--data", f"pipe:cat {cast_shards}/{{}}", "--set", f"data.cache_dir={run_dir.parent / 'cache'}"]
    job_id = start(cluster, recipe, run_dir, *data, "--partition", "main", "--set", "cluster.signal_delay_s=110")
    job = cluster.wait_for(job_id, "RUNNING")
    wait_until(lambda: job.log.exists() and "Loading pickle" in job.log.read_text(), "first rank")
    cluster.run(["scancel", "--signal=TERM", job_id])
    wait_for_start(run_dir, 0)
    assert read_recipe(run_dir).data.root is None

    wait_for_next_steps(run_dir, 10)
    assert cluster.job(job_id).restarts == 1
    # SLURM looks at the limits every 30 s, in which so small a run would be over. It is woken up with the warning.
    for rank in range(2):
        os.kill(rank_process(job_id, rank), signal.SIGSTOP)
    cluster.run(["scontrol", "update", f"JobId={job_id}", "TimeLimit=2"])
    cluster.wait_for(job_id, "PENDING", "RUNNING", restarts=2)
    cluster.run(["scontrol", "update", f"JobId={job_id}", "TimeLimit=10"])

    wait_for_start(run_dir, 1)
    wait_for_next_steps(run_dir, 25)
    preempt(cluster)
    wait_for_start(run_dir, 2)
    wait_for_next_steps(run_dir, 25)
    cluster.run(["scancel", "--signal=TERM", job_id])
    wait_for_start(run_dir, 3)
    assert totals(run_dir).steps_redone == 0

    wait_for_next_steps(run_dir, 25)
    here = nodes(cluster.job(job_id))
    cluster.set_state(here[0], "drain")
    wait_for_step(run_dir, max(steps(run_dir)) + 30)
    assert nodes(cluster.job(job_id)) == here
    cluster.run(["scontrol", "requeue", job_id])
    assert here[0] not in nodes(finish(cluster, job_id, restarts=5))
    check_as_if_nothing_had_been(run_dir, undisturbed, starts=5)


@pytest.mark.slow
def test_a_run_that_is_not_warned_goes_on_from_its_last_save(
    cluster: Cluster, recipe: Arguments, undisturbed: Path, run_dir: Path
) -> None:
    """Ranks that die, a preemption without notice, a signal to all of the job at once, broken devices, a crashed node.

    Ranks that die start again in place. Nodes with broken devices are excluded, one after the other.
    """
    said_by_cuda = r'os.write(2, b"  what():  CUDA error: uncorrectable ECC error encountered\n")'
    late = f"threading.Thread(target=lambda: (wait(), {said_by_cuda}, os.abort()), daemon=True).start()"
    first = in_each_rank(run_dir, "SLURM_PROCID", "1", late)
    job_id = start(cluster, recipe, run_dir, *first, "--partition", "abrupt", "--set", "safety.lease_s=10")
    for rank in range(2):
        wait_for_start(run_dir, rank)
        wait_for_next_steps(run_dir)
        os.kill(rank_process(job_id, rank), signal.SIGKILL)
        killed = time.monotonic()
        wait_for_start(run_dir, rank + 1)
        assert time.monotonic() - killed < 60
    job = cluster.job(job_id)
    assert job.restarts == 0
    said = job.log.read_text()
    assert said.count("starting the ranks again on the same nodes") == 2
    assert "starting the ranks again on the same nodes (2 of at most 3 times)" in said

    wait_for_next_steps(run_dir)
    preempt(cluster)
    wait_for_start(run_dir, 3)
    wait_for_next_steps(run_dir)
    # The batch script too, and srun, which kills the ranks in the middle of their last step.
    cluster.run(["scancel", "--full", "--signal=TERM", job_id])
    wait_for_start(run_dir, 4)
    wait_for_next_steps(run_dir)
    crashed = nodes(cluster.job(job_id))[0]
    cluster.crash(crashed)
    wait_for_start(run_dir, 5)
    assert crashed not in nodes(cluster.job(job_id))
    cluster.boot(crashed)

    broken: list[str] = []
    for count in range(5, 7):
        wait_for_start(run_dir, count)
        wait_for_next_steps(run_dir)
        broken.append(nodes(cluster.job(job_id))[1])
        (run_dir / "break").touch()
        cluster.wait_for(job_id, "PENDING", "RUNNING", restarts=count - 1)
    job = finish(cluster, job_id, restarts=5)
    assert len(set(broken)) == 2
    assert cluster.excluded(job_id) == set(broken)
    assert not set(broken) & set(nodes(job))
    said = job.log.read_text()
    for node in broken:
        assert f"node {node} shows a broken device: rank 1 on node {node}:   what():  CUDA error: uncorr" in said
    assert said.count("starting the ranks again") == 2
    check_as_if_nothing_had_been(run_dir, undisturbed, starts=8)
    check_at_most_the_last_interval_was_made_twice(run_dir)


def test_three_starts_without_progress_end_the_job_and_say_why(
    cluster: Cluster, recipe: Arguments, run_dir: Path
) -> None:
    job_id = start(cluster, recipe, run_dir, *in_each_rank(run_dir, "SLURM_PROCID", "1", "os.kill(os.getpid(), 9)"))
    wait_until(lambda: cluster.job(job_id).state == "FAILED", "end of the job")
    job = cluster.job(job_id)
    assert job.restarts == 2  # the first two starts were on the same nodes
    said = job.log.read_text()
    assert "GIVEN UP: three starts in a row ended no further than one before them" in said
    assert re.search(r"The last fault: n\d: task 1: Killed\.", said)
    assert f"The logs: {run_dir}/slurm/{job_id} and {run_dir}/logs." in said
    assert len(re.findall(r"^crate-dist start .*: on n", said, re.MULTILINE)) == 4


def test_an_error_that_needs_a_person_ends_the_job_for_good(cluster: Cluster, recipe: Arguments, run_dir: Path) -> None:
    RunFolder(run_dir).log_file(1).mkdir(parents=True)  # so that one rank has an error, and the other loses that one
    job_id = start(cluster, recipe, run_dir)
    wait_until(lambda: cluster.job(job_id).state == "FAILED", "end of the job")
    job = cluster.job(job_id)
    assert (job.restarts, job.exit_code) == (0, f"{NEEDS_A_PERSON}:0")
    assert "lost another one" in job.log.read_text()


def test_a_run_folder_has_one_job_and_a_cancelled_one_stays_so_until_it_is_submitted_again_on_half_the_nodes(
    cluster: Cluster, recipe: Arguments, undisturbed: Path, run_dir: Path
) -> None:
    recipe = [*recipe, "--set", "train.max_steps=250"]
    job_id = start(cluster, recipe, run_dir, "--nodes", "4")
    with pytest.raises(ClusterError, match=f"job {job_id}, which is to work in {run_dir}, is (pending|running)"):
        start(cluster, recipe, run_dir)
    wait_for_step(run_dir, 5)
    second = ["srun", "--nodes=1", sys.executable, "-m", "crate_dist.train", *recipe, "--run-dir", run_dir]
    done = cluster.run(second, check=False, cwd=run_dir.parent, env=ONE_THREAD)
    assert done.returncode == 1
    assert "give another --run-dir" in done.stderr
    assert len(starts(run_dir)) == 1

    wait_for_step(run_dir, 25)
    cluster.run(["scancel", job_id])
    wait_until(lambda: cluster.job(job_id).state == "CANCELLED", "end of the job")
    folder = RunFolder(run_dir)
    last = max(steps(run_dir))
    assert [c.step for c in list_checkpoints(folder.checkpoints)][-1] == last
    assert lock_is_free(folder)

    again = start(cluster, recipe, run_dir)
    job = finish(cluster, again, restarts=0)
    assert "taking over" not in job.log.read_text()
    assert cluster.job(job_id).state == "CANCELLED"
    assert steps(run_dir) == list(range(1, 251))
    assert [(s["step"], s["world_size"]) for s in starts(run_dir)] == [(0, 4), (last, 2)]
    assert totals(run_dir).steps_redone == 0
    # The same batches, summed up in another order.
    there = dict(losses(undisturbed))
    assert max(abs(loss - there[step]) for step, loss in losses(run_dir)) < 0.1
