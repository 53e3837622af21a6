"""The recipe, resolved from a file and the command line, and validated."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import Field, ValidationError, model_validator

from crate_dist.config.keys import (
    RENAMED,
    RecipeError,
    assign,
    explain,
    flatten,
    keys_of,
    nearest,
    new_names,
    parse_value,
    rename,
)
from crate_dist.config.model import ModelSection
from crate_dist.config.rules import parts_of
from crate_dist.config.sections import (
    DATA_VARIABLE,
    MIRROR_VARIABLE,
    AugmentSection,
    CheckpointSection,
    ClusterSection,
    DataSection,
    ImageSection,
    LogSection,
    MixSection,
    OptimSection,
    OrderSection,
    SafetySection,
    Section,
    TrainSection,
)
from crate_dist.locations import is_private, location, may_run_a_command, redacted

RECIPE_FILE = "recipe.toml"
"""Name of the resolved recipe in a run folder; other files have what their authors gave, but a sweep's base."""
GRID_FILE, BASE_FILE = "grid.toml", "base.toml"
"""Names, in a sweep's folder, of its grid and of the resolved recipe around it."""

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
_DECIDING = ("model", "data", "order", "augment", "mix", "images", "optim", "train")
_WITHOUT_INFLUENCE = {
    "data": {"root", "cache_dir", "cache_gb", "workers", "max_bad_fraction"},
    "train": {"micro_batch", "max_steps", "compile", "recompute"},
}
"""Settings of the deciding sections that leave the result as it is."""


