"""ZeRO-2 (Rajbhandari et al. 2020, arXiv 1910.02054) of DeepSpeed, with gradients that travel without the host waiting.

DeepSpeed's optimizer partitions the weights and keeps their masters; its own way for gradients has the host wait for
the device before each reduction, prepares each parameter by itself, and takes the norm of each.

All that is to be known of DeepSpeed in a training stands here.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from crate_dist.config import Recipe
from crate_dist.distributed import device_type
from crate_dist.training import compiling
from crate_dist.training.buckets import Bucket, cut
from crate_dist.training.stragglers import OwnTime

os.environ["DS_ACCELERATOR"] = device_type()  # which DeepSpeed reads when it is imported, and else looks for others

import deepspeed
import deepspeed.accelerator.cuda_accelerator
import deepspeed.runtime.engine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups

with compiling.decorators_ignored(), contextlib.suppress(ImportError):  # where a version of it has none
    # DeepSpeed imports its Muon in any case, which is not used here and would import all of torch's compiler.
    import deepspeed.runtime.zero.muon.original_muon

# Asking it for free memory, DeepSpeed takes the names in CUDA_VISIBLE_DEVICES for numbers. Else it asks torch.
deepspeed.accelerator.cuda_accelerator.pynvml = None

# What a user of this program can do nothing about: that Lion is not on DeepSpeed's own list, and old names in torch.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")

# DeepSpeed would try for every one of its operations, on every rank, whether a compiler could build it, and build one
# of them on a CPU, for a minute or more, to speed up what gloo does well enough. None of them is used here.
deepspeed.ops.__compatible_ops__ = {}

RANKS_REDUCED_TO = 16
"""The most ranks at which each gradient is reduced to its owner. In larger jobs that would be many small messages, and
take longer than sending twice as much in few, by the model of benchmarks/scaling.py. Parameter groups share no message:
where there is a pair of them for each layer, as with optim.layer_decay, the ranks are counted once for each pair."""

BUCKETS, SMALLEST_BUCKET = 8, 1 << 20
"""In how many parts gradients are reduced, and the fewest elements of one: the first are on their way while the last
are computed, and each is still large enough for the network (CRATE-B's 6 MB in bf16)."""

_CHUNK = 1 << 18
"""Elements that are summed in fp32 at a time for the norm: a CPU would lose 0.7 % of it over all of CRATE-L at once."""


class Zero2(DeepSpeedZeroOptimizer):
    """DeepSpeed's partitions and weights, with reductions, norm, clipping and guard of our own.

    A gradient is copied into its place in one flat vector. When the last one of a bucket is there, its reduction is
    queued behind what computes, on a stream of its own, in an order that is the same on all ranks. Each part goes to
    the rank that owns it, or, with use_multi_rank_bucket_allreduce, the bucket to all: twice the traffic, but one
    message instead of one for each owner. What arrives is summed over the micro-batches in fp32.

    not_finite: 0-d fp32, on the device; 1 from the first step on whose gradient or loss is not finite. From then on no
        step changes anything, so that the host may learn of it later and still find the weights of that step.
    grad_norm: 0-d fp32, of the gradient of the last step, over all ranks, before clipping
    own_time: of micro-batches, up to their first reduction
    """

    def create_gradient_handling_hooks(self) -> None:
        """Lays out the buckets. DeepSpeed calls it while it makes the optimizer, when the partitions are known."""
        self._rank, self._ranks = dist.get_rank(self.dp_process_group), dist.get_world_size(self.dp_process_group)
        device = self.bit16_groups_flat[0].device
        self.not_finite = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self._taint = torch.zeros((), device=device)
        self._sums = [torch.zeros_like(part, requires_grad=False) for part in self.single_partition_of_fp32_groups]
        place = {parameter: number for number, parameter in enumerate(self.param_names)}
        buckets = [bucket for group in range(len(self.bit16_groups)) for bucket in self._buckets_of(group)]
        # The backward pass ends with the first parameter of the model: a bucket is ready when its first one is.
        self._buckets = sorted(buckets, key=lambda bucket: -min(place[p] for p in bucket.parameters))
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                hook = partial(self._arrived, bucket)
                self._grad_acc_hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        self._sums_are_old = True
        accelerator = get_accelerator()
        timed = None if accelerator.is_synchronized_device() else partial(accelerator.Event, enable_timing=True)
        self.own_time = OwnTime(timed)
        self._begin()

    def _buckets_of(self, group: int) -> Iterator[Bucket]:
        """Cuts the flat gradient of a group into buckets, from its end."""
        flat, partition = torch.zeros_like(self.bit16_groups_flat[group]), self.partition_size[group]
        own = self._rank * partition
        sizes = [parameter.numel() for parameter in self.bit16_groups[group]]
        starts = [0, *itertools.accumulate(sizes)]
        for first, last in cut(sizes, self.reduce_bucket_size):
            parameters, position, stop = self.bit16_groups[group][first:last], starts[first], starts[last]
            parts = {
                owner: flat[max(owner * partition, position) : min((owner + 1) * partition, stop)]
                for owner in range(position // partition, (stop - 1) // partition + 1)
            }
            mine = parts.get(self._rank)
            start = max(own, position) - own
            sums = None if mine is None else (mine, self._sums[group][start : start + mine.numel()])
            gradient = flat[position:stop]
            pieces = gradient.split(sizes[first:last])
            views = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
            yield Bucket(gradient, parameters, views, parts, sums)

    @torch.no_grad()
    def heed(self, loss: Tensor) -> None:
        """Has the next step not taken, on any rank, when this loss is not finite, whatever its gradients are."""
        self._taint += 0 * loss

    def _begin(self) -> None:
        """Expects the gradients of a micro-batch."""
        self._reduced = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def _arrived(self, bucket: Bucket, _: nn.Parameter) -> None:
        """Notes a gradient, and reduces what is ready: in their order, since all ranks must issue the same."""
        bucket.missing -= 1
        if self.overlap_comm:
            bucket.streams.add(get_accelerator().current_stream())
        while self._reduced < len(self._buckets) and not self._buckets[self._reduced].missing:
            self._reduce(self._buckets[self._reduced])
            self._reduced += 1

    def _reduce(self, bucket: Bucket) -> None:
        """Queues the reduction of a bucket.

        The order of what is done on the device, where it has streams:

        - The backward pass may have computed gradients on several streams. This one waits for all of them, and memory
          of theirs that it reads is not given away before it has.
        - It writes into the bucket after the reduction of the micro-batch before has read it (`was_read`). The bucket
          and the sums live as long as this optimizer, so that no allocator can give them away.
        - The reduction waits for this stream: for the copies, and for the last optimizer step, which reads the sums
          and came before this forward pass. Reductions run one after the other.
        - `step` has its stream wait for all reductions before it reads the sums.
        """
        self.own_time.ready()
        here = get_accelerator().current_stream()
        pairs = zip(bucket.views, bucket.parameters, strict=True)
        ready = [(view, p.grad) for view, p in pairs if p.grad is not None]
        for stream in bucket.streams - {here}:
            here.wait_stream(stream)
            for _, gradient in ready:
                gradient.record_stream(here)
        bucket.streams.clear()
        if bucket.was_read:
            here.wait_event(bucket.was_read)
        if len(ready) < len(bucket.parameters):  # a parameter that this loss does not depend on
            bucket.gradient.zero_()
        if ready:
            torch._foreach_copy_([view for view, _ in ready], [gradient for _, gradient in ready])
        for parameter in bucket.parameters:
            parameter.grad = None
        if self.overlap_comm:
            self.reduction_stream.wait_stream(here)
        with get_accelerator().stream(self.reduction_stream):
            self._send(bucket)
            if bucket.mine:
                part, total = bucket.mine
                total.copy_(part) if self._sums_are_old else total.add_(part)
            if self.overlap_comm:
                bucket.was_read = bucket.was_read or get_accelerator().Event()
                bucket.was_read.record(self.reduction_stream)

    def _send(self, bucket: Bucket) -> None:
        if self._ranks == 1:
            return
        bucket.gradient.div_(self._ranks)
        if self.use_multi_rank_bucket_allreduce:
            dist.all_reduce(bucket.gradient, group=self.dp_process_group)
        else:
            for owner, part in bucket.parts.items():
                dist.reduce(part, dist.get_global_rank(self.dp_process_group, owner), group=self.dp_process_group)

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Ends a micro-batch: reduces what a parameter without gradient has held up. DeepSpeed's engine calls it."""
        for bucket in self._buckets[self._reduced :]:
            self._reduce(bucket)
        self._sums_are_old = False
        self._begin()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Takes a step of the optimizer with the clipped gradient on this rank's partition, and gathers the weights."""
        if self.overlap_comm:
            get_accelerator().current_stream().wait_stream(self.reduction_stream)
        chunks = [chunk for total in self._sums for chunk in total.split(_CHUNK)]
        squares = torch.stack(torch._foreach_norm(chunks)).square().sum() + self._taint
        self._taint.zero_()
        dist.all_reduce(squares, group=self.dp_process_group)
        self.grad_norm = squares.sqrt()
        self.not_finite.logical_or_(~torch.isfinite(self.grad_norm))
        self.optimizer.grad_scale = (
            ((self.grad_norm + 1e-6) / self.clip_grad).clamp(min=1.0) if self.clip_grad else None
        )
        self.optimizer.found_inf = self.not_finite
        for part, total in zip(self.single_partition_of_fp32_groups, self._sums, strict=True):
            part.grad = total
        self.optimizer.step()
        for part, flat in zip(self.single_partition_of_fp32_groups, self.bit16_groups_flat, strict=True):
            part.grad = None
            rounded = flat[self._rank * part.numel() : (self._rank + 1) * part.numel()]
            rounded.copy_(torch.where(self.not_finite > 0, rounded, part))  # what is looked into stays as it is
            if self._ranks > 1:
                dist.all_gather_into_tensor(flat, rounded, group=self.dp_process_group)
        self._sums_are_old = True

    @torch.no_grad()
    def show(self, partitions: Sequence[Tensor]) -> None:
        """Has the model see other weights than the master weights: those in the ranks' partitions. A collective."""
        for part, flat in zip(partitions, self.bit16_groups_flat, strict=True):
            rounded = flat[self._rank * part.numel() : (self._rank + 1) * part.numel()]
            rounded.copy_(part)
            if self._ranks > 1:
                dist.all_gather_into_tensor(flat, rounded, group=self.dp_process_group)


class Guard:
    """Tells the host which step was not taken, without its waiting for the one that runs."""

    def __init__(self, not_finite: Tensor) -> None:
        self._flag, self._noted = not_finite, list[tuple[int, Tensor, Any]]()
        accelerator = get_accelerator()
        self._at_once = accelerator.is_synchronized_device()
        # Pinned memory, which alone a device writes while the host goes on, and an event that lets the host sleep.
        self._free = [
            (accelerator.pin_memory(torch.zeros(())), None if self._at_once else accelerator.Event(blocking=True))
            for _ in range(2)
        ]

    def note(self, step: int) -> int | None:
        """Has the flag copied when the device comes to it. Returns the step before if it was not taken, else None.

        Where the host does everything itself it tells of this one.
        """
        memory, event = self._free.pop()
        memory.copy_(self._flag, non_blocking=True)
        if event is not None:
            event.record()
        self._noted.append((step, memory, event))
        return self._look(0 if self._at_once else 1)

    def look(self) -> int | None:
        """Returns the first of all steps that was not taken, or None. Waits for the last one."""
        return self._look(0)

    def _look(self, unseen: int) -> int | None:
        """Looks at the flags of all steps but the last `unseen`."""
        while len(self._noted) > unseen:
            step, memory, event = self._noted.pop(0)
            if event is not None:
                event.synchronize()
            self._free.append((memory, event))
            if memory.numpy() != 0:
                return step
        return None


def initialize(
    model: nn.Module, optimizer: Optimizer, recipe: Recipe, micro_batch: int, accumulation: int
) -> tuple[deepspeed.DeepSpeedEngine, Zero2]:
    """Has DeepSpeed take over a model and its optimizer, in this process group. A collective."""
    # DeepSpeed would clone the group, with a time-out that ends NCCL before the watchdog says what hangs.
    deepspeed_groups._WORLD_GROUP = dist.group.WORLD
    parameters = sum(p.numel() for p in model.parameters())
    engine, zero, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=_config(
            recipe,
            micro_batch,
            accumulation,
            max(parameters // BUCKETS, SMALLEST_BUCKET),
            to_owners=dist.get_world_size() * max(len(optimizer.param_groups) // 2, 1) <= RANKS_REDUCED_TO,
        ),
        dist_init_required=False,
    )
    return engine, zero


def _config(recipe: Recipe, micro_batch: int, accumulation: int, bucket: int, to_owners: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optim.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 2,
            "round_robin_gradients": False,
            "contiguous_gradients": True,
            "overlap_comm": not get_accelerator().is_synchronized_device(),  # a CPU has no streams to overlap
            "reduce_bucket_size": bucket,
            # A gradient goes to the rank that owns it, not to all: two thirds of the traffic, and one message more per
            # rank, which in a large job would be many small ones.
            "use_multi_rank_bucket_allreduce": not to_owners,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice per micro-batch
        "steps_per_print": 1 << 60,
    }
    if recipe.train.precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


deepspeed.runtime.engine.DeepSpeedZeroOptimizer = Zero2  # what its engine makes for stage 2
