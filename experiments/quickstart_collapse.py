"""Collapse: RL from a start policy that has not learnt the single additions.

Claim:    within ten steps the policy collapses to guesses of three tokens and does not
          recover; pass@1 is at chance level (one in five) and entropy falls to 0.14.
          At this start policy, long responses are mostly incorrect and carry most of
          the negative gradient, so the first large steps shorten the responses.
Command:  make train EXP=quickstart_collapse
Hardware: any; about a minute on 2 CPU cores.
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
