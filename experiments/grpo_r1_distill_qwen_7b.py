"""GRPO as usually run, off-policy: four PPO-clip steps on each rollout batch. Its
comparison is `on_policy_grpo_r1_distill_qwen_7b`, with one step per batch.

Claim:    none yet: planned, not run (docs/scaling.md).
Command:  make train EXP=grpo_r1_distill_qwen_7b
Hardware: as opo_r1_distill_qwen_7b.
Result:   see experiments/README.md.
"""

import dataclasses

from experiments import on_policy_grpo_r1_distill_qwen_7b
from opo_jax.config import Config


def get_config() -> Config:
  base = on_policy_grpo_r1_distill_qwen_7b.get_config()
  return dataclasses.replace(
    base,
    experiment="grpo_r1_distill_qwen_7b",
    algorithm=dataclasses.replace(base.algorithm, loss="ppo_clip", updates_per_batch=4),
  )
