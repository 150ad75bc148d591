"""OPO learns to work step by step and to end its responses, on two CPU cores.

Claim:    held-out pass@1 on running totals rises from about 0.33 to above 0.95.
Command:  make train EXP=quickstart
Hardware: any; 2 to 3 minutes on 2 CPU cores, of which SFT takes half a minute to one.
Result:   see README.md and experiments/README.md.
"""

from opo_jax.config import SFT, Config, Eval, Model, Optimizer


def get_config() -> Config:
  return Config(
    experiment="quickstart",
    steps=120,
    # The usual 0.02 suits wide models; at width 128, learning is far slower with it.
    model=Model(initializer_range=0.08),
    sft=SFT(steps=200, learning_rate=3e-3),
    optimizer=Optimizer(learning_rate=1e-4),
    eval=Eval(every=10, problems=256, samples=16),
  )
