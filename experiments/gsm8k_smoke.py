"""Every real component once: GSM8K, a real tokenizer with its chat template, the math
verifier.

Claim:    two complete steps run on a CPU with nothing mocked. The policy is tiny and
          randomly initialised, with the real vocabulary size: its responses are random
          and its reward is 0.
Command:  make train EXP=gsm8k_smoke   (data from OPO_DATA_DIR, else downloaded)
Hardware: any; about a minute on 2 CPU cores.
Result:   see experiments/README.md.
"""

import os

from opo_jax.config import Checkpoint, Config, Data, Eval, Model, Reward, Rollout

# The same tokenizer, from OPO_DATA_DIR or from the hub.
_LOCAL = os.path.join(
  os.environ.get("OPO_DATA_DIR", ""), "tokenizer", "deepseek-r1-distill-qwen"
)
_HUB = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"


def get_config() -> Config:
  return Config(
    experiment="gsm8k_smoke",
    steps=2,
    model=Model(
      vocab_size=152_064,  # padded as in the 7B model
      width=64,
      mlp_width=128,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=16,
    ),
    data=Data(
      train="gsm8k",
      tokenizer=_LOCAL if os.path.isdir(_LOCAL) else _HUB,
      instruction=(
        "Please reason step by step, and put your final answer within \\boxed{}."
      ),
    ),
    reward=Reward(verifier="math", workers=2, truncated="scored"),
    rollout=Rollout(prompts_per_step=4, group_size=4, max_new_tokens=32),
    eval=Eval(every=0, benchmarks=("gsm8k",), problems=8, samples=2),
    checkpoint=Checkpoint(every=1),
  )
