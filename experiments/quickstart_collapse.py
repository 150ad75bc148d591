"""The collapse: RL on a start that has not learnt the single steps.

Claim:    the policy falls into three-token guesses within ten steps and stays there;
          pass@1 is that of guessing and entropy is gone. Long answers are mostly wrong
          at this start and carry most of the negative gradient, so the first large
          steps remove length itself.
Command:  make train EXP=quickstart_collapse
Hardware: any; 2 CPU cores need about a minute.
Result:   see experiments/README.md.
"""

import dataclasses

from experiments.quickstart import get_config as quickstart
from opo_jax.config import Config


def get_config() -> Config:
  base = quickstart()
  return dataclasses.replace(
    base,
    experiment="quickstart_collapse",
    sft=dataclasses.replace(base.sft, steps=40),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-3),
  )
