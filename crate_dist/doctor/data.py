"""The stage "data": how fast images come to the device, and whether a step would wait for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import torch

from crate_dist.config import AugmentSection, DataSection, ImageSection
from crate_dist.data.feed import Feed
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import Share, TrainLoader, train_transform
from crate_dist.data.order import Order
from crate_dist.data.splits import open_split
from crate_dist.data.workers import open_server
from crate_dist.doctor.shards import make_shards
from crate_dist.doctor.stage import Finding, Setting

RATES = {"CRATE-B": 8000.0, "CRATE-L": 3500.0}
"""Images per second that a step on an H200 is to take, compiled, in bf16."""
_IN_SMALL = {"a step": 100.0}
_WORKERS = (1, 2, 4, 6, 8, 10, 12, 14)
_COPIED = 2**27  # bytes


def examine(setting: Setting) -> Iterator[Finding]:
    """Copies to the device, then loads with more and more workers, then as slowly as a step would."""
    open_server()  # before this process has threads
    if setting.device == "cuda":
        yield from _copies()
    else:
        yield Finding("copies to the device", "not measured", note="needs a GPU")
    # In the size of ImageNet's: 500 x 375 pixels, 110 kB.
    shards = make_shards(
        setting.scratch, 96 if setting.small else 1024, 32, *((64, 64) if setting.small else (500, 375))
    )
    index = open_split(shards, "train", DataSection())
    yield from _workers(setting, index)


def _copies() -> Iterator[Finding]:
    """Measures copies from memory to the device, alone and beside products."""
    there = torch.empty(_COPIED, dtype=torch.uint8, device="cuda")
    rates = {}
    for kind in ("pinned", "pageable"):
        here = torch.zeros(_COPIED, dtype=torch.uint8, pin_memory=kind == "pinned")
        seconds = _timed(lambda here=here: there.copy_(here, non_blocking=True), 10)  # type: ignore[misc]
        rates[kind] = _COPIED / seconds / 1e9
        yield Finding(f"copies to the device, {kind}", rates[kind], "GB/s")
        back = _timed(lambda here=here: here.copy_(there, non_blocking=True), 10)  # type: ignore[misc]
        yield Finding(f"copies from the device, {kind}", _COPIED / back / 1e9, "GB/s")
    # 224 x 224 x 3 bytes of an image, at the rate of the fastest model
    need = RATES["CRATE-B"] * 224 * 224 * 3 / 1e9
    yield Finding(
        "pinned copies, to what CRATE-B needs", rates["pinned"] / need, "times", "2 or more", rates["pinned"] > 2 * need
    )

    square = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    here, stream = torch.zeros(_COPIED, dtype=torch.uint8, pin_memory=True), torch.cuda.Stream()
    copies = 10
    copying = copies * _COPIED / rates["pinned"] / 1e9
    products = max(1, round(copying / _timed(lambda: square @ square, 20)))

    def compute() -> None:
        for _ in range(products):
            square @ square

    def both() -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(copies):
                there.copy_(here, non_blocking=True)
        compute()
        torch.cuda.current_stream().wait_stream(stream)

    alone, beside = _timed(compute, 3), _timed(both, 3)
    hidden = (alone + copying - beside) / min(alone, copying)
    yield Finding(
        "copies hidden beside products",
        100 * hidden,
        "%",
        "80 or more",
        hidden > 0.8,
        facts={"products_s": alone, "copies_s": copying, "both_s": beside},
    )


def _timed(work: Callable[[], object], times: int) -> float:
    """Returns the seconds of one call, of `times` queued after each other on the device."""
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / times


def _workers(setting: Setting, index: ShardIndex) -> Iterator[Finding]:
    """Loads with 1 to 14 workers, as many as there are cores, and then at the rates of steps."""
    there = len(os.sched_getaffinity(0))
    counts = [count for count in _WORKERS if count <= max(there, 1)]
    turns = len(counts) + len(RATES)
    seconds = 0.5 if setting.small else min(4.0, max(0.5, (setting.left_s - 10) / turns / 2))
    rates = {}
    for count in counts:
        loader = _loader(setting, index, count)
        for _ in range(2 * count):  # the first ones come while the others start
            next(loader)
        made, began = 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            made += len(next(loader).images)
        rates[count] = made / (time.perf_counter() - began)
        yield Finding(f"loading, {count} workers", rates[count], "images/s")
        del loader
    most = counts[-1]
    if most > 1:
        efficiency = rates[most] / rates[1] / most
        well = efficiency > 0.5 if not setting.small else None
        note = "the cores may be two to one, or others use them" if well is False else ""
        yield Finding(f"{most} workers, to {most} times one", 100 * efficiency, "%", "50 or more", well, note)

    device = torch.device(setting.device)
    count = max(1, min(_WORKERS[-1], there - 1))
    for name, rate in (_IN_SMALL if setting.small else RATES).items():
        feed = Feed(_loader(setting, index, count), device)
        for _ in range(2 * count):
            next(feed)
        waited, began, used = feed.wait_s, time.perf_counter(), 0
        while time.perf_counter() < began + seconds:
            images = len(next(feed).images)
            used += images
            time.sleep(images / rate)
        took = time.perf_counter() - began
        share = (feed.wait_s - waited) / took
        enough = -(-rate // rates[1])
        note = "" if share < 0.05 else f"some {enough:.0f} cores like these would do, or smaller images: docs/data.md"
        yield Finding(f"waiting of {name} at {rate:g} images/s, {count} workers", 100 * share, "%", note=note)
        del feed


def _loader(setting: Setting, index: ShardIndex, workers: int) -> TrainLoader:
    size, batch = (32, 8) if setting.small else (224, 64)
    transform = train_transform(AugmentSection(), ImageSection(), size)
    return TrainLoader(index, Order(index.shard_sizes, 0, 4, 64), Share(0, 1, batch, batch), transform, workers)
