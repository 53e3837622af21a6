"""The site file: who may write it, what it may say, and where a job's values come from. On a cluster: tests/cluster."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from crate_dist.config import RecipeError
from crate_dist.errors import UserError
from crate_dist.launching import site as module
from crate_dist.launching.memory import checkpoint_bytes
from crate_dist.launching.site import Site, load_site, template, user_file
from crate_dist.run.folder import RunFolder, read_recipe
from crate_dist.slurm.options import known_options, parse_option
from crate_dist.slurm.verdict import qos_beyond, refusal
from crate_dist.watching.resuming import launch_command
from tests.launching.test_launchers import launch, sbatch, tiny  # noqa: F401
from tests.ranks import REPOSITORY

_spec = importlib.util.spec_from_file_location("launch_slurm", REPOSITORY / "launch" / "slurm.py")
assert _spec
assert _spec.loader
PROGRAM = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(PROGRAM)
STORED = REPOSITORY / "tests" / "stored_run" / "run"


Arguments = list[str | Path]


class Said(NamedTuple):
    """How a program ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    """A site file."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    path = folder / "site.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def slurm(*arguments: str | Path, data: Path) -> Said:
    """Runs launch/slurm.py --dry-run in this process, where there is no sbatch."""
    os.environ["PATH"] = "/nonexistent"  # given back by a fixture
    given = [*arguments, "--data", data, "--dry-run", "--set", "train.global_batch=64"]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = PROGRAM.main([str(word) for word in given])
        except SystemExit as end:
            status = int(end.code or 0)
    return Said(status, out.getvalue(), err.getvalue())


def asked(shown: str) -> set[str]:
    """The options of sbatch in a script."""
    return set(re.findall(r"^#SBATCH --(.*)$", shown, re.MULTILINE))


def origin(shown: str, key: str) -> tuple[str, str]:
    """The value of a key in what a dry run shows, and where it is from."""
    row = re.search(rf"^  {key} +(\S.*?)  +(\S.*)$", shown, re.MULTILINE)
    assert row, shown
    return row[1], row[2]


# The files


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folders of the clone's file and of the user's, both empty."""
    monkeypatch.delenv(module.SITE_VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(module, "CLONE_FILE", tmp_path / "clone" / "site.toml")
    return tmp_path / "clone", tmp_path / "config" / "crate-dist"


def test_the_users_own_file_wins_over_the_clones_key_by_key(places: tuple[Path, Path], tmp_path: Path) -> None:
    assert load_site() == Site()
    clone = written(places[0], 'partition = "gpu"\naccount = "all"\nenvironment.A = "1"\nenvironment.B = "1"\n')
    own = written(places[1], 'account = "mine"\nenvironment.B = "2"\n')
    assert own == user_file()
    site = load_site()
    assert (site.partition, site.account, site.environment) == ("gpu", "mine", {"A": "1", "B": "2"})
    assert [site.origins[key] for key in ("partition", "account", "environment.A", "environment.B")] == [
        *(str(clone), str(own)),
        *(str(clone), str(own)),
    ]
    other = written(tmp_path / "other", 'qos = "high"')
    assert (load_site(other).qos, load_site(other).partition) == ("high", None)
    assert load_site(other, use=False) == Site()


def test_no_other_folder_is_looked_into(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "here", 'setup = ["echo owned"]')
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CONFIG_HOME", ".")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_site() == Site()


@pytest.mark.parametrize(
    ("mode", "folder_mode", "refused"), [(0o602, 0o755, True), (0o600, 0o777, True), (0o644, 0o755, False)]
)
def test_a_file_that_others_could_have_written_is_refused(
    mode: int, folder_mode: int, refused: bool, tmp_path: Path
) -> None:
    path = written(tmp_path / "site", 'qos = "high"', mode)
    path.parent.chmod(folder_mode)
    if refused:
        with pytest.raises(RecipeError, match=r"others may write to .*: chmod go-w .*site"):
            load_site(path)
    else:
        assert load_site(path).qos == "high"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partion = 'x'", "unknown key 'partion' (did you mean 'partition'?)"),
        ("partition = 'x y'", "partition: "),
        ("partition", "is not TOML"),
        ("time = 'long'", "time: 'long' is no time limit; 90 (minutes), 12:00:00 or 2-00:00:00 would be"),
        ("gpus_per_node = 'a100'", "gpus_per_node: 'a100': expected a whole number from 0 on, or with the type"),
        ("gres = 'lustre:1'", "gres: 'lustre:1': expected the GPUs, as \"gpu:{n}\""),
        ("gres = 'gpu:a100:4,gpu:b:1'", "expected gpu:N or gpu:TYPE:N for the GPUs"),
        ('environment."A;B" = "1"', "environment: 'A;B' is no name of a variable"),
        ("environment.SLURM_JOB_ID = '1'", "environment: SLURM_JOB_ID is said by SLURM or the launcher"),
        ("environment.OMP_NUM_THREADS = 4", 'environment: OMP_NUM_THREADS: expected a text, such as "4", not 4'),
        (r"environment.A = 'x'\nsetup = ['a\nb']".replace("\\n", "\n"), "is not TOML"),
        ('setup = ["a\\nb"]', "setup.0: has a line break"),
        ("sbatch.nodes = 3", "sbatch's --nodes is the launcher's own: --nodes N"),
        ("sbatch.gres = 'gpu:4'", "the GPUs belong into the key gres of the file itself"),
        ("sbatch.exclusive = false", "exclusive: expected a text, a number, or true"),
        ("sbatch.reservatoin = 'x'", "sbatch knows no option --reservatoin (did you mean 'reservation'?)"),
        ("data = 'shards'", "data: 'shards' depends on where a command is given; expected a path from / or ~ on"),
    ],
)
def test_what_a_site_file_cannot_say_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_site(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_the_template_has_every_key_and_is_a_site_file(tmp_path: Path) -> None:
    assert load_site(written(tmp_path, template())) == Site()
    lines = [line.removeprefix("# ") for line in template().splitlines()]
    site = load_site(written(tmp_path, "\n".join(line for line in lines if re.match(r"[a-z.A-Z_]+ = ", line))))
    assert {key.partition(".")[0] for key in site.origins} == set(Site.model_fields)


# The values of a job


def test_a_site_wins_over_the_recipe_and_a_flag_over_the_site(cast_shards: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    text = (REPOSITORY / "configs" / "crate_tiny.toml").read_text()
    recipe.write_text(f'{text}\npartition = "old"\nqos = "low"\ntime_min = 60\ngpus_per_node = 4\n')
    site = written(tmp_path, "partition = 'gpu'\naccount = 'a'\ntime = '2:00:00'\nmodules = ['cuda/12']\nmem_gb = 5\n")
    flags: Arguments = ["--site", site, "--account", "b", "--set", "cluster.mem_gb=7", "--setup", "echo hello"]
    shown = slurm("--config", recipe, *flags, data=cast_shards).stdout
    assert {"partition=gpu", "account=b", "qos=low", "time=120", "mem=7GB", "gpus-per-node=4"} <= asked(shown)
    assert origin(shown, "partition") == ("gpu", str(site))
    assert origin(shown, "account") == ("b", "--account")
    assert origin(shown, "qos") == ("low", str(recipe))
    assert origin(shown, "mem_gb") == ("7", "--set cluster.mem_gb")
    assert origin(shown, "cpus_per_task") == ("12", "default")
    assert origin(shown, "train.global_batch") == ("64", "--set train.global_batch")
    assert origin(shown, "data.root") == (str(cast_shards), "--data")
    script = shown.splitlines()
    load = next(line for line in script if line.startswith("module load cuda/12 || {"))
    assert script.index(load) + 1 == script.index("echo hello", script.index("#!/bin/bash"))
    without = slurm("--config", recipe, *flags, "--no-site", data=cast_shards).stdout
    assert {"partition=old", "time=60"} <= asked(without)


@pytest.mark.parametrize(
    ("site", "flags", "expected"),
    [
        ("gpus_per_node = 4", [], {"gpus-per-node=4", "ntasks-per-node=4"}),
        ("gpus_per_node = 'a100:4'", [], {"gpus-per-node=a100:4", "ntasks-per-node=4"}),
        ("gpus_per_node = 'a100:4'", ["--gpus-per-node", "2"], {"gpus-per-node=a100:2", "ntasks-per-node=2"}),
        ("", ["--gpus-per-node", "h100:2"], {"gpus-per-node=h100:2", "ntasks-per-node=2"}),
        ("gres = 'gpu:{n}'", [], {"gres=gpu:8", "ntasks-per-node=8"}),
        ("gres = 'gpu:{n}'", ["--gpus-per-node", "a100:2"], {"gres=gpu:a100:2", "ntasks-per-node=2"}),
        ("gres = 'gpu:a100:4'", [], {"gres=gpu:a100:4", "ntasks-per-node=4"}),
        ("sbatch.gres = 'lustre:1'", [], {"gres=lustre:1", "gpus-per-node=8"}),
        ("gres = 'gpu:{n}'", ["--sbatch", "gres=lustre:1"], {"gres=gpu:8,lustre:1"}),
        ("", ["--sbatch", "gres=gpu:a100:2,lustre:1"], {"gres=gpu:a100:2,lustre:1", "ntasks-per-node=2"}),
        ("", ["--sbatch", "mem-per-gpu=60G"], {"mem-per-gpu=60G", "gpus-per-node=8"}),
        ("", ["--sbatch", "mem-per-cpu=1G"], {"mem-per-cpu=1G", "gpus-per-node=8"}),
    ],
)
def test_gpus_are_asked_for_as_the_site_wants(
    site: str, flags: list[str], expected: set[str], cast_shards: Path, tmp_path: Path
) -> None:
    shown = slurm("--arch", "crate_tiny", "--site", written(tmp_path, site), *flags, data=cast_shards).stdout
    assert expected <= asked(shown)
    assert len([option for option in asked(shown) if option.startswith(("gpus", "gres=gpu"))]) == 1
    assert len([option for option in asked(shown) if option.startswith("mem")]) == 1


def test_a_recipe_for_the_cpu_stays_one(cast_shards: Path, tmp_path: Path) -> None:
    site = written(tmp_path, "gres = 'gpu:4'\ncpus_per_task = 12")
    shown = slurm("--arch", "demo", "--site", site, "--run-dir", tmp_path / "run", data=cast_shards).stdout
    assert {"ntasks-per-node=2", "cpus-per-task=1"} <= asked(shown)
    assert not [option for option in asked(shown) if option.startswith("g")]


def test_lists_add_up_and_other_options_replace(cast_shards: Path, tmp_path: Path) -> None:
    text = "exclude = ['n1', 'n[3-5]']\nsbatch.nice = 3\nsbatch.reservation = 'x'\nsbatch.exclude = 'n7'\n"
    site = written(tmp_path, text)
    flags: Arguments = ["--exclude", "n9", "--sbatch", "exclude=n8", "--nice", "7", "--after", "17", "--after", "18_2"]
    shown = slurm("--arch", "crate_tiny", "--site", site, *flags, "--sbatch", "exclusive", data=cast_shards).stdout
    assert {
        *("exclude='n1,n[3-5],n7,n8,n9'", "nice=7", "reservation=x", "exclusive"),
        "dependency=afterany:17:18_2",
    } <= asked(shown)


def test_a_mail_flag_wins_over_both_of_the_sites_words_for_it(cast_shards: Path, tmp_path: Path) -> None:
    site = written(tmp_path, "mail = 'a'\nsbatch.mail-user = 'b'\nsbatch.mail-type = 'FAIL'\n")
    shown = slurm("--arch", "crate_tiny", "--site", site, "--mail", "c", data=cast_shards).stdout
    assert {"mail-user=c", "mail-type=FAIL"} <= asked(shown)
    assert origin(shown, "mail-user") == ("c", "--mail")


@pytest.mark.parametrize(
    ("clone", "own", "expected", "file"),
    [
        ("gres = 'gpu:4'", "gpus_per_node = 2", "gres=gpu:2", 1),
        ("gres = 'gpu:a100:4'", "gpus_per_node = 'h100:2'", "gres=gpu:h100:2", 1),
        ("gpus_per_node = 2", "gres = 'gpu:4'", "gres=gpu:4", 1),
        ("gpus_per_node = 2", "gres = 'gpu:{n}'", "gres=gpu:2", 0),
    ],
)
def test_of_two_files_the_users_own_says_how_many_gpus(
    clone: str, own: str, expected: str, file: int, places: tuple[Path, Path], cast_shards: Path
) -> None:
    files = written(places[0], clone), written(places[1], own)
    shown = slurm("--arch", "crate_tiny", data=cast_shards).stdout
    assert expected in asked(shown)
    assert origin(shown, "gpus_per_node") == (re.sub(".*?(gpu:|node=)", "", expected), str(files[file]))


def test_a_value_that_is_set_by_its_old_name_is_from_the_command_line(cast_shards: Path) -> None:
    shown = slurm("--arch", "crate_tiny", "--set", "data.lanes=8", data=cast_shards).stdout
    assert origin(shown, "order.lanes") == ("8", "--set data.lanes")


@pytest.mark.parametrize(
    ("flags", "qos", "expected"),
    [("DenyOnLimit", "long", ""), ("PartitionTimeLimit", "long", "the qos long may"), ("PartitionTimeLimit", "x", "")],
)
def test_a_qos_that_goes_beyond_partitions_is_known(
    flags: str, qos: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sacctmgr"
    program.write_text(f"#!/bin/sh\necho 'normal|'\necho 'long|{flags}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert qos_beyond({"qos": (qos, "--qos")}).startswith(expected)
    assert bool(qos_beyond({"qos": (qos, "--qos")})) == bool(expected)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sbatch", "nodes=3"], "--sbatch nodes=3: sbatch's --nodes is the launcher's own: --nodes N"),
        (["--sbatch", "array=0-3"], "sbatch's --array is the launcher's own: --seeds"),
        (["--sbatch", "output=x"], "the logs lie in the run folder"),
        (["--sbatch", "wrap=true"], "--wrap is the launcher's own"),
        (["--sbatch", "exlude=n3"], "sbatch knows no option --exlude (did you mean 'exclude'?)"),
        (["--sbatch", "comment=a\n#SBATCH --uid=0"], "has a control character in it, and would not stay on one line"),
        (["--sbatch", "comment=a\\"], "sbatch would misread the backslash"),
        (["--sbatch", "comment="], "no value behind the ="),
        (["--nice", "3", "--sbatch", "nice=4"], "--sbatch nice=4 and --nice: give one of them"),
        (
            ["--gpus-per-node", "2", "--sbatch", "gres=gpu:4"],
            "--gpus-per-node 2 and --sbatch gres=gpu:4: give one of them",
        ),
        (["--exclude", ""], "--exclude: no value"),
        (["--exclude", "n1\n#SBATCH --uid=0"], "--exclude: 'n1\\n#SBATCH --uid=0' has a control character in it"),
        (["--mail", "me\nyou"], "--mail: 'me\\nyou' has a control character in it"),
        (["--mail", "me", "--sbatch", "mail-user=you"], "--sbatch mail-user=you and --mail: give one of them"),
        (["--run-dir", "/tmp/a\nb"], "--run-dir: '/tmp/a\\nb' has a control character in it"),
        (["--setup", "#SBATCH --uid=0"], "sbatch would read the set-up line"),
        (["--after", "17;rm"], "'17;rm': expected the id of a job, as 17, or 17_3 for a task of an array"),
    ],
)
def test_what_sbatch_would_not_get_as_given_is_refused(flags: list[str], said: str, cast_shards: Path) -> None:
    done = slurm("--arch", "crate_tiny", *flags, data=cast_shards)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert not done.stdout


def test_values_reach_the_ranks_as_they_are(tmp_path: Path) -> None:
    word = 'it\'s "two" words; $HOME `id` \\ #x %j'
    site = Site.model_validate(
        {"environment": {"A": word}, "setup": ['B="$A"'], "purge": True, "modules": ["x/1", "y"]}
    )
    # `module` as a cluster has it: a function
    lines = ["module() { echo module: $*; }", *site.setup_lines(), 'printf "%s\\n" "$A" "$B"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["module: purge", "module: load x/1 y", word, word]
    lines[0] = "module() { [ $1 = purge ]; }"
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "crate-dist: module load x/1 y failed\n")


def test_data_and_runs_of_the_site_are_those_that_nothing_else_names(cast_shards: Path, tmp_path: Path) -> None:
    site = written(tmp_path, f"data = '{cast_shards}'\nruns = '{tmp_path}/runs'\n")
    batch: Arguments = ["--set", "train.global_batch=64", "--dry-run", "--site", site]
    for program, gpu in (("slurm.py", "--gpus-per-node"), ("local.py", "--ranks")):
        command: Arguments = [sys.executable, REPOSITORY / "launch" / program, "--arch", "crate_tiny", *batch, gpu, "1"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": "/nonexistent"})
        assert f"{tmp_path}/runs/crate_tiny (new)" in done.stdout, done.stderr
        assert f"{cast_shards}: 200 images" in done.stdout
    shown = slurm("--arch", "crate_tiny", "--site", site, data=tmp_path)  # --data wins
    assert f"no folder {tmp_path}/train" in shown.stderr


# What is submitted


def test_a_job_is_queued_whatever_is_wrong_with_a_site_file_that_is_not_read(
    sbatch: dict[str, str],  # noqa: F811
    tiny: Arguments,  # noqa: F811
    tmp_path: Path,
) -> None:
    broken = written(tmp_path / "config" / "crate-dist", "parttion = 1")
    environment = {**sbatch, "XDG_CONFIG_HOME": str(tmp_path / "config"), module.SITE_VARIABLE: str(broken)}
    done = launch("slurm.py", *tiny, "--no-site", env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4242" in done.stdout


def test_a_run_is_resumed_with_the_resources_that_its_command_asked_for(
    sbatch: dict[str, str],  # noqa: F811
    tiny: Arguments,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--exclude", "n3", "--nice", "7", "--comment", "hello", "--sbatch", "mem-per-cpu=100M", "--time", "10"]
    flags += ["--gpus-per-node", "a100:2", "--notify", "echo secret", "--mail", "me", "--sbatch", "reboot"]
    flags += ["--set", "cluster.requeues=3"]
    run = tmp_path / "run"
    done = launch("slurm.py", *tiny, *flags, "--run-dir", run, env=sbatch)
    assert done.returncode == 0, done.stderr
    assert "secret" not in RunFolder(run).record_file.read_text()
    (RunFolder(run).slurm / "4242").mkdir(exist_ok=True)
    command = launch_command(run, ["--nice", "2"])
    assert capsys.readouterr().err == (
        "note: it was started with --sbatch reboot --mail me --notify: give that again, if it is meant\n"
    )
    site = written(tmp_path, "time = 30\npartition = 'gpu'")
    said = slurm(*command[1:], "--nice", "2", "--site", site, data=Path(tiny[3])).stdout
    assert {
        *("exclude=n3", "nice=2", "comment=hello", "mem-per-cpu=100M", "time=10", "gpus-per-node=a100:2"),
        "partition=gpu",
    } <= asked(said)
    assert origin(said, "requeues") == ("3", "--set cluster.requeues")
    again = launch_command(run, ["--sbatch", "gres=gpu:1", "--set", "cluster.time_min=20"])
    assert not [word for word in again if word.startswith(("--gpus-per-node", "--time"))]


def test_a_run_folder_says_no_command_by_the_options_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    folder.record.begin()
    (folder.slurm / "12").mkdir(parents=True)
    foreign = [("--setup", "id"), ("--container", "x"), ("--notify", "id"), ("--sbatch", "container-image=x")]
    folder.record.note_asked([*foreign, ("--set", "cluster.setup=['id']"), ("--set", "data.root=pipe:id"), ("-x", "y")])
    same = ["--config", str(folder.recipe_file), "--run-dir", str(folder.path)]
    assert launch_command(folder.path)[1:] == same
    folder.record.note_asked([("\x1b[2J", "\n")])
    capsys.readouterr()
    assert launch_command(folder.path)[1:] == same
    assert "\x1b" not in capsys.readouterr().err
    folder.record_file.write_text('{"starts": [], "asked": [1]}')
    with pytest.raises(UserError, match="does not say how the run was started"):
        launch_command(folder.path)


# What a dry run shows


def test_a_dry_run_says_the_verdict_first_and_survives_a_reader_that_leaves(cast_shards: Path) -> None:
    words = [
        sys.executable,
        str(REPOSITORY / "launch" / "slurm.py"),
        "--arch",
        "crate_tiny",
        "--data",
        str(cast_shards),
    ]
    command = f"set -o pipefail; {shlex.join([*words, '--dry-run', '--set', 'train.global_batch=64'])} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("verdict       ")
    done = subprocess.run(["bash", "-c", command.replace("=64", "=65")], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "verdict       NO: it would not start; 1 thing(s) are wrong, named here and at the end\n"
    assert done.stderr.startswith("error: a global batch of 65")


def test_a_dry_run_shows_verdict_values_summary_and_script_in_this_order(cast_shards: Path) -> None:
    shown = slurm("--arch", "crate_tiny", data=cast_shards).stdout
    order = ["verdict  ", "\nvalue  ", "\n  partition ", "\ndata  ", "\nmemory  ", "\ncheckpoints  ", "\n#!/bin/bash"]
    places = [shown.index(text) for text in [*order, "recipe.toml"]]
    assert places == sorted(places)


def test_the_size_of_a_checkpoint_is_foretold() -> None:
    there = sum(path.stat().st_size for path in (STORED / "checkpoints" / "step-00000008").glob("rank-*.pt"))
    assert checkpoint_bytes(read_recipe(STORED), classes=4) == pytest.approx(there, rel=0.01)


# What SLURM says


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("sbatch: error: invalid partition specified: gpuu", "  partition = gpuu, from S"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "  account is not"),
        ("allocation failure: Invalid qos specification", "  qos = high, from R"),
        (
            "QOSMaxNodePerUserLimit\nJob violates accounting/QOS policy (job submit limit, …)",
            "  nodes = 9, from --nodes",
        ),
        ("error: QOSMaxWallDurationPerJobLimit", "  time_min = 1440, from default"),
        (
            "Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            "  time_min = ",
        ),
        ("sbatch: error: Memory specification can not be satisfied", "  mem_gb is not set"),
        ("allocation failure: Requested node configuration is not available", "  gpus_per_node = 8, from default"),
        ("sbatch: unrecognized option '--reservation=x'", "  reservation = x, from --sbatch reservation=x"),
        ("something that nobody has heard of", "sacctmgr show associations"),
    ],
)
def test_a_refusal_names_the_setting_that_is_meant(said: str, meant: str) -> None:
    settings = {
        **{"nodes": ("9", "--nodes"), "gpus_per_node": ("8", "default"), "partition": ("gpuu", "S")},
        **{"account": ("unset", "default"), "qos": ("high", "R"), "time_min": ("1440", "default")},
        **{"mem_gb": ("unset", "default"), "reservation": ("x", "--sbatch reservation=x")},
    }
    text = refusal(said, settings)
    assert meant in text
    assert text.startswith("sbatch refused the job: ")
    assert "allocation failure" not in text


def test_options_of_plugins_are_known_where_sbatch_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sbatch"
    program.write_text(
        "#!/bin/sh\necho '  -x, --exclude=hosts   exclude'\necho '      --container-image=PATH  [pyxis]'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    known_options.cache_clear()
    try:
        assert parse_option("container-image=a+b=c", "--sbatch") == ("container-image", "a+b=c")
    finally:
        known_options.cache_clear()
