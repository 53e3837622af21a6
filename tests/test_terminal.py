"""At a terminal there are colours, near paths and a bar that fits; in a file or a pipe nothing but plain lines."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from crate_dist.config import load_recipe
from crate_dist.launching.showing import show
from crate_dist.run.folder import RunFolder
from crate_dist.terminal import complain, labelled, near, paint
from crate_dist.training.console import Console
from crate_dist.training.optim import Schedule
from crate_dist.training.rank_log import start_logging
from crate_dist.world import World
from tests.ranks import REPOSITORY

ALONE = World(0, 1, 0, 1, "127.0.0.1", 1, "local")
REPORT = {
    "train/loss": 2.911,
    "train/lr": 1.9e-4,
    "train/grad_norm": 1.5,
    "train/epoch": 65.86,
    "speed/images_per_s": 12_345.0,
    "speed/data_wait_fraction": 0.02,
    "memory/host_peak_gb": 3.5,
}


_END = "END"


class Terminal:
    """A terminal of this machine; what was written to it is read from the other end."""

    def __init__(self, columns: int) -> None:
        self._screen, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._stream = os.fdopen(end, "w")

    def __enter__(self) -> Terminal:
        with ExitStack() as stack:
            stack.callback(os.close, self._screen)
            stack.enter_context(self._stream)
            stack.enter_context(redirect_stdout(self._stream))
            stack.enter_context(redirect_stderr(self._stream))
            self._end = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    def shown(self) -> str:
        """Returns what it shows, of which there may be no more than its memory holds, 4 kB."""
        self._stream.write(_END)
        self._stream.flush()
        said = ""
        while not said.endswith(_END):
            said += os.read(self._screen, 1 << 12).decode()
        return said.removesuffix(_END)


@pytest.fixture(autouse=True)
def _usual(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def as_before() -> Iterator[None]:
    """The root logger has its handlers again afterwards."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:], root.level = before


def test_a_terminal_has_colours() -> None:
    with Terminal(80) as terminal:
        show(f"{paint('FAILED', 'red')} {labelled('data', os.path.abspath('here'))}")
        complain("no")
        said = "\033[31mFAILED\033[0m \033[1mdata          \033[0mhere\r\n\033[31merror:\033[0m no\r\n"
        assert terminal.shown() == said


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "")])
def test_whoever_wants_no_colours_gets_none(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with Terminal(80):
        assert labelled(paint("a", "green"), "b") == f"{'a':<14}b"


def test_a_pipe_gets_no_colours_and_whole_paths(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    complain(f"cannot read {tmp_path}/runs/a")
    assert capsys.readouterr().err == f"error: cannot read {tmp_path}/runs/a\n"


def test_a_terminal_gets_paths_from_where_one_stands_and_no_other_is_touched(tmp_path: Path) -> None:
    with Terminal(80):
        assert near(f"--run-dir={tmp_path}/runs/a '{tmp_path}/b c'") == "--run-dir=runs/a 'b c'"
        for text in (f"file://{tmp_path}/a", f"/mnt{tmp_path}/a", f"{tmp_path}-old/a", f"{tmp_path}", f"{tmp_path}/-x"):
            assert near(text) == text


@pytest.mark.parametrize("columns", [80, 100, 140])
@pytest.mark.parametrize(("step", "last"), [(93_600, 93_836), (1_250_000, 1_251_000)])
def test_the_bar_is_whole_on_one_line(step: int, last: int, columns: int) -> None:
    recipe = load_recipe(REPOSITORY / "configs" / "crate_tiny.toml")
    schedule = Schedule(150, last * recipe.train.global_batch // 150, recipe.train.global_batch)
    with Terminal(columns) as terminal:
        console = Console(recipe, ALONE, schedule, step, last, top1=61.27)
        console.report(step, REPORT)
        console.step()
        console.close()
        lines = [line.rstrip() for line in re.split(r"[\r\n]", terminal.shown()) if line.strip()]
    assert all(len(line) <= columns for line in lines)
    made = rf"step ({step + 1:,}|{step + 1})"
    for part in (r"epoch 1\d\d\S*/150", made, "loss 2.911", "top-1 61.", "12,?345 images/s", r"\d ?s left"):
        assert re.search(part, lines[-1]), (part, lines[-1])


@pytest.mark.usefixtures("as_before")
def test_a_log_is_plain_lines_whatever_the_terminal_shows(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    with Terminal(80) as terminal:
        start_logging(folder, ALONE)
        logging.getLogger().info("step 1/2  loss 2.9")
        logging.getLogger().info("saved %s", folder.checkpoints)
        logging.getLogger().error("cannot write %s", folder.metrics)
        shown = re.sub(r"\d\d:\d\d:\d\d", "TIME", terminal.shown()).replace("\r", "")
    assert [line for line in shown.splitlines() if line] == [
        "\033[2mTIME\033[0m saved run/checkpoints",
        "\033[2mTIME\033[0m \033[31merror:\033[0m cannot write run/metrics.jsonl",
    ]
    logged = [line.split(" ", 2)[2] for line in folder.log_file(0).read_text().splitlines()]
    assert logged == ["I step 1/2  loss 2.9", f"I saved {folder.checkpoints}", f"E cannot write {folder.metrics}"]
