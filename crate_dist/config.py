"""One validated recipe: TOML file < command line, and an unknown key is an error that names the nearest.

Imports neither torch nor deepspeed, so that a login node can resolve and check a recipe at once.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from crate_dist.errors import UserError
from crate_dist.locations import is_private, location, may_run_a_command, redacted

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
DATA_VARIABLE = "CRATE_DATA"
CACHE_VARIABLE = "CRATE_CACHE"

ArchName = Literal["crate_demo", "crate_tiny", "crate_small", "crate_base", "crate_large"]

Compile = Literal["auto"] | bool
Precision = Literal["bf16", "autocast", "fp32"]
ResizeFilter = Literal["bicubic", "bilinear"]

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OneWord = Annotated[str, Field(pattern=r"^[^\s\p{Cc}]+$")]
"""What stands on a line of the batch script, where a line break would begin a command."""


Location = Annotated[Path | str, BeforeValidator(lambda value: location(value) if isinstance(value, str) else value)]


class RecipeError(UserError, ValueError):
    """A recipe or an override that cannot be used; the message says what was given and what would do."""


class Section(BaseModel):
    """A table of the recipe. Frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    _withheld: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def withheld(self) -> dict[str, str]:
        """Keys that a recipe file gave and only the user may, each with what is to be said of it; see load_recipe."""
        return self._withheld


class ModelSection(Section):
    """Which CRATE, and at which resolution."""

    arch: ArchName
    image_size: Positive = 224
    patch_size: Positive = 16
    num_classes: Positive | None = Field(None, description="unset: as many as the shards' index has")
    pool: Literal["cls", "mean"] = "cls"
    dropout: Fraction = 0.0
    emb_dropout: Fraction = 0.0
    ista_step: float = Field(0.1, gt=0, description="η, the step size of ISTA")
    ista_threshold: float = Field(0.1, ge=0, description="λ, the sparsity weight of ISTA")

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}; "
                f"{self.image_size // self.patch_size * self.patch_size or self.patch_size} would be"
            )
        return self


class DataSection(Section):
    """Where the shards are, and how they become batches."""

    root: Location | None = Field(
        None, description=f"folder or URL with train/ and val/ shards below it; unset: ${DATA_VARIABLE}"
    )
    train_split: str = "train"
    val_split: str = Field("val", description='"": train without evaluation')
    cache_dir: Path | None = Field(
        None, description=f"where a node keeps the shards of a URL; unset: ${CACHE_VARIABLE}, then the temporary folder"
    )
    cache_gb: float = Field(64.0, gt=0, description="how much of them it keeps; twice what it reads at a time will do")
    workers: int = Field(8, ge=0, description="loader processes per rank")
    lanes: Positive = Field(64, description="streams of shards that are read side by side; see order.py")
    window: Positive = Field(4096, description="samples that are shuffled together within a lane")
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Fraction = 0.5
    randaugment_ops: int = Field(0, ge=0, description="operations of RandAugment on each image; 0: none")
    randaugment_magnitude: int = Field(14, ge=0, le=30, description="how strong they are")
    erase: Fraction = Field(0.0, description="share of the training images that lose a rectangle")
    eval_fit: Literal["crop", "stretch"] = Field(
        "crop", description='"stretch": the whole validation image, resized to the square, whatever eval_crop says'
    )
    eval_crop: float = Field(0.875, gt=0, le=1, description="central share of a validation image's short side")
    resize_filter: ResizeFilter = Field(
        "bicubic", description="of training's and evaluation's antialiased resize; torchvision's default is bilinear"
    )
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    max_bad_fraction: Fraction = Field(0.001, description="more undecodable samples than this stop the run")

    def place(self, given: Path | str | None = None) -> Path | str:
        """The folder or URL of the shards: what was given on the command line, data.root, or the environment's.

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


class OptimSection(Section):
    """The optimizer, its schedule, and the loss."""

    name: Literal["lion", "adamw"] = "lion"
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    decay_all: bool = Field(True, description="also decay norms, biases and embeddings, as the paper does")
    betas: tuple[float, float] | None = Field(None, description="unset: lion (0.9, 0.99), adamw (0.9, 0.999)")
    eps: float = 1e-8
    schedule: Literal["cosine", "reference"] = Field(
        "cosine", description='"reference": the minimum of warm-up and cosine, changed once per epoch'
    )
    warmup_epochs: float = Field(5.0, ge=0)
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    label_smoothing: Fraction = 0.1


class TrainSection(Section):
    """How long, and in which global batches. The cluster has no say in it."""

    global_batch: Positive
    micro_batch: Positive = Field(128, description="largest batch that one device takes at a time")
    epochs: Positive
    max_steps: Positive | None = Field(None, description="stop early, with the schedule as for all epochs")
    seed: int = Field(0, ge=0)
    precision: Precision = Field(
        "bf16", description='of the products; master weights are fp32. "autocast": bf16 products, all else fp32'
    )
    init_from: Path | None = Field(None, description="a run, a checkpoint or a file of weights to begin from")
    init_head: Literal["auto", "new", "keep"] = Field(
        "auto", description='of these weights; "auto": a new one when the classes differ in number or names'
    )
    init_heads: Positive | None = Field(None, description="of these weights, where their file does not tell")
    compile: Compile = Field("auto", description="torch.compile; auto: on GPUs that it supports; see compiling.py")
    recompute: int = Field(
        0, ge=0, description="layers computed again in the backward pass instead of kept: less memory, same numbers"
    )


class CheckpointSection(Section):
    """When to save and what to keep."""

    every_steps: Positive = 500
    keep: Positive = Field(3, description="newest checkpoints that are kept, beside the best one")
    max_failures: Positive = Field(3, description="saves that may fail in a row before the run stops")


class SafetySection(Section):
    """When to give up on a rank that does not answer."""

    hang_timeout_s: Positive = Field(900, description="without progress for so long, a rank ends the job")
    lease_s: Positive = Field(
        30, description="of the run folder's lock; a start elsewhere waits twice as long for a job that gives no sign"
    )


class LogSection(Section):
    """What is measured and how often."""

    every_steps: Positive = 20
    eval_every_epochs: Positive = 1
    whitebox_every_steps: int = Field(
        500, ge=0, description="coding rate, sparsity, gradients and attention of every layer; 0: never"
    )
    whitebox_images: Positive = Field(8, description="of the validation split, the same ones each time")


class ClusterSection(Section):
    """What launch/slurm.py asks the scheduler for; without influence on the result."""

    nodes: Positive = 1
    gpus_per_node: int = Field(8, ge=0, description="one task per GPU; 0: CPU only, see tasks_per_node")
    tasks_per_node: Positive | None = Field(None, description="unset: one per GPU")
    cpus_per_task: Positive = 12
    mem_gb: Positive | None = Field(None, description="memory per node; unset: all of it")
    time_min: Positive = Field(24 * 60, description="time limit; the job is requeued until the run is complete")
    signal_delay_s: Positive = Field(120, description="warning before the time limit")
    requeues: Positive = Field(100, description="times that the job may be put back into the queue")
    restarts_in_place: int = Field(3, ge=0, description="times that ranks which died start again on the same nodes")
    partition: OneWord | None = None
    account: OneWord | None = None
    qos: OneWord | None = None
    constraint: OneWord | None = None
    setup: tuple[str, ...] = Field((), description="shell lines before the job; not from any file: see --setup")
    container: str | None = Field(None, description="image for srun --container-image (pyxis)")

    @property
    def ranks_per_node(self) -> int:
        """Tasks that run on each node: one per GPU unless said otherwise."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def world_size(self) -> int:
        """Tasks in the whole job."""
        return self.nodes * self.ranks_per_node


