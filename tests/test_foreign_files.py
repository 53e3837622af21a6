"""A file from elsewhere runs nothing, and what a location holds of secrets is written and shown nowhere."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crate_dist import evaluate, probe
from crate_dist.checkpoint.trained import load_trained
from crate_dist.config import DataSection, RecipeError, load_recipe
from crate_dist.data.index import INDEX_JSON, ShardError
from crate_dist.data.reader import ShardReader
from crate_dist.data.remote import fetch as remote
from crate_dist.data.remote.fetch import RetryPolicy
from crate_dist.data.splits import open_split
from crate_dist.figures.__main__ import main as figures_main
from crate_dist.locations import is_private, location, may_run_a_command, name_above, redacted, scrubbed
from crate_dist.models.weights import __main__ as weights
from crate_dist.run.folder import RunFolder
from tests.conftest import SMALL_RECIPE
from tests.launching.test_launchers import sbatch  # noqa: F401
from tests.ranks import REPOSITORY
from tests.servers import serving

PASSWORD, TOKEN, KEY = "hunter2pass", "tok3nvalue", "s3cretkey"


def start(program: str, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, REPOSITORY / "launch" / program, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def run(cast_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that was started with a user and a token in its URL, and again with a command; and what was printed."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "small.toml").write_text(SMALL_RECIPE)
    run_dir, few = folder / "run", ("--ranks", 1, "--set", f"data.cache_dir={folder / 'cache'}", "--set")
    with serving(cast_shards) as server:
        url = f"{server.url.replace('//', f'//reader:{PASSWORD}@')}/{{}}?token={TOKEN}"
        first = start(
            "local.py",
            "--config",
            folder / "small.toml",
            "--data",
            url,
            "--run-dir",
            run_dir,
            *few,
            "train.max_steps=5",
        )
        basic = base64.b64encode(f"reader:{PASSWORD}".encode()).decode()
        assert server.asked == {(f"token={TOKEN}", f"Basic {basic}")}, first.stderr
    again = ("--config", run_dir / "recipe.toml", "--run-dir", run_dir, *few, "train.max_steps=10")
    second = start("local.py", *again, env={"CRATE_DATA": f"pipe:KEY={KEY} cat {cast_shards}/{{}}"})
    for done in (first, second):
        assert done.returncode == 0, done.stderr
    return run_dir, [first.stdout + first.stderr, second.stdout + second.stderr]


@pytest.mark.spawn
def test_what_the_user_gave_is_kept_in_no_file_and_shown_nowhere(
    run: tuple[Path, list[str]], cast_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, said = run
    steps = [json.loads(line)["step"] for line in RunFolder(run_dir).metrics.read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 11))
    assert "http://…@127.0.0.1" in said[0]
    assert "pipe:…: 200 images" in said[1]
    out = ["--json", str(tmp_path / "out.json"), "--workers", "0"]
    assert evaluate.main([str(run_dir), "--data", f"pipe:KEY={KEY} cat {cast_shards}/{{}}", *out]) == 0
    said += [*capsys.readouterr(), (tmp_path / "out.json").read_text()]
    kept = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert len(kept) > 8
    for secret in (PASSWORD, TOKEN, KEY):
        assert not [path for path, data in kept.items() if secret.encode() in data]
        assert not [text for text in said if secret in text]


@pytest.mark.spawn
def test_a_start_without_what_is_not_kept_says_what_to_give(run: tuple[Path, list[str]]) -> None:
    done = start("local.py", "--config", run[0] / "recipe.toml", "--run-dir", run[0], "--dry-run")
    assert done.returncode == 1
    assert "no data folder: give --data" in done.stderr
    assert "has to be given at every start" in done.stderr


@pytest.fixture
def planted(run: tuple[Path, list[str]], tmp_path: Path) -> Callable[[str], Path]:
    """Copies the run and gives its recipe a data.root; the word MARK in it is the path of a file that must not be."""

    def copy(root: str) -> Path:
        shutil.copytree(run[0], tmp_path / "planted")
        recipe = tmp_path / "planted" / "recipe.toml"
        root = json.dumps(root.replace("MARK", str(tmp_path / "mark")))
        recipe.write_text(recipe.read_text().replace("[data]\n", f"[data]\nroot = {root}\n"))
        return tmp_path / "planted"

    return copy


@pytest.mark.spawn
@pytest.mark.parametrize(
    "root", ["pipe:touch MARK; cat {}", "sftp://host/MARK", "ais://host/MARK", "hf://x", "new://x"]
)
def test_opening_somebody_s_run_runs_nothing_of_it(
    root: str, planted: Callable[[str], Path], tmp_path: Path, cast_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = planted(root)
    out = ["--out", str(tmp_path / "figures")]
    for main, arguments in (
        (evaluate.main, [str(folder)]),
        (evaluate.main, [str(max((folder / "checkpoints").iterdir()))]),
        (probe.main, ["knn", str(folder)]),
        (figures_main, ["layers", str(folder), *out]),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "may not say what is to be run" in error
        assert "--data" in error
    assert load_trained(folder).classes  # as --init-from does
    weights.main(["describe", str(folder / "model-last.pt")])
    for program in ("local.py", "slurm.py") if root.startswith("pipe:") else ():
        done = start(program, "--config", folder / "recipe.toml", "--run-dir", tmp_path / "other", "--dry-run")
        assert done.returncode == 1
        assert "may not say what is to be run" in done.stderr
    assert not (tmp_path / "mark").exists()
    assert figures_main(["layers", str(folder), *out, "--data", str(cast_shards), "--count", "2"]) == 0


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a recipe with more lines."""

    def write(lines: str) -> Path:
        (tmp_path / "foreign.toml").write_text(f"{SMALL_RECIPE}\n{lines}\n")
        return tmp_path / "foreign.toml"

    return write


