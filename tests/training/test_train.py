"""A run as a whole: real ranks, real shards, killed and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crate_dist.checkpoint.format import CheckpointError
from crate_dist.checkpoint.loading import list_checkpoints
from crate_dist.checkpoint.trained import load_trained
from crate_dist.config import WeightsKind, load_recipe
from crate_dist.models.weights.names import WeightsError
from crate_dist.run.dashboard import tags_of
from crate_dist.run.folder import RunFolder
from crate_dist.training.wandb_run import sent
from crate_dist.watching.report import report
from crate_dist.watching.runs import Queue, look
from tests.conftest import casts, write_split
from tests.ranks import REPOSITORY, Training, free_port, train_to_the_end

pytestmark = pytest.mark.spawn

STORED = REPOSITORY / "tests" / "stored_run"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in lines(run) if "train/loss" in line}


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(RunFolder(run).model(which), weights_only=True)["state_dict"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cast_shards: Path) -> tuple[list[object], Path]:
    """The arguments of a run on two ranks, and its folder when it was never disturbed."""
    from tests.conftest import SMALL_RECIPE

    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = folder / "small.toml"
    recipe.write_text(SMALL_RECIPE)
    arguments: list[object] = ["--config", recipe, "--data", cast_shards, "--set", "optim.ema_decay=0.8"]
    train_to_the_end([*arguments, "--run-dir", folder / "run"], world_size=2)
    return arguments, folder / "run"


def test_a_run_learns_and_leaves_what_it_promises(undisturbed: tuple[list[object], Path]) -> None:
    _, run = undisturbed
    folder = RunFolder(run)
    curve = losses(run)
    assert list(curve) == list(range(1, 26))  # three epochs of 200 samples in batches of 24
    assert curve[25] < curve[1] - 0.3
    evaluations = [line for line in lines(run) if "val/top1" in line]
    assert [line["step"] for line in evaluations] == [9, 17, 25]
    assert evaluations[-1]["val/top1"] > 60
    assert folder.log_file(0).read_text()
    assert folder.log_file(1).exists()
    record = json.loads(folder.record_file.read_text())
    assert len(record["starts"]) == 1
    assert record["code"]["packages"]["torch"]
    assert "| steps | 25 |" in (run / "model-last.md").read_text()
    assert "| validation | top-1 " in (run / "model-best.md").read_text()


def test_the_average_of_the_weights_is_evaluated_decides_which_is_best_and_is_exported(
    undisturbed: tuple[list[object], Path],
) -> None:
    _, run = undisturbed
    folder = RunFolder(run)
    *_, last = evaluations = [line for line in lines(run) if "val/ema_top1" in line]
    assert [line["step"] for line in evaluations] == [9, 17, 25]
    assert last["val/ema_loss"] != last["val/loss"]
    shown = dict(tensorboard_curve(run, "val/ema_top1"))
    assert shown == pytest.approx({line["step"]: line["val/ema_top1"] for line in evaluations})
    best = list_checkpoints(folder.checkpoints)[-1].progress
    assert best.best_top1 == max(line["val/ema_top1"] for line in evaluations)
    seen = look(run, Queue({}), disk=False)
    assert (seen.top1, seen.ema_top1, seen.best_top1) == (last["val/top1"], last["val/ema_top1"], best.best_top1)
    assert f"of the weights themselves {last['val/top1']:.2f} % at step 25" in report(folder)
    kinds: dict[WeightsKind, str] = {"raw": "last", "ema": "last-ema"}
    for kind, name in kinds.items():
        for source in (run, folder.model(name)):
            model = load_trained(source, weights=kind).model
            assert same(dict(model.state_dict()), weights(run, name)), source
    assert not same(weights(run), weights(run, "last-ema"))
    assert f"| validation | top-1 {last['val/ema_top1']:.4g} %" in (run / "model-last-ema.md").read_text()
    assert "moving average over the training, decay 0.8" in (run / "model-last-ema.md").read_text()
    assert "moving average" not in (run / "model-last.md").read_text()
    with pytest.raises(WeightsError, match=r"'ema' weights were asked for, and .*model-last.pt has them as they are"):
        load_trained(folder.model("last"), weights="ema")
    with pytest.raises(CheckpointError, match=r"'ema' weights were asked for, and .*has no moving average"):
        load_trained(STORED / "run", weights="ema")


def test_the_newest_checkpoints_and_the_best_are_kept(undisturbed: tuple[list[object], Path]) -> None:
    _, run = undisturbed
    saved = list_checkpoints(RunFolder(run).checkpoints)
    best = saved[-1].progress.best_step
    assert {c.step for c in saved} == {17, 20, 25} | {best}
    assert not list(RunFolder(run).checkpoints.glob(".*"))


def test_killed_with_9_and_started_again_it_ends_bit_for_bit_the_same(
    undisturbed: tuple[list[object], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments, run = undisturbed
    arguments = [*arguments, "--run-dir", tmp_path / "run", "--set", "log.trackers=tensorboard,wandb"]
    with Training(arguments, world_size=2):
        wait_for_step(tmp_path / "run", 12)
    before = max(losses(tmp_path / "run"))
    assert before < 25, "the run was over before it could be killed"
    train_to_the_end(arguments, world_size=2)
    assert losses(tmp_path / "run") == losses(run)
    for which in ("last", "last-ema"):
        assert same(weights(tmp_path / "run", which), weights(run, which))
    starts = json.loads(RunFolder(tmp_path / "run").record_file.read_text())["starts"]
    assert [start["step"] for start in starts] in ([0, 10], [0, 15])

    curve = tensorboard_curve(tmp_path / "run", "train/loss")
    assert curve == tensorboard_curve(run, "train/loss")
    assert [step for step, _ in curve] == list(range(1, 26))
    restarts = tensorboard_curve(tmp_path / "run", "run/restarts")
    assert (starts[1]["step"] + 1, 1.0) in restarts, "the restart leaves a mark"
    assert {value for step, value in restarts if step > starts[1]["step"]} == {1.0}
    points = [point for path in RunFolder(tmp_path / "run").wandb.glob("offline-run-*/*.wandb") for point in sent(path)]
    for name, steps in {
        "train/loss": range(1, 26),
        "speed/images_per_s": range(1, 26),
        "val/top1": (9, 17, 25),
    }.items():
        assert sorted(step for sent_name, step in points if sent_name == name) == list(steps)


def test_on_another_number_of_ranks_it_goes_on_with_the_same_batches(
    undisturbed: tuple[list[object], Path], tmp_path: Path
) -> None:
    arguments, run = undisturbed
    arguments = [*arguments, "--run-dir", tmp_path / "run"]
    train_to_the_end([*arguments, "--set", "train.max_steps=7"], world_size=2)
    said = [line for line in RunFolder(tmp_path / "run").log_file(0).read_text().splitlines() if " I step " in line]
    assert "step 7/7 " in said[-1]
    assert said[-1].endswith("  0 s left")
    train_to_the_end([*arguments, "--set", "train.max_steps=13"], world_size=4)
    train_to_the_end(arguments, world_size=1)
    there, here = losses(run), losses(tmp_path / "run")
    assert list(here) == list(there)
    # The same samples in another order of summation and in bf16.
    assert max(abs(here[step] - there[step]) for step in there) < 0.03
    assert all(here[step] == there[step] for step in range(1, 8))


def test_a_complete_run_started_again_says_so_and_changes_nothing(undisturbed: tuple[list[object], Path]) -> None:
    arguments, run = undisturbed
    before = weights(run)
    train_to_the_end([*arguments, "--run-dir", run], world_size=1)
    assert same(weights(run), before)
    assert list(losses(run)) == list(range(1, 26))


def test_another_recipe_in_the_same_folder_is_refused(undisturbed: tuple[list[object], Path]) -> None:
    arguments, run = undisturbed
    with Training([*arguments, "--run-dir", run, "--set", "optim.lr=1e-3"], world_size=1) as refused:
        assert refused.wait() == [1]
        output = refused.output()
    assert "optim.lr: 0.0003 there, 0.001 now" in output
    assert "Traceback" not in output


def test_a_run_named_by_its_folder_alone_goes_on_by_its_own_recipe(
    undisturbed: tuple[list[object], Path], small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(load_recipe(small_recipe, data__root=cast_shards, train__max_steps=3))
    train_to_the_end(["--run-dir", folder.path], world_size=2)
    assert losses(folder.path) == {step: loss for step, loss in losses(undisturbed[1]).items() if step <= 3}
    train_to_the_end(["--run-dir", folder.path, "--data", cast_shards, "--set", "train.max_steps=4"], world_size=2)
    assert losses(folder.path) == {step: loss for step, loss in losses(undisturbed[1]).items() if step <= 4}
    with Training(["--set", "train.max_steps=4"], world_size=1) as refused:
        assert refused.wait() == [2]
        assert "--arch or --config is required, or --run-dir" in refused.output()
    with Training(["--run-dir", tmp_path / "none"], world_size=1) as nowhere:
        assert nowhere.wait() == [1]
        assert f"error: {tmp_path / 'none'} is no run folder" in nowhere.output()


def test_a_loss_that_is_not_finite_stops_the_run_with_the_checkpoint_intact(
    cast_shards: Path, small_recipe: Path, tmp_path: Path
) -> None:
    arguments: list[object] = ["--config", small_recipe, "--data", cast_shards, "--run-dir", tmp_path / "run"]
    arguments += ["--set", "optim.lr=1e30", "--set", "optim.warmup_epochs=0", "--set", "checkpoint.every_steps=1"]
    arguments += ["--set", "mix.mixup=0.8", "--set", "train.group=2", "--set", "model.drop_path=0.1"]
    with Training(arguments, world_size=2) as stopped:
        assert stopped.wait() == [1, 1]
        output = stopped.output()
    assert "not finite: rank 0: the output of" in output
    assert "train-00000" in output
    for saved in list_checkpoints(RunFolder(tmp_path / "run").checkpoints):
        assert saved.damaged() is None
        assert all(bool(torch.isfinite(w).all()) for w in saved.weights().values())


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if RunFolder(run).metrics.exists() and max(losses(run), default=0) >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached in two minutes")


def tensorboard_curve(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(RunFolder(run).tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tags_of(RunFolder(run))(tag))]


def test_under_torchrun_it_is_the_same_run(undisturbed: tuple[list[object], Path], tmp_path: Path) -> None:
    arguments, run = undisturbed
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["-m", "crate_dist.train", *map(str, arguments), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--set", "train.max_steps=3"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == {step: loss for step, loss in losses(run).items() if step <= 3}


def test_too_many_bad_samples_stop_the_run_and_are_listed_by_name(small_recipe: Path, tmp_path: Path) -> None:
    def samples() -> Iterator[tuple[str, bytes, int]]:
        for number, (key, image, label) in enumerate(casts(200, seed=5)):
            yield key, (image[:50] if number % 4 == 0 else image), label

    write_split(tmp_path / "data" / "train", samples(), shard_samples=60, classes=4)
    arguments = ["--config", small_recipe, "--data", tmp_path / "data", "--run-dir", tmp_path / "run"]
    with Training([*arguments, "--set", "data.val_split="], world_size=1) as stopped:
        assert stopped.wait() == [1]
        assert "data.max_bad_fraction = 0.001" in stopped.output()
    listed = [json.loads(line) for line in RunFolder(tmp_path / "run").bad_samples.read_text().splitlines()]
    assert len(listed) > 8
    assert all(int(item["key"].partition(".")[0]) % 4 == 0 and item["reason"] for item in listed)
    train_to_the_end(
        [*arguments, "--set", "data.val_split=", "--set", "data.max_bad_fraction=0.3", "--set", "log.every_steps=5"],
        world_size=2,
    )
    counted = dict(tensorboard_curve(tmp_path / "run", "data/bad_samples"))
    assert counted[25] == 3 * 50  # a quarter of 200, in each of three epochs


def test_validation_images_that_cannot_be_read_are_left_out_said_and_when_too_many_stop_the_run(
    cast_shards: Path, small_recipe: Path, tmp_path: Path
) -> None:
    samples = [
        (key, image[:50] if number % 6 == 0 else image, label)
        for number, (key, image, label) in enumerate(casts(37, 2))
    ]
    write_split(tmp_path / "data" / "val", iter(samples), shard_samples=20, classes=4)
    (tmp_path / "data" / "train").symlink_to(cast_shards / "train")
    arguments = ["--config", small_recipe, "--data", tmp_path / "data", "--run-dir", tmp_path / "run"]
    folder = RunFolder(tmp_path / "run")
    with Training([*arguments, "--set", "train.max_steps=9"], world_size=2) as stopped:
        assert stopped.wait() == [1, 1]
        assert "val: 7 of 37 samples could not be read" in stopped.output()
        assert "data.max_bad_fraction = 0.001" in stopped.output(1)
    listed = [json.loads(line) for line in folder.bad_samples.read_text().splitlines()]
    assert [(item["split"], item["key"]) for item in listed] == [("val", f"{n:06d}.png") for n in range(0, 37, 6)]
    allowed = ["--set", "train.max_steps=9", "--set", "data.max_bad_fraction=0.2"]
    said = train_to_the_end([*arguments, *allowed], world_size=2)
    assert "left out of val: 000006.png of val-000000.tar" in said
    assert "7 samples could not be read and do not count" in said
    assert dict(tensorboard_curve(tmp_path / "run", "data/bad_val_samples")) == {9: 7}


def test_starting_over_takes_a_flag_and_loses_nothing(undisturbed: tuple[list[object], Path], tmp_path: Path) -> None:
    arguments, _ = undisturbed
    arguments = [*arguments, "--run-dir", tmp_path / "run", "--set", "train.max_steps=3"]
    train_to_the_end(arguments, world_size=1)
    for file in RunFolder(tmp_path / "run").checkpoints.glob("*/rank-*.pt"):
        file.write_bytes(b"")
    with Training(arguments, world_size=1) as stopped:
        assert stopped.wait() == [1]
        assert "--start-over" in stopped.output()
    said = train_to_the_end([*arguments, "--start-over"], world_size=1)
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    (before,) = (path for path in tmp_path.iterdir() if path.name.startswith("run.before-"))
    assert f"what stood in {tmp_path / 'run'} is in {before} now" in said
    assert list(losses(before)) == [1, 2, 3]