class Recipe(Section):
    """Everything that one run needs to know, resolved and validated."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelSection
    data: DataSection = DataSection()
    optim: OptimSection
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    safety: SafetySection = SafetySection()
    cluster: ClusterSection = ClusterSection()

    @property
    def lanes(self) -> int:
        """The largest number of lanes, at most data.lanes, that divides the global batch."""
        batch = self.train.global_batch
        return next(n for n in range(min(self.data.lanes, batch), 0, -1) if batch % n == 0)

    def data_root(self) -> Path | str:
        """The folder or URL of the shards, as DataSection.place has it. Raises RecipeError when there is none."""
        return self.data.place()

    def to_toml(self) -> str:
        """The recipe as TOML that load_recipe reads back.

        What only the user may give, and what is nobody else's business, is left out: a comment says so.
        """
        table = self.model_dump(mode="json", exclude_none=True)
        notes = []
        if self.data.root is not None and is_private(self.data.root):
            del table["data"]["root"]
            notes.append(
                f"# data.root is {redacted(self.data.root)}: --data, or ${DATA_VARIABLE}, gives it at each start."
            )
        for key in _USERS["cluster"]:
            if table["cluster"].pop(key, None):
                notes.append(f"# cluster.{key} is not kept: --{key} gives it at each start.")
        return "".join(f"{note}\n" for note in notes) + tomli_w.dumps(table)

    def mathematics(self) -> dict[str, Any]:
        """The flat keys that decide the result; a resumed run must agree on them.

        Left out: where the data lies, how many processes read and compute, what is logged and saved.
        """
        flat = _flatten(self.model_dump(mode="json", include={"model", "data", "optim", "train"}))
        for key in (
            "data.root",
            "data.cache_dir",
            "data.cache_gb",
            "data.workers",
            "data.max_bad_fraction",
            "train.micro_batch",
            "train.max_steps",
            "train.compile",
            "train.recompute",
        ):
            flat.pop(key, None)
        return flat


def load_recipe(source: str | Path, overrides: Iterable[str] = (), **values: Any) -> Recipe:
    """Reads a recipe and applies, in this order, keyword `values` and `section.key=value` overrides.

    Parameters
    ----------
    source: a path to a TOML file, or the name of one in configs/ (`crate_large`)
    overrides: `section.key=value` texts; the value is read as TOML, and as plain text where it is none
    values: the same with `__` for the dot: `train__seed=1`; None means "not given"

    What could run a command is taken from `overrides`, `values` and the files in configs/, which are as much the
    project's own as its code. Of other files, a run folder's too, it is left out, and the section's `withheld` says so.

    Raises
    ------
    RecipeError: no such recipe, broken TOML, an unknown key (the nearest is named), a value that does not fit
    """
    path = find_recipe(source)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error
    raw.setdefault("name", path.stem)
    withheld = {} if path.parent.resolve() == CONFIG_DIR else _withhold(raw, path)
    for key, value in values.items():
        if value is not None:
            _assign(raw, key.replace("__", "."), value, origin="the command line")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"--set {text}: expected section.key=value, for instance --set train.epochs=90")
        _assign(raw, key.strip(), _parse_value(value.strip()), origin=f"--set {key.strip()}")
    recipe = build_recipe(raw, origin=str(path))
    for (section, key), said in withheld.items():
        if key not in raw[section]:
            getattr(recipe, section).withheld[key] = said
    return recipe


def build_recipe(raw: Mapping[str, Any], origin: str) -> Recipe:
    """Validates nested plain values. Raises RecipeError that names `origin` and each wrong key."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join([f"{origin}:", *(f"  {_explain(item)}" for item in error.errors())])) from error


