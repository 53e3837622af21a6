"""Checkpoints are copied to a mirror whole, never in the way of the training, and an empty run folder goes on there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crate_dist.checkpoint.format import (
    GroupLayout,
    Manifest,
    Progress,
    StoredFile,
    rank_file,
    read_manifest,
    write_manifest,
)
from crate_dist.checkpoint.mirror.background import Mirror
from crate_dist.checkpoint.mirror.joining import look, noted
from crate_dist.checkpoint.mirror.record import RECORD, MirrorError, MirrorRecord, RunMirror
from crate_dist.config import Recipe, RecipeError, load_recipe
from crate_dist.data.index import ShardError
from crate_dist.data.remote.fetch import NotThere, RetryPolicy
from crate_dist.data.remote.store import Store
from crate_dist.launching.opening import opened
from crate_dist.launching.options import recipe_from, recipe_parser
from crate_dist.launching.preflight import preflight
from crate_dist.run.checkpoints import checkpoint_names, note_published, step_name
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import ALONE
from tests.servers import FolderServer, serving

QUICK = RetryPolicy(2, first_delay_s=0.01, longest_delay_s=0.01, silence_s=2.0)
BEAT_S = 0.4
EVENTS = "events.out.tfevents.0000000001.node.7"
PASSWORD = "hunter2pass"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as server:
        yield server


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waits for little, and at the end for the threads: a test after this one may fork."""
    for module in ("joining", "record"):
        monkeypatch.setattr(f"crate_dist.checkpoint.mirror.{module}.LOOKING", QUICK)
    yield
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("mirror")])


@pytest.fixture
def recipe(small_recipe: Path, cast_shards: Path) -> Recipe:
    return load_recipe(small_recipe, ["checkpoint.keep=2"], data__root=str(cast_shards))


def folder(path: Path, recipe: Recipe) -> RunFolder:
    """A run folder that was opened, as the run's first start does, with something in the files of the run."""
    run = RunFolder(path)
    run.open(recipe)
    return run


