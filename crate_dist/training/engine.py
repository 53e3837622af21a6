"""Takes training steps with DeepSpeed ZeRO-2 around a model.

What is computed in which precision, when the recipe says "bf16": the weights that the model sees, activations and
gradients are bf16, and a product sums in fp32 before it rounds. LayerNorm and the softmax of attention compute in fp32
inside and round once. When it says "autocast": weights, tokens and gradients are fp32, and products and attention read
them rounded to bf16; where patches and positions are both products, as in ToST, so are the tokens that the first layer
reads. That is twice the traffic; in return a small change of a weight near 1 is not rounded away between the master
weights and the model, which at small learning rates is felt.

In both the loss is computed from fp32 logits. The mean of the gradients over the ranks is taken in their own precision,
their sum over micro-batches in fp32; their norm, the master weights and the optimizer's state are fp32, the latter two
partitioned over the ranks.

Saving and loading go through the room checkpoint and not through DeepSpeed, whose own checkpoints belong to one
world size.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import record_function

from crate_dist.checkpoint.format import GroupLayout
from crate_dist.checkpoint.loading import RankState
from crate_dist.config import Recipe, RecipeError
from crate_dist.data.loader import Normalize
from crate_dist.data.order import hash64
from crate_dist.errors import UserError
from crate_dist.models.batch_norm import GroupedBatchNorm, statistics, take_statistics
from crate_dist.models.kernels import attention_kernel, choose_kernels
from crate_dist.models.sizes import ista_in_one_product
from crate_dist.models.transformer import Transformer
from crate_dist.training import compiling, drop_path
from crate_dist.training.compiled_cache import check_node_folder
from crate_dist.training.lion import Lion
from crate_dist.training.mixing import MixedBatch, Targets
from crate_dist.training.optim import build_optimizer, parameter_groups
from crate_dist.training.partitions import Partitions
from crate_dist.training.zero import Guard, initialize

logger = logging.getLogger(__name__)


class NotFinite(UserError):
    """A gradient is not finite. No step was taken with it, and none since.

    step: optimizer steps before it
    """

    def __init__(self, message: str, step: int = -1) -> None:
        super().__init__(message)
        self.step = step


class WeightsNotFinite(UserError):
    """A step has made weights that are no numbers, of gradients that were."""


MicroBatch = tuple[torch.Tensor, torch.Tensor]
"""Images, uint8 (n, height, width, 3), and labels, int64 (n,)."""


@dataclass(frozen=True)
class StepResult:
    """Loss, the mean over this rank's samples, of which `hits` got the highest logit at their label, of mixed ones at
    that of the larger share; gradient norm, of all ranks before clipping. 0-d, on the device."""

    loss: torch.Tensor
    hits: torch.Tensor
    grad_norm: torch.Tensor


def has_batch_norm(model: nn.Module, group: int) -> bool:
    """Returns whether a model has batch norm, whose statistics are taken over `group` images.

    Raises RecipeError when the group is a single image, or when there is batch norm of torch's own.
    """
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    for name, norm in norms:
        if not isinstance(norm, GroupedBatchNorm):
            raise RecipeError(
                f"{name} is torch's {type(norm).__name__}, whose statistics are those of the images that a rank has at "
                "a time: the number of ranks would decide the result. GroupedBatchNorm of models/batch_norm.py takes "
                "them over train.group images"
            )
        if group == 1:
            raise RecipeError(
                f"{name} is batch norm, whose statistics are taken over train.group images, which is 1; "
                "--set train.group=N gives it some, with an N that divides the global batch"
            )
    return bool(norms)


class Engine:
    """A model in training on this rank."""

    def __init__(
        self, model: Transformer, recipe: Recipe, device: torch.device, micro_batch: int, accumulation: int
    ) -> None:
        self.recipe, self.device = recipe, device
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        self._normalize = Normalize(recipe.images.mean, recipe.images.std, device, self.dtype)
        self._dropout = recipe.model.dropout > 0 or recipe.model.emb_dropout > 0
        precision, group = recipe.train.precision, recipe.train.group
        again, rounded = recipe.train.recompute, precision == "autocast"
        model.set_execution(recompute=again, autocast=rounded, images=micro_batch, group=group)
        choose_kernels()
        products = torch.float32 if precision == "fp32" else torch.bfloat16
        if model.config.mixer in ("mssa", "attention"):
            logger.info("attention: %s", attention_kernel(model, device, products))
        if model.config.tokenwise == "ista":
            one = ista_in_one_product(micro_batch * model.config.num_tokens, model.config.dim)
            logger.info("ISTA: %s", "one product" if one else "two products")
        if has_batch_norm(model, group):
            logger.info("batch norm: statistics of each group of %d images", group)
        groups = parameter_groups(model, recipe.optim)
        weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        self.layouts = [GroupLayout(g["names"], [[*weights[name].shape] for name in g["names"]]) for g in groups]
        check_node_folder()
        optimizer = build_optimizer(groups, recipe.optim)
        self._engine, self._zero = initialize(model, optimizer, recipe, micro_batch, accumulation)
        self._guard = Guard(self._zero.not_finite)
        self.partitions = Partitions(self._zero, self.module, self.layouts, recipe.optim)
        # DeepSpeed makes the master weights from the ones it has rounded to bf16; they start from the exact ones.
        self.partitions.begin_with(weights)
        self._whole_batch = 0
        if compiling.should_compile(recipe.train.compile, device):
            passes = partial(self._try_passes, micro_batch, recipe.model.image_size)
            if compiling.compile_model(self.module, passes, device):
                self._whole_batch = micro_batch
                if isinstance(optimizer, Lion) and device.type == "cuda":  # on a CPU it goes by what fits the cache
                    compiling.compile_lion(optimizer, recipe.optim.grad_clip > 0, device)

    @property
    def module(self) -> Transformer:
        """The model with the weights of the products' precision."""
        module: Transformer = self._engine.module
        return module

    def step(self, batches: Iterator[MicroBatch | MixedBatch], lr: float, step: int) -> StepResult:
        """Takes one optimizer step on `accumulation` micro-batches, at learning rate `lr`. A collective.

        Holds one of them at a time. Raises NotFinite on every rank when the gradients of this step, or on a GPU of the
        one before, are not finite: the host learns of a step while the next one runs. The weights are in any case those
        of the step that it names. `check` tells at once.
        """
        self.seed_dropout(step)
        for group in self._zero.param_groups:
            group["lr"] = lr * group["lr_factor"]
        if not self.module.training:
            self._engine.train()
        losses, hits = list[torch.Tensor](), list[torch.Tensor]()
        for part in range(self.accumulation):
            self._zero.own_time.begin()
            batch = next(batches)
            with record_function("forward"):
                logits, labels = self._logits(batch, self._engine, self.kept_branches(step, part))
                loss = self.criterion(logits, labels)
            with record_function("backward"):
                self._engine.backward(loss)
            self._zero.heed(loss)
            with record_function("optimizer"):
                self._engine.step()
            losses.append(loss.detach())
            heavier = labels.heavier if isinstance(labels, Targets) else labels
            hits.append((logits.detach().argmax(dim=1) == heavier).sum())
        self._take_statistics()
        self.partitions.note_step()
        self._raise_if(self._guard.note(step))
        return StepResult(torch.stack(losses).mean(), torch.stack(hits).sum(), self._zero.grad_norm)

    def own_s(self) -> float:
        """Returns the seconds that this rank was by itself since the last call; see OwnTime. After `check`."""
        return self._zero.own_time.take()

    def check(self) -> None:
        """Raises NotFinite when a step until now was not taken, and WeightsNotFinite. Waits for the last; a collective.

        Weights are looked at too, since an optimizer may divide by zero where gradients are finite.
        """
        self._raise_if(self._guard.look())
        broken = torch.stack([~torch.isfinite(part).all() for part in self.partitions.weights]).any().float()
        dist.all_reduce(broken, dist.ReduceOp.MAX)
        if broken:
            raise WeightsNotFinite(
                "the weights are not finite, though the gradients of all steps were: an optimizer that divides by too "
                "little (optim.eps) or overflows (optim.lr, optim.weight_decay). Nothing is saved of it"
            )

    @staticmethod
    def _raise_if(step: int | None) -> None:
        if step is not None:
            raise NotFinite("the gradients are not finite", step)

    def seed_dropout(self, step: int) -> None:
        """Has the step after `step` drop the same again, where a model drops at all."""
        if self._dropout:
            torch.manual_seed(int(hash64(self.recipe.train.seed, step, dist.get_rank(), 2)[0] >> 1))

    def kept_branches(self, step: int, part: int) -> torch.Tensor | None:
        """Returns drop path's factors, fp32 (2 * depth, n), for micro-batch `part` of the step after `step`, if any."""
        rate = self.recipe.model.drop_path
        if not rate:
            return None
        first = (dist.get_rank() * self.accumulation + part) * self.micro_batch
        branches, seed = 2 * self.module.config.depth, self.recipe.train.seed
        return drop_path.kept(rate, branches, first, self.micro_batch, seed, step, self.device)

    def loss(self, batch: MicroBatch | MixedBatch, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the mean loss of a micro-batch, 0-d, in the model's mode. kept: drop path's factors"""
        return self.criterion(*self._logits(batch, self.module, kept))

    def _logits(
        self, batch: MicroBatch | MixedBatch, model: nn.Module, kept: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | Targets]:
        """Returns fp32 logits (n, classes), and the labels (n,) beside them. model: DeepSpeed's, within a step."""
        images, labels = batch
        return model(self._normalize(images), kept).float(), labels.to(self.device, non_blocking=True)

    def criterion(self, logits: torch.Tensor, labels: torch.Tensor | Targets) -> torch.Tensor:
        """Returns the mean loss, 0-d, of logits (n, classes) and labels (n,)."""
        smoothing = self.recipe.optim.label_smoothing
        if isinstance(labels, Targets):
            return labels.cross_entropy(logits, smoothing)
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    @torch.inference_mode()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Returns fp32 logits (n, classes) of uint8 images (n, height, width, 3), dropout off.

        A micro-batch is computed by what was compiled, another number of images eager.
        """
        self._raise_if(self._guard.look())
        self.module.eval()
        with contextlib.nullcontext() if len(images) == self._whole_batch else compiling.eagerly():
            logits: torch.Tensor = self.module(self._normalize(images)).float()
        return logits

    def _try_passes(self, micro_batch: int, side: int) -> None:
        """Computes a micro-batch as `step` and `predict` do; changes no gradient and no weight."""
        self._whole_batch = micro_batch
        images = torch.zeros(micro_batch, side, side, 3, dtype=torch.uint8, device=self.device)
        labels = torch.zeros(micro_batch, dtype=torch.int64, device=self.device)
        self.module.train()
        try:
            learned = [p for p in self.module.parameters() if p.requires_grad]
            torch.autograd.grad(self.loss((images, labels), self.kept_branches(0, 0)), learned, allow_unused=True)
        finally:  # what the stem took of these images, also where the compiler fails behind it
            take_statistics(self.module, torch.zeros_like(statistics(self.module)))
        self.predict(images)

    def state(self) -> RankState:
        """Returns this rank's partitions of the master weights and optimizer state, as views on the live tensors.

        Raises what `check` does, so that nothing is saved of which nothing good can come. A collective.
        """
        self.check()
        return self.partitions.state()

    def _take_statistics(self) -> None:
        """Has the running statistics of batch norm take up what all ranks have seen: a collective, if there are any."""
        if (seen := statistics(self.module)).numel():
            dist.all_reduce(seen)
            take_statistics(self.module, seen.masked_fill_(self._zero.not_finite > 0, 0.0))