class Recipe(Section):
    """Everything that one run needs to know, resolved and validated."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run; unset: the file's")
    model: ModelSection
    data: DataSection = DataSection()
    order: OrderSection = OrderSection()
    augment: AugmentSection = AugmentSection()
    mix: MixSection = MixSection()
    images: ImageSection = ImageSection()
    optim: OptimSection
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    safety: SafetySection = SafetySection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _epochs_before_the_cooldown(self) -> Self:
        cooldown, left = self.optim.cooldown_epochs, self.train.epochs - self.optim.warmup_epochs
        if cooldown and cooldown >= left:
            raise ValueError(
                f"optim.cooldown_epochs {cooldown} are the last of train.epochs {self.train.epochs}, and with "
                f"optim.warmup_epochs {self.optim.warmup_epochs:g} leave none for the rate to fall in; less than "
                f"{max(left, 1):g} would"
            )
        return self

    @model_validator(mode="after")
    def _epochs_behind_the_warm_up(self) -> Self:
        late, warmup = {"timm": 1, "deit": 2}.get(self.optim.schedule, 0), self.optim.warmup_epochs
        most = max(self.train.epochs - self.optim.cooldown_epochs - late, 0)
        if late and warmup > most:
            raise ValueError(
                f"optim.warmup_epochs {warmup:g} take the place of epochs with optim.schedule "
                f'"{self.optim.schedule}", and leave none of train.epochs {self.train.epochs} behind them; '
                f"--set optim.warmup_epochs={most} or less leaves one"
            )
        return self

    @model_validator(mode="after")
    def _neighbours_in_a_group(self) -> Self:
        arch = self.model.parts()
        normed = [f'{kind} = "{getattr(arch, kind)}"' for kind, part in parts_of(arch).items() if part.batch_norm]
        needs = f"{normed[0]} has batch norm, whose statistics are taken over train.group images" if normed else ""
        if self.mix.enabled:
            needs = "[mix] takes an image's partner among train.group neighbours"
        if needs and self.train.group == 1:
            batch = self.train.global_batch
            would = [str(n) for n in (2, 4, 8, 16, 32, 64) if batch % n == 0] or [str(batch)]
            raise ValueError(
                f"{needs}, which is 1; "
                f"--set train.group={would[-1]} gives it some, and {', '.join(would)} divide the global batch"
            )
        return self

    @property
    def lanes(self) -> int:
        """The largest number of lanes, at most order.lanes, that divides the global batch."""
        batch = self.train.global_batch
        return next(n for n in range(min(self.order.lanes, batch), 0, -1) if batch % n == 0)

    def to_toml(self) -> str:
        """Returns the recipe as TOML that load_recipe reads back.

        What only the user may give, and what is nobody else's business, is left out: a comment says so.
        """
        table = self.model_dump(mode="json", exclude_none=True)
        notes = []
        if self.data.root is not None and is_private(self.data.root):
            del table["data"]["root"]
            notes.append(
                f"# data.root is {redacted(self.data.root)}: --data, or ${DATA_VARIABLE}, gives it at each start."
            )
        if self.checkpoint.mirror and is_private(self.checkpoint.mirror):
            del table["checkpoint"]["mirror"]
            shown = redacted(self.checkpoint.mirror)
            notes.append(f"# checkpoint.mirror is {shown}: ${MIRROR_VARIABLE}, or --set, gives it at each start.")
        for key in _ONLY_FROM_THE_USER["cluster"]:
            if table["cluster"].pop(key, None):
                notes.append(f"# cluster.{key} is not kept: --{key}, or a site file, gives it at each start.")
        return "".join(f"{note}\n" for note in notes) + tomli_w.dumps(table)

    def deciding_values(self) -> dict[str, Any]:
        """Returns the values that decide the result, by flat keys; a resumed run must agree on them.

        Left out: where the data lies, how many processes read and compute, what is logged and saved.
        """
        return flatten(self.model_dump(mode="json", include=set(_DECIDING), exclude=_WITHOUT_INFLUENCE))


_KNOWN = keys_of(Recipe)


def load_recipe(
    source: str | Path, overrides: Iterable[str] = (), *, may_be_unread: Collection[str] = (), **values: Any
) -> Recipe:
    """Reads a recipe and applies, in this order, keyword `values` and `section.key=value` overrides.

    Parameters
    ----------
    source: a path to a TOML file, or the name of one in configs/ (`crate_large`)
    overrides: `section.key=value` texts; the value is read as TOML, and as plain text where it is none
    may_be_unread: flat keys that may be given though no part of this model reads them, as another run's of a grid does
    values: the same with `__` for the dot: `train__seed=1`; None means "not given"

    What could run a command is taken from `overrides`, `values` and the files in configs/, which are as much the
    project's own as its code. Of other files, a run folder's too, it is left out, and the section's `withheld` says so.

    Raises RecipeError: no such recipe, broken TOML, an unknown key (the nearest is named), a value that does not fit.
    """
    path = find_recipe(source)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}; a quote or a bracket may be missing there") from error
    raw.setdefault("name", path.stem)
    rename(raw, str(path))
    given = dict.fromkeys(() if _is_resolved(path) else flatten(raw), False)
    withheld = {} if path.parent.resolve() == CONFIG_DIR else _withhold(raw, path)
    origins = {}
    before = dict(raw["model"]) if _is_resolved(path) and isinstance(raw.get("model"), dict) else {}
    for key, value in values.items():
        if value is not None:
            origins[key.replace("__", ".")] = "the command line"
            assign(raw, key.replace("__", "."), value, _KNOWN, origin="the command line")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"--set {text}: expected section.key=value, for instance --set train.epochs=90")
        assign(raw, key.strip(), parse_value(value.strip()), _KNOWN, origin=f"--set {key.strip()}")
        place = location(value.strip().strip("'\""))
        shown = value if isinstance(place, Path) else redacted(place)  # an error is output as well
        origins[RENAMED.get(key.strip(), key.strip())] = f"--set {key}={shown}"
    if before and not any(key.startswith("model.options") for key in origins):
        _leave_out_options(raw["model"], before)
    given |= dict.fromkeys(origins, True)
    to_be_read = {key: by_hand for key, by_hand in given.items() if key not in may_be_unread}
    recipe = build_recipe(raw, str(path), origins, to_be_read)
    for (section, key), said in withheld.items():
        if key not in raw[section]:
            getattr(recipe, section).withheld[key] = said
    return recipe


def build_recipe(
    raw: Mapping[str, Any],
    origin: str,
    origins: Mapping[str, str] | None = None,
    given: Mapping[str, bool] | None = None,
) -> Recipe:
    """Validates nested plain values. Raises RecipeError: a line for each wrong key, which names where it was given.

    origins: by flat key, of values that are not from `origin`
    given: by flat key, of values that are not from a resolved recipe, whether the command line has them: there each has
    to have a meaning, where a file may have one that is as if it were not there
    """
    try:
        return Recipe.model_validate(raw, context=given)
    except ValidationError as error:
        lines = (explain(item, _KNOWN, origins or {}, origin) for item in error.errors())
        raise RecipeError("\n".join(lines)) from error


def recipes() -> dict[str, str]:
    """Returns the recipes in configs/ and what each trains on what, with which the comment at its beginning begins."""
    files = sorted(CONFIG_DIR.glob("*.toml"))
    heads = {path.stem: path.read_text(encoding="utf-8").partition("\n")[0] for path in files}
    return {name: re.split("[:(]", head)[0].strip("# ,") for name, head in heads.items()}


def recipe_of(name: str, deciding_values: Mapping[str, Any]) -> Recipe:
    """Builds the recipe that has these deciding values, of today's names or of old ones, and defaults for the rest.

    Whatever else stands among them, which may be from anybody's file, is left out. Raises RecipeError.
    """
    raw: dict[str, Any] = {"name": name}
    for key, value in new_names(deciding_values).items():
        section, _, setting = key.partition(".")
        if section in _DECIDING and setting not in _WITHOUT_INFLUENCE.get(section, ()):
            raw.setdefault(section, {})[setting] = value
    if model := raw.get("model"):
        options = {key: model.pop(key) for key in list(model) if key.startswith("options.")}
        model["options"] = {key.partition(".")[2]: value for key, value in options.items()}
    return build_recipe(raw, name)


def find_recipe(source: str | Path) -> Path:
    """Finds the file that a recipe's name or path means. Raises RecipeError that names the nearest."""
    path = Path(source)
    if path.is_file() and (isinstance(source, Path) or path.suffix == ".toml"):
        return path
    known = list(recipes())
    if path.suffix == ".toml":
        raise RecipeError(
            f"no recipe file {path}; --config takes the path of one, --arch a name in configs/: {', '.join(known)}"
        )
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; --config takes a recipe file, a run's is {path / 'recipe.toml'}")
    named = CONFIG_DIR / f"{source}.toml"
    if named.is_file():
        return named
    raise RecipeError(f"no recipe {str(source)!r}{nearest(str(source), known)}; there are: {', '.join(known)}")


