"""Where the time of one RL step goes: rollout and update, in ms and tokens/s.

    python benchmarks/step.py [--repeats 5]
    make bench-peers              (with TRL and Tunix beside, in a venv of their own)

Two shapes: the quickstart's, and bench-small (Qwen2, vocabulary 4096, width 256, 6
layers, tied; 16 prompts of 64 tokens x 8 samples of 128 tokens). Machines differ and
are noisy: compare figures of one run with each other, not with another day's.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rollouts import in_turns, peer, table

from opo_jax import trainer
from opo_jax.advantages import ESTIMATORS
from opo_jax.models import ModelConfig, Policy
from opo_jax.sampler import generate

# name: (model, prompts, prompt tokens, samples, response tokens)
SHAPES = {
  "quickstart": (ModelConfig(32, 128, 384, 2, 4, 2, 32), 32, 15, 8, 32),
  "bench-small": (ModelConfig(4096, 256, 1024, 6, 8, 2, 32), 16, 64, 8, 128),
}


def milliseconds(function, repeats):
  """Median after one warm-up call, which compiles."""
  times = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(1e3 * (time.perf_counter() - start))
  return statistics.median(times[1:]), times[0]


def main(repeats: int, python: str | None) -> None:
  print(
    f"{jax.default_backend()}, {jax.device_count()} device(s), JAX {jax.__version__}"
  )
  print("shape         phase     first call     median    tokens/s    share of step")
  for name, (config, prompts, prompt_tokens, samples, tokens) in SHAPES.items():
    policy = Policy(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    asked = rng.integers(3, config.vocab_size, (prompts, prompt_tokens)).tolist()

    def rollout(policy=policy, asked=asked, samples=samples, tokens=tokens):
      return generate(
        policy, asked, samples_per_prompt=samples, max_new_tokens=tokens, eos_ids=()
      )

    algorithm = trainer.Algorithm(
      ESTIMATORS["opo"],
      trainer.OBJECTIVES["policy_gradient"],
      require_on_policy=False,
    )
    optimizer = optax.adamw(1e-6)
    update = trainer.Update(algorithm, optimizer)
    copy = jax.tree.map(jnp.copy, policy)
    state = trainer.TrainState(copy, optimizer.init(copy), jnp.int32(0))
    times = {"rollout": milliseconds(rollout, repeats)}
    rollouts = rollout()
    rewards = jnp.asarray(rng.integers(0, 2, prompts * samples), jnp.float32)

    def learn(update=update, rollouts=rollouts, rewards=rewards):
      nonlocal state
      state, metrics, _ = update(state, rollouts, rewards, jnp.ones_like(rewards) > 0)
      return metrics

    times["update"] = milliseconds(learn, repeats)
    total = sum(median for median, _ in times.values())
    for phase, (median, first) in times.items():
      rate = 1e3 * prompts * samples * tokens / median
      print(
        f"{name:12}  {phase:8} {first:8.0f} ms {median:8.0f} ms  {rate:10.0f}"
        f"    {median / total:12.0%}"
      )

    def step(rollout=rollout, learn=learn):
      rollout()
      return learn()

    if python and name == "bench-small":
      print("\nwhole step of bench-small")
      times = in_turns({"opo_jax": step}, repeats)
      for label in ("TRL", "Tunix"):
        times[label] = peer(python, label.lower(), "step", repeats)
      table(prompts * samples * tokens, times)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--peers", help="the interpreter of the peers' venv")
  arguments = parser.parse_args()
  main(arguments.repeats, arguments.peers)
