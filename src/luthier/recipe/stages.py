"""Which settings a stage's word takes.

What a stage does stands in `pipeline/stages.py`, row by row with this table; here are only words and settings.
"""

from luthier.recipe.training import SFT, Pretrain, Training

__all__ = ["STAGE_SETTINGS"]

STAGE_SETTINGS: dict[str, type[Training]] = {"pretrain": Pretrain, "sft": SFT}
