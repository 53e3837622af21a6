"""One validated recipe: TOML file < command line, and an unknown key is an error that names the nearest.

Imports neither torch nor deepspeed, so that a login node can resolve and check a recipe at once. The sections stand
here and not beside their users, which are rooms above this one: a recipe knows all of them.
"""

from crate_dist.config.keys import RecipeError, new_names
from crate_dist.config.recipe import (
    CONFIG_DIR,
    Recipe,
    build_recipe,
    derive_batch,
    find_recipe,
    load_recipe,
)
from crate_dist.config.sections import (
    CACHE_VARIABLE,
    DATA_VARIABLE,
    ArchName,
    AugmentSection,
    ClusterSection,
    Colour,
    Compile,
    DataSection,
    ImageSection,
    ModelSection,
    OptimSection,
    OrderSection,
    Precision,
    ResizeFilter,
)

__all__ = [
    "CACHE_VARIABLE",
    "CONFIG_DIR",
    "DATA_VARIABLE",
    "ArchName",
    "AugmentSection",
    "ClusterSection",
    "Colour",
    "Compile",
    "DataSection",
    "ImageSection",
    "ModelSection",
    "OptimSection",
    "OrderSection",
    "Precision",
    "Recipe",
    "RecipeError",
    "ResizeFilter",
    "build_recipe",
    "derive_batch",
    "find_recipe",
    "load_recipe",
    "new_names",
]
