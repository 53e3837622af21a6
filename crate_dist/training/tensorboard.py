"""Writes TensorBoard's event files: curves that go on over restarts, whatever the clock and the disk do."""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from crate_dist.data.decode import Pixels
from crate_dist.files import AppendedFile
from crate_dist.run.folder import EVENTS
from crate_dist.run.lock import ALONE


class Curves:
    """The event file of one start.

    TensorBoard reads the files of a folder in the order of the times in their names. A clock that was set back would
    put the newest first: it gets a time behind all others instead.

    purge_step: what the files before say of this step and of later ones is not shown any more; None: all is
    tag: gives the name under which TensorBoard is to show a value; see dashboard.py
    """

    def __init__(
        self,
        folder: Path,
        purge_step: int | None,
        check: Callable[[], None] = ALONE.check,
        tag: Callable[[str], str] = str,
    ) -> None:
        self._tag = tag
        names = [path.name.removeprefix(EVENTS) for path in folder.glob(f"{EVENTS}*")]
        stamps = [int(first) for name in names if (first := name.partition(".")[0]).isdecimal()]
        stamp = max([int(time.time()), *(stamp + 1 for stamp in stamps)])
        self._file = AppendedFile(folder / f"{EVENTS}{stamp:010d}.{platform.node()}.{os.getpid()}", check)
        self._append(Event(file_version="brain.Event:2", source_metadata=SourceMetadata(writer="crate-dist")))
        if purge_step is not None:
            self._append(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: Summary, step: int) -> None:
        """Appends what torch.utils.tensorboard.summary makes: scalars, images, histograms."""
        self._append(Event(step=step, summary=values))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Appends one point of each of these curves."""
        points = [Summary.Value(tag=self._tag(name), simple_value=value) for name, value in values.items()]
        self.add(Summary(value=points), step)

    def layers(self, name: str, values: Sequence[float], step: int) -> None:
        """Appends one value of every layer, the first layer first."""
        self.scalars({f"{name}/layer-{layer:02d}": value for layer, value in enumerate(values, start=1)}, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Appends a text in Markdown."""
        self.add(summary.text(name, text), step)

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Appends a picture, uint8 (height, width, 3)."""
        (image,) = summary.image(name, pixels, dataformats="HWC").value
        image.tag = self._tag(name)
        self.add(Summary(value=[image]), step)

    def settings(self, run: str, values: Mapping[str, Any]) -> None:
        """Appends the settings of the run, which has this name in "HParams", where those come first that differ.

        Nothing is said of the metrics there: TensorBoard then takes all curves, and shows the first by name.
        """
        told = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in values.items()}
        self.add(hparams_pb(told, trial_id=run), 0)

    def charts(self, layout: Mapping[str, Mapping[str, str]], step: int) -> None:
        """Says which curves share a chart in "Custom Scalars": group -> title -> regular expression of their names."""
        groups = {
            group: {title: ["Multiline", [names]] for title, names in charts.items()}
            for group, charts in layout.items()
        }
        self.add(summary.custom_scalars(groups), step)

    def sync(self) -> None:
        """Brings everything to disk."""
        self._file.sync()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())
