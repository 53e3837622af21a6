"""What the parts of a model ask of it, by their rows in config/parts.py: one check for recipes and models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields

from crate_dist.config.archs import Arch
from crate_dist.config.keys import nearest
from crate_dist.config.parts import PARTS, Option, Part


def check_model(arch: Arch, image_size: int, patch_size: int, pool: str, options: Mapping[str, float]) -> None:
    """Raises ValueError when there can be no such model; the message says what would do.

    Patches do not tile the image, or the stem has none of the size; heads do not divide the width; a class token is
    missing that is to be read, or there is one too many; no part takes an option, or not with this value.
    """
    if image_size % patch_size:
        raise ValueError(
            f"image_size {image_size} is no multiple of patch_size {patch_size}; "
            f"{image_size // patch_size * patch_size or patch_size} would be"
        )
    if pool not in ("cls", "mean"):
        raise ValueError(f'pool is "cls" or "mean", not {pool!r}')
    for kind, part in parts_of(arch).items():
        said = f'{kind} = "{getattr(arch, kind)}"'
        _check_patches(said, part, patch_size, arch.dim)
        if part.class_token not in (None, arch.class_token):
            others = ", ".join(name for name, row in PARTS[kind].items() if row.class_token in (None, arch.class_token))
            needs = "needs a class token in the layers" if part.class_token else "brings a class token of its own"
            raise ValueError(
                f"{said} {needs}: class_token = {str(part.class_token).lower()} would do, or another {kind}: {others}"
            )
        if "pool" in part.reads and pool == "cls" and not arch.class_token:
            raise ValueError('there is no class token for the head to read; pool = "mean" reads the patches')
    if arch.dim % arch.heads:
        fitting = [str(n) for n in range(1, min(arch.dim, 32) + 1) if arch.dim % n == 0]
        raise ValueError(f"width {arch.dim} does not divide into {arch.heads} heads; it does into {', '.join(fitting)}")
    _check_options(arch, options)


def parts_of(arch: Arch) -> dict[str, Part]:
    """Returns the rows of an architecture's parts, by kind. Raises ValueError for a name that there is not."""
    for kind, table in PARTS.items():
        if (name := getattr(arch, kind)) not in table:
            raise ValueError(f"there is no {kind} {name!r}{nearest(str(name), table)}; there are: {', '.join(table)}")
    return {kind: table[getattr(arch, kind)] for kind, table in PARTS.items()}


def with_defaults(arch: Arch, given: Mapping[str, float]) -> dict[str, float]:
    """Returns the values of all options that the parts of an architecture take."""
    return {name: option.default for name, option in _options_of(arch).items()} | dict(given)


def unread(arch: Arch) -> set[str]:
    """Returns the settings that some parts read, and none of this architecture's."""
    return set(_readers()).difference(*(part.reads for part in parts_of(arch).values()))


def check_read(arch: Arch, name: str, value: object, usual: object = None) -> None:
    """Raises ValueError when no part of an architecture reads a setting that a user gave. usual: a value that may be"""
    if name in unread(arch) and value not in (None, usual):
        raise ValueError(
            f"{name} {str(value).lower() if isinstance(value, bool) else value} would change nothing: no part of this "
            f"model reads it, only {', '.join(_readers()[name])} (config/parts.py says what each reads); leave it unset"
        )


def differing(there: Arch, here: Arch) -> dict[str, object]:
    """Returns the settings, by flat key, with which a model `here` would have the size and the parts of one `there`.

    Options too, where both are a ModelConfig. Left out is what leaves no weights, norms' eps and first weights, and
    what no part of `there` reads, which would be refused.
    """
    unseen = {"norm_eps", "head_norm_eps", "init"} | unread(there)
    names = [field.name for field in fields(Arch) if field.name not in unseen]
    found = {name: getattr(there, name) for name in names if getattr(there, name) != getattr(here, name)}
    keys = {f"model.{'width' if name == 'dim' else name}": value for name, value in found.items()}
    defaults = with_defaults(there, {})
    known, own = (defaults | with_defaults(one, getattr(one, "options", {})) for one in (there, here))
    return keys | {f"model.options.{name}": value for name, value in known.items() if own[name] != value}


def for_new_head(settings: Mapping[str, object]) -> dict[str, object]:
    """Returns settings of `differing` without the head, which is to be new, unless the class token goes with it."""
    return {key: value for key, value in settings.items() if key != "model.head" or "model.class_token" in settings}


def as_set(settings: Mapping[str, object]) -> str:
    """Returns settings as a command line takes them: --set model.depth=2 --set model.out_bias=false."""
    plain = {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}
    return " ".join(f"--set {key}={value}" for key, value in plain.items())


def _readers() -> dict[str, list[str]]:
    """Returns, by setting, the parts that read it, where not all do."""
    found: dict[str, list[str]] = {}
    for kind, table in PARTS.items():
        for name, part in table.items():
            for setting in part.reads:
                found.setdefault(setting, []).append(f"{kind} {name}")
    return found


def _options_of(arch: Arch) -> dict[str, Option]:
    """Returns the options of an architecture's parts. Raises ValueError when two of them call theirs the same."""
    found, owners = dict[str, Option](), dict[str, str]()
    for kind, part in parts_of(arch).items():
        for name, option in part.options.items():
            owner = f'{kind} = "{getattr(arch, kind)}"'
            if name in owners:
                raise ValueError(
                    f"{owners[name]} and {owner} both have an option {name}, and a recipe could not tell them apart; "
                    "call one of them otherwise in config/parts.py"
                )
            owners[name], found[name] = owner, option if isinstance(option, Option) else Option(option)
    return found


def _check_options(arch: Arch, given: Mapping[str, float]) -> None:
    known = _options_of(arch)
    for name, value in given.items():
        if name not in known:
            there = f"they take {', '.join(known)}" if known else "they take none"
            raise ValueError(
                f"no part of this model takes options.{name}{nearest(name, known)}; {there}; model.options={{}} leaves "
                "out all that the recipe's file gives"
            )
        option = known[name]
        whole = isinstance(option.default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not math.isfinite(value):
            raise ValueError(f"options.{name} is a {'whole ' * whole}number, not {value!r}")
        above = max(option.above, 0) if whole else option.above
        if not above < value <= option.to:
            bounds = [f"above {above:g}"] * (above > -math.inf) + [f"of at most {option.to:g}"] * (option.to < math.inf)
            raise ValueError(f"options.{name} is a {'whole ' * whole}number {' and '.join(bounds)}, not {value!r}")


def _check_patches(said: str, part: Part, patch_size: int, dim: int) -> None:
    if not part.patches:
        return
    if patch_size not in part.patches:
        raise ValueError(
            f"{said} does not make every size of patch: patch_size is one of {', '.join(map(str, part.patches))}, "
            f"not {patch_size}"
        )
    if dim % (divisor := part.patches[patch_size]):
        raise ValueError(
            f"{said} has a width of {dim} / {divisor} for patches of {patch_size} pixels; "
            f"{dim // divisor * divisor or divisor} would divide"
        )
