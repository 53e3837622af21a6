"""A sweep, up to the call of sbatch: its values, the names of its runs, its file. On a cluster: tests/cluster/."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from crate_dist.config import Recipe, RecipeError, load_recipe
from crate_dist.launching.grid import add_grid_options, read_grid, recipes_of, run_name, save_grid
from crate_dist.launching.options import recipe_parser
from crate_dist.launching.sweep import results_table
from crate_dist.run.folder import RunFolder, read_recipe
from tests.launching.test_launchers import Arguments, launch, sbatch, tiny  # noqa: F401


def rows(said: str) -> list[list[str]]:
    """The lines of the table of runs, in words."""
    lines = said.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("run  ") and "folder" not in line)
    return [line.split() for line in lines[first + 1 :]]


@pytest.fixture
def refusal(tiny: Arguments) -> Callable[..., str]:  # noqa: F811
    """What these options are refused with."""

    def said(*options: str | Path) -> str:
        parser = recipe_parser(None, required=False)
        add_grid_options(parser)
        arguments = parser.parse_args([*map(str, tiny), *map(str, options)])
        with pytest.raises(RecipeError) as caught:
            recipes_of(arguments, read_grid(arguments))
        return str(caught.value)

    return said


def test_a_grid_is_an_array_of_runs_called_by_their_values(
    sbatch: dict[str, str],  # noqa: F811
    tiny: Arguments,  # noqa: F811
    tmp_path: Path,
) -> None:
    given: Arguments = [*tiny, "--grid", "train.seed=0,1", "--grid", "optim.lr=1e-4,0.0002", "--max-parallel", "3"]
    done = launch("slurm.py", *given, env=sbatch, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "runs" / "crate_tiny-grid"
    script = (tmp_path / "bin" / "script").read_text()
    assert "#SBATCH --array=0-3%3" in script
    (code,) = (sweep / "code").iterdir()
    assert str(code / "crate_dist" / "start.py") in script
    assert rows(done.stdout) == [
        ["lr=0.0001,seed=0", "0.0001", "0", "job", "4242_0"],
        ["lr=0.0001,seed=1", "0.0001", "1", "job", "4242_1"],
        ["lr=0.0002,seed=0", "0.0002", "0", "job", "4242_2"],
        ["lr=0.0002,seed=1", "0.0002", "1", "job", "4242_3"],
    ]
    for number, (name, lr, seed, *_) in enumerate(rows(done.stdout)):
        recipe = read_recipe(sweep / name)
        assert (recipe.optim.lr, recipe.train.seed) == (float(lr), int(seed))
        pickled = sweep / name / "slurm" / f"4242_{number}" / f"4242_{number}_submitted.pkl"
        assert vars(DelayedSubmission.load(pickled).function) == {"run_dir": sweep / name}
        assert f" {sweep / name}" in script.replace("'", " ").replace("(", " ")


def test_a_sweep_whose_jobs_wait_takes_no_runs_of_another_recipe(
    sbatch: dict[str, str],  # noqa: F811
    tiny: Arguments,  # noqa: F811
    tmp_path: Path,
) -> None:
    assert launch("slurm.py", *tiny, "--grid", "optim.lr=1e-3,3e-3", env=sbatch, cwd=tmp_path).returncode == 0
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(
        "#!/bin/sh\necho '4242|4242_0|PENDING|||||Resources|'\necho '4243|4242_1|PENDING|||||Resources|'\n"
    )
    squeue.chmod(0o755)
    base = tmp_path / "runs" / "crate_tiny-grid" / "base.toml"
    before = base.read_bytes()
    more: Arguments = [*tiny, "--grid", "optim.lr=1e-3,3e-3,5e-3", "--dry-run"]
    assert [row[-3:] for row in rows(launch("slurm.py", *more, env=sbatch, cwd=tmp_path).stdout)[:2]] == [
        ["4242_0", "is", "pending"],
        ["4242_1", "is", "pending"],
    ]
    mixed = launch("slurm.py", *more[:-1], "--set", "optim.warmup_epochs=1", env=sbatch, cwd=tmp_path)
    assert mixed.returncode == 1
    assert "optim.warmup_epochs: " in mixed.stderr
    assert "job 4242_0 works on it: `scancel 4242_0` first" in mixed.stderr
    assert base.read_bytes() == before
    assert not (base.parent / "lr=0.005").exists()


def test_the_order_and_the_spelling_of_a_grid_change_no_name(tiny: Arguments, tmp_path: Path) -> None:  # noqa: F811
    one = ["--grid", "optim.lr=1e-4,2e-4", "--grid", "data.flip=0,0.5"]
    other = ["--grid", "augment.flip=0.0,0.50", "--grid", "optim.lr=0.00010,0.0002"]
    said = [rows(launch("slurm.py", *tiny, *given, "--dry-run", cwd=tmp_path).stdout) for given in (one, other)]
    assert said[0] == said[1]
    assert said[0][1][0] == "flip=0.0,lr=0.0002"


def test_a_value_stands_in_a_name_only_as_far_as_a_folder_can_be_called_so() -> None:
    names = {}
    for value in ("train", "../../etc", "a/b", "a b", "..", "", "a,seed=1", "x" * 300, "x" * 301, "é", "a\nb", "$(x)"):
        recipe = load_recipe("demo", [f"data.train_split={json.dumps(value)}"])
        names[run_name(recipe, ["data.train_split", "train.seed"])] = value
    assert len(names) == 12
    assert "train_split=train,seed=0" in names
    for name in names:
        assert len(name.encode()) < 200
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789=,._+~-")
    recipe = load_recipe("demo", ["augment.crop_scale=[0.08, 1]", "optim.betas=[0.9, 0.99]"])
    assert run_name(recipe, ["augment.crop_scale", "optim.betas"]) == "crop_scale=0.08_1.0,betas=0.9_0.99"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--grid", "optim.lrr=1"], "--grid optim.lrr: unknown key 'optim.lrr' (did you mean 'optim.lr'?)"),
        (["--grid", "optim.lr"], "--grid optim.lr: expected section.key=value,value, for instance"),
        (["--grid", "optim.lr="], "expected section.key=value,value, for instance"),
        (["--grid", "optim.lr=1e-4,0.0001"], "lr=0.0001 is in the grid 2 times: a value is given twice"),
        (["--grid", "optim.name=lion,sgd"], "optim.name: Input should be 'lion' or 'adamw', not 'sgd'"),
        (["--grid", 'optim.name=lion,"adamw"'], "all words need quotes, and the shell needs others"),
        (["--grid", "cluster.nodes=1,2"], "cluster.nodes cannot be in a grid: an array has one shape"),
        (["--grid", "data.root=a,b"], "data.root cannot be in a grid: the runs of a grid share their data"),
        (["--grid", "name=a,b"], "name cannot be in a grid"),
        (["--grid", "optim.lr=1", "--grid", "optim.lr=2"], "--grid optim.lr and --grid optim.lr: give one of them"),
        (["--grid", "optim.lr=1", "--set", "optim.lr=2"], "--set optim.lr=2 and --grid optim.lr: give one of them"),
        (["--grid", "train.seed=1", "--seeds", "2"], "--grid train.seed and --seeds: give one of them"),
        (["--grid", "model.ratio=2,4"], "ratio 2 would change nothing: no part of this model reads it"),
        (
            ["--grid", "model.tokenwise=ista,odl", "--set", "model.layer_scale=0.5"],
            "layer_scale 0.5 would change nothing",
        ),
        (["--grid", "train.seed=1", "--seed", "2"], "--seed and --grid train.seed: give one of them"),
        (
            ["--grid", f"train.seed={','.join(map(str, range(50)))}", "--grid", "optim.lr=1,2,3"],
            "the grid of 50 x 3 values makes 150 runs; --yes, if so many are meant",
        ),
    ],
)
def test_a_grid_that_cannot_work_is_said_at_once(
    options: list[str], expected: str, refusal: Callable[..., str]
) -> None:
    assert expected in refusal(*options)


def swept(*options: str | Path) -> list[Recipe]:
    """Returns the recipes of these options' runs."""
    parser = recipe_parser(None, required=False)
    add_grid_options(parser)
    arguments = parser.parse_args(["--data", "/data", *map(str, options)])
    return recipes_of(arguments, read_grid(arguments))


