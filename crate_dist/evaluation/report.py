"""Says and writes what an evaluation found: lines for people, tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crate_dist.evaluation.accuracy import ClassAccuracies, Evaluation, class_text
from crate_dist.evaluation.calibration import Calibration
from crate_dist.evaluation.corruptions import Corrupted
from crate_dist.evaluation.real import Reassessed
from crate_dist.evaluation.sets import EvalSet
from crate_dist.files import write_whole

_NAMED = 5


@dataclass(frozen=True)
class Outcome:
    """What was found on a data set. seconds: of the whole pass, the start of the loader's workers among them"""

    of: EvalSet
    result: Evaluation
    calibration: Calibration
    by_class: ClassAccuracies
    real: Reassessed | None
    seconds: float

    @property
    def rate(self) -> float:
        """Images per second of all ranks."""
        return self.result.samples / self.seconds

    def records(self) -> list[dict[str, Any]]:
        """Returns one record per class."""
        return self.by_class.records(self.of.matching.classes, self.of.matching.names)

    def confusions(self, most: int | None = None) -> list[dict[str, Any]]:
        """Returns the most frequent confusions, or all."""
        return self.by_class.confusions(self.of.matching.classes, self.of.matching.names, most)

    def lines(self, model: str, ranks: int, told: str) -> list[str]:
        """Returns what is to be said of it as soon as it is known. told: how classes are matched, if that was said"""
        result = self.result
        lines = [
            f"{model} on {self.of.index.place}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, "
            f"loss {result.loss:.4f}, {result.samples:,} samples; {self.rate:,.0f} images/s"
            + (f", {self.rate / ranks:,.0f} on each of {ranks} ranks" if ranks > 1 else "")
        ]
        if result.unreadable:
            total, named = result.samples + result.unreadable, [f"{item.key} of {item.shard}" for item in result.bad]
            which = ", ".join(named[:_NAMED]) + (", …" if len(named) > _NAMED else "")
            lines.append(f"{result.unreadable:,} of {total:,} samples could not be read and do not count: {which}")
        if (words := self.of.matching.describe()) and words != told:
            lines.append(words)
        lines.append(self.calibration.describe())
        if self.real:
            lines.append(f"ReaL labels: top-1 {self.real.top1:.2f} % of {self.real.samples:,} images that have some")
        return lines

    def record(self) -> dict[str, Any]:
        """Returns everything, as in JSON."""
        matching, result = self.of.matching, asdict(self.result)
        result["bad"] = [item._asdict() for item in self.result.bad]
        return {
            "data": str(self.of.index.place),
            **result,
            "seconds": self.seconds,
            "images_per_s": self.rate,
            "matched_by": matching.by,
            "competing": matching.competing,
            "model_classes": matching.outputs,
            "calibration": asdict(self.calibration),
            "real": asdict(self.real) if self.real else None,
            "classes": self.records(),
            "confusions": self.confusions(),
        }


@dataclass(frozen=True)
class CorruptedOutcome:
    """What was found on ImageNet-C. seconds: of all passes"""

    of: EvalSet
    corrupted: Corrupted
    seconds: float

    def record(self) -> dict[str, Any]:
        """Returns everything, as in JSON."""
        assert self.of.corruptions is not None
        matching = self.of.matching
        return {
            "data": str(self.of.corruptions.root),
            **self.corrupted.record(),
            "seconds": self.seconds,
            "matched_by": matching.by,
            "competing": matching.competing,
            "model_classes": matching.outputs,
        }


def summary(outcomes: Sequence[Outcome | CorruptedOutcome]) -> list[str]:
    """Returns one table of all data sets."""
    width = max(24, *(len(one.of.name) + 2 for one in outcomes))
    lines = ["", f"{'data':{width}}   top-1     top-5      loss      ECE    samples  classes"]
    for one in outcomes:
        matching = one.of.matching
        classes = f"{matching.competing:,}"
        if matching.competing < matching.outputs:
            classes += f" of {matching.outputs:,}"
        if isinstance(one, CorruptedOutcome):
            row = _row(100 - one.corrupted.mean_error, None, None, None, one.corrupted.samples)
        else:
            row = _row(one.result.top1, one.result.top5, one.result.loss, one.calibration.ece, one.result.samples)
        lines.append(f"{one.of.name:{width}}{row}  {classes}")
        if isinstance(one, CorruptedOutcome) and one.corrupted.mce is not None:
            lines.append(f"{'  mCE':{width}}{one.corrupted.mce:6.2f} %")
        if isinstance(one, Outcome) and one.real:
            lines.append(f"{'  ReaL labels':{width}}{_row(one.real.top1, None, None, None, one.real.samples)}")
    return lines


def class_lines(outcome: Outcome, most: int | None) -> list[str]:
    """Returns the table of classes, the worst first, of all or so many."""
    index, records = outcome.of.index, outcome.records()
    lines = ["", "   top-1     top-5  samples  class"]
    for label in outcome.by_class.worst_first()[:most]:
        record = records[label]
        text = class_text(index.classes, index.class_names, record["label"])
        lines.append(f"{record['top1']:6.2f} %  {record['top5']:6.2f} %  {record['samples']:7,}  {text}")
    if absent := int((outcome.by_class.samples == 0).sum()):
        lines.append(f"{absent} more classes have no sample in this split")
    return lines


def confusion_lines(outcome: Outcome, most: int) -> list[str]:
    """Returns the table of the most frequent confusions."""
    return [
        "",
        "  times  of the class  true -> predicted",
        *(
            f"{item['count']:7,}  {item['share']:10.2f} %  {item['true']} -> {item['predicted']}"
            for item in outcome.confusions(most)
        ),
    ]


def reliability_lines(calibration: Calibration) -> list[str]:
    """Returns the table of the bins of confidence."""
    return [
        "",
        "   confidence      mean     top-1  samples",
        *(
            f"{100 * one.low:5.1f} … {100 * one.high:5.1f} {one.confidence:7.2f} %  {one.top1:6.2f} %  {one.samples:7,}"
            for one in calibration.bins
        ),
    ]


def write_classes(path: Path, outcome: Outcome) -> None:
    """Writes the table of classes as CSV."""
    records, table = outcome.records(), io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_whole(path, table.getvalue())


def _row(top1: float, top5: float | None, loss: float | None, ece: float | None, samples: int) -> str:
    shares = [f"{'-':>8}" if share is None else f"{share:6.2f} %" for share in (top1, top5, ece)]
    return f"{shares[0]}  {shares[1]}  {'-' if loss is None else format(loss, '.4f'):>8} {shares[2]} {samples:10,}"
