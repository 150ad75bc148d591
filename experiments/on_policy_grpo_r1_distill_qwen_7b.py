"""GRPO's advantage, exact on-policy.

Differs from `opo_r1_distill_qwen_7b` in two settings: the advantage (group mean as
baseline, divided by the group's standard deviation) and GRPO's aggregation.

Claim:    none yet: planned, not run (docs/scaling.md).
Command:  make train EXP=on_policy_grpo_r1_distill_qwen_7b
Hardware: as opo_r1_distill_qwen_7b.
Result:   see experiments/README.md.
"""

import dataclasses

from experiments import opo_r1_distill_qwen_7b
from opo_jax.config import Config


def get_config() -> Config:
  base = opo_r1_distill_qwen_7b.get_config()
  return dataclasses.replace(
    base,
    experiment="on_policy_grpo_r1_distill_qwen_7b",
    algorithm=dataclasses.replace(
      base.algorithm, advantage="grpo", aggregation="sequence_mean_token_mean"
    ),
  )
