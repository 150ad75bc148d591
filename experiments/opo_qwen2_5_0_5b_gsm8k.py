"""OPO on GSM8K with Qwen2.5-0.5B-Instruct, for one GPU or eight TPU v5e.

Claim:    none yet: planned, not run. The table in docs/scaling.md lists the devices
          that it fits on and a bound on its speed.
Command:  make train EXP=opo_qwen2_5_0_5b_gsm8k
Hardware: a v5e-8 (make plan … TOPOLOGY=v5e:2x4); one v5e chip with
          --algorithm.micro-batch-tokens 8192; one GPU of 40 GB, or of 24 GB with
          --algorithm.micro-batch-tokens 16384. The GPU sizes are estimates from the
          plan for one v6e chip (24 GiB in the update, start policy included), as JAX
          allocates 75 % of a GPU's memory; the experiment has not run on a GPU.
Result:   see experiments/README.md.
"""

from opo_jax.config import (
  Algorithm,
  Checkpoint,
  Config,
  Data,
  Eval,
  Mesh,
  Model,
  Optimizer,
  Reward,
  Rollout,
)


def get_config() -> Config:
  return Config(
    experiment="opo_qwen2_5_0_5b_gsm8k",
    steps=200,
    model=Model(path="Qwen/Qwen2.5-0.5B-Instruct", remat="block"),
    data=Data(
      train="gsm8k",
      tokenizer="",
      instruction=(
        "Please reason step by step, and put your final answer within \\boxed{}."
      ),
    ),
    reward=Reward(verifier="math", workers=8),
    rollout=Rollout(
      prompts_per_step=128, group_size=8, max_prompt_tokens=512, max_new_tokens=1024
    ),
    algorithm=Algorithm(micro_batch_tokens=65_536),
    optimizer=Optimizer(learning_rate=1e-6),
    mesh=Mesh(data=1, fsdp=-1, tensor=1),
    checkpoint=Checkpoint(every=20),
    eval=Eval(every=20, benchmarks=("gsm8k",), problems=256, samples=4),
  )
