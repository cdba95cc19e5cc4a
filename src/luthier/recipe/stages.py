"""Which settings a stage's word takes.

What a stage does stands in `pipeline/stages.py`, row by row with this table; here are only words and settings.
"""

from luthier.recipe.policy import DAPO, GRPO, GSPO, PPO, RLOO, DrGRPO, ReinforcePP
from luthier.recipe.preference import CPO, DPO, IPO, KTO, ORPO, ProcessReward, Reward, SimPO
from luthier.recipe.rounds import RLAIF, IterativeDPO
from luthier.recipe.training import SFT, Pretrain, Training

__all__ = ["STAGE_SETTINGS"]

STAGE_SETTINGS: dict[str, type[Training]] = {
    **{"pretrain": Pretrain, "sft": SFT},
    **{"dpo": DPO, "ipo": IPO, "kto": KTO, "orpo": ORPO, "simpo": SimPO, "cpo": CPO},
    **{"ppo": PPO, "grpo": GRPO, "dr_grpo": DrGRPO, "dapo": DAPO, "gspo": GSPO, "rloo": RLOO},
    **{"reinforce_pp": ReinforcePP},
    **{"reward": Reward, "process_reward": ProcessReward, "iterative_dpo": IterativeDPO, "rlaif": RLAIF},
}
