"""How much of scoring is hidden behind sampling, with a verifier that takes its time.

    python benchmarks/overlap.py [--verify-ms 20] [--workers 2]

A policy of the quickstart's size gives 32 x 8 answers of up to 256 tokens in 32 slots.
They are scored in turns: after sampling, and while others are still being sampled. The
verifier only sleeps, so that it takes no core from the sampler, as on an accelerator.
"""

import argparse
import functools
import statistics
import time


def verify(response: str, reference: str, *, seconds: float) -> float:
  """A slow verifier; at the top of a module without JAX, for its processes."""
  time.sleep(seconds)
  return float(len(response) > len(reference))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--verify-ms", type=float, default=20.0)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--rounds", type=int, default=5)
  options = parser.parse_args()

  import pathlib
  import tempfile

  import numpy as np

  from opo_jax import build
  from opo_jax.config import Config, Model, Reward, Rollout
  from opo_jax.data import sources
  from opo_jax.rewards import RewardPool
  from opo_jax.run import Run
  from opo_jax.scorer import on_host

  config = Config(
    model=Model(initializer_range=0.08),
    rollout=Rollout(max_new_tokens=256, slots=32),
    reward=Reward(workers=options.workers, truncated="scored"),
  )
  slow = functools.partial(verify, seconds=options.verify_ms / 1000)
  seconds = {(early, phase): [] for early in (0, 1) for phase in ("rollout", "reward")}
  with (
    tempfile.TemporaryDirectory() as directory,
    RewardPool(slow, workers=options.workers, timeout_s=5) as pool,
  ):
    run = Run(config, pathlib.Path(directory))
    sampler, scorer = build.make_sampler(config), run.make_scorer()
    scorer.pool, policy = pool, run.init_policy()
    problems = sources.load(config.data.train, "train")[: 32 * (1 + options.rounds)]
    for turn in range(1 + options.rounds):  # the first one compiles
      asked, rewards = problems[32 * turn :][:32], {}
      for early in (0, 1):
        begin = time.perf_counter()
        scorer.begin(asked)
        rollouts = sampler.sample(
          policy,
          run.encode(asked),
          build.rollout_params(config),
          seed=turn,
          on_ended=scorer.add if early else None,
        )
        rollouts = on_host(rollouts, run.mesh)
        sampled = time.perf_counter()
        rewards[early] = scorer.finish(rollouts).verified
        if turn:
          seconds[early, "rollout"].append(sampled - begin)
          seconds[early, "reward"].append(time.perf_counter() - sampled)
      np.testing.assert_array_equal(rewards[0], rewards[1])
      count, length = len(rewards[0]), float(rollouts.lengths.mean())
  print(
    f"{count} answers of {length:.0f} tokens on average; {options.workers} workers,"
    f" {options.verify_ms:g} ms an answer: {count * options.verify_ms / 1000:.2f} s of"
    " verification"
  )
  for early, name in enumerate(("after sampling", "while sampling")):
    rollout, reward = (
      statistics.median(seconds[early, phase]) for phase in ("rollout", "reward")
    )
    print(
      f"scored {name}: rollout {rollout:.2f} s, reward {reward:.2f} s,"
      f" together {rollout + reward:.2f} s (medians of {options.rounds})"
    )
  print(f"{scorer.batch.num_early} of {count} were scored before sampling ended")


if __name__ == "__main__":
  main()
