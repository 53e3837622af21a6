"""The tables of a recipe, but for [model]: every setting, its type, its bounds, its default and its meaning."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from crate_dist.config.keys import RecipeError
from crate_dist.locations import location, may_run_a_command, redacted

DATA_VARIABLE = "CRATE_DATA"
CACHE_VARIABLE = "CRATE_CACHE"
MIRROR_VARIABLE = "CRATE_MIRROR"

Compile = Literal["auto"] | bool
DecayRule = Literal["all", "matrices", "weights", "kernels"]
Precision = Literal["bf16", "autocast", "fp32"]
ResizeFilter = Literal["bicubic", "bilinear"]
CropName = Literal["torchvision", "tensorflow"]
RandAugmentName = Literal["torchvision", "timm", "timm_increasing", "crate_alpha"]
ScheduleName = Literal["cosine", "big_vision", "reference", "timm", "deit"]
WeightsKind = Literal["raw", "ema"]
"""The weights that an optimizer has made, or their moving average."""
TrackerName = Literal["tensorboard", "wandb"]
Colour = tuple[float, float, float]
"""Red, green and blue, from 0 to 1."""

Positive = Annotated[int, Field(gt=0)]
AboveZero = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Location = Annotated[Path | str, BeforeValidator(lambda value: location(value) if isinstance(value, str) else value)]
OneWord = Annotated[str, Field(pattern=r"^[^\s\p{Cc}]+$")]
"""Text on a line of the batch script, where a line break would begin a command."""

_MOST_TRACED = 100
"""Steps: the profiler holds all of a trace in memory, some megabytes per step."""


def _mirror(value: Path | str | None) -> Path | str | None:
    """Reads the place of a mirror; an empty text stays one. Raises ValueError for what no file can be put below."""
    place = location(value) if isinstance(value, str) and value else value
    if place and may_run_a_command(place):
        raise ValueError(
            f"{redacted(place)} is no place that checkpoints can be copied to; s3://, gs://, https:// (with PUT) "
            "or a folder of another mount would be"
        )
    if isinstance(place, str) and re.search(r"[?#]", place) and "{}" not in place:
        raise ValueError(
            f"{redacted(place)} does not say where the names of files go: write {{}} there, as in https://host/runs/{{}}?…"
        )
    return place


def _in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the lower bound {bounds[0]:g} is above the upper one, {bounds[1]:g}")
    return bounds


def node_count(given: object) -> int | str:
    """Returns a number of machines, 4, or a range of them, "2-4", as it is written shortest.

    Raises ValueError: neither of them.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(given))
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < fewest <= most:
        raise ValueError(f"{given!r}: expected a whole number from 1 on, or a range of them such as 2-4")
    return fewest if fewest == most else f"{fewest}-{most}"