@pytest.mark.parametrize(
    ("line", "flag", "in_script"),
    [
        ('setup = ["touch MARK"]', ("--setup", "module load cuda"), "module load cuda"),
        ('container = "docker://evil"', ("--container", "docker://mine"), "--container-image=docker://mine"),
    ],
)
def test_what_is_to_be_run_in_a_job_is_the_user_s_word_alone(
    line: str, flag: tuple[str, str], in_script: str, foreign: Callable[[str], Path], cast_shards: Path
) -> None:
    arguments = ("--config", foreign(f"[cluster]\n{line}"), "--data", cast_shards, "--gpus-per-node", 0, "--dry-run")
    refused = start("slurm.py", *arguments)
    assert refused.returncode == 1
    assert "may not say what is to be run" in refused.stderr
    assert flag[0] in refused.stderr
    assert not refused.stdout
    done = start("slurm.py", *arguments, *flag)
    assert done.returncode == 0, done.stderr
    script, _, recipe = done.stdout.partition("recipe.toml")
    assert in_script in script
    assert "MARK" not in script
    assert "evil" not in script
    assert flag[1] not in recipe


def test_the_project_s_own_recipes_may_say_it(
    foreign: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = foreign('[cluster]\nsetup = ["module load cuda"]')
    assert load_recipe(path).cluster.setup == ()
    monkeypatch.setattr("crate_dist.config.recipe.CONFIG_DIR", tmp_path)
    assert load_recipe("foreign").cluster.setup == ("module load cuda",)


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint"])
def test_no_line_break_gets_into_the_batch_script(key: str, foreign: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError, match=f"cluster.{key}"):
        load_recipe(foreign(f'[cluster]\n{key} = "gpu\\ntouch MARK #"'))


def test_a_path_in_a_recipe_mounts_nothing_else_into_a_container(
    foreign: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = foreign("")
    recipe.write_text(recipe.read_text().replace("[data]\n", '[data]\nroot = "/tmp/evil:/usr/bin"\n'))
    done = start("slurm.py", "--config", recipe, "--gpus-per-node", 0, "--dry-run", "--container", "docker://mine")
    assert done.returncode == 1
    assert "a container cannot be shown /tmp/evil:/usr/bin" in done.stderr


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSection:
    monkeypatch.setattr(remote, "RETRIES", RetryPolicy(1, silence_s=10))
    return DataSection(cache_dir=tmp_path / "cache")


def test_names_in_a_recipe_and_in_an_index_are_no_part_of_the_user_s_command(
    data: DataSection, cast_shards: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(ShardError, match="is refused"):
        open_split(f"pipe:cat {cast_shards}/{{}}", f"train/index.json; touch {mark}; cat x", data)
    shutil.copytree(cast_shards, tmp_path / "shards")
    meta = json.loads((tmp_path / "shards/train" / INDEX_JSON).read_text())
    meta["shards"][0]["name"] = f"x;touch${{IFS}}$(basename${{IFS}}{mark.name})"
    (tmp_path / "shards/train" / INDEX_JSON).write_text(json.dumps(meta))
    index = open_split(f"pipe:cd {tmp_path}; cat shards/{{}}", "train", data)
    with pytest.raises(ShardError, match="is refused"):
        ShardReader(index).read(0)
    assert not mark.exists()


def test_the_programs_of_a_cloud_are_run_without_a_shell(
    data: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("aws", "gsutil"):
        program = tmp_path / "bin" / name
        program.write_text(
            '#!/bin/sh\nfor word; do echo "<$word>" >> "$0.said"; done; echo "denied: $5 $2" >&2; exit 1\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    odd = f"bucket/$(touch {tmp_path}/mark);`touch {tmp_path}/mark`"
    for scheme, expected in (
        ("s3", f"<s3>\n<cp>\n<--only-show-errors>\n<s3://{odd}/train/index.json>\n<->\n"),
        ("gs", f"<cat>\n<gs://{odd}/train/index.json>\n"),
    ):
        assert not may_run_a_command(f"{scheme}://{odd}")
        with pytest.raises(ShardError, match="exit status 1: denied"):
            open_split(f"{scheme}://{odd}", "train", data)
        assert (tmp_path / "bin" / f"{'aws' if scheme == 's3' else 'gsutil'}.said").read_text() == expected
    assert not (tmp_path / "mark").exists()


def test_a_command_reaches_the_job_in_its_environment(
    sbatch: dict[str, str],  # noqa: F811
    small_recipe: Path,
    cast_shards: Path,
    tmp_path: Path,
) -> None:
    command = f"pipe:KEY={KEY} cat {cast_shards}/{{}}"
    arguments = ("--config", small_recipe, "--run-dir", tmp_path / "run", "--data", command, "--gpus-per-node", 0)
    given = {**sbatch, "PATH": f"{sbatch['PATH']}:{os.environ['PATH']}", "CRATE_CACHE": str(tmp_path / "cache")}
    refused = start("slurm.py", *arguments, env={**given, "SBATCH_EXPORT": "NONE"})
    assert refused.returncode == 1
    assert "SBATCH_EXPORT=NONE keeps CRATE_DATA from the job" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = start("slurm.py", *arguments, env=given)
    assert done.returncode == 0, done.stderr
    assert f"CRATE_DATA={command}\n" in (tmp_path / "bin" / "environment").read_text()
    said = done.stdout + done.stderr + start("slurm.py", *arguments, "--dry-run", env=given).stdout
    assert "# data.root is pipe:…" in said
    texts = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [text for text in [*texts, said.encode()] if KEY.encode() in text]


def test_a_failure_shows_no_secret(data: DataSection, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path) as server:
        for root in (
            f"{server.url}/{{}}?token={TOKEN}",
            f"http://reader:{TOKEN}@127.0.0.1:99999/",
            f"http://reader:{TOKEN}/x@host/",
            f"http://host/a b?{TOKEN}",
            f"sftp://reader:{TOKEN}@127.0.0.1:1/",
            f"new://{TOKEN}@host",
            f"pipe:echo no such thing as https://host/{{}}?token={TOKEN} >&2; false",
            f"s3://key:{TOKEN}@bucket?{TOKEN}",
        ):
            with pytest.raises(ShardError, match="cannot fetch") as caught:
                open_split(root, "train", data)
            assert TOKEN not in str(caught.value) + caplog.text
            chain: BaseException | None = caught.value
            while chain is not None and not chain.__suppress_context__:
                chain = chain.__cause__ or chain.__context__
                assert TOKEN not in str(chain)


@pytest.mark.parametrize(
    ("given", "shown", "command", "above"),
    [
        ("/data/shards", "/data/shards", False, "data"),
        ("https://host/imagenet/train", "https://host/imagenet/train", False, "imagenet"),
        (
            "https://me:pw@host:80/x/imagenet/val/{}?token=1#y",
            "https://…@host:80/x/imagenet/val/{}?…",
            False,
            "imagenet",
        ),
        ("https://host/x?name=a@b", "https://…", False, None),
        ("https://me:p?w@host/x", "https://…", False, None),
        ("https://me:p/w@host/x/y", "https://…@host/x/y", False, "x"),
        ("s3://bucket/a/b", "s3://bucket/a/b", False, "a"),
        ("sftp://me@host/a/b", "sftp://…@host/a/b", True, "a"),
        ("pipe:cat /x/{}", "pipe:cat …", True, ""),
        ("pipe:cat", "pipe:cat", True, ""),
        ("pipe: KEY='a secret b' curl {}", "pipe:…", True, ""),
        ("pipe:", "pipe:…", True, ""),
        ("https://host/a\nb", "https://host/a…b", False, None),
    ],
)
def test_what_is_shown_of_a_location(given: str, shown: str, command: bool, above: str | None) -> None:
    place = location(given)
    assert redacted(place) == shown
    assert may_run_a_command(place) == command
    assert is_private(place) == (command or shown != given)
    assert above is None or name_above(place) == above


def test_a_complaint_loses_the_words_of_the_location() -> None:
    place = "pipe:wget -O- 'https://host/{}?token=abcd%20123'"
    assert (
        scrubbed("wget: https://host/val?token=abcd%20123 (abcd 123): not found", place)
        == "wget: …://…/val?…=… (… 123): not found"
    )