def save(run: RunFolder, step: int, best: int = -1, ranks: int = 2) -> Path:
    """Publishes a checkpoint as a save does: after the curves up to it, by a rename."""
    with run.metrics.open("a") as lines:
        lines.write(json.dumps({"step": step}) + "\n")
    with (run.path / EVENTS).open("ab") as events:
        events.write(b"event" * 100)
    beside, final, files = run.checkpoints / f".unfinished-{step}", run.checkpoints / step_name(step), {}
    beside.mkdir()
    for rank in range(ranks):
        data = f"rank {rank} of step {step}".encode() * 1000
        (beside / rank_file(rank)).write_bytes(data)
        files[rank_file(rank)] = StoredFile(len(data), hashlib.sha256(data).hexdigest())
    progress = Progress(step=step, best_step=best)
    groups = {"groups": [GroupLayout(["a"], [[8]])], "partitions": [8 // ranks], "kinds": ["fp32"]}
    write_manifest(beside, Manifest(world_size=ranks, progress=progress, files=files, **groups))  # type: ignore[arg-type]
    beside.rename(final)
    note_published(run.checkpoints, step)
    return final


class At:
    """A mirror of a run folder that was begun, and is left at the end."""

    def __init__(self, place: Path | str, run: RunFolder, recipe: Recipe, policy: RetryPolicy = QUICK) -> None:
        self.mirror = Mirror(place, run, recipe, ALONE, policy, BEAT_S)
        self.run = run

    def __enter__(self) -> Mirror:
        self.mirror.begin()
        return self.mirror

    def __exit__(self, *_: object) -> None:
        self.mirror.finish(Patience(20))


class Patience:
    """Is over after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def __call__(self) -> bool:
        return time.monotonic() > self._until


def until(what: Callable[[], object], seconds: float = 20) -> None:
    over = Patience(seconds)
    while not what():
        assert not over(), "it did not come to that"
        time.sleep(0.01)


def contents(run: RunFolder, *names: str) -> dict[str, bytes]:
    paths = [path for name in names for path in sorted((run.path / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in paths}


def record(place: Path | str, run: RunFolder) -> MirrorRecord:
    found = RunMirror(place, run, QUICK).read()
    assert found is not None
    return found


def lost(run: RunFolder) -> None:
    shutil.rmtree(run.path)


@pytest.mark.parametrize("kind", ["http", "folder"])
def test_what_was_published_comes_back_whole_into_an_empty_folder(
    kind: str, server: FolderServer, recipe: Recipe, tmp_path: Path
) -> None:
    place: Path | str = f"{server.url}/mirrors" if kind == "http" else tmp_path / "other"
    (tmp_path / "other").mkdir()
    run = folder(tmp_path / "here" / "run", recipe)
    save(run, 5, best=5)
    save(run, 10, best=5)
    with At(place, run, recipe):
        pass
    before = contents(run, "checkpoints")
    lines, curves = run.metrics.read_text(), (run.path / EVENTS).read_bytes()
    started = json.loads(run.record_file.read_text())
    assert [saved.step for saved in record(place, run).checkpoints] == [5, 10]
    if kind == "http":
        assert server.puts[-1] == "mirrors/run/mirror.json", "the record is written last"
    lost(run)

    elsewhere = folder(tmp_path / "elsewhere" / "run", recipe)
    with At(place, elsewhere, recipe) as mirror:
        assert mirror.step == 10
        assert contents(elsewhere, "checkpoints") == before
        assert (elsewhere.path / EVENTS).read_bytes() == curves
        assert elsewhere.metrics.read_text() == lines
        assert json.loads(elsewhere.record_file.read_text()) == started
        assert json.loads(elsewhere.published.read_text()) == {"step": 10}
        assert read_manifest(elsewhere.checkpoints / step_name(10)).progress.step == 10


def test_the_newest_and_the_best_are_kept_and_nothing_else_is_removed(
    server: FolderServer, recipe: Recipe, tmp_path: Path
) -> None:
    place = f"{server.url}/mirrors"
    foreign = server.folder / "mirrors" / "run" / "notes.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    run = folder(tmp_path / "run", recipe)
    with At(place, run, recipe) as mirror:
        for step in (5, 10, 15, 20):
            save(run, step, best=5)
            mirror.published()
            until(lambda step=step: mirror.step == step)  # type: ignore[misc]
        until(lambda: len(record(place, run).checkpoints) == 3)
    there = record(place, run)
    assert [saved.step for saved in there.checkpoints] == [5, 15, 20]
    left = {str(path.relative_to(server.folder / "mirrors/run")) for path in server.folder.rglob("*") if path.is_file()}
    assert left == {"mirror.json", "notes.txt", *(f"{there.id}/{name}" for name in there.objects())}
    assert foreign.read_text() == "mine"
    assert server.deletes
    order = [name for name in server.puts if name.endswith((RECORD, "manifest.json"))]
    assert order[-1].endswith(RECORD)


@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_a_damaged_copy_is_passed_over_for_the_one_before(
    damage: str, server: FolderServer, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = f"{server.url}/mirrors"
    run = folder(tmp_path / "run", recipe)
    save(run, 5)
    with At(place, run, recipe) as mirror:
        until(lambda: mirror.step == 5)
        save(run, 10)
        mirror.published()
        until(lambda: mirror.step == 10)
    there = record(place, run)
    newest = server.folder / "mirrors/run" / there.id / there.checkpoints[-1].checkpoint_files[rank_file(1)].object
    data = newest.read_bytes()
    newest.write_bytes(data[:-7] if damage == "short" else data[:50] + b"?" + data[51:])
    if damage == "gone":
        newest.unlink()
    lost(run)
    again = folder(tmp_path / "run", recipe)
    with At(place, again, recipe):
        assert checkpoint_names(again.checkpoints) == [step_name(5)]
        assert again.metrics.read_text() == '{"step": 5}\n'
    assert "damaged copy of step-00000010" in caplog.text

    for path in (server.folder / "mirrors/run" / there.id).rglob("manifest.json"):
        path.write_text("nothing")
    lost(again)
    with pytest.raises(MirrorError, match=r"none of the \d checkpoints in .* is whole"):
        At(place, folder(tmp_path / "run", recipe), recipe).mirror.begin()


@pytest.mark.parametrize("fault", ["507", "403", "drop", "hang"])
def test_a_store_that_fails_is_told_and_counted_and_holds_nobody_up(
    fault: str, server: FolderServer, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    place = f"{server.url}/mirrors"
    run = folder(tmp_path / "run", recipe)
    save(run, 5)
    with At(place, run, recipe) as mirror:
        until(lambda: mirror.step == 5)
        server.put_faults["*"] = [fault, "forever"]
        save(run, 10)
        began = time.monotonic()
        mirror.published()
        assert time.monotonic() - began < 0.1
        if fault == "hang":  # until the attempts are over: this is the middle of one
            mirror.finish(lambda: True)
            assert "step 10 IS NOT IN THE MIRROR" in caplog.text
            return
        until(lambda: mirror.failures >= 2)
        assert mirror.step == 5
        until(lambda: noted(run)["failures"] >= 2)
        assert "MIRRORING FAILED (1 in a row); training goes on" in caplog.text
        assert [saved.step for saved in record(place, run).checkpoints] == [5]
        server.put_faults.clear()
        until(lambda: mirror.step == 10)
        until(lambda: noted(run)["failures"] == 0)
    assert "works again" in caplog.text
    there = record(place, run)
    objects = {path.name for path in (server.folder / "mirrors/run" / there.id).iterdir()}
    assert objects == {name.partition("/")[0] for name in there.objects()}, "what had come of the failed ones is gone"


def test_a_disk_that_fills_up_leaves_the_copies_before_whole(
    server: FolderServer, recipe: Recipe, tmp_path: Path
) -> None:
    place = f"{server.url}/mirrors"
    run = folder(tmp_path / "run", recipe)
    save(run, 5)
    with At(place, run, recipe) as mirror:
        until(lambda: mirror.step == 5)
        server.room = 30_000
        save(run, 10)
        mirror.published()
        until(lambda: mirror.failures >= 2)
        mirror.leave()
    server.room = 10**9
    lost(run)
    again = folder(tmp_path / "run", recipe)
    with At(place, again, recipe):
        assert checkpoint_names(again.checkpoints) == [step_name(5)]


def test_without_its_mirror_a_run_that_has_checkpoints_goes_on_and_one_without_does_not_start(
    server: FolderServer, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = f"{server.url}/mirrors"
    server.faults[RECORD] = ["503", "forever"]
    with pytest.raises(MirrorError, match=r"503.*Nothing is started.*--set checkpoint.mirror="):
        At(place, folder(tmp_path / "new", recipe), recipe).mirror.begin()
    with pytest.raises(MirrorError, match="is something not mounted"):
        At(tmp_path / "no mount", folder(tmp_path / "new", recipe), recipe).mirror.begin()
    run = folder(tmp_path / "run", recipe)
    save(run, 5)
    with At(place, run, recipe) as mirror:
        assert mirror.failures
        server.faults.clear()
        until(lambda: mirror.step == 5)
    assert "MIRRORING FAILED" in caplog.text


def test_a_mirror_that_can_only_be_read_is_gone_on_from(server: FolderServer, recipe: Recipe, tmp_path: Path) -> None:
    run = folder(tmp_path / "run", recipe)
    save(run, 5)
    with At(f"{server.url}/mirrors", run, recipe):
        pass
    lost(run)
    server.put_faults["*"] = ["403", "forever"]
    again = folder(tmp_path / "run", recipe)
    with At(f"{server.url}/mirrors", again, recipe) as mirror:
        assert checkpoint_names(again.checkpoints) == [step_name(5)]
        assert mirror.failures


def test_another_run_of_the_same_name_is_refused_until_it_is_started_over(
    server: FolderServer, recipe: Recipe, tmp_path: Path
) -> None:
    place = f"{server.url}/mirrors"
    mirrored = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"mirror": place})})
    first = folder(tmp_path / "one" / "run", mirrored)
    save(first, 5)
    with At(place, first, mirrored):
        pass
    before = record(place, first)
    second = folder(tmp_path / "two" / "run", mirrored)
    save(second, 10)
    with pytest.raises(MirrorError, match=r"holds another run than .*two/run: that of .*one/run .* up to step 5"):
        At(place, second, mirrored).mirror.begin()
    with pytest.raises(MirrorError, match="holds another run"):
        look(second, mirrored)
    with opened(second, mirrored, start_over=True):
        assert look(second, mirrored) is not None
        with At(place, second, mirrored) as mirror:
            save(second, 7)
            mirror.published()
            until(lambda: mirror.step == 7)
    assert record(place, second).id != before.id
    aside = server.folder / "mirrors/run" / f"mirror-{before.id}.json"
    assert json.loads(aside.read_text())["checkpoints"][0]["step"] == 5
    assert all((server.folder / "mirrors/run" / before.id / name).is_file() for name in before.objects())
    with pytest.raises(MirrorError, match="holds another run"):
        At(place, first, mirrored).mirror.begin()


def test_a_run_of_another_recipe_is_refused_by_the_values_that_differ(
    server: FolderServer, recipe: Recipe, tmp_path: Path
) -> None:
    place = f"{server.url}/mirrors"
    run = folder(tmp_path / "run", recipe)
    save(run, 5)
    with At(place, run, recipe):
        pass
    lost(run)
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 3})})
    with pytest.raises(MirrorError, match=r"another recipe:\n  train.seed: 0 there, 3 now\n"):
        At(place, folder(tmp_path / "run", other), other).mirror.begin()
    assert not checkpoint_names(run.checkpoints)


def test_a_second_start_elsewhere_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(
    server: FolderServer, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = f"{server.url}/mirrors"
    first, second = (folder(tmp_path / name / "run", recipe) for name in ("one", "two"))
    save(first, 5)
    with At(place, first, recipe) as mirror:
        until(lambda: mirror.step == 5)
        with pytest.raises(MirrorError, match=r"is in use by .*one/run on .*another folder"):
            At(place, second, recipe).mirror.begin()
        assert mirror._copier
        mirror._copier._mutex.acquire()  # as one that is stopped, or cut off
        with At(place, second, recipe) as other:
            assert "is taken over from" in caplog.text
            assert checkpoint_names(second.checkpoints) == [step_name(5)]
            mirror._copier._mutex.release()  # the first comes back, and notices
            until(lambda: "is written by another start" in mirror.problem)
            save(second, 10)
            other.published()
            until(lambda: other.step == 10)
    assert "NOTHING IS MIRRORED ANY MORE, training goes on" in caplog.text
    assert record(place, second).step == 10


def test_a_folder_that_is_behind_its_mirror_catches_up(server: FolderServer, recipe: Recipe, tmp_path: Path) -> None:
    place = f"{server.url}/mirrors"
    first, second = (folder(tmp_path / name / "run", recipe) for name in ("one", "two"))
    save(first, 5)
    with At(place, first, recipe):
        pass
    with At(place, second, recipe) as mirror:
        save(second, 10)
        mirror.published()
        until(lambda: mirror.step == 10)
    with At(place, first, recipe):
        assert checkpoint_names(first.checkpoints) == [step_name(5), step_name(10)]
        assert first.metrics.read_text() == second.metrics.read_text()


def test_a_checkpoint_that_is_damaged_here_is_not_mirrored(
    server: FolderServer, recipe: Recipe, tmp_path: Path
) -> None:
    run = folder(tmp_path / "run", recipe)
    (save(run, 5) / rank_file(0)).write_bytes(b"x" * 20_000)
    with At(f"{server.url}/mirrors", run, recipe) as mirror:
        until(lambda: "does not have the digest" in mirror.problem or "missing at the end" in mirror.problem)
        assert mirror.step == -1


@pytest.mark.parametrize(
    "place", ["../../etc/cron.d/x", "/etc/passwd", "compiled/x.py", "checkpoints/step-00000005/../x"]
)
def test_a_record_leads_nowhere_out_of_the_run_folder(
    place: str, server: FolderServer, recipe: Recipe, tmp_path: Path
) -> None:
    run = folder(tmp_path / "run", recipe)
    save(run, 5)
    with At(f"{server.url}/mirrors", run, recipe):
        pass
    path = server.folder / "mirrors/run" / RECORD
    said = json.loads(path.read_text())
    files = said["checkpoints"][0]["files"]
    files[place] = files["metrics.jsonl"]
    path.write_text(json.dumps(said))
    lost(run)
    with pytest.raises(MirrorError, match="is no record of a mirror"):
        At(f"{server.url}/mirrors", folder(tmp_path / "run", recipe), recipe).mirror.begin()


def test_the_preflight_says_what_the_mirror_has(
    server: FolderServer, recipe: Recipe, small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    def resolved(*more: str) -> Recipe:
        given = ["--config", small_recipe, "--data", cast_shards, "--set", f"checkpoint.mirror={server.url}/mirrors"]
        return recipe_from(recipe_parser("").parse_args([*map(str, given), *more]))

    run = RunFolder(tmp_path / "run")
    said = str(preflight(resolved(), 2, run.path))
    assert f"mirror        {server.url}/mirrors/run answers, and has no checkpoint of this run yet" in said
    run.open(resolved())
    save(run, 5)
    with At(f"{server.url}/mirrors", run, resolved()):
        pass
    assert "has step 5 of this run" in str(preflight(resolved(), 2, run.path))
    lost(run)
    found = preflight(resolved(), 2, run.path)
    assert found.resumes
    assert "GOES ON FROM STEP 5 THERE" in str(found)
    assert not run.path.exists()
    with pytest.raises(RecipeError, match=r"another recipe:\n  train.seed: 0 there, 2 now"):
        preflight(resolved("--seed", "2"), 2, run.path)
    server.faults[RECORD] = ["503", "forever"]
    with pytest.raises(RecipeError, match=r"does not answer: .*503.*--set checkpoint.mirror= starts without"):
        preflight(resolved(), 2, run.path)


def test_secrets_of_a_mirror_are_in_no_file_and_what_could_run_a_command_is_none(
    server: FolderServer, small_recipe: Path, cast_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for command in ("pipe:cat > /x/{}", "sftp://host/x"):
        with pytest.raises(RecipeError, match="no place that checkpoints can be copied to"):
            load_recipe(small_recipe, [f"checkpoint.mirror={command}"])
    place = server.url.replace("http://", f"http://me:{PASSWORD}@") + f"/mirrors/{{}}?token={PASSWORD}"
    given = ["--config", str(small_recipe), "--data", str(cast_shards), "--set", f"checkpoint.mirror={place}"]
    recipe = recipe_from(recipe_parser("").parse_args(given))
    run = folder(tmp_path / "run", recipe)
    assert "# checkpoint.mirror is http://…@" in run.recipe_file.read_text()
    assert load_recipe(run.recipe_file).checkpoint.mirror is None
    assert load_recipe(run.recipe_file).checkpoint.find_mirror() == place
    save(run, 5)
    server.put_faults["*"] = ["503", "503", "503"]
    with At(place, run, recipe) as mirror:
        until(lambda: mirror.step == 5)
    assert (f"token={PASSWORD}", "Basic " + "bWU6aHVudGVyMnBhc3M=") in server.asked
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in [*texts, caplog.text.encode()] if PASSWORD.encode() in text]


@pytest.mark.skipif(not shutil.which("aws"), reason="no aws on this machine")
def test_aws_writes_reads_and_removes(server: FolderServer, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": server.url, "AWS_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    store = Store("s3://bucket/mirrors", RetryPolicy(1, silence_s=20)).below("run")
    with pytest.raises(NotThere, match=r"\(404\)"):
        store.get("a.bin", b"".join)
    data = os.urandom(300_000)
    assert store.put("a.bin", data) == (len(data), hashlib.sha256(data).hexdigest())
    assert store.get("a.bin", b"".join) == data
    store.remove("a.bin")
    assert (server.puts, server.deletes) == (["bucket/mirrors/run/a.bin"],) * 2
    server.put_faults["a.bin"] = ["403", "forever"]
    with pytest.raises(ShardError, match=r"\(403\)|AccessDenied|Forbidden"):
        store.put("a.bin", data)


def test_the_programs_of_a_cloud_write_and_remove_without_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("aws", "gsutil"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\ncat >> {tmp_path}/came\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for scheme in ("s3", "gs"):
        store = Store(f"{scheme}://bucket/$(touch {tmp_path}/mark)", QUICK)
        assert store.put("a", b"some bytes") == (10, hashlib.sha256(b"some bytes").hexdigest())
        store.remove("a")
    odd = f"//bucket/$(touch {tmp_path}/mark)/a"
    assert (tmp_path / "said").read_text().splitlines() == [
        f"s3 cp --only-show-errors --cli-connect-timeout 10 --expected-size 10 - s3:{odd}",
        f"s3 rm --only-show-errors --cli-connect-timeout 10 s3:{odd}",
        f"-q cp - gs:{odd}",
        f"-q rm gs:{odd}",
    ]
    assert (tmp_path / "came").read_bytes() == b"some bytes" * 2
    assert not (tmp_path / "mark").exists()
    (tmp_path / "bin/aws").write_text("#!/bin/sh\nexec sleep 60\n")
    began = time.monotonic()
    with pytest.raises(ShardError, match="has not ended"):
        Store("s3://bucket", dataclasses.replace(QUICK, attempts=1, silence_s=0.3)).put("a", b"x" * 10)
    (tmp_path / "large").write_bytes(b"x" * 2**21)
    with pytest.raises(ShardError, match="less than 1 MiB went in"):
        Store("s3://bucket", dataclasses.replace(QUICK, attempts=1, silence_s=0.3)).put("a", tmp_path / "large")
    assert time.monotonic() - began < 20


def mirrored(server: FolderServer, run: RunFolder, recipe: Recipe, steps: tuple[int, ...], best: int = -1) -> str:
    """Mirrors a run with these steps; returns the mirror's place."""
    place = f"{server.url}/mirrors"
    with At(place, run, recipe) as mirror:
        for step in steps:
            save(run, step, best)
            mirror.published()
            until(lambda step=step: mirror.step == step)  # type: ignore[misc]
    return place


def copy_of(server: FolderServer, run: RunFolder, file: str, step: int) -> Path:
    """Returns where the mirror has a file of a run, as it was copied with a step."""
    there = record(f"{server.url}/mirrors", run)
    saved = next(saved for saved in there.checkpoints if saved.step == step)
    return server.folder / "mirrors" / "run" / there.id / {**saved.run_files, **saved.checkpoint_files}[file].object


def with_mirror(recipe: Recipe, place: Path | str) -> Recipe:
    return recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"mirror": place})})


