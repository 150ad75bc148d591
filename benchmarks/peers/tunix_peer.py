"""Tunix's vanilla sampler and GRPOLearner on bench-small, on CPU in float32.

    .venv-peers/bin/python benchmarks/peers/tunix_peer.py --task dense
    .venv-peers/bin/python benchmarks/peers/tunix_peer.py --task step

The model is Tunix's own Qwen2; its matrices keep Tunix's initial values, zeros in the
MLP among them, which changes no shape. bench_small.py says what is printed. Chosen for
speed: beta 0 (no reference model), all 128 rollouts in one call, sampler and trainer
sharing weights on one mesh, no rematerialisation, and a cache of exactly 64 + 128
positions, since every position of the cache is attended in every step (the default is
1,024). The first repeat compiles and is not counted. One repeat on a busy machine of 2
cores: the dense rollout 5.8 CPU seconds of both threads (`cpu_s`) and 1.5 GB, a step
with micro-batches of 32 rollouts 29.6 and 4.0 GB. The sampler runs until its longest
row ends and ends rows at end tokens only, so there is no long_tail task.
"""

import argparse

import bench_small as bench

DENSE_ROWS = bench.DENSE_PROMPTS * bench.SAMPLES_PER_PROMPT


def make_model():
  import jax
  from flax import nnx
  from tunix.models.qwen2 import model as qwen2

  config = qwen2.ModelConfig(
    num_layers=bench.LAYERS,
    vocab_size=bench.VOCABULARY,
    embed_dim=bench.WIDTH,
    hidden_dim=bench.MLP,
    num_heads=bench.HEADS,
    head_dim=bench.HEAD_DIM,
    num_kv_heads=bench.KV_HEADS,
    rope_theta=10_000,
    norm_eps=1e-6,
    use_tied_embedding=True,
  )
  return qwen2.Qwen2(config, rngs=nnx.Rngs(params=jax.random.key(0)))


def rollout_config():
  """On-policy sampling of exactly 128 tokens; the cache is as long as it must be."""
  from tunix.rl.rollout.base_rollout import RolloutConfig

  return RolloutConfig(
    max_tokens_to_generate=bench.DENSE_TOKENS,
    max_prompt_length=bench.PROMPT_TOKENS,
    kv_cache_size=bench.PROMPT_TOKENS + bench.DENSE_TOKENS,
    temperature=1.0,
    top_p=1.0,
    top_k=None,
  )


def texts() -> list[str]:
  return [bench.as_text(ids) for ids in bench.prompts(bench.DENSE_PROMPTS)]


def dense(arguments) -> dict:
  from tunix.rl.rollout.base_rollout import CacheConfig
  from tunix.rl.rollout.vanilla_rollout import VanillaRollout

  config = rollout_config()
  engine = VanillaRollout(
    make_model(),
    bench.tokenizer(),
    CacheConfig(config.kv_cache_size, bench.LAYERS, bench.KV_HEADS, bench.HEAD_DIM),
  )
  rows = [text for text in texts() for _ in range(bench.SAMPLES_PER_PROMPT)]
  watch = bench.Stopwatch()
  for _ in range(arguments.repeats + 1):  # the first one compiles
    watch.restart()
    output = engine.generate(rows, config)
    watch.lap()
    lengths = {len(tokens) for tokens in output.tokens}
    assert lengths == {bench.DENSE_TOKENS}, lengths
  return {
    "tokens": len(rows) * bench.DENSE_TOKENS,
    "seconds": watch.wall_s[1:],
    "rollout_s": watch.wall_s[1:],
    "update_s": [],
    "cpu_s": watch.cpu_s[1:],
    "settings": {"rows_per_call": len(rows)},
  }


def step(arguments) -> dict:
  import jax
  import numpy as np
  import optax
  from flax import nnx
  from tunix.rl import rl_cluster
  from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  role = rl_cluster.Role
  cluster = rl_cluster.RLCluster(
    actor=make_model(),
    tokenizer=bench.tokenizer(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys((role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh),
      rollout_engine="vanilla",
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-6),
        eval_every_n_steps=1_000_000,
        max_steps=arguments.repeats + 1,
        mini_batch_size=bench.DENSE_PROMPTS,
        train_micro_batch_size=arguments.micro_batch // bench.SAMPLES_PER_PROMPT,
        rollout_micro_batch_size=bench.DENSE_PROMPTS,
      ),
      rollout_config=rollout_config(),
    ),
  )
  learner = GRPOLearner(
    rl_cluster=cluster,
    algo_config=GRPOConfig(num_generations=bench.SAMPLES_PER_PROMPT, beta=0.0),
    reward_fns=bench.alternating_rewards,
  )
  steps, sampling = bench.Stopwatch(), bench.Stopwatch()
  generate, run_step = cluster.generate, learner._run_global_step

  def timed_rollout(*args, **kwargs):
    sampling.restart()
    output = generate(*args, **kwargs)
    sampling.lap()
    assert output.left_padded_prompt_tokens.shape == (DENSE_ROWS, bench.PROMPT_TOKENS)
    assert sum(len(t) for t in output.tokens) == DENSE_ROWS * bench.DENSE_TOKENS
    return output

  def timed_step(*args, **kwargs):
    run_step(*args, **kwargs)
    jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
    steps.lap()

  cluster.generate, learner._run_global_step = timed_rollout, timed_step
  learner.train([{"prompts": np.array(texts())}] * (arguments.repeats + 1))
  assert len(sampling.wall_s) == len(steps.wall_s) == arguments.repeats + 1
  return {
    "tokens": DENSE_ROWS * bench.DENSE_TOKENS,
    **bench.split(steps, sampling),
    "settings": {"micro_batch": arguments.micro_batch},
  }


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--micro-batch", type=int, default=32)


if __name__ == "__main__":
  tasks = {"dense": dense, "step": step}
  bench.main(__doc__.splitlines()[0], "google-tunix", "tunix", tasks, add_arguments)
