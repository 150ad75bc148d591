"""The quickstart with LoRA: OPO trains only adapters, a tenth of the parameters.

SFT trains all parameters, in place of pre-training; RL then freezes them and trains
adapters of rank 8 on all linear layers.

Claim:    held-out pass@1 rises from about 0.35 to above 0.95, as in full training.
Command:  make train EXP=lora_quickstart
Hardware: any; about as long as the quickstart on 2 CPU cores.
Result:   seed 0: 0.354 to 0.981, see docs/lora.md.
"""

import dataclasses

from experiments import quickstart
from opo_jax.config import Config, Optimizer


def get_config() -> Config:
  base = quickstart.get_config()
  return dataclasses.replace(
    base,
    experiment="lora_quickstart",
    model=dataclasses.replace(base.model, lora_rank=8),
    # Ten times that of full training, as is usual for LoRA.
    optimizer=Optimizer(learning_rate=1e-3),
  )
