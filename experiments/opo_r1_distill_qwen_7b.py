"""The paper's run: OPO on DeepSeek-R1-Distill-Qwen-7B with Skywork-OR1's mathematics.

Claim:    none of ours yet: planned, not run (docs/scaling.md). The paper
          (https://arxiv.org/abs/2505.23585) reports pass@1 of 95.26 on MATH-500 and
          68.50 on AIME 2024, against 95.10 and 67.96 with GRPO.
Command:  make train EXP=opo_r1_distill_qwen_7b
Hardware: 64 TPUs with these settings, v5p:4x4x4 or v6e:8x8; the smallest v5p slice is
          one host, v5p:2x2x1, with --algorithm.micro-batch-tokens 40960. Responses of
          32,768 tokens fit both slices of 64 with the flags in docs/scaling.md.
Result:   see experiments/README.md.

From the paper: model, data, 8 responses per prompt, exact on-policy, rule-based 0/1
reward, no KL and no entropy term. Not stated there, taken from the closest public
recipe for this model and data (Skywork-OR1 7B): 256 prompts per step, learning rate
1e-6, temperature 1, prompts of up to 2,048 and responses of up to 8,192 tokens.
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
    experiment="opo_r1_distill_qwen_7b",
    steps=500,
    model=Model(path="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", remat="block"),
    data=Data(
      train="skywork_or1_math",
      tokenizer="",
      instruction=(
        "Please reason step by step, and put your final answer within \\boxed{}."
      ),
    ),
    reward=Reward(verifier="math", workers=16),
    rollout=Rollout(
      prompts_per_step=256, group_size=8, max_prompt_tokens=2048, max_new_tokens=8192
    ),
    algorithm=Algorithm(micro_batch_tokens=655_360),
    optimizer=Optimizer(learning_rate=1e-6),
    mesh=Mesh(data=1, fsdp=-1, tensor=1),
    checkpoint=Checkpoint(every=10),
    eval=Eval(
      every=50,
      benchmarks=("math500", "aime24", "aime25"),
      problems=0,
      samples=16,
      temperature=0.6,
    ),
  )