def find_recipe(source: str | Path) -> Path:
    """The file that a recipe's name or path means. Raises RecipeError that names the nearest."""
    path = Path(source)
    if path.suffix == ".toml":
        if path.is_file():
            return path
        raise RecipeError(f"no recipe file {path}")
    named = CONFIG_DIR / f"{source}.toml"
    if named.is_file():
        return named
    known = sorted(p.stem for p in CONFIG_DIR.glob("*.toml"))
    raise RecipeError(f"no recipe {source!r}{_nearest(str(source), known)}; there are: {', '.join(known)}")


def derive_batch(global_batch: int, world_size: int, largest_micro_batch: int) -> tuple[int, int]:
    """(micro_batch, accumulation) with micro_batch * accumulation * world_size == global_batch.

    The micro-batch is the largest that fits and divides, so that the recipe's global batch holds on any cluster.
    Raises RecipeError when the ranks do not divide the global batch, naming the numbers that would.
    """
    share, rest = divmod(global_batch, world_size)
    if rest or not share:
        fitting = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        ranks = [str(n) for n in sorted(sorted(fitting, key=lambda n: abs(n - world_size))[:4])]
        batches = [str(n * world_size) for n in sorted({max(share, 1), share + 1})]
        raise RecipeError(
            f"a global batch of {global_batch} does not divide over {world_size} ranks; "
            f"it does over {', '.join(ranks)}; "
            f"these ranks take --set train.global_batch={' or '.join(batches)}"
        )
    micro = next(n for n in range(min(share, largest_micro_batch), 0, -1) if share % n == 0)
    return micro, share // micro


_USERS: Mapping[str, Mapping[str, str]] = {
    "data": {"root": f"--data '…' or export {DATA_VARIABLE}='…'"},
    "cluster": {"setup": "--setup 'LINE', once for each line", "container": "--container IMAGE"},
}
"""What could run a command, by section and key, and how the user gives it; see docs/security.md."""


def _withhold(raw: Mapping[str, Any], path: Path) -> dict[tuple[str, str], str]:
    """Takes out of a file's values what only the user may give; what is to be said of each, by section and key."""
    found = {}
    for section, keys in _USERS.items():
        if not isinstance(table := raw.get(section), dict):
            continue
        for key, remedy in keys.items():
            value = table.get(key)
            if not value or (section == "data" and not (isinstance(value, str) and may_run_a_command(location(value)))):
                continue
            del table[key]
            what = f"{redacted(value)}, which could run a command" if section == "data" else f"{value!r}"
            found[section, key] = (
                f"{path} has {section}.{key} = {what}; a recipe file may not say what is to be run on your account. "
                f"If it is what you want, say so yourself: {remedy}"
            )
    return found


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _nearest(given: str, known: list[str]) -> str:
    last = given.rpartition(".")[2]
    close = [key for key in known if key.rpartition(".")[2] == last]  # the right word in the wrong section
    close = close or difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _assign(raw: dict[str, Any], key: str, value: Any, origin: str) -> None:
    known = _known_keys()
    if key not in known:
        raise RecipeError(f"{origin}: unknown key {key!r}{_nearest(key, known)}")
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
    raw[last] = value


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if re.fullmatch(r"(?i)true|false", text):
            return text.lower() == "true"
        return text


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_nearest(key, _known_keys())}"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if item["type"] in ("missing", "value_error") else f", not {item['input']!r}"
    return f"{key}: {message}{given}"
