"""The off-policy comparison: four PPO-clip steps on every rollout batch.

Claim:    the importance ratio leaves 1 and the clip becomes active; in the quickstart,
          with one step per batch, the ratio is 1 and the clip fraction 0 throughout.
Command:  make train EXP=quickstart_off_policy
Hardware: any; about 3 minutes on 2 CPU cores.
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
