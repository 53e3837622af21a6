"""A checkpoint exists only when it is whole, and belongs to no cluster size."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from crate_dist.checkpoint import loading as checkpoint
from crate_dist.checkpoint import saving
from crate_dist.checkpoint.format import (
    FORMAT_VERSION,
    CheckpointError,
    GroupLayout,
    Progress,
    StoredFile,
    manifest_digest,
)
from crate_dist.checkpoint.loading import StateReader
from crate_dist.run.checkpoints import checkpoint_names, note_published
from crate_dist.run.lock import ALONE, LostTheRun, Tenure
from crate_dist.world import World
from tests.chaos.ranks import spawn_statuses
from tests.ranks import spawn

pytestmark = pytest.mark.spawn

LAYOUTS = [GroupLayout(["a", "b"], [[3, 5], [4]]), GroupLayout(["c"], [[7]])]


def vectors(step: int) -> dict[str, list[torch.Tensor]]:
    """What a run of LAYOUTS holds after `step`, unpartitioned: the numbers say kind, group, step and place."""
    return {
        kind: [torch.arange(g.numel) + 1000.0 * step + 100 * n + offset for n, g in enumerate(LAYOUTS)]
        for kind, offset in (("fp32", 0.25), ("exp_avg", 0.5))
    }


def partitioned(step: int, rank: int, world_size: int) -> dict[str, list[torch.Tensor]]:
    """One rank's share, cut as ZeRO cuts: equal parts, the last one padded."""
    share: dict[str, list[torch.Tensor]] = {}
    for kind, groups in vectors(step).items():
        share[kind] = []
        for flat in groups:
            size = -(-len(flat) // (2 * world_size)) * 2
            padded = torch.cat([flat, torch.full((size * world_size - len(flat),), -1.0)])
            share[kind].append(padded[rank * size : (rank + 1) * size].clone())
    return share


def save(world: World, device: torch.device, folder: Path, steps: list[int], tenure: Tenure = ALONE) -> None:
    for step in steps:
        state = partitioned(step, world.rank, world.world_size)
        saving.publish(folder, state, LAYOUTS, Progress(step=step), world, tenure=tenure)


def with_an_average(step: int, rank: int, world_size: int) -> dict[str, list[torch.Tensor]]:
    share = partitioned(step, rank, world_size)
    return {**share, "average": [part / 2 for part in share["fp32"]]}


def save_with_an_average(world: World, device: torch.device, folder: Path) -> None:
    state = with_an_average(10, world.rank, world.world_size)
    saving.publish(folder, state, LAYOUTS, Progress(step=10), world)


def finds_its_share(world: World, device: torch.device, folder: Path) -> bool:
    found = checkpoint.find_newest(folder, world)
    assert found is not None
    for kind, parts in with_an_average(10, world.rank, world.world_size).items():
        for group, part in enumerate(parts):
            mine = torch.full_like(part, torch.nan)
            found.reader().copy(kind, group, world.rank * len(part), mine)
            inside = min(len(part), max(0, LAYOUTS[group].numel - world.rank * len(part)))  # padding is not kept
            if not torch.equal(mine[:inside], part[:inside]) or mine[inside:].any():
                return False
    return True


def find(world: World, device: torch.device, folder: Path) -> int | str | None:
    try:
        found = checkpoint.find_newest(folder, world)
    except CheckpointError as error:
        return str(error)
    return found.step if found else None


def save_and_say_why_not(world: World, device: torch.device, folder: Path, number: int) -> str:
    """As a holder that has lost the folder."""

    def lost() -> None:
        raise LostTheRun("another job works there")

    try:
        save(world, device, folder, [40], Tenure(number, "lost", lost))
    except LostTheRun as error:
        return str(error)
    return "saved"


def find_where_nothing_can_be_listed(world: World, device: torch.device, folder: Path, number: int) -> list[object]:
    def failing(path: object) -> list[str]:
        raise OSError(number, os.strerror(number))

    checkpoint._PAUSES_S = ()
    os.listdir = failing  # type: ignore[assignment]
    try:
        checkpoint.find_newest(folder, world)
    except CheckpointError as error:
        return [error.__cause__.errno if isinstance(error.__cause__, OSError) else None, str(error)]
    return ["found something"]


def find_where_a_file_cannot_be_read(
    world: World, device: torch.device, folder: Path, name: str, number: int
) -> list[object]:
    def failing(what: Callable[..., Any]) -> Callable[..., Any]:
        def fails(path: Path, *arguments: Any, **keywords: Any) -> Any:
            if path.parts[-2:] == ("step-00000030", name):
                raise OSError(number, os.strerror(number), str(path))
            return what(path, *arguments, **keywords)

        return fails

    checkpoint._PAUSES_S = ()
    Path.stat, Path.read_text = failing(Path.stat), failing(Path.read_text)  # type: ignore[method-assign]
    try:
        checkpoint.find_newest(folder, world)
    except CheckpointError as error:
        return [error.__cause__.errno if isinstance(error.__cause__, OSError) else None, str(error)]
    return ["found something"]


def replace_and_stand_still(world: World, device: torch.device, folder: Path, point: str) -> None:
    """Saves step 30 once more with keep=1, and is killed at a point."""

    replace = Path.replace
    removes = point == "setting a checkpoint aside"

    def killed_or_replaced(path: Path, target: Path) -> Path:
        if path.name.startswith("step-") == removes and path.is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = killed_or_replaced  # type: ignore[method-assign, assignment]
    save(world, device, folder, [30])
    saving.prune(folder, keep=1, progress=Progress(step=30))


def save_where_rank_1_cannot_write(world: World, device: torch.device, folder: Path) -> str:
    save(world, device, folder, [10])
    state = partitioned(20, world.rank, world.world_size)
    original = torch.save
    if world.rank == 1:

        def full_disk(*_: object) -> None:
            raise OSError(28, "No space left on device")

        torch.save = full_disk  # type: ignore[assignment]
    try:
        saving.publish(folder, state, LAYOUTS, Progress(step=20), world)
    except CheckpointError as error:
        return str(error)
    finally:
        torch.save = original
    return "saved"


def fail_while_a_save_is_under_way(world: World, device: torch.device, folder: Path) -> list[str]:
    saver = saving.Saver(folder, LAYOUTS, world, keep=3, max_failures=3)
    write = saving._write_file

    def slowly(path: Path, state: checkpoint.RankState | checkpoint.Buffers) -> tuple[StoredFile | None, str]:
        time.sleep(1.0)
        return write(path, state)

    saving._write_file = slowly
    saver.save(partitioned(10, world.rank, world.world_size), Progress(step=10))
    saver.leave()
    return [path.name for path in folder.iterdir()]


def start_where_a_save_was_killed(world: World, device: torch.device, folder: Path) -> list[str]:
    saving.Saver(folder, LAYOUTS, world, keep=3, max_failures=3)
    torch.distributed.barrier()
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def saved_on_three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    spawn(save, 3, folder, [10, 20, 30])
    return folder


@pytest.fixture
def folder(saved_on_three_ranks: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_on_three_ranks, tmp_path / "checkpoints")


def test_every_interval_reads_back_as_it_was_saved(saved_on_three_ranks: Path) -> None:
    saved = checkpoint.list_checkpoints(saved_on_three_ranks)[-1]
    assert saved.step == 30
    reader = StateReader(saved)
    for kind, groups in vectors(30).items():
        for group, flat in enumerate(groups):
            for start in range(len(flat) + 1):
                for stop in range(start, len(flat) + 4):
                    out = torch.full((stop - start,), torch.nan)
                    reader.copy(kind, group, start, out)
                    expected = torch.cat([flat, torch.zeros(4)])[start:stop]
                    assert torch.equal(out, expected)


def test_a_kind_that_is_none_of_the_optimizer_s_is_kept_and_resharded_as_the_others_are(tmp_path: Path) -> None:
    spawn(save_with_an_average, 2, tmp_path / "checkpoints")
    saved = checkpoint.list_checkpoints(tmp_path / "checkpoints")[0]
    assert saved.manifest.kinds == ["average", "exp_avg", "fp32"]
    flat = vectors(10)["fp32"][0] / 2
    assert torch.equal(saved.weights("average")["a"], flat[:15].view(3, 5))
    for world_size in (1, 3):
        assert spawn(finds_its_share, world_size, tmp_path / "checkpoints") == [True] * world_size


def test_the_weights_come_back_by_name(saved_on_three_ranks: Path) -> None:
    weights = checkpoint.list_checkpoints(saved_on_three_ranks)[0].weights()
    flat = vectors(10)["fp32"]
    assert torch.equal(weights["a"], flat[0][:15].view(3, 5))
    assert torch.equal(weights["b"], flat[0][15:])
    assert torch.equal(weights["c"], flat[1])


def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_the_last_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    errors = spawn(save_where_rank_1_cannot_write, 2, folder)
    assert errors[0] == errors[1]
    assert "step 20 was not saved: rank 1" in errors[0]
    assert "No space left" in errors[0]
    assert [c.step for c in checkpoint.list_checkpoints(folder)] == [10]
    assert [p.name for p in folder.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "remove", "manifest", "no manifest", "wrong step", "wrong world size"]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(folder: Path, damage: str) -> None:
    newest = folder / "step-00000030"
    victim = newest / "rank-00001.pt"
    manifest = newest / "manifest.json"
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "remove":
        victim.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-9])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "wrong step":
        manifest.write_text(manifest.read_text().replace('"step": 30', '"step": 31'))
    else:
        said = {**json.loads(manifest.read_text()), "world_size": 2}
        manifest.write_text(json.dumps({**said, "digest": manifest_digest(said)}))
    assert spawn(find, 2, folder) == [20, 20]