def derive_batch(global_batch: int, world_size: int, largest_micro_batch: int, group: int = 1) -> tuple[int, int]:
    """Returns (micro_batch, accumulation) with micro_batch * accumulation * world_size == global_batch.

    The micro-batch is the largest that fits and divides, so that the recipe's global batch holds on any cluster.
    group: neighbouring images that stay together in one micro-batch
    Raises RecipeError when the ranks do not divide the global batch, naming the numbers that would.
    """
    groups, left = divmod(global_batch, group)
    share, rest = divmod(groups, world_size)
    if left or rest or not share:
        fitting = [n for n in range(1, groups + 1) if global_batch % (n * group) == 0]
        ranks = [str(n) for n in sorted(sorted(fitting, key=lambda n: abs(n - world_size))[:4])]
        batches = [str(n * world_size * group) for n in sorted({max(share, 1), share + 1})]
        whole = f" in whole groups of {group}" if group > 1 else ""
        raise RecipeError(
            f"a global batch of {global_batch} does not divide over {world_size} ranks{whole}; "
            f"it does over {', '.join(ranks)}; "
            f"these ranks take --set train.global_batch={' or '.join(batches)}"
        )
    if largest_micro_batch < group:
        raise RecipeError(
            f"a micro-batch of at most {largest_micro_batch} images has no room for a group of {group}; "
            f"--set train.micro_batch={group} has"
        )
    micro = next(n for n in range(min(share, largest_micro_batch // group), 0, -1) if share % n == 0)
    return micro * group, share // micro


def _leave_out_options(model: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Takes out the options that only the parts `before` took, and that nobody gave: a resolved recipe has them all."""
    try:
        then, now = (ModelSection.model_validate({**table, "options": {}}).options for table in (before, model))
    except ValidationError:
        return  # build_recipe says what is wrong
    if isinstance(options := model.get("options"), dict):
        usual = {name for name, value in then.items() if name not in now and options.get(name) == value}
        model["options"] = {name: value for name, value in options.items() if name not in usual}


def _is_resolved(path: Path) -> bool:
    """Tells whether a file is a program's, with every value, and not what an author gave."""
    return path.name == RECIPE_FILE or (path.name == BASE_FILE and path.with_name(GRID_FILE).exists())


_ONLY_FROM_THE_USER: Mapping[str, Mapping[str, str]] = {
    "data": {"root": f"--data '…' or export {DATA_VARIABLE}='…'"},
    "cluster": {"setup": "--setup 'LINE', once for each line", "container": "--container IMAGE"},
}
"""Settings that could run a command, and how the user gives them; see docs/security.md."""


def _withhold(raw: Mapping[str, Any], path: Path) -> dict[tuple[str, str], str]:
    """Takes out of a file's values what only the user may give; returns a text on each, by section and key."""
    found = {}
    for section, keys in _ONLY_FROM_THE_USER.items():
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
