"""PPO, GRPO and their kin in one table: what each takes of the one algorithm.

A row gives defaults; `recipe/policy.py` has a setting for each of its columns.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["POLICY", "Aggregate", "Baseline", "KLPlace", "Ratio", "Row", "Scale"]

Aggregate = Literal["constant", "sequences", "sum", "tokens"]
Baseline = Literal["batch_mean", "group_mean", "leave_one_out", "none", "value"]
KLPlace = Literal["loss", "reward"]
Ratio = Literal["none", "sequence", "token"]
Scale = Literal["batch_std", "group_std", "none", "whitened"]


@dataclass(frozen=True, slots=True)
class Row:
    """What makes a method; each is a setting of the same name. filtered: mask_truncated and dynamic_sampling."""

    baseline: Baseline
    scale: Scale
    ratio: Ratio
    clip_low: float | None
    clip_high: float | None
    aggregate: Aggregate
    beta: float
    kl_in: KLPlace
    group_size: int
    rollout_epochs: int
    filtered: bool


# fmt: off
POLICY: dict[str, Row] = {
    #                   baseline        scale       ratio      low  high aggregate   beta kl_in    n epochs filter
    "ppo":          Row("value",        "whitened", "token",   0.2, 0.2, "tokens",   0.05,"reward",1,4,     False),
    "grpo":         Row("group_mean",   "group_std","token",   0.2, 0.2, "sequences",0.04,"loss",  8,1,     False),
    "dr_grpo":      Row("group_mean",   "none",     "token",   0.2, 0.2, "constant", 0.0, "loss",  8,1,     False),
    "dapo":         Row("group_mean",   "group_std","token",   0.2, 0.28,"tokens",   0.0, "loss",  8,1,     True),
    "gspo":         Row("group_mean",   "group_std","sequence",3e-4,4e-4,"sequences",0.0, "loss",  8,1,     False),
    "rloo":         Row("leave_one_out","none",     "none",    None,None,"sum",      0.05,"reward",4,1,     False),
    "reinforce_pp": Row("none",         "whitened", "token",   0.2, 0.2, "tokens",   0.01,"reward",1,1,     False),
}
# fmt: on