@pytest.mark.parametrize("left", [[], [10]])
def test_a_folder_that_is_ahead_of_all_whole_copies_goes_on_as_it_is(
    left: list[int], server: FolderServer, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = folder(tmp_path / "run", recipe)
    place = mirrored(server, run, recipe, (10, 15))
    for step in {10, 15} - {*left}:
        copy_of(server, run, rank_file(0), step).unlink()
    lost(run)
    run = folder(tmp_path / "run", recipe)
    run.record.note_run_id(record(place, run).id)
    save(run, 12)
    before = contents(run, ".").keys()
    lines = run.metrics.read_text()
    with At(place, run, recipe) as mirror:
        assert "goes on from step 12 of its folder" in caplog.text
        assert checkpoint_names(run.checkpoints) == [step_name(12)]
        assert run.metrics.read_text() == lines
        assert contents(run, ".").keys() - before <= {"mirror.json"}
        until(lambda: mirror.step == 12)
    assert record(place, run).step == 12, "the damaged one is no part of the run any more"


@pytest.mark.parametrize("page", [b"", b"<html>maintenance</html>", b"[]", b'{"version": 1}'])
def test_a_record_that_cannot_be_read_ends_neither_a_run_nor_its_mirroring(
    page: bytes, server: FolderServer, recipe: Recipe, tmp_path: Path
) -> None:
    run = folder(tmp_path / "run", recipe)
    place = mirrored(server, run, recipe, (5,))
    file = server.folder / "mirrors" / "run" / RECORD
    good = file.read_bytes()
    file.write_bytes(page)
    found = look(run, with_mirror(recipe, place))
    assert "goes on from step 5 of its folder" in str(found)
    with At(place, run, recipe) as mirror:
        assert mirror.failures
        assert file.read_bytes() == page, "it may be a page that is shown for a while"
        file.write_bytes(good)
        until(lambda: not mirror.failures)
        good = file.read_bytes()
        file.write_bytes(page)
        save(run, 10)
        mirror.published()
        until(lambda: mirror.failures)
        file.write_bytes(good)
        until(lambda: mirror.step == 10)
    file.write_bytes(page)
    empty = folder(tmp_path / "elsewhere" / "run", recipe)
    with pytest.raises(MirrorError, match=r"--start-over sets it aside.*Nothing is started"):
        At(place, empty, recipe).mirror.begin()
    with opened(run, with_mirror(recipe, place), start_over=True):
        save(run, 3)
        with At(place, run, recipe) as mirror:
            until(lambda: mirror.step == 3)
    assert [path.read_bytes() for path in file.parent.glob("mirror-damaged-*.json")] == [page]


@pytest.mark.parametrize("file", ["recipe.toml", "manifest.json"])
def test_a_small_file_that_is_gone_is_passed_over_too(
    file: str, server: FolderServer, recipe: Recipe, tmp_path: Path
) -> None:
    run = folder(tmp_path / "run", recipe)
    place = mirrored(server, run, recipe, (5, 10))
    copy_of(server, run, file, 10).unlink()
    lost(run)
    step = 10 if file == "recipe.toml" else 5
    found = look(run, with_mirror(recipe, place))
    assert "GOES ON FROM STEP" in str(found)
    run = folder(tmp_path / "run", recipe)
    with At(place, run, recipe):
        assert checkpoint_names(run.checkpoints) == [step_name(step)]


def test_a_start_that_is_killed_between_two_renames_is_repeated(
    server: FolderServer, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path / "run", recipe)
    place = mirrored(server, run, recipe, (5, 10, 15), best=5)
    lost(run)
    run = folder(tmp_path / "run", recipe)
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.parent == run.checkpoints and checkpoint_names(run.checkpoints):
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            At(place, run, recipe).mirror.begin()
    with At(place, run, recipe):
        assert checkpoint_names(run.checkpoints) == [step_name(5), step_name(15)]


def test_a_store_that_takes_all_and_keeps_nothing_is_found_out(
    server: FolderServer, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Store._send

    def swallow(self: Store, name: str, chunks: Iterator[bytes], *more: object) -> None:
        if name in swallowed:
            list(chunks)
        else:
            send(self, name, chunks, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "_send", swallow)
    run, swallowed = folder(tmp_path / "run", recipe), {RECORD}
    with pytest.raises(MirrorError, match="it keeps nothing"):
        At(f"{server.url}/mirrors", run, recipe).mirror.begin()
    swallowed.clear()
    with At(f"{server.url}/mirrors", run, recipe) as mirror:
        save(run, 5)
        mirror.published()
        until(lambda: mirror.step == 5)
        swallowed.add("manifest.json")
        save(run, 10)
        mirror.published()
        until(lambda: mirror.failures)
        assert mirror.step == 5


def test_a_copied_run_folder_does_not_take_over_a_start_that_lives_and_a_linked_one_keeps_its_name(
    server: FolderServer, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "scratch" / "job77").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "scratch" / "job77")
    run = folder(tmp_path / "run", recipe)
    save(run, 5)
    with At(f"{server.url}/mirrors", run, recipe) as mirror:
        until(lambda: mirror.step == 5)
        shutil.copytree(run.path, tmp_path / "copy" / "run", ignore=shutil.ignore_patterns("*.tmp"))  # come and go
        with pytest.raises(MirrorError, match="is in use by"):
            At(f"{server.url}/mirrors", RunFolder(tmp_path / "copy" / "run"), recipe).mirror.begin()
    assert os.listdir(server.folder / "mirrors") == ["run"]


def test_a_mirror_says_when_the_weights_did_not_come(
    server: FolderServer, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = folder(tmp_path / "run", recipe)
    save(run, 5)
    begun = At(f"{server.url}/mirrors", run, recipe)
    with begun as mirror:
        until(lambda: mirror.step == 5)
        run.model("last").write_bytes(b"weights")
        server.put_faults["model-last.pt"] = ["507", "forever"]
        mirror.finish(Patience(20), exported=True)
        assert "BUT NOT ALL THAT IS COPIED WITH IT" in caplog.text
        assert "step 5 is in the mirror http" in caplog.text


@pytest.mark.parametrize("wrong", ["step", "manifest", "run.json", "file name"])
def test_a_record_that_contradicts_itself_is_not_gone_on_from(
    wrong: str, server: FolderServer, recipe: Recipe, tmp_path: Path
) -> None:
    run = folder(tmp_path / "run", recipe)
    place = mirrored(server, run, recipe, (5,))
    file = server.folder / "mirrors" / "run" / RECORD
    said = json.loads(file.read_text())
    files = said["checkpoints"][0]["files"]
    if wrong == "step":
        said["checkpoints"][0]["step"] = 10**15
    elif wrong == "manifest":
        del files[f"checkpoints/{step_name(5)}/manifest.json"]
    elif wrong == "file name":
        files["tensorboard/events.out.tfevents." + "x" * 400] = files["metrics.jsonl"]
    else:
        copy_of(server, run, "run.json", 5).write_text("[]")
        files["run.json"] |= {"bytes": 2, "sha256": hashlib.sha256(b"[]").hexdigest()}
    file.write_text(json.dumps(said))
    lost(run)
    run = folder(tmp_path / "run", recipe)
    with pytest.raises(MirrorError, match="is whole" if wrong == "run.json" else "is no record of a mirror"):
        At(place, run, recipe).mirror.begin()
    assert not checkpoint_names(run.checkpoints)
    assert run.record.run_id() is None or wrong == "run.json"


def test_a_mirror_in_the_wrong_place_is_refused_or_told(
    recipe: Recipe, small_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = folder(tmp_path / "runs" / "run", recipe)
    for place in (tmp_path / "runs", run.path):
        with pytest.raises(MirrorError, match="the two would mix"):
            RunMirror(place, run, QUICK)
    with pytest.raises(RecipeError, match=r"https://host/c\?… does not say where the names of files go") as refused:
        load_recipe(small_recipe, [f"checkpoint.mirror=https://host/c?sig={PASSWORD}"])
    assert PASSWORD not in str(refused.value)
    (tmp_path / "mount").mkdir()
    assert "something is not mounted" in str(look(run, with_mirror(recipe, tmp_path / "mount")))
    with At(tmp_path / "mount", run, recipe) as mirror:
        assert "mount is an empty folder" in caplog.text
        save(run, 5)
        mirror.published()
        until(lambda: mirror.step == 5)
        (tmp_path / "mount").rename(tmp_path / "unmounted")
        (tmp_path / "mount").mkdir()
        save(run, 10)
        mirror.published()
        until(lambda: "not mounted" in mirror.problem)
        assert not list((tmp_path / "mount").iterdir())
        (tmp_path / "mount").rmdir()
        (tmp_path / "unmounted").rename(tmp_path / "mount")
        until(lambda: mirror.step == 10)


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_record_is_stored_whole_or_not_at_all_when_its_writer_ends(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    child = tmp_path / "bin" / "child"
    child.write_text(f"#!/bin/sh\ntouch {tmp_path}/began\nsleep 1\ncat > {tmp_path}/came\ntouch {tmp_path}/ended\n")
    (tmp_path / "bin" / "aws").write_text(f"#!/bin/sh\n{child}\nexit $?\n")
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    if end == "stopped":
        store = Store("s3://bucket", QUICK)

        def stop() -> None:
            until((tmp_path / "began").exists)
            store.stop()

        threading.Thread(target=stop).start()
        with pytest.raises(ShardError, match="was left"):
            store.put(RECORD, b"x" * 200_000)
        time.sleep(1.3)
        assert not (tmp_path / "came").exists(), "the wrapper's child went on"
        return
    put = f'from crate_dist.data.remote.store import Store; Store("s3://bucket").put("{RECORD}", b"x" * 200_000)'
    with subprocess.Popen([sys.executable, "-c", put]) as writer:
        until((tmp_path / "began").exists)
        writer.send_signal(signal.SIGKILL)
    until((tmp_path / "ended").exists)
    assert (tmp_path / "came").stat().st_size == 200_000
