"""OPO against a reward model, without a reference model, on two CPU cores.

Claim:    the true score of held-out responses rises, and most responses win against the
          start policy's, although the reward model is trained on noisy labels and the
          loss has no KL penalty. The KL divergence to the start policy is reported.
Command:  make train EXP=alignment_quickstart
Hardware: any; a few minutes on 2 CPU cores.
Result:   see docs/alignment.md.
"""

from opo_jax.config import (
  SFT,
  Config,
  Data,
  Eval,
  Model,
  Optimizer,
  Reward,
  RewardModel,
  Rollout,
)


def get_config() -> Config:
  return Config(
    experiment="alignment_quickstart",
    steps=80,
    model=Model(width=64, mlp_width=192, head_dim=16, initializer_range=0.08),
    data=Data(train="preferences", tokenizer="preferences"),
    reward=Reward(verifier="reward_model", truncated="scored"),
    reward_model=RewardModel(steps=600, learning_rate=2e-3),
    sft=SFT(steps=300, batch_size=64, learning_rate=3e-3),
    rollout=Rollout(max_new_tokens=17),
    optimizer=Optimizer(learning_rate=3e-4),
    eval=Eval(every=20, benchmarks=("preferences",), problems=128, samples=4),
  )
