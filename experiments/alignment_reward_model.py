"""The reward model of `alignment_quickstart` alone.

Claim:    its accuracy on held-out pairs is close to that of the true score, which is
          the upper bound because the labels are noisy.
Command:  make reward-model EXP=alignment_reward_model
          make train EXP=alignment_quickstart \
            ARGS="--reward.model runs/alignment_reward_model"
Hardware: any; one to two minutes on 2 CPU cores.
Result:   see docs/alignment.md.
"""

import dataclasses

from experiments.alignment_quickstart import get_config as quickstart
from opo_jax.config import Config


def get_config() -> Config:
  return dataclasses.replace(quickstart(), experiment="alignment_reward_model")
