"""Measures the white box while it trains: what every layer does to a few images, always the same ones.

In TensorBoard, layer by layer, as a picture over time, and as charts of all layers each under "Custom Scalars":

    coding_rate         R^c of what MSSA reads, nats              zeros          share of zeros after ISTA
    coding_rate_change  what MSSA makes of it, less what it read  dead_tokens    share of tokens that are all zero
    gradient_norm       ‖∂ loss / ∂ θ_ℓ‖₂ on these images         dead_features  share that no token of any image uses
    coherence           of the dictionary, see whitebox/measures.py

and as pictures the profile over the layers and where the class token looks. Rank 0 measures, with the weights that the
model sees in training and in their precision, while the others wait; under ZeRO-2 these are whole on every rank, and
so this takes no collective. Gradients are those of a backward pass of its own over these images: ZeRO has dealt out
the step's own by then, and these can be compared from one time to the next, as the batch does not change. Nothing here
draws a random number or writes to the model: a run ends with the same weights with and without.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import numpy as np
import torch

from crate_dist.config import Recipe
from crate_dist.data.decode import BadImage, Pixels
from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.data.loader import Normalize, eval_transform
from crate_dist.data.reader import ShardReader
from crate_dist.distributed import Left, gather_objects
from crate_dist.models.transformer import Transformer
from crate_dist.training.compiling import eagerly
from crate_dist.training.interrupt import Interrupt
from crate_dist.training.metrics import Monitor
from crate_dist.training.optim import Schedule
from crate_dist.whitebox.measures import Profile, class_attention_maps, layer_gradient_norms, profile
from crate_dist.whitebox.pixels import layer_profile
from crate_dist.whitebox.sheets import attention
from crate_dist.world import World

logger = logging.getLogger(__name__)

_SHOWN = 4
_DEAD = 0.1
_COSTLY = 0.01


class Live:
    """Measures at step 1 and every log.whitebox_every_steps steps, the same ones however often a run is resumed.

    A layer is said to compress no longer when its MSSA leaves the images' mean coding rate, in its own subspaces, as
    high as it was or higher, after the warm-up; and its tokens to die when more than a tenth of them are all zero
    after its ISTA. Either is said once per layer.
    """

    def __init__(
        self, recipe: Recipe, world: World, device: torch.device, index: ShardIndex, schedule: Schedule
    ) -> None:
        self._recipe, self._world, self._device, self._index = recipe, world, device, index
        self._every = recipe.log.whitebox_every_steps
        self._warm_after = recipe.optim.warmup_epochs * schedule.steps_per_epoch
        self._batch: tuple[Pixels, torch.Tensor] | None = None
        self._said: set[tuple[str, int]] = set()
        self._first_end: float | None = None
        self._spent_s = 0.0

    def is_due(self, step: int) -> bool:
        """Says whether `measure` is to be called after this step, the same on all ranks."""
        return self._every > 0 and (step == 1 or step % self._every == 0)

    def measure(
        self, model: Transformer, step: int, monitor: Monitor, interrupt: Interrupt, unless_known: bool = False
    ) -> bool:
        """Measures and writes on rank 0. All ranks call it: those that wait must not take it for a slow step.

        unless_known: not when that was written by an earlier start, which may also have left it

        Returns
        -------
        False, on all ranks, when rank 0 has left it because the run is told to stop

        Raises ShardError: the images cannot be read.
        """
        left = False
        if self._world.is_main and not (unless_known and monitor.knows(step, "whitebox/zeros")):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # what is still under way belongs to the step
            began = time.perf_counter()
            try:
                with eagerly():  # a graph for these few images would be compiled while the others wait
                    layers, pictures = self._measured(model, step, interrupt)
            except Left:
                left = True
                logger.info("the white-box measures of step %d are left, and made by the next start", step)
            else:
                interrupt.hold()
                monitor.white_box(step, layers, pictures, began)
                self._say_when_costly(began, time.perf_counter() - began)
        return not gather_objects(left)[0]

    def _measured(
        self, model: Transformer, step: int, interrupt: Interrupt
    ) -> tuple[dict[str, list[float]], dict[str, Pixels]]:
        self._batch = self._batch or first_images(self._index, self._recipe, interrupt.go_on)
        pixels, labels = self._batch
        prepared, dtype = self._recipe.images, next(model.parameters()).dtype
        images = Normalize(prepared.mean, prepared.std, self._device, dtype)(torch.from_numpy(pixels))
        interrupt.go_on()
        seen = profile(model, [images])
        interrupt.go_on()
        norms = layer_gradient_norms(model, images, labels.to(self._device), self._recipe.optim.label_smoothing)
        interrupt.go_on()
        maps = class_attention_maps(model, images[:_SHOWN]).cpu().numpy()
        self._warn(step, seen)
        layers = {f"whitebox/{name}": values for name, values in seen.means().items()}
        layers["whitebox/gradient_norm"] = norms.tolist()
        return layers, _pictures(step, pixels[:_SHOWN], seen, maps)

    def _warn(self, step: int, seen: Profile) -> None:
        before, after = seen.coding_rate.mean(dim=1).tolist(), seen.compressed.mean(dim=1).tolist()
        for layer, (read, made, dead) in enumerate(zip(before, after, seen.dead_tokens.mean(dim=1), strict=True), 1):
            if made >= read and step > self._warm_after and self._first_time("compress", layer):
                logger.warning(
                    "layer %d compresses no longer: at step %d its MSSA takes the coding rate from %.1f to %.1f nats",
                    layer,
                    step,
                    read,
                    made,
                )
            if dead > _DEAD and self._first_time("dead", layer):
                logger.warning(
                    "%.0f %% of the tokens are all zero after layer %d at step %d: "
                    "a lower optim.lr or model.ista_threshold may help",
                    100 * dead,
                    layer,
                    step,
                )

    def _say_when_costly(self, began: float, seconds: float) -> None:
        """Looks at all that has passed since the first time, in which images are read and libraries loaded."""
        if self._first_end is None:
            self._first_end = began + seconds
            return
        self._spent_s += seconds
        share = self._spent_s / (began + seconds - self._first_end)
        if share > _COSTLY and self._first_time("costly", 0):
            enough = math.ceil(self._every * share / _COSTLY / 100) * 100
            logger.warning(
                "the white-box measures take %.1f %% of the time; --set log.whitebox_every_steps=%d costs 1 %% at most",
                100 * share,
                enough,
            )

    def _first_time(self, what: str, layer: int) -> bool:
        known = (what, layer) in self._said
        self._said.add((what, layer))
        return not known


def first_images(
    index: ShardIndex, recipe: Recipe, go_on: Callable[[], None] = lambda: None
) -> tuple[Pixels, torch.Tensor]:
    """Reads the first log.whitebox_images of a split that decode: uint8 (b, size, size, 3) and int64 labels (b,).

    go_on: called before each of them; what it raises is raised here

    Raises ShardError: none decodes, or a shard cannot be read.
    """
    size, reader = recipe.model.image_size, ShardReader(index)
    transform = eval_transform(recipe.images, size)
    pixels: list[Pixels] = []
    labels: list[int] = []
    for sample in range(index.num_samples):
        if len(pixels) == recipe.log.whitebox_images:
            break
        go_on()
        try:
            pixels.append(transform(reader.read(sample)))
        except BadImage:  # named and counted when the loader comes by
            continue
        labels.append(int(index.rows["label"][sample]))
    if not pixels:
        raise ShardError(f"no sample of {index.place} decodes")
    return np.stack(pixels), torch.tensor(labels)


def _pictures(step: int, pixels: Pixels, seen: Profile, maps: np.ndarray) -> dict[str, Pixels]:
    """Draws the profile, and the class token's attention. maps: attention (L, b, h, rows, cols)"""
    tokens = 1 + maps.shape[-2] * maps.shape[-1]
    times = tokens * maps
    what = f"attention of the class token, step {step:,}; 1 x: as if all {tokens} tokens got the same"
    layers = [f"layer {layer}" for layer in range(1, len(maps) + 1)]
    heads = [f"head {head}" for head in range(1, maps.shape[2] + 1)]
    return {
        "whitebox/profile": layer_profile(seen, f", step {step:,}"),
        "whitebox/attention_of_the_layers": attention(pixels, times.mean(axis=2), layers, f"mean {what}"),
        "whitebox/attention_of_the_last_layers_heads": attention(
            pixels, times[-1].swapaxes(0, 1), heads, f"the last layer's {what}"
        ),
    }
