"""The batch script's memory and its reading of logs, in a real shell, no scheduler. On a real one: tests/cluster."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crate_dist.run.exit_status import LOST_THE_RUN, NEEDS_A_PERSON, STOPPED, TRY_AGAIN
from crate_dist.run.faults import DEVICE_FAULT
from crate_dist.run.folder import STOP_REQUEST
from tests.ranks import REPOSITORY

START = "crate-dist start 2.1: rank {rank} on node {node}\n"
BEFORE = "crate-dist start 1.1: rank {rank} on node {node}\n"


def batch(tmp_path: Path, *commands: str, env: dict[str, str] | None = None, setup: str = "") -> str:
    """Returns what `commands` print after slurm/batch.sh has been read, as in a job that was requeued twice.

    setup: lines of the user's
    """
    lines = [
        f"crate_device_fault={shlex.quote(DEVICE_FAULT)} crate_stopped={STOPPED}",
        f"crate_needs_a_person={NEEDS_A_PERSON} crate_lost_the_run={LOST_THE_RUN}",
        f"crate_submissions={tmp_path}/logs crate_run_dirs=({tmp_path}/one {tmp_path}/two)",
        f"crate_stop_request={STOP_REQUEST} crate_notify= crate_stuck_after=30 crate_python={sys.executable}",
        f"crate_start_py={REPOSITORY}/crate_dist/start.py",
        f"source {REPOSITORY}/crate_dist/slurm/tell.sh",
        setup,
        f"source {REPOSITORY}/crate_dist/slurm/batch.sh",
        "crate_start=1",
        "scontrol() { printf 'n1\\nn2\\n'; }",  # the nodes of the job
        *commands,
    ]
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "PATH": "/usr/bin:/bin", **(env or {})}
    done = subprocess.run(["bash", "-c", "\n".join(lines)], env=variables, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_a_task_of_an_array_knows_itself_and_its_run(tmp_path: Path) -> None:
    say = "echo $crate_job $crate_run_dir"
    assert batch(tmp_path, say) == f"7 {tmp_path}/one"
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    assert batch(tmp_path, say, env=array) == f"7_1 {tmp_path}/two"


@pytest.mark.parametrize(
    ("ends", "stuck"),
    [
        ([(TRY_AGAIN, None)], 0),  # with nothing before it to be compared to
        ([(TRY_AGAIN, 100), (TRY_AGAIN, 100), (TRY_AGAIN, 100), (TRY_AGAIN, 100)], 3),
        ([(TRY_AGAIN, 100), (TRY_AGAIN, 100), (TRY_AGAIN, 100), (TRY_AGAIN, 105)], 0),
        ([(TRY_AGAIN, 100), (TRY_AGAIN, 90), (STOPPED, 95), (TRY_AGAIN, 100)], 2),  # a later one was damaged
    ],
)
def test_starts_that_get_no_further_are_counted_over_requeues(
    ends: list[tuple[int, int | None]], stuck: int, tmp_path: Path
) -> None:
    for status, step in ends:
        shutil.rmtree(tmp_path / "one", ignore_errors=True)
        if step is not None:
            (tmp_path / "one" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        said = batch(tmp_path, f"crate_note_progress {status}; echo $crate_stuck")
    assert said == str(stuck)


@pytest.mark.parametrize(
    ("before", "status", "expected"),
    [
        ("", 1, "over"),  # it never came to train
        ("", TRY_AGAIN, "again"),
        ("-1 1", 1, "again"),  # it did before, so srun could not start the ranks
        ("-1 2", TRY_AGAIN, "GIVEN UP: three starts in a row ended no further than one before them, before the first"),
        ("100 2", STOPPED, "again"),
        ("100 2", NEEDS_A_PERSON, "over"),
        ("100 0", LOST_THE_RUN, "over"),
        ("100 x", TRY_AGAIN, "again"),
    ],
)
def test_whether_another_start_is_worth_it(before: str, status: int, expected: str, tmp_path: Path) -> None:
    (tmp_path / "logs" / "7").mkdir(parents=True)
    (tmp_path / "logs" / "7" / "progress").write_text(before)
    (tmp_path / "one" / "checkpoints" / "step-00000100").mkdir(parents=True)
    if before.startswith("-1"):
        shutil.rmtree(tmp_path / "one")
    said = batch(tmp_path, f"crate_note_progress {status}", f"crate_is_worth_it {status} && echo again || echo over")
    assert expected in said


def test_the_end_of_a_start_that_was_told_to_stop_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "logs" / "7").mkdir(parents=True)
    (tmp_path / "logs" / "7" / "progress").write_text("100 1")
    assert batch(tmp_path, "kill -TERM $$", "crate_note_progress 143; echo $crate_stuck") == "1"


def test_the_node_of_a_broken_device_is_found_in_the_logs_of_this_start_alone(tmp_path: Path) -> None:
    logs = tmp_path / "logs" / "7"
    logs.mkdir(parents=True)
    ecc = "what():  CUDA error: uncorrectable ECC error encountered\n"
    (logs / "7_0_log.out").write_text(BEFORE.format(rank=0, node="n1") + ecc + START.format(rank=0, node="n1"))
    (logs / "7_1_log.out").write_text(START.format(rank=1, node="n2") + "step 5\n" + ecc)
    (logs / "7_2_log.out").write_text(START.format(rank=2, node="n9;reboot") + ecc)
    (logs / "7_3_log.out").write_text(BEFORE.format(rank=3, node="n1") + ecc)
    said = batch(tmp_path, "crate_look_at_logs; echo broken: $crate_broken")
    assert said.splitlines()[0].startswith(
        "crate-dist: node n2 shows a broken device: rank 1 on node n2: what():  CUDA"
    )
    assert said.splitlines()[1:] == ["broken: n2"]


def test_the_name_of_a_sample_makes_no_node_a_broken_one(tmp_path: Path) -> None:
    (logs := tmp_path / "logs" / "7").mkdir(parents=True)
    name = "2026-11-21 10:00:00 W replaced NVRM: Xid.png of train-000000.tar: it does not decode\n"
    (logs / "7_0_log.out").write_text(START.format(rank=0, node="n1") + name)
    assert batch(tmp_path, "crate_look_at_logs; echo broken: $crate_broken") == "broken:"


def test_a_checkpoint_that_replaced_another_is_progress_too(tmp_path: Path) -> None:
    (tmp_path / "logs" / "7").mkdir(parents=True)
    (tmp_path / "logs" / "7" / "progress").write_text("100 2")
    (tmp_path / "one" / "checkpoints" / "step-00000105.1").mkdir(parents=True)
    assert batch(tmp_path, f"crate_note_progress {TRY_AGAIN}; echo $crate_furthest $crate_stuck") == "105 0"


def test_a_rank_that_was_killed_is_named_where_no_rank_says_a_fault(tmp_path: Path) -> None:
    logs = tmp_path / "logs" / "7"
    logs.mkdir(parents=True)
    killed = "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 75\n"
    (logs / "7_0_log.out").write_text("crate-dist start 2.1: on n[1-2]\n" + killed)
    assert batch(tmp_path, 'crate_look_at_logs; echo "$crate_fault"') == "n2: task 1: Killed"


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        (["n2: task 1: Terminated", f"n1: task 0: Exited with exit code {STOPPED}"], "yes"),
        (["n1: tasks 0-1: Terminated"], "yes"),
        ([f"n1: tasks 0-1: Exited with exit code {STOPPED}"], "no"),  # by its status
        (["n2: task 1: Terminated", f"n1: task 0: Exited with exit code {TRY_AGAIN}"], "no"),
        (["n2: task 1: Terminated", "n1: task 0: Killed"], "no"),
    ],
)
def test_ranks_told_to_stop_before_they_could_answer_were_told(ends: list[str], told: str, tmp_path: Path) -> None:
    (logs := tmp_path / "logs" / "7").mkdir(parents=True)
    lines = ["crate-dist start 2.1: on n[1-2]", *(f"srun: error: {end}" for end in ends)]
    (logs / "7_0_log.out").write_text("\n".join(lines) + "\n")
    assert batch(tmp_path, "crate_look_at_logs; echo $crate_told_to_stop") == told


def test_the_fault_that_is_named_is_not_that_of_a_rank_which_lost_another(tmp_path: Path) -> None:
    logs = tmp_path / "logs" / "7"
    logs.mkdir(parents=True)
    fault = "rank 1 on node n2: ShardError: cannot read /data/x.tar: Input/output error"
    (logs / "7_0_log.out").write_text(
        START.format(rank=0, node="n1") + "crate-dist lost: rank 0 on node n1: DistBackendError: …\n"
    )
    (logs / "7_1_log.out").write_text(START.format(rank=1, node="n2") + f"crate-dist fault: {fault}\n")
    assert batch(tmp_path, 'crate_look_at_logs; echo "$crate_fault/$crate_broken"') == f"{fault}/"


def test_a_node_that_says_it_is_unfit_is_named_and_not_its_neighbour(tmp_path: Path) -> None:
    (logs := tmp_path / "logs" / "7").mkdir(parents=True)
    why = "clock, to that of the file system: 86400 s (expected: within 60 s)"
    unfit = f"crate-dist unfit: rank 1 on node n2: {why}\n"
    (logs / "7_0_log.out").write_text(START.format(rank=0, node="n1") + "crate-dist lost: rank 0 on node n1: …\n")
    (logs / "7_1_log.out").write_text(START.format(rank=1, node="n2") + unfit)
    said = batch(tmp_path, 'crate_look_at_logs; echo "broken: $crate_broken"')
    assert said.splitlines() == [f"crate-dist: node n2 is unfit: rank 1 on node n2: {why}", "broken: n2"]


RANGE = "crate_nodes_used=([2]=2 [3]=2 [4]=4) crate_ranks_per_node=8 crate_fewest_nodes=2"
NODES = "scontrol() {{ printf '%s\\n' {nodes}; }}"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("n1 n2", ["--nodes=2 --nodelist=n1,n2 --ntasks=16 --ntasks-per-node=8"]),
        (
            "n1 n2 n5",
            [
                "crate-dist: the global batch divides over 2 nodes, and not over 3; idle: n5",
                "--nodes=2 --nodelist=n1,n2 --ntasks=16 --ntasks-per-node=8",
            ],
        ),
        ("n1 n2 n3 n4", ["--nodes=4 --nodelist=n1,n2,n3,n4 --ntasks=32 --ntasks-per-node=8"]),
    ],
)
def test_of_a_range_of_nodes_those_are_used_that_divide(nodes: str, expected: list[str], tmp_path: Path) -> None:
    show = 'crate_choose_nodes; echo "${crate_here[@]}"'
    assert batch(tmp_path, RANGE, NODES.format(nodes=nodes), show).splitlines() == expected


def test_an_exact_number_of_nodes_is_left_to_srun_as_it_was(tmp_path: Path) -> None:
    assert batch(tmp_path, "crate_nodes_used=([2]=2)", 'crate_choose_nodes; echo "${#crate_here[@]} $crate_used"') == (
        "0 n1,n2"
    )


@pytest.mark.parametrize(
    ("broken", "there", "expected"),
    [
        ("n2", "n1 n2 n3", "leave n2, yes"),
        ("n1,n2", "n1 n2 n3 n4", "all of them are like that, so it may be the program\nleave , no"),
        ("n2", "n1 n2", "without n2 there are too few in this partition that fit the job\nleave , no"),
    ],
)
def test_nodes_are_left_only_where_others_are_left(broken: str, there: str, expected: str, tmp_path: Path) -> None:
    said = batch(
        tmp_path,
        "crate_fewest_nodes=2 crate_nodes_used=([2]=2)",
        "scontrol() { [ $2 = hostnames ] && echo $3 | tr , '\\n'; }",
        f"sinfo() {{ printf '%s\\n' {there}; }}",
        f"crate_choose_nodes; crate_broken={broken}; crate_find_others",
        'echo "leave $crate_broken, $crate_may_leave_nodes"',
        env={"SLURM_JOB_NODELIST": "n1,n2"},
    )
    assert said.endswith(expected)


@pytest.mark.parametrize(("progress", "may"), [(None, "yes"), ("100 0\n", "yes"), ("100 1\n", "no")])
def test_a_node_is_not_left_again_when_that_has_just_brought_nothing(
    progress: str | None, may: str, tmp_path: Path
) -> None:
    if progress:
        (tmp_path / "logs" / "7").mkdir(parents=True)
        (tmp_path / "logs" / "7" / "progress").write_text(progress)
    assert batch(tmp_path, "echo $crate_may_leave_nodes") == may


def test_a_run_that_was_asked_to_stop_is_neither_started_nor_requeued(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / STOP_REQUEST).touch()
    command = "command() { echo RAN; }"
    assert "RAN" not in (said := batch(tmp_path, command, "srun; echo status $?"))
    assert said.endswith(f"status {STOPPED}")
    said = batch(tmp_path, f"crate_note_progress {STOPPED}; crate_is_worth_it {STOPPED} || echo over")
    assert said.splitlines() == [
        "crate-dist: stopped, as it was asked to; `launch/status.py resume` goes on with it",
        "over",
    ]


@pytest.mark.parametrize("python", [sys.executable, "/nonexistent"])
def test_who_is_to_be_told_of_a_failure_is_told_even_without_this_python(python: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    settings = f"crate_python={python} crate_notify={shlex.quote(f'cat > {tmp_path}/note')}"
    fault = 'rank 0: it said "no"\\n and \\ went'
    said = batch(
        tmp_path,
        settings,
        "exec 2>/dev/null",  # where a shell says that there is no such Python
        f"crate_fault={shlex.quote(fault)}",
        f"crate_note_progress {NEEDS_A_PERSON}; crate_is_worth_it {NEEDS_A_PERSON} || echo over",
    )
    assert said.startswith("crate-dist: FAILED: it needs a person: rank 0")
    assert said.endswith("over")
    note = json.loads((tmp_path / "note").read_text())
    assert (note["event"], note["run"]) == ("failed", f"{tmp_path}/one")
    assert note["fault"] == f"FAILED: it needs a person: {fault}"


@pytest.mark.parametrize(
    ("asked", "there", "expected"),
    [
        ("Features=fast", "n1 fast (null)\nn2 fast (null)\nn3 slow (null)", "too few in this partition that fit"),
        ("Features=fast", "n1 fast (null)\nn2 fast (null)\nn3 new,fast (null)", "leave n2"),
        ("Features=[a|b]&c*2", "n1 a,c (null)\nn2 a,c (null)\nn3 b,c (null)", "leave n2"),
        ("Features=[a|b]&c*2", "n1 a,c (null)\nn2 a,c (null)\nn3 b (null)", "too few in this partition that fit"),
        ("TresPerNode=gres:gpu:a:4", "n1 x gpu:a:4\nn2 x gpu:a:4\nn3 x gpu:b:4", "too few in this partition that fit"),
        ("TresPerNode=gres:gpu:4", "n1 x gpu:a:4\nn2 x gpu:a:4\nn3 x gpu:b:4(S:0-1)", "leave n2"),
        ("ReqNodeList=n2", "n1 x x\nn2 x x\nn3 x x", "is not excluded: the job asks for n2"),
        ("Reservation=r", "n1 x x\nn2 x x\nn3 x x", "too few in this partition that fit"),
    ],
)
def test_a_node_is_excluded_only_where_others_fit_the_job(
    asked: str, there: str, expected: str, tmp_path: Path
) -> None:
    said = batch(
        tmp_path,
        "crate_fewest_nodes=2 crate_nodes_used=([2]=2)",
        f"""scontrol() {{
            case "$*" in
                *hostnames*) echo $3 | tr , '\\n' ;;
                *reservation*) echo 'ReservationName=r Nodes=n1,n2 NodeCnt=2' ;;
                *) echo 'JobId=7 {asked} ExcNodeList=(null) End=0' ;;
            esac
        }}""",
        f"sinfo() {{ printf '%s\\n' {shlex.quote(there)}; }}",
        "crate_choose_nodes; crate_broken=n2; crate_find_others",
        'echo "leave $crate_broken"',
        env={"SLURM_JOB_NODELIST": "n1,n2", **({"SLURM_JOB_RESERVATION": "r"} if "Reservation" in asked else {})},
    )
    assert expected in said


@pytest.mark.parametrize("when", ["restart", "requeue", "refusal"])
def test_a_run_that_is_asked_to_stop_while_its_ranks_start_again_has_not_failed(when: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    ask = f"touch {tmp_path}/one/{STOP_REQUEST}"
    before = {"restart": ask, "requeue": f"{ask}; false", "refusal": "false"}[when]
    said = batch(
        tmp_path,
        f"crate_notify={shlex.quote(f'touch {tmp_path}/told')} crate_restarts_in_place=3 crate_requeues=5",
        "crate_watch_for_stalls() { :; }; sleep() { :; }",
        f"crate_can_start_here() {{ {before}; }}",
        f"command() {{ echo RAN; return {TRY_AGAIN}; }}",
        f"""scontrol() {{
            case "$1" in
                requeue) {ask}; return 1 ;; # the request had SLURM refuse it
                --oneliner) echo 'JobState=RUNNING Restarts=2 ' ;;
            esac
        }}""",
        "srun; echo status $?",
    )
    assert said.count("RAN") == 1
    assert "asked to" in said
    assert ("requeueing" in said) == (when == "refusal")
    assert "FAILED" not in said
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize(
    ("setup", "why"),
    [("crate_fault='module load x failed'; exit 1", "status 1: module load x failed"), ("set -e; false", "status 1")],
)
def test_a_set_up_line_that_ends_the_job_is_told(setup: str, why: str, tmp_path: Path) -> None:
    notify = f"crate_notify={shlex.quote(f'cat >> {tmp_path}/note')}"
    (tmp_path / "one").mkdir()
    said = batch(tmp_path, "echo not here", setup=f"{notify}\n{setup}")
    assert said.startswith(f"crate-dist: FAILED: a set-up line ended the job with {why}\n")
    assert "not here" not in said
    assert json.loads((tmp_path / "note").read_text())["fault"].endswith(why)


def test_a_job_that_is_cancelled_in_its_set_up_or_gets_through_it_has_not_failed(tmp_path: Path) -> None:
    assert batch(tmp_path, setup="kill -TERM $$") == ""
    assert batch(tmp_path, "exit 3", setup="true") == ""
    assert batch(tmp_path, setup="trap 'echo cleaned' EXIT") == "cleaned"
