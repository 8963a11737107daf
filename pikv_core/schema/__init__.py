"""The typed, frozen schema of every verb's recipe; each field's comment has its unit.

`pikv_core.recipes` reads recipes from files and flags.
"""

from pikv_core.schema.base import Recipe, Section, parse_bytes
from pikv_core.schema.compress import CompressRecipe, MethodRecipe
from pikv_core.schema.gen_data import GenDataRecipe
from pikv_core.schema.generate import CacheRecipe, GenerateRecipe, PrefixSettings
from pikv_core.schema.simulate import AttentionReplayRecipe, SimulateRecipe
from pikv_core.schema.tiers import TiersRecipe
from pikv_core.schema.train import (
    DistillSettings,
    DuoGateSettings,
    ExportSettings,
    LoRASettings,
    ModelRecipe,
    PolicyRouterSettings,
    TokenScorerSettings,
    TrainRecipe,
    TrainSettings,
)

RECIPES: dict[str, type[Recipe]] = {
    schema.model_fields["verb"].default: schema
    for schema in (GenDataRecipe, TrainRecipe, CompressRecipe, GenerateRecipe, SimulateRecipe)
}

__all__ = [
    "RECIPES",
    "AttentionReplayRecipe",
    "CacheRecipe",
    "CompressRecipe",
    "DistillSettings",
    "DuoGateSettings",
    "ExportSettings",
    "GenDataRecipe",
    "GenerateRecipe",
    "LoRASettings",
    "MethodRecipe",
    "ModelRecipe",
    "PolicyRouterSettings",
    "PrefixSettings",
    "Recipe",
    "Section",
    "SimulateRecipe",
    "TiersRecipe",
    "TokenScorerSettings",
    "TrainRecipe",
    "TrainSettings",
    "parse_bytes",
]
