"""launch/slurm.py up to the call of sbatch, and what both launchers check. On a real cluster: tests/cluster."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from crate_dist.config import RecipeError, build_recipe, load_recipe
from crate_dist.job import TrainJob
from crate_dist.launching.memory import advice, largest_micro_batch
from crate_dist.launching.opening import check_that_no_job_waits
from crate_dist.launching.preflight import check_init_from, preflight
from crate_dist.run.folder import RunFolder
from crate_dist.slurm import queue
from crate_dist.slurm.nodes import nodes_used
from crate_dist.slurm.options import parse_minutes
from tests.ranks import REPOSITORY

LAUNCH = REPOSITORY / "launch"
Arguments = list[str | Path]


def launch(
    program: str, *arguments: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a launcher with nothing to be found on its path, unless `env` says otherwise."""
    return subprocess.run(
        [sys.executable, LAUNCH / program, *arguments],
        env={**os.environ, "PATH": "/nonexistent", **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry_run(*arguments: str | Path) -> tuple[list[str], str]:
    """The lines of the script, and the recipe, that a dry run of launch/slurm.py shows."""
    done = launch("slurm.py", *arguments, "--dry-run")
    script, _, recipe = done.stdout[done.stdout.find("#!/bin/bash") :].partition("# -------------------- recipe.toml")
    return script.splitlines(), recipe.partition("\n")[2]


@pytest.fixture
def tiny(cast_shards: Path) -> Arguments:
    """Arguments of a run that a machine with small shards could start."""
    return ["--arch", "crate_tiny", "--data", cast_shards, "--set", "train.global_batch=64"]


@pytest.fixture
def sbatch(tmp_path: Path) -> dict[str, str]:
    """An environment with an sbatch that keeps its script and its environment beside it, and takes every job."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "sbatch"
    program.write_text(
        f'#!/bin/sh\n/bin/cp "$1" {folder}/script\n/usr/bin/env > {folder}/environment\necho Submitted batch job 4242\n'
    )
    program.chmod(0o755)
    (folder / "srun").symlink_to(program)
    return {"PATH": str(folder)}


# What it asks SLURM for


def test_its_defaults_are_what_a_slurm_user_expects(cast_shards: Path) -> None:
    script, _ = dry_run("--arch", "crate_large", "--nodes", "4", "--data", cast_shards)
    assert {
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --time=1440",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --job-name=crate_large",
    } <= set(script)
    assert not [line for line in script if line.startswith(("#SBATCH --error", "#SBATCH --wckey"))]
    command = script[-2]
    assert command.startswith("srun --unbuffered")
    assert "--kill-on-bad-exit=1" in command
    assert "--cpus-per-task=12" in command
    assert re.search(rf"{sys.executable} -u \S+/code/\w+/crate_dist/start.py -u -m submitit.core._submit", command)


def test_flags_replace_the_cluster_table(tiny: Arguments) -> None:
    flags = ["--partition", "gpu", "--account", "vision", "--qos", "high", "--constraint", "h100&ib"]
    flags += ["--cpus-per-task", "6", "--mem-gb", "500", "--time", "2-00:00:00", "--nodes", "2"]
    setup = ["--setup", "module load cuda", "--setup", "export NCCL_DEBUG=INFO"]
    script, _ = dry_run(*tiny, *flags, *setup)
    assert {
        "#SBATCH --partition=gpu",
        "#SBATCH --account=vision",
        "#SBATCH --qos=high",
        "#SBATCH --constraint='h100&ib'",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --mem=500GB",
        "#SBATCH --time=2880",
        "#SBATCH --nodes=2",
    } <= set(script)
    assert script.index("module load cuda") + 1 == script.index("export NCCL_DEBUG=INFO")


def test_a_range_of_nodes_is_left_to_slurm_with_the_cores_of_a_node_as_one_tasks(tiny: Arguments) -> None:
    arguments: Arguments = [*tiny, "--nodes", "2-4", "--gpus-per-node", "2", "--cpus-per-task", "5"]
    script, recipe = dry_run(*arguments)
    assert {"#SBATCH --nodes=2-4", "#SBATCH --cpus-per-task=10", "crate_nodes_used=([2]=2 [3]=2 [4]=4)"} <= set(script)
    assert not [line for line in script if line.startswith("#SBATCH --ntasks")]
    assert "--cpus-per-task=5" in script[-2]
    assert 'nodes = "2-4"' in recipe


def test_a_range_of_nodes_says_which_numbers_train_and_is_refused_where_none_does(tiny: Arguments) -> None:
    arguments: Arguments = [*tiny, "--gpus-per-node", "8", "--dry-run"]
    said = launch("slurm.py", *arguments, "--nodes", "2-5").stdout
    assert "2 and 4 of 2-5 nodes; on 3, 1 would stand idle; on 5, 1 would stand idle" in said
    done = launch("slurm.py", *arguments, "--nodes", "5-7")
    assert done.returncode == 1
    assert "divides over no number of 5-7 nodes; with 8 ranks on each, 1, 2, 4, 8 would" in done.stderr
    assert "'4-2': expected a whole number from 1 on, or a range" in launch("slurm.py", *tiny, "--nodes", "4-2").stderr


def test_without_gpus_none_are_requested_and_those_of_the_node_are_hidden(tiny: Arguments) -> None:
    arguments: Arguments = [*tiny, "--gpus-per-node", "0", "--tasks-per-node", "3"]
    script, _ = dry_run(*arguments)
    assert "#SBATCH --ntasks-per-node=3" in script
    assert not [line for line in script if line.startswith(("#SBATCH --gpus", "#SBATCH --gres"))]
    assert "export CUDA_VISIBLE_DEVICES=" in script
    script, _ = dry_run(*tiny, "--gpus-per-node", "2")
    assert "export CUDA_VISIBLE_DEVICES=" not in script


def test_ranks_follow_the_gpus_that_a_flag_asks_for(cast_shards: Path, tmp_path: Path) -> None:
    arguments: Arguments = ["--arch", "demo", "--data", cast_shards, "--run-dir", tmp_path / "run"]
    script, _ = dry_run(*arguments, "--gpus-per-node", "4")  # 2 CPU ranks in the recipe
    assert "#SBATCH --ntasks-per-node=4" in script


def test_a_container_sees_the_data_the_run_and_the_code(tiny: Arguments, cast_shards: Path, tmp_path: Path) -> None:
    arguments: Arguments = [*tiny, "--run-dir", tmp_path / "runs" / "one"]
    command = dry_run(*arguments, "--container", "docker://pytorch")[0][-2]
    assert "--container-image=docker://pytorch" in command
    for folder in (cast_shards, tmp_path / "runs"):
        assert f"{folder}:{folder}" in command
    assert re.search(rf" python3 -u {tmp_path}/runs/one/code/\w+/crate_dist/start.py -u -m submitit", command)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *(("90", 90), ("90:30", 91), ("12:00:00", 720), ("0:00:01", 1)),
        *(("2-00:00:00", 2880), ("1-12", 2160), ("1-12:30", 2190)),
    ],
)
def test_time_limits_are_read_as_slurm_does(text: str, minutes: int) -> None:
    assert parse_minutes(text) == minutes


def test_a_time_limit_that_is_none_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'2 days' is no time limit; 90"):
        parse_minutes("2 days")


# A dry run, and a submission


def test_a_dry_run_needs_no_slurm_and_writes_nothing(tiny: Arguments, tmp_path: Path) -> None:
    done = launch("slurm.py", *tiny, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_whether_the_micro_batch_fits_the_card(tiny: Arguments) -> None:
    cards = {gb: launch("slurm.py", *tiny, "--dry-run", "--gpu-memory-gb", gb).stdout for gb in ("80", "0.1")}
    assert "micro-batch 8 needs about" in cards["80"]
    assert "which is too much" in cards["0.1"]


def test_a_dry_run_shows_the_recipe_that_the_job_will_read(tiny: Arguments, cast_shards: Path, tmp_path: Path) -> None:
    _, shown = dry_run(*tiny, "--nodes", "3", "--set", "optim.grad_clip=0")
    (tmp_path / "shown.toml").write_text(shown)
    recipe = load_recipe(tmp_path / "shown.toml")
    assert recipe.cluster.nodes == 3
    assert recipe.data.root == cast_shards
    assert recipe.optim.grad_clip == 0
    assert recipe.name == "crate_tiny"


@pytest.mark.parametrize("seeds", [[], ["--seeds", "1", "2"]])
def test_a_dry_run_shows_the_script_that_sbatch_is_given(
    sbatch: dict[str, str], tiny: Arguments, tmp_path: Path, seeds: list[str]
) -> None:
    arguments: Arguments = [*tiny, "--run-dir", tmp_path / "run", *seeds]
    shown, _ = dry_run(*arguments)
    done = launch("slurm.py", *arguments, env=sbatch)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bin" / "script").read_text().splitlines() == shown[: shown.index("", len(shown) - 2)]


def test_a_submission_says_what_was_submitted_and_how_to_watch_it(
    sbatch: dict[str, str], tiny: Arguments, cast_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = launch("slurm.py", *tiny, "--run-dir", run, env=sbatch)
    assert done.returncode == 0, done.stderr
    for expected in (
        "4242",
        f"{run} (new)",
        f"{cast_shards}: 200 images to train on and 37 to validate on, 4 classes",
        "64 = 8 images at a time x 1 accumulated x 8 ranks",
        "squeue --job 4242",
        f"tail -F {run}/slurm/4242/4242_0_log.out",
        f"tensorboard --logdir {tmp_path}",
        "scancel 4242",
    ):
        assert expected in done.stdout
    assert (run / "slurm" / "4242" / "4242_submitted.pkl").is_file()
    RunFolder(run).metrics.write_text('{"step": 1}\n')
    assert "(goes on)" in launch("slurm.py", "--config", run / "recipe.toml", "--run-dir", run, env=sbatch).stdout


def test_seeds_are_an_array_of_runs(sbatch: dict[str, str], tiny: Arguments, tmp_path: Path) -> None:
    arguments: Arguments = [*tiny, "--seeds", "0", "7"]
    done = launch("slurm.py", *arguments, env=sbatch, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-1%2" in (tmp_path / "bin" / "script").read_text()
    for number, (name, seed) in enumerate((("crate_tiny", 0), ("crate_tiny-seed7", 7))):
        run = RunFolder(tmp_path / "runs" / name)
        assert load_recipe(run.recipe_file).train.seed == seed
        pickled = run.slurm / f"4242_{number}" / f"4242_{number}_submitted.pkl"
        assert vars(DelayedSubmission.load(pickled).function) == {"run_dir": run.path}


def test_the_job_that_it_is_called_from_does_not_leak_into_the_new_one(
    sbatch: dict[str, str], tiny: Arguments, tmp_path: Path
) -> None:
    around = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "RANK": "1", "WORLD_SIZE": "2", "SLURM_CONF": "/etc/own.conf"}
    arguments: Arguments = [*tiny, "--run-dir", tmp_path / "run"]
    done = launch("slurm.py", *arguments, env={**sbatch, **around})
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "bin" / "environment").read_text().splitlines()
    assert "SLURM_CONF=/etc/own.conf" in seen
    assert not [line for line in seen if line.startswith(("SLURM_JOB_ID", "SLURM_NTASKS", "RANK", "WORLD_SIZE"))]


@pytest.mark.parametrize("program", ["slurm.py", "local.py"])
@pytest.mark.parametrize("arguments", [["--help"], ["--arch", "crate_tiny", "--dry-run"]])
def test_the_login_node_never_imports_torch(program: str, arguments: list[str], cast_shards: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", LAUNCH / program, *arguments],
        env={**os.environ, "CRATE_DATA": str(cast_shards)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "crate_dist.run.folder" in imported
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "deepspeed", "webdataset", "PIL")}


def test_what_is_pickled_is_the_run_folder_alone() -> None:
    job = TrainJob(Path("/runs/one"))
    assert vars(pickle.loads(pickle.dumps(job))) == {"run_dir": Path("/runs/one")}
    accepted = pickle.loads(pickle.dumps(TrainJob(Path("/runs/one"), "digest of the data")))
    assert (job.accepted_data, accepted.accepted_data) == (False, "digest of the data")
    again = job.checkpoint()
    assert isinstance(again, DelayedSubmission)
    assert again.function is job


# What is said at once, before anything is queued


def test_no_sbatch(tiny: Arguments, tmp_path: Path) -> None:
    done = launch("slurm.py", *tiny, cwd=tmp_path)
    assert done.returncode == 1
    assert "error: no sbatch on this machine: run this on a login node" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["slurm.py", "local.py"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "/nowhere"], "no folder /nowhere/train: data_prep/imagenet.py or data_prep/image_folder.py writes"),
        (["--set", "data.val_split=none"], "none to evaluate on; --set data.val_split= trains without evaluation"),
        (["--set", "train.global_batch=65"], "a global batch of 65 does not divide over"),
        (["--set", "train.global_batch=6400"], "200 samples, fewer than one global batch of 6400; --set train.global_"),
        (["--set", "model.num_classes=2"], "4 classes, more than model.num_classes = 2; leave it out, or give 4"),
        (["--run-dir", "/dev/null"], "/dev/null is a file; --run-dir takes a folder"),
        (["--run-dir", "/dev/null/below"], "/dev/null is a file; --run-dir takes a folder"),
        (["--run-dir", "/usr"], "/usr holds something that is no run"),
        (["--set", "train.epoch=2"], "unknown key 'train.epoch' (did you mean 'train.epochs'?)"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    program: str, arguments: list[str], expected: str, tiny: Arguments, sbatch: dict[str, str], tmp_path: Path
) -> None:
    ranks = ["--ranks", "8"] if program == "local.py" else []
    given: Arguments = [*tiny, "--run-dir", tmp_path / "run", *ranks]
    done = launch(program, *given, *arguments, env={**sbatch, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "bin" / "script").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tasks-per-node", "16"], "16 tasks per node on 8 GPUs, and each rank needs its own; --tasks-per-node 8"),
        (["--time", "2"], "leaves no time to train; --time 3 or more"),
        (["--seeds", "1", "1"], "the same seed twice"),
        (["--seeds", "1", "--seed", "2"], "--seed and --seeds: give one of them"),
        (["--set", "cluster.nodes=0"], "cluster.nodes: 0: expected a whole number from 1 on"),
    ],
)
def test_a_cluster_that_cannot_work_is_said_at_once(arguments: list[str], expected: str, tiny: Arguments) -> None:
    done = launch("slurm.py", *tiny, *arguments)
    assert done.returncode == 1
    assert expected in done.stderr


def test_options_that_count_are_looked_at_where_they_are_given(tiny: Arguments) -> None:
    done = launch("slurm.py", *tiny, "--nodes", "0")
    assert done.returncode == 2
    assert "argument --nodes: '0': expected a whole number from 1 on" in done.stderr


def test_all_that_is_wrong_is_said_together(tmp_path: Path) -> None:
    recipe = load_recipe("crate_tiny", data__root=str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError) as caught:
        preflight(recipe, 7, tmp_path / "file")
    assert len(str(caught.value).split("\n\n")) == 3


def test_wandb_that_is_asked_for_and_not_installed_is_said_with_what_would_do(
    cast_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["log.trackers=tensorboard,wandb", "train.global_batch=64"]
    recipe = load_recipe("crate_tiny", chosen, data__root=str(cast_shards))
    assert "\nwandb         gets what the run measures" in str(preflight(recipe, 1, tmp_path / "run"))
    monkeypatch.setattr("crate_dist.launching.preflight.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install -e '.\[wandb\]' .* --set log.trackers=tensorboard$"):
        preflight(recipe, 1, tmp_path / "run")


def test_an_index_that_is_missing_or_promises_missing_shards(cast_shards: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for file in (cast_shards / split).iterdir():
            (tmp_path / split / file.name).symlink_to(file)
    recipe = load_recipe("crate_tiny", data__root=str(tmp_path), train__global_batch=64)
    preflight(recipe, 1, tmp_path / "run")
    (tmp_path / "val" / "val-000001.tar").unlink()
    with pytest.raises(RecipeError, match=r"val-000001.tar is missing; `python data_prep/verify.py"):
        preflight(recipe, 1, tmp_path / "run")
    (tmp_path / "val" / "index.json").unlink()
    with pytest.raises(RecipeError, match=r"no index.json in .*/val; `python data_prep/index.py"):
        preflight(recipe, 1, tmp_path / "run")


def test_groups_of_neighbours_stay_whole_on_every_cluster_and_card(cast_shards: Path, tmp_path: Path) -> None:
    chosen = ["train.global_batch=192", "train.group=16", "cluster.gpus_per_node=2", "cluster.nodes=2-5"]
    recipe = load_recipe("crate_tiny", chosen, data__root=str(cast_shards))
    assert nodes_used(recipe) == {2: 2, 3: 3, 4: 3, 5: 3}  # 192 divides over 4 nodes, its 12 groups do not
    assert preflight(recipe, 6, tmp_path / "run").micro_batch == 32
    with pytest.raises(RecipeError, match=r"not divide over 8 ranks in whole groups of 16; .* 6, 12; .*=128 or"):
        preflight(recipe, 8, tmp_path / "run")
    fits = [largest_micro_batch(recipe, 2, gb * 1e9) for gb in (0.1, 2, 4, 8, 80)]
    assert fits[0] == 0
    assert fits[-1] == 96
    assert fits == sorted(fits)
    assert all(n % 16 == 0 for n in fits)
    assert "not even one group of 16 images would fit" in advice(recipe, 96, 2, 0.1)


def test_a_run_folder_of_another_recipe(cast_shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe("crate_tiny", data__root=str(cast_shards), train__global_batch=64)
    RunFolder(tmp_path / "run").open(recipe)
    RunFolder(tmp_path / "run").metrics.write_text('{"step": 1}\n')
    changed = recipe.model_dump()
    changed["optim"]["lr"] = 1.0
    with pytest.raises(RecipeError, match=r"(?s)holds a run of another recipe.*optim.lr.*another --run-dir") as caught:
        preflight(build_recipe(changed, "test"), 1, tmp_path / "run")
    named = re.findall(r"--config (\S+),", str(caught.value))
    assert preflight(load_recipe(*named), 1, tmp_path / "run").resumes


def test_a_run_of_an_equal_model_begins_another_whatever_it_is_called(tmp_path: Path) -> None:
    RunFolder(tmp_path).open(load_recipe("cbt_tiny", ["model.mixer=mssa"]))
    (RunFolder(tmp_path).checkpoints / "step-00000001").mkdir()
    assert check_init_from(tmp_path, load_recipe("cbt_tiny", ["model.arch=cbsa_crate_tiny"])) == ""
    with pytest.raises(RecipeError, match=r"--set model\.arch=cbt_tiny would fit"):
        check_init_from(tmp_path, load_recipe("cbt_tiny", ["model.arch=cbsa_tost_tiny"]))


def test_a_run_folder_without_permission(cast_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("crate_tiny", data__root=str(cast_shards), train__global_batch=64)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(RecipeError, match="no permission to write the run folder"):
        preflight(recipe, 1, tmp_path / "run")


@pytest.mark.parametrize(
    ("says", "refusal"),
    [
        ("echo '4242|4242|PENDING|0:00|1:00|N/A||Resources'", "job 4242, which is to work in .*, is pending"),
        ("echo '4250|4242_1|RUNNING|0:10|0:50|N/A|n[0-1]|None'", "job 4242_1, which is to work in .*, is running"),
        ("echo Unable to contact slurm controller >&2; exit 1", "does not say .*4242.*Unable to contact"),
        ("echo '17|17|PENDING|0:00|1:00|N/A||Resources'", ""),
    ],
)
def test_slurm_is_asked_whether_a_job_of_the_folder_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, refusal: str
) -> None:
    folder, squeue = RunFolder(tmp_path / "run"), tmp_path / "squeue"
    for job in "4242", "4242_1":
        (folder.slurm / job).mkdir(parents=True)
    squeue.write_text(f"#!/bin/sh\n{says}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(queue, "_PAUSES_S", (0.0, 0.1))
    if refusal:
        with pytest.raises(RecipeError, match=refusal):
            check_that_no_job_waits(folder)
    else:
        check_that_no_job_waits(folder)
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    check_that_no_job_waits(folder)  # the job itself