def test_a_grid_over_parts_has_settings_that_some_of_its_runs_read() -> None:
    runs = swept("--arch", "demo", "--grid", "model.tokenwise=ista,odl", "--grid", "model.ratio=2,4")
    assert [(run.model.ratio, run.model.tokenwise) for run in runs] == [*product((2, 4), ("ista", "odl"))]
    beside = swept("--arch", "demo", "--grid", "model.tokenwise=ista,odl", "--set", "model.ratio=2")
    assert beside == runs[:2]


@pytest.mark.parametrize("key", ["model.ratio", "optim.lr"])
def test_a_sweep_from_when_nobody_was_told_what_is_not_read_goes_on(key: str, tmp_path: Path) -> None:
    grid: dict[str, list[float]] = {key: [2, 4]}
    base = load_recipe("demo", ["model.ratio=2"], may_be_unread=["model.ratio"])
    save_grid(tmp_path, grid, base)
    runs = swept("--grid-file", tmp_path / "grid.toml")
    assert [run.model.ratio for run in runs] == ([2, 4] if key == "model.ratio" else [2, 2])
    mine = (tmp_path / "base.toml").rename(tmp_path / "mine.toml")
    with pytest.raises(RecipeError, match="ratio 2 would change nothing"):
        swept("--config", mine, "--grid", f"{key}=2,4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr = [1e-4", "is not TOML"),
        ("[grid]\noptim.lr = 1e-4", "optim.lr = 0.0001 is no list of values; optim.lr = [VALUE, VALUE] would be"),
        ("[optim]\nlr = [1e-4]", "a grid file has a table [grid]"),
        ("[grid]\noptim.lrr = [1]", "unknown key 'optim.lrr'"),
        ('[grid]\ncluster.setup = [["touch here"]]', "cluster.setup cannot be in a grid"),
        ('[grid]\ncluster.container = ["image"]', "cluster.container cannot be in a grid"),
        ('[grid]\ndata.root = ["pipe:touch here"]', "data.root cannot be in a grid"),
        (
            '[grid]\ncheckpoint.mirror = ["s3://b/1", "https://u:word@h1/a"]',
            "https://…@h1/a cannot be in a grid, for that is written to files, and this has a secret in it",
        ),
    ],
)
def test_a_grid_file_that_cannot_work_is_said_at_once(
    text: str, expected: str, refusal: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    assert expected in refusal("--grid-file", tmp_path / "mine.toml")


def test_a_sweep_leaves_a_file_that_goes_on_with_it(
    sbatch: dict[str, str],  # noqa: F811
    tiny: Arguments,  # noqa: F811
    tmp_path: Path,
) -> None:
    sweep = tmp_path / "my sweep"
    values = ["--grid", "augment.crop_scale=[0.08,1.0],[0.2,1.0]", "--grid", "optim.name=lion,adamw"]
    given: Arguments = [*tiny, "--run-dir", sweep, *values, "--partition", "gpu"]
    assert launch("slurm.py", *given, env=sbatch).returncode == 0
    before = {path: path.read_text() for path in sweep.glob("*/recipe.toml")}
    assert len(before) == 4
    RunFolder(next(iter(before)).parent).metrics.write_text('{"step": 1}\n')
    done = launch("slurm.py", "--grid-file", sweep / "grid.toml", env=sbatch, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_text() for path in sweep.glob("*/recipe.toml")} == before
    assert "#SBATCH --partition=gpu" in (tmp_path / "bin" / "script").read_text()
    other = launch("slurm.py", *tiny, "--run-dir", sweep, "--grid", "optim.lr=1,2", env=sbatch)
    assert f"{sweep} holds a sweep over augment.crop_scale and optim.name; give this one, over optim.lr" in other.stderr
    single = launch("slurm.py", *tiny, "--run-dir", next(iter(before)).parent, "--grid", "optim.lr=1,2", env=sbatch)
    assert "is the folder of a single run; give the sweep another one by --run-dir" in single.stderr


def test_a_grid_file_of_ones_own_names_a_recipe(cast_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('recipe = "crate_tiny"\n[grid]\n"optim.lr" = [1e-4, 2e-4]\n')
    given: Arguments = ["--grid-file", tmp_path / "mine.toml", "--data", cast_shards, "--set", "train.global_batch=64"]
    done = launch("slurm.py", *given, "--dry-run")
    assert [name for name, *_ in rows(done.stdout)] == ["lr=0.0001", "lr=0.0002"]
    assert "/runs/crate_tiny-grid/" in done.stdout
    (tmp_path / "mine.toml").write_text("[grid]\noptim.lr = [1e-4, 2e-4]\n")
    assert 'names no recipe: --arch NAME does, or recipe = "NAME" in it' in launch("slurm.py", *given).stderr


def test_nothing_is_submitted_unless_every_run_is_in_order(
    sbatch: dict[str, str],  # noqa: F811
    tiny: Arguments,  # noqa: F811
    tmp_path: Path,
) -> None:
    grid = ["--grid", "data.val_split=val,none", "--seeds", "0", "1"]
    done = launch("slurm.py", *tiny, *grid, env=sbatch, cwd=tmp_path)
    assert done.returncode == 1
    assert "error: val_split=none,seed=0 and 1 more: no folder" in done.stderr
    assert not (tmp_path / "bin" / "script").exists()
    assert not (tmp_path / "runs").exists()


def test_more_runs_than_an_array_may_have_are_refused(
    sbatch: dict[str, str],  # noqa: F811
    tiny: Arguments,  # noqa: F811
    tmp_path: Path,
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'MaxArraySize            = 2'\n")
    scontrol.chmod(0o755)
    done = launch("slurm.py", *tiny, "--grid", "train.seed=0,1,2", env=sbatch, cwd=tmp_path)
    assert "3 runs are more than an array of this cluster may have: MaxArraySize is 2" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_on_one_machine_the_runs_of_a_grid_follow_each_other_and_are_compared(
    small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    given: Arguments = ["--config", small_recipe, "--data", cast_shards, "--ranks", "1", "--run-dir", sweep]
    given += ["--grid", "optim.lr=1e-9,1e-3", "--set", "train.max_steps=8", "--set", "log.eval_every_epochs=1"]
    environment = {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    done = launch("local.py", *given, env=environment)
    assert done.returncode == 0, done.stderr
    assert [(name, *state) for name, _, *state in rows(done.stdout)] == [
        ("lr=1e-09", "complete", "at", "step", "8"),
        ("lr=0.001", "complete", "at", "step", "8"),
    ]
    again = launch("local.py", "--grid-file", sweep / "grid.toml", env=environment)
    assert again.stdout.splitlines()[1:] == [*done.stdout.splitlines()[-2:], "nothing is left to do"]
    alone = launch("slurm.py", *given[:4], *given[10:], "--run-dir", sweep / "lr=0.001", "--set", "optim.lr=1e-3")
    assert alone.returncode == 0, alone.stderr  # without an sbatch: nothing is asked of SLURM
    assert "complete at step 8, and nothing is left to do; longer training is a new run" in alone.stdout
    head, *lines = results_table([sweep / "lr=1e-09", sweep / "lr=0.001"]).splitlines()
    assert head.split() == ["run", "best", "top-1", "train", "loss", "val", "loss", "step", "optim.lr"]
    assert [line.split()[0] for line in lines] == ["lr=0.001", "lr=1e-09"]  # the one that has learnt something first
    assert {line.split()[-2] for line in lines} == {"8"}
