"""Over-optimisation: a reward model trained on few labels is optimised too far.

Claim:    with a sixteenth of the labels, the policy finds responses that the reward
          model scores high and the true score does not. On-policy training without a
          KL penalty does not prevent this.
Command:  make train EXP=alignment_overoptimised
Hardware: any; a few minutes on 2 CPU cores.
Result:   see docs/alignment.md.
"""

import dataclasses

from experiments.alignment_quickstart import get_config as quickstart
from opo_jax.config import Config


def get_config() -> Config:
  base = quickstart()
  return dataclasses.replace(
    base,
    experiment="alignment_overoptimised",
    steps=120,
    reward_model=dataclasses.replace(base.reward_model, num_pairs=256),
  )