class Section(BaseModel):
    """A table of the recipe. Frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    _withheld: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def withheld(self) -> dict[str, str]:
        """Keys that a recipe file gave and only the user may, each with what is to be said of it; see load_recipe."""
        return self._withheld


class DataSection(Section):
    """The folder of the shards, and their reading; without influence on the result, but for the splits."""

    root: Location | None = Field(
        None, description=f"folder or URL with train/ and val/ shards below it; unset: ${DATA_VARIABLE}"
    )
    train_split: str = Field("train", description="folder below it to train on")
    val_split: str = Field("val", description='folder below it to evaluate on; "": train without evaluation')
    cache_dir: Path | None = Field(
        None, description=f"where a node keeps the shards of a URL; unset: ${CACHE_VARIABLE}, then the temporary folder"
    )
    cache_gb: float = Field(
        64.0, gt=0, description="gigabytes of them that it keeps; twice what it reads at a time will do"
    )
    workers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="loader processes per rank; unset: one for each of its cores but one, at most 8"
    )
    max_bad_fraction: Fraction = Field(0.001, description="share of samples that do not decode; more stop the run")

    def find_root(self, given: Path | str | None = None) -> Path | str:
        """Returns the folder or URL of the shards: the one given, else data.root, else the environment's.

        Raises RecipeError when there is none of them, or only one that a recipe may not give.
        """
        root = given or self.root or os.environ.get(DATA_VARIABLE)
        if not root:
            raise RecipeError(
                self.withheld.get("root")
                or f"no data folder: give --data DIR, set data.root in the recipe, or export {DATA_VARIABLE}=DIR "
                "(a folder that data_prep wrote, with train/ and val/ in it); a location with a command or a secret in "
                "it is kept in no run folder, and has to be given at every start"
            )
        place = location(root)
        return place.expanduser().absolute() if isinstance(place, Path) else place


class OrderSection(Section):
    """The order in which an epoch visits the samples; see data/order.py."""

    lanes: Positive = Field(64, description="streams of shards that are read side by side; lowered to divide the batch")
    window: Positive = Field(4096, description="samples that are shuffled together within a lane")
    repeats: Positive = Field(
        1,
        description="views of every sample in an epoch, each augmented anew; see data/repeats.py",
    )


class AugmentSection(Section):
    """The random changes of training images."""

    crop: CropName = Field(
        "torchvision", description="whose way of drawing the crop; tensorflow's, of big_vision, has more small ones"
    )
    crop_scale: Annotated[tuple[Share, Share], AfterValidator(_in_order)] = Field(
        (0.08, 1.0), description="bounds of the crop's share of the area"
    )
    crop_ratio: Annotated[tuple[AboveZero, AboveZero], AfterValidator(_in_order)] = Field(
        (3 / 4, 4 / 3), description="bounds of the crop's width to its height"
    )
    flip: Fraction = Field(0.5, description="share of the images that are mirrored")
    randaugment: RandAugmentName = Field(
        "torchvision", description="whose operations RandAugment has; see docs/regularisation.md"
    )
    randaugment_ops: int = Field(0, ge=0, description="operations of RandAugment on each image; 0: none")
    randaugment_magnitude: int = Field(
        14, ge=0, le=30, description="strength of these operations; to 30 for torchvision's, to 10 for the others"
    )
    randaugment_std: float = Field(
        0.0, ge=0, description="standard deviation of the normal noise on it; not for torchvision's"
    )
    color_jitter: float = Field(
        0.0, ge=0, description="largest change of brightness, contrast and saturation, as a share of each; 0: none"
    )
    erase: Fraction = Field(0.0, description="share of the images that lose a rectangle")
    erase_mode: Literal["mean", "pixel"] = Field(
        "mean", description='what is there then: the mean colour, or "pixel": normal noise, as timm has it'
    )

    @model_validator(mode="after")
    def _within_its_set(self) -> Self:
        if self.randaugment == "torchvision" and self.randaugment_std:
            raise ValueError(
                f"randaugment_std {self.randaugment_std:g}: torchvision's RandAugment has no noise; "
                'randaugment = "timm", "timm_increasing" and "crate_alpha" have'
            )
        if self.randaugment != "torchvision" and self.randaugment_magnitude > 10:
            raise ValueError(
                f"randaugment_magnitude {self.randaugment_magnitude}: {self.randaugment!r} has magnitudes up to 10; "
                "9 is what published recipes have"
            )
        return self


def _alpha(given: float) -> float:
    if given and not 0.01 <= given <= 100:
        raise ValueError(f"{given:g}: expected an α from 0.01 to 100, often 0.8 or 1.0, or 0 for none")
    return given


Alpha = Annotated[float, AfterValidator(_alpha), Field(json_schema_extra={"minimum": 0, "maximum": 100})]
"""α of the Beta(α, α) that a share is drawn from; 0: nothing is drawn."""


class MixSection(Section):
    """The mixing of training images by twos, of which one step in its whole does either; see training/mixing.py."""

    mixup: Alpha = Field(
        0.0,
        description="α of mixup: two images blended, λ of the first, λ from Beta(α, α); 0: none; often 0.8",
    )
    cutmix: Alpha = Field(
        0.0, description="α of cutmix: a box of another image pasted, λ of the area left; 0: none; often 1.0"
    )
    switch: Fraction = Field(0.5, description="share of the mixed steps that take cutmix, where both have an α")
    probability: Fraction = Field(1.0, description="share of the steps that mix at all")

    @property
    def enabled(self) -> bool:
        """Says whether any step mixes."""
        return self.mixup + self.cutmix > 0 and self.probability > 0


class ImageSection(Section):
    """The preparation of an image for the model. Exported weights keep these keys, and are evaluated by them."""

    resize_filter: ResizeFilter = Field(
        "bicubic", description="filter of all resizes, which are antialiased; torchvision's default is bilinear"
    )
    mean: Colour = Field((0.485, 0.456, 0.406), description="mean of red, green and blue from 0 to 1, taken off")
    std: tuple[AboveZero, AboveZero, AboveZero] = Field(
        (0.229, 0.224, 0.225), description="their standard deviation, by which the rest is divided"
    )
    eval_fit: Literal["crop", "stretch"] = Field(
        "crop", description='"stretch": the whole validation image, resized to the square, whatever eval_crop says'
    )
    eval_crop: float = Field(0.875, gt=0, le=1, description="central share of a validation image's short side")


class OptimSection(Section):
    """The optimizer, its schedule, and the loss."""

    name: Literal["lion", "adamw"] = Field("lion", description="the optimizer")
    lr: float = Field(gt=0, description="the highest learning rate")
    min_lr: float = Field(0.0, ge=0, description="the learning rate that the schedule falls to")
    warmup_lr: float = Field(0.0, ge=0, description="the learning rate that the warm-up rises from")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor of the learning rate from each layer to the one before it: the head has the full rate, the "
        "stem that to the power of depth + 1",
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay: multiplied by the learning rate")
    decay: DecayRule = Field(
        "all",
        description='parameters with weight decay; "matrices": those with two dimensions; "weights": more than one, '
        'but not class token and positions, as timm; "kernels": of linear maps and convolutions, as CRATE-α',
    )
    betas: tuple[Decay, Decay] | None = Field(
        None, description="decay rates of the moments; unset: lion (0.9, 0.99), adamw (0.9, 0.999)"
    )
    eps: float = Field(1e-8, gt=0, description="adamw's, added to the denominator")
    schedule: ScheduleName = Field(
        "cosine",
        description='by steps "cosine" and "big_vision" (CRATE-α\'s); by epochs "reference" (CRATE\'s and CBT\'s), '
        '"timm", and "deit" (ToST\'s: timm\'s, an epoch late)',
    )
    warmup_epochs: float = Field(5.0, ge=0, description="epochs in which the learning rate rises from warmup_lr")
    cooldown_epochs: int = Field(0, ge=0, description="last ones of train.epochs, at min_lr, after the schedule's end")
    ema_decay: Decay = Field(
        0.0,
        description="decay per step of the average of the weights, which is evaluated and exported as well; 0: none",
    )
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    label_smoothing: Fraction = Field(0.1, description="share of each target that is spread over all classes")

    @model_validator(mode="after")
    def _below_the_peak(self) -> Self:
        for name in ("min_lr", "warmup_lr"):
            if (given := getattr(self, name)) > self.lr:
                raise ValueError(
                    f"{name} {given:g} is above lr {self.lr:g}, the highest learning rate; {self.lr:g} or less would do"
                )
        if self.cooldown_epochs and not self.min_lr:
            raise ValueError(
                f"cooldown_epochs {self.cooldown_epochs} at min_lr 0 would change no weight; give a min_lr above 0, "
                "or cooldown_epochs = 0"
            )
        return self


class TrainSection(Section):
    """The length of the run and its global batches; the cluster has no say in either."""

    global_batch: Positive = Field(description="images per step on all ranks together")
    micro_batch: Positive = Field(128, description="largest batch that one device takes at a time")
    group: Positive = Field(
        1,
        description="neighbouring images of the order that every micro-batch holds whole: [mix] takes partners, and "
        "batch norm its statistics, among them; divides both batches",
    )
    epochs: Positive = Field(description="times that every training image is seen, order.repeats times each")
    max_steps: Positive | None = Field(
        None, description="steps after which training stops early, with the schedule as for all epochs"
    )
    seed: int = Field(0, ge=0, description="seed of the order, the augmentation and the first weights")
    precision: Precision = Field(
        "bf16",
        description='precision of the products; master weights are fp32. "autocast": bf16 products, all else fp32',
    )
    init_from: Path | None = Field(None, description="a run, a checkpoint or a file of weights to begin from")
    init_head: Literal["auto", "new", "keep", "map"] = Field(
        "auto",
        description='head of the model begun from; "auto": a new one when the classes differ in number or names; '
        '"map": its rows of the same classes, by id, and new ones for others',
    )
    init_heads: Positive | None = Field(
        None, description="attention heads of the weights begun from, where their file does not tell"
    )
    init_weights: WeightsKind | None = Field(
        None, description='"ema": the moving average in the run or checkpoint begun from, instead of its weights'
    )
    compile: Compile = Field(
        "auto", description="torch.compile; auto: on GPUs that it supports; see training/compiling.py"
    )
    recompute: int = Field(
        0, ge=0, description="layers computed again in the backward pass instead of kept: less memory, same numbers"
    )

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if rest := self.global_batch % self.group:
            below = self.global_batch - rest
            would = [str(n) for n in (below, below + self.group) if n]
            raise ValueError(
                f"global_batch {self.global_batch} is no multiple of group {self.group}; {' or '.join(would)} would be"
            )
        if self.micro_batch < self.group:
            raise ValueError(
                f"micro_batch {self.micro_batch} has no room for a group of {self.group} images, which it must hold "
                f"whole; micro_batch {self.group} would, or a smaller group, which changes the result"
            )
        return self

    def last_step(self, views: int) -> int:
        """Returns the step at which a run with so many images in an epoch is complete: the schedule's, or max_steps."""
        steps = -(-self.epochs * views // self.global_batch)
        return min(steps, self.max_steps or steps)


class CheckpointSection(Section):
    """The times of saves, and the checkpoints that are kept."""

    every_steps: Positive = Field(500, description="steps between saves")
    keep: Positive = Field(3, description="newest checkpoints that are kept, beside the best one")
    max_failures: Positive = Field(3, description="saves that may fail in a row before the run stops")
    mirror: Annotated[Path | str | None, BeforeValidator(_mirror)] = Field(
        None,
        description=f"folder or URL to which published checkpoints are copied, below the run folder's name, and from "
        f'which an empty run folder goes on; unset: ${MIRROR_VARIABLE}; "": nowhere',
    )

    def find_mirror(self) -> Path | str | None:
        """Returns checkpoint.mirror, else the environment's; None: no mirror. Raises RecipeError."""
        try:
            place = _mirror(os.environ.get(MIRROR_VARIABLE)) if self.mirror is None else self.mirror
        except ValueError as error:
            raise RecipeError(f"{MIRROR_VARIABLE}: {error}") from None
        return place.expanduser().absolute() if isinstance(place, Path) else place or None


def _short(steps: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= steps[1] - steps[0] < _MOST_TRACED:
        raise ValueError(
            f"{list(steps)}: expected the first and the last step of a trace of {_MOST_TRACED} steps at most, as in "
            "[100, 105]"
        )
    return steps


def _words(given: object) -> object:
    """Reads what --set log.trackers=tensorboard,wandb gives; each of them counts once."""
    words = [word.strip() for word in given.split(",") if word.strip()] if isinstance(given, str) else given
    return tuple(dict.fromkeys(words)) if isinstance(words, list | tuple) else words


class LogSection(Section):
    """The measurements, where they are shown, and the steps between them."""

    trackers: Annotated[tuple[TrackerName, ...], BeforeValidator(_words)] = Field(
        ("tensorboard",), description="what shows the curves; wandb: pip install 'crate-dist[wandb]' and `wandb login`"
    )
    every_steps: Positive = Field(20, description="steps between lines of the log and points of the curves")
    eval_every_epochs: Positive = Field(1, description="epochs between evaluations of the whole validation split")
    whitebox_every_steps: int = Field(
        500,
        ge=0,
        description="steps between measurements of all layers' coding rate, sparsity, gradients, attention; 0: never",
    )
    whitebox_images: Positive = Field(
        8, description="images of the validation split to measure them on, the same ones each time"
    )
    profile_steps: Annotated[tuple[Positive, Positive], AfterValidator(_short)] | None = Field(
        None, description="first and last step that torch's profiler traces, on every rank, into profile/; unset: none"
    )


class SafetySection(Section):
    """The times after which a rank that does not answer is given up."""

    hang_timeout_s: Positive = Field(900, description="seconds without progress after which a rank ends the job")
    lease_s: Positive = Field(
        30,
        description="seconds that the run folder's lock holds without a sign; a start elsewhere waits twice as long",
    )


class ClusterSection(Section):
    """The job that launch/slurm.py asks the scheduler for; without influence on the result."""

    nodes: Annotated[int | str, BeforeValidator(node_count)] = Field(
        1, description='machines of the job; "2-4": as many of them as SLURM has, of which those train that divide'
    )
    gpus_per_node: int = Field(
        8, ge=0, description="GPUs of each machine, one task on each; 0: CPU only, see tasks_per_node"
    )
    tasks_per_node: Positive | None = Field(None, description="ranks on each machine; unset: one per GPU")
    cpus_per_task: Positive = Field(12, description="cores of each task, its loader processes included")
    mem_gb: Positive | None = Field(None, description="gigabytes of memory of each machine; unset: all of it")
    time_min: Positive = Field(
        24 * 60, description="time limit in minutes; the job is requeued until the run is complete"
    )
    signal_delay_s: Positive = Field(120, description="seconds between the warning and the time limit")
    requeues: Positive = Field(100, description="times that the job may be put back into the queue")
    restarts_in_place: int = Field(3, ge=0, description="times that ranks which died start again on the same nodes")
    partition: OneWord | None = Field(None, description="sbatch's --partition; unset: the cluster's default")
    account: OneWord | None = Field(None, description="sbatch's --account")
    qos: OneWord | None = Field(None, description="sbatch's --qos")
    constraint: OneWord | None = Field(None, description="sbatch's --constraint, features that the nodes must have")
    setup: tuple[str, ...] = Field((), description="shell lines before the job; not from any file: see --setup")
    container: str | None = Field(None, description="image for srun --container-image (pyxis); not from any file")

    @property
    def ranks_per_node(self) -> int:
        """Tasks that run on each node: one per GPU unless said otherwise."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def node_counts(self) -> range:
        """The numbers of nodes that SLURM may give the job."""
        fewest, _, most = str(self.nodes).partition("-")
        return range(int(fewest), int(most or fewest) + 1)
