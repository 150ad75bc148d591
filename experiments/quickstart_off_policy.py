"""The off-policy comparison: four PPO-clip steps on every rollout batch.

Claim:    the ratio leaves 1 and the clip starts to act; quickstart beside it, with one
          exact step per batch, has ratio 1 and clip fraction 0 throughout.
Command:  make train EXP=quickstart_off_policy
Hardware: any; 2 CPU cores need about 3 minutes.
Result:   see experiments/README.md.
"""

import dataclasses

from experiments.quickstart import get_config as quickstart
from opo_jax.config import Config


def get_config() -> Config:
  base = quickstart()
  return dataclasses.replace(
    base,
    experiment="quickstart_off_policy",
    algorithm=dataclasses.replace(
      base.algorithm, advantage="grpo", loss="ppo_clip", updates_per_batch=4
    ),
  )