def test_checkpoints_none_of_which_is_whole_stop_the_run(folder: Path) -> None:
    for path in folder.iterdir():
        (path / "rank-00002.pt").unlink()
    message = spawn(find, 2, folder)[0]
    assert "none of the 3 checkpoints" in message
    assert "--start-over" in message


def test_a_new_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert spawn(find, 2, tmp_path / "nothing") == [None, None]


def test_what_a_killed_save_left_is_no_checkpoint(folder: Path) -> None:
    (folder / "step-00000030").rename(folder / ".unfinished-00000030")
    assert spawn(find, 2, folder) == [20, 20]
    saving.prune(folder, keep=5, progress=Progress(step=20))
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000010", "step-00000020"]


def test_what_a_killed_save_left_is_gone_with_the_next_start(folder: Path) -> None:
    (folder / "step-00000030").rename(folder / ".unfinished-00000030")
    left = spawn(start_where_a_save_was_killed, 2, folder)
    assert left == [["step-00000010", "step-00000020"]] * 2


def test_an_error_elsewhere_lets_a_save_that_is_under_way_end(tmp_path: Path) -> None:
    assert spawn(fail_while_a_save_is_under_way, 2, tmp_path)[0] == ["step-00000010"]


def test_pruning_keeps_the_newest_and_the_best(folder: Path) -> None:
    saving.prune(folder, keep=1, progress=Progress(step=30, best_step=10))
    assert [c.step for c in checkpoint.list_checkpoints(folder)] == [10, 30]


