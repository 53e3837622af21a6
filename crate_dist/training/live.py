"""Measures the white box while it trains: what every layer does to a few images, always the same ones.

In TensorBoard, layer by layer, as a picture over time, and as charts of all layers each under "Custom Scalars":
whatever whitebox/measures.py finds that the model has, of CRATE

    coding_rate         R^c of what MSSA reads, nats              zeros          share of zeros after ISTA
    coding_rate_change  what MSSA makes of it, less what it read  dead_tokens    share of tokens that are all zero
    token_coding_rate   R of the tokens that it reads, nats       dead_features  share that no token of any image uses
    subspace_coherence, orthonormality_error of the U_k           coherence      of the dictionary
    out_alignment       cosine of W and [U_1 … U_K]               gradient_norm  ‖∂ loss / ∂ θ_ℓ‖₂ on these images

and as pictures the profile over the layers and where the class token looks, or whatever else the mixer shows; what the
model cannot have is said in the log once. docs/models.md has a table of them all.

Rank 0 measures, with the weights that the model sees in training and in their precision, while the others wait; under
ZeRO-2 these are whole on every rank, and so this takes no collective. Gradients are those of a backward pass of its own
over these images: ZeRO has dealt out the step's own by then, and these can be compared from one time to the next, as
the batch does not change. Nothing here draws a random number or writes to the model: a run ends with the same weights
with and without.
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
from crate_dist.errors import UserError
from crate_dist.models.transformer import Transformer
from crate_dist.training.compiling import eagerly
from crate_dist.training.interrupt import Interrupt
from crate_dist.training.metrics import Monitor
from crate_dist.training.optim import Schedule
from crate_dist.whitebox.maps import Maps, token_maps
from crate_dist.whitebox.measures import Profile, layer_gradient_norms, profile
from crate_dist.whitebox.pixels import layer_profile
from crate_dist.whitebox.sheets import attention
from crate_dist.world import World

logger = logging.getLogger(__name__)

_SHOWN = 4
_DEAD = 0.1
_COSTLY = 0.01


class Live:
    """Measures at step 1 and every log.whitebox_every_steps steps, the same ones however often a run is resumed.

    A layer is said to compress no longer when its mixer leaves the images' mean coding rate, in its own subspaces, as
    high as it was or higher, after the warm-up; and its tokens to die when more than a tenth of them are all zero
    in its sparse code. Either is said once per layer.
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
        if self._world.is_main and not (unless_known and monitor.knows(step, "whitebox/gradient_norm")):
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
        try:
            pictures = _attention(step, pixels[:_SHOWN], token_maps(model, images[:_SHOWN]))
        except UserError as error:
            pictures = {}
            self._say_once(str(error))
        self._warn(step, seen)
        layers = {f"whitebox/{name}": values for name, values in seen.means().items()}
        layers["whitebox/gradient_norm"] = norms.tolist()
        return layers, {"whitebox/profile": layer_profile(seen, f", step {step:,}"), **pictures}

    def _warn(self, step: int, seen: Profile) -> None:
        for sentence in seen.what_is_missing():
            self._say_once(f"the white box of this model: {sentence}")
        if "coding_rate" in seen:
            rates, changes = seen.mean("coding_rate").tolist(), seen.mean("coding_rate_change").tolist()
            for layer, (read, change) in enumerate(zip(rates, changes, strict=True), 1):
                if change >= 0 and step > self._warm_after and self._first_time("compress", layer):
                    logger.warning(
                        "layer %d compresses no longer: at step %d its %s takes the coding rate from %.1f to %.1f nats",
                        layer,
                        step,
                        seen.mixer,
                        read,
                        read + change,
                    )
        for layer, dead in enumerate(seen.mean("dead_tokens").tolist() if "dead_tokens" in seen else (), 1):
            if dead > _DEAD and self._first_time("dead", layer):
                logger.warning(
                    "%.0f %% of the tokens are all zero after layer %d at step %d: "
                    "a lower optim.lr or model.ista_threshold may help",
                    100 * dead,
                    layer,
                    step,
                )

    def _say_once(self, text: str) -> None:
        if self._first_time(text, 0):
            logger.info("%s", text)

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


def _attention(step: int, pixels: Pixels, maps: Maps) -> dict[str, Pixels]:
    """Draws the maps of the layers, of the last one's heads, and of the model's head where it looks itself."""
    times, heads = maps.layers / maps.even[..., None, None], [f"head {n + 1}" for n in range(maps.layers.shape[2])]
    what = f"{maps.what}, step {step:,}; 1 x: as if all had the same"
    layers = [f"layer {layer + 1}" for layer in range(len(times))]
    drawn = {
        f"{maps.kind}_of_the_layers": (maps.over_heads(times), layers, f"{maps.over_heads_name}: {what}"),
        f"{maps.kind}_of_the_last_layers_heads": (times[-1].swapaxes(0, 1), heads, f"the last layer's {what}"),
    }
    if maps.head is not None:
        last = maps.head[-1].swapaxes(0, 1) * (1 + maps.head.shape[-2] * maps.head.shape[-1])
        what = f"attention of the class token in the head's last block, step {step:,}; 1 x: as if all had the same"
        drawn["attention_of_the_head"] = (last, heads, what)
    return {
        f"whitebox/{name}": attention(pixels, values.cpu().numpy(), headings, title)
        for name, (values, headings, title) in drawn.items()
    }
