"""Holds what a rank keeps of a training: its partitions of master weights and optimizer state, of their average too.

Each is a slice, the same of all kinds, of the flattened parameters of a group; buffers, and parameters that are not
trained, are whole on every rank. They are saved and loaded through the room checkpoint, for any number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crate_dist.checkpoint.format import AVERAGE, WEIGHTS, CheckpointError, GroupLayout
from crate_dist.checkpoint.loading import Buffers, Checkpoint, RankState
from crate_dist.config.sections import OptimSection
from crate_dist.training.averaging import Average
from crate_dist.training.optim import STATE_KEYS
from crate_dist.training.zero import Zero2

logger = logging.getLogger(__name__)

Fill = Callable[[str, int, int, Tensor], None]
"""Given a kind, a group and a start, fills a tensor with what the flat vector of the group holds from there on."""


class Partitions:
    """This rank's part of a model in training, and of its average where the recipe asks for one.

    layouts: what each group consists of, in the order of the flat vectors
    average: None when the recipe asks for none
    """

    def __init__(self, zero: Zero2, model: nn.Module, layouts: Sequence[GroupLayout], optim: OptimSection) -> None:
        self.layouts = layouts
        self._zero, self._optim = zero, optim
        parameters = dict(model.named_parameters())
        self._buffers = {name: t for name, t in model.state_dict().items() if name not in parameters}
        self._frozen = {name: p.detach() for name, p in parameters.items() if not p.requires_grad}
        self._frozen_exact = {name: t.float() for name, t in self._frozen.items()}
        self._check()
        self.average: Average | None = None

    @property
    def weights(self) -> list[Tensor]:
        """The master weights, fp32, one per group; views on the live tensors."""
        partitions: list[Tensor] = self._zero.single_partition_of_fp32_groups
        return partitions

    def state(self) -> RankState:
        """Returns weights, optimizer state and average by kind, as views on the live tensors."""
        state: RankState = {WEIGHTS: [part.detach() for part in self.weights]}
        for kind in STATE_KEYS[self._optim.name]:
            state[kind] = [self._optimizer_state(part)[kind] for part in self.weights]
        if self.average:
            state[AVERAGE] = self.average.partitions
        return state

    def buffers(self) -> Buffers:
        """Returns what the model keeps beside its weights, and the average of that; views on the live tensors.

        A frozen parameter is one of them, fp32, as it was before it was rounded for the products.
        """
        if not (self._buffers or self._frozen):
            return {}
        kept = {WEIGHTS: self._buffers, **({AVERAGE: self.average.buffers} if self.average else {})}
        return {kind: {**buffers, **self._frozen_exact} for kind, buffers in kept.items()}

    def note_step(self) -> None:
        """Has the average take up the weights after a step, unless that was not taken."""
        if self.average:
            self.average.update(self.weights, self._buffers, self._zero.not_finite)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Has the module compute with the average of the weights; then with the weights again, bit for bit as before.

        Only entering is a collective, so that one rank's error there cannot make the others wait.
        """
        assert self.average is not None
        seen = [*self._zero.bit16_groups_flat, *self._buffers.values()]
        kept = [tensor.clone() for tensor in seen]
        try:
            self._zero.show(self.average.partitions)
            _copy(self.average.buffers, self._buffers)
            yield
        finally:
            for tensor, before in zip(seen, kept, strict=True):
                tensor.data.copy_(before)

    @torch.no_grad()
    def fill(self, fill: Fill) -> None:
        """Sets the master weights, and has the model see them. A collective."""
        for group, part in enumerate(self.weights):
            staging = torch.empty(part.numel(), dtype=torch.float32)
            fill(WEIGHTS, group, self._start(part), staging)
            part.data.copy_(staging)
        self._zero.update_lp_params()

    def begin_with(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the weights to parameters by name, whole and fp32; the average begins there. A collective."""
        self._freeze(tensors)
        self.fill(lambda kind, group, start, out: _from_tensors(tensors, self.layouts[group], start, out))
        self.average = self._new_average()

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes up weights and optimizer state that any number of ranks saved. A collective.

        Raises CheckpointError: of another model or another optimizer.
        """
        self._check_kinds(checkpoint)
        reader = checkpoint.reader()
        self.fill(reader.copy)
        buffers = reader.buffers(WEIGHTS)
        _copy(buffers, self._buffers)
        self._freeze(buffers)
        self.average = self._new_average()
        averaged = AVERAGE in checkpoint.manifest.kinds
        if self.average and averaged:
            _copy(reader.buffers(AVERAGE), self.average.buffers)
        elif self.average:
            logger.warning("%s has no average of the weights: it begins with the weights there", checkpoint.path)
        elif averaged:
            logger.warning("%s has an average of the weights, and optim.ema_decay is 0: it ends", checkpoint.path)
        for group, part in enumerate(self.weights):
            held = self._optimizer_state(part, checkpoint.step)
            if self.average and averaged:
                held = {**held, AVERAGE: self.average.partitions[group]}
            for kind in held.keys() & checkpoint.manifest.kinds:
                staging = torch.empty(part.numel(), dtype=torch.float32)
                reader.copy(kind, group, self._start(part), staging)
                held[kind].copy_(staging)

    def _check_kinds(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError when there is something else in a checkpoint than what is kept here."""
        there, here = (
            [(list(g.names), g.numel) for g in groups] for groups in (checkpoint.manifest.groups, self.layouts)
        )
        if there != here:
            raise CheckpointError(_other_model(checkpoint, self.layouts))
        kinds = {WEIGHTS, *STATE_KEYS[self._optim.name]}
        if kinds != {*checkpoint.manifest.kinds} - {AVERAGE}:
            raise CheckpointError(
                f"{checkpoint.path} holds {checkpoint.manifest.kinds}, but {self._optim.name} keeps {sorted(kinds)}"
            )
        buffers = self._buffers | self._frozen
        if {name: [*tensor.shape] for name, tensor in buffers.items()} != checkpoint.manifest.buffers:
            raise CheckpointError(
                f"{checkpoint.path} holds other buffers than the recipe's model has: {[*checkpoint.manifest.buffers]} "
                f"there, {[*buffers]} here"
            )

    def _freeze(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the parameters that are not trained, and has the model see them, in its own precision."""
        _copy(tensors, self._frozen_exact)
        _copy(tensors, self._frozen)

    def _new_average(self) -> Average | None:
        decay = self._optim.ema_decay
        return Average(self.weights, self._buffers, decay) if decay else None

    def _start(self, partition: Tensor) -> int:
        return dist.get_rank() * partition.numel()

    def _optimizer_state(self, partition: Tensor, steps: int = 0) -> dict[str, Tensor]:
        """Returns the optimizer's own state of a partition, made where no step has made it yet."""
        state: dict[str, Tensor] = self._zero.optimizer.state[partition]
        if not state or steps:
            for kind in STATE_KEYS[self._optim.name]:
                state[kind] = torch.zeros_like(partition, requires_grad=False)
            if self._optim.name == "adamw":
                state["step"] = torch.tensor(float(steps), device=partition.device)
        return state

    def _check(self) -> None:
        """Asserts what checkpoint/loading.py relies on in ZeRO's flat vectors: equal parts, no gaps, our order."""
        world_size = dist.get_world_size()
        assert not any(any(padding) for padding in self._zero.round_robin_bit16_padding)
        assert all(p.dtype == torch.float32 for p in self.weights)
        for part, layout in zip(self.weights, self.layouts, strict=True):
            assert layout.numel <= part.numel() * world_size < layout.numel + 4 * world_size + part.numel()


def _other_model(checkpoint: Checkpoint, layouts: Sequence[GroupLayout]) -> str:
    """Says in which parameter a checkpoint's model is not the recipe's, or that they are only grouped otherwise."""
    there = checkpoint.manifest.shapes
    here = {name: [*shape] for group in layouts for name, shape in zip(group.names, group.shapes, strict=True)}
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    what = "groups the parameters otherwise, as another optim.decay or optim.layer_decay does"
    if names:
        parts = (f"{one} {where}" for one, where in ((there.get(names[0]), "there"), (here.get(names[0]), "here")))
        what = f"holds another model: {names[0]} is {', '.join(parts)}, and so are {len(names) - 1} more"
    return (
        f"{checkpoint.path} {what}; give the recipe that it was saved with, or another --run-dir, or --start-over, "
        "which sets the run aside"
    )


def _copy(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    for name, tensor in here.items():
        tensor.copy_(there[name])


def _from_tensors(tensors: Mapping[str, Tensor], layout: GroupLayout, start: int, out: Tensor) -> None:
    """Copies [start, start + len(out)) of the flattened tensors; zeros behind their end."""
    flat = torch.cat([tensors[name].reshape(-1) for name in layout.names])[start : start + out.numel()]
    out.zero_()
    out[: flat.numel()].copy_(flat)