def test_a_later_one_is_neither_removed_nor_does_it_push_out_one_that_is_whole(folder: Path) -> None:
    (folder / "step-00000030" / "rank-00001.pt").unlink()
    saving.prune(folder, keep=1, progress=Progress(step=20))
    assert sorted(os.listdir(folder)) == ["step-00000020", "step-00000030"]


def test_one_that_a_later_version_has_written_is_left_alone(folder: Path) -> None:
    manifest = folder / "step-00000010" / "manifest.json"
    said = {**json.loads(manifest.read_text()), "version": FORMAT_VERSION + 1}
    manifest.write_text(json.dumps({**said, "digest": manifest_digest(said)}))
    saving.prune(folder, keep=1, progress=Progress(step=30))
    assert sorted(os.listdir(folder)) == ["step-00000010", "step-00000030"]


@pytest.mark.parametrize("hidden", ["step-00000010", "step-00000030"])
def test_what_cannot_be_read_at_the_moment_is_not_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    """The best one, or the newest."""
    monkeypatch.setattr(checkpoint, "_PAUSES_S", ())
    read = Path.read_text

    def failing(path: Path, *arguments: Any, **keywords: Any) -> str:
        if path.parent.name == hidden:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path, *arguments, **keywords)

    with monkeypatch.context() as momentary:
        momentary.setattr(Path, "read_text", failing)
        saving.prune(folder, keep=1, progress=Progress(step=30, best_step=10))
    there = [saved.step for saved in checkpoint.list_checkpoints(folder)]
    assert {10, 30} <= set(there)


def test_what_another_job_has_saved_is_not_removed_by_one_that_lost_the_run(folder: Path) -> None:
    """Between its last look at the lock and the removal, it was stopped for hours."""
    spawn(save, 1, folder, [5, 6], Tenure(7, "of the one that came later"))
    saving.prune(folder, keep=1, progress=Progress(step=30), tenure=Tenure(6, "of the one that was stopped"))
    assert [saved.step for saved in checkpoint.list_checkpoints(folder)] == [5, 6, 30]
    unfinished = saving._unfinished(folder, Tenure(7, "of the one that came later"), "00000040")
    unfinished.mkdir()
    saving._sweep(folder, Tenure(6, "of the one that was stopped"))
    assert unfinished.exists()
    saving._sweep(folder, Tenure(8, "of one that comes after both"))
    assert not unfinished.exists()


