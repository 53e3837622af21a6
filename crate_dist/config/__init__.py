"""One validated recipe: TOML file < command line, and an unknown key is an error that names the nearest.

Imports neither torch nor deepspeed, so that a login node can resolve and check a recipe at once. The sections stand
here and not beside their users, which are rooms above this one: a recipe knows all of them.
"""

from crate_dist.config.keys import RecipeError as RecipeError
from crate_dist.config.keys import new_names as new_names
from crate_dist.config.model import ModelSection as ModelSection
from crate_dist.config.recipe import CONFIG_DIR as CONFIG_DIR
from crate_dist.config.recipe import RECIPE_FILE as RECIPE_FILE
from crate_dist.config.recipe import Recipe as Recipe
from crate_dist.config.recipe import build_recipe as build_recipe
from crate_dist.config.recipe import derive_batch as derive_batch
from crate_dist.config.recipe import load_recipe as load_recipe
from crate_dist.config.recipe import recipe_of as recipe_of
from crate_dist.config.recipe import recipes as recipes
from crate_dist.config.sections import CACHE_VARIABLE as CACHE_VARIABLE
from crate_dist.config.sections import DATA_VARIABLE as DATA_VARIABLE
from crate_dist.config.sections import MIRROR_VARIABLE as MIRROR_VARIABLE
from crate_dist.config.sections import AugmentSection as AugmentSection
from crate_dist.config.sections import ClusterSection as ClusterSection
from crate_dist.config.sections import Colour as Colour
from crate_dist.config.sections import Compile as Compile
from crate_dist.config.sections import CropName as CropName
from crate_dist.config.sections import DataSection as DataSection
from crate_dist.config.sections import ImageSection as ImageSection
from crate_dist.config.sections import MixSection as MixSection
from crate_dist.config.sections import OptimSection as OptimSection
from crate_dist.config.sections import ResizeFilter as ResizeFilter
from crate_dist.config.sections import WeightsKind as WeightsKind