def test_one_that_lost_the_run_publishes_and_removes_nothing(folder: Path) -> None:
    def lost() -> None:
        raise LostTheRun("another job works there")

    tenure = Tenure(6, "of the one that was stopped", lost)
    with pytest.raises(LostTheRun):
        saving.prune(folder, keep=1, progress=Progress(step=30), tenure=tenure)
    assert spawn(save_and_say_why_not, 1, folder, tenure.number) == ["another job works there"]
    assert sorted(os.listdir(folder)) == ["step-00000010", "step-00000020", "step-00000030"]


def test_one_that_is_known_to_be_damaged_is_none_of_the_newest(folder: Path) -> None:
    prune = partial(saving.prune, folder, damaged=["step-00000030"])
    prune(keep=2, progress=Progress(step=30))
    assert sorted(os.listdir(folder)) == ["step-00000010", "step-00000020", "step-00000030"]
    spawn(save, 1, folder, [30, 40])
    prune(keep=2, progress=Progress(step=40))
    assert sorted(os.listdir(folder)) == ["step-00000030.1", "step-00000040"]


@pytest.mark.parametrize(("name", "error"), [("manifest.json", errno.ESTALE), ("rank-00001.pt", errno.EIO)])
def test_the_newest_that_cannot_be_read_is_not_passed_over_for_an_older_one(
    folder: Path, name: str, error: int
) -> None:
    for said in spawn(find_where_a_file_cannot_be_read, 2, folder, name, error):
        assert said == [error, f"{folder / 'step-00000030'} cannot be read: {os.strerror(error)}"]


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_listing_that_fails_does_not_start_the_run_at_step_0(folder: Path, error: int) -> None:
    for said in spawn(find_where_nothing_can_be_listed, 2, folder, error):
        assert said == [error, f"cannot see which checkpoints there are in {folder}: {os.strerror(error)}"]


@pytest.mark.parametrize("gone", ["folder", "checkpoints"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_at_step_0(folder: Path, gone: str) -> None:
    shutil.rmtree(folder)
    if gone == "checkpoints":
        folder.mkdir()
    note_published(folder, 30)
    for said in spawn(find, 2, folder):
        assert "this run has published one of step 30" in said
        assert "--start-over" in said


def test_a_damaged_note_of_what_was_published_stops_a_run_only_where_there_is_no_checkpoint(folder: Path) -> None:
    folder.with_name("published.json").write_text("{}")
    assert spawn(find, 1, folder) == [30]
    shutil.rmtree(folder)
    assert "published.json is damaged" in spawn(find, 1, folder)[0]


def test_a_run_that_publishes_puts_it_down_outside_the_folder(folder: Path) -> None:
    assert spawn(find, 1, folder) == [30]  # of before that was put down
    spawn(save, 1, folder, [40])
    shutil.rmtree(folder)
    assert "has published one of step 40" in spawn(find, 1, folder)[0]


def test_a_listing_does_not_swallow_errors_and_knows_replacements(tmp_path: Path) -> None:
    for name in "step-00000015.10", "step-00000015", "step-00000015.2", "step-100000000", "step-5", ".unfinished-1":
        (tmp_path / name).mkdir()
    listed = checkpoint_names(tmp_path)
    assert listed == ["step-00000015", "step-00000015.2", "step-00000015.10", "step-100000000"]
    assert checkpoint_names(tmp_path / "nothing") == []
    with pytest.raises(NotADirectoryError):
        checkpoint_names(Path(__file__))


@pytest.mark.parametrize("point", ["renaming the folder of a save", "setting a checkpoint aside"])
def test_killed_twice_while_the_only_checkpoint_is_replaced_there_is_always_a_whole_one(
    folder: Path, point: str
) -> None:
    for old in "step-00000010", "step-00000020":
        shutil.rmtree(folder / old)
    for _ in range(2):
        assert spawn_statuses(partial(replace_and_stand_still, point=point), 1, folder) == [-signal.SIGKILL]
        assert spawn(find, 1, folder) == [30]
    spawn(save, 1, folder, [30])
    saving.prune(folder, keep=1, progress=Progress(step=30))
    assert [saved.manifest.world_size for saved in checkpoint.list_checkpoints(folder)] == [1]


def test_a_checkpoint_that_cannot_be_removed_is_no_reason_to_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(saving, "_remove", read_only)
    saving.prune(folder, keep=1, progress=Progress(step=30))
    assert "Read-only file system" in caplog.text
    assert len(list(folder.iterdir())) == 3


def test_one_of_the_same_step_is_replaced(folder: Path) -> None:
    spawn(save, 2, folder, [30])
    assert spawn(find, 2, folder) == [30, 30]
    assert checkpoint.list_checkpoints(folder)[-1].manifest.world_size == 2
