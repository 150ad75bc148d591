"""Where the time of one RL step goes: rollout and update, in ms and tokens/s.

    python benchmarks/step.py [--repeats 5] [--only quickstart dense layouts long-tail]
    make bench-peers              (with TRL and Tunix beside, in a venv of their own)

    quickstart  the quickstart's shapes
    dense       bench-small (Qwen2, vocabulary 4096, width 256, 6 layers, tied): 16
                prompts of 64 tokens x 8 samples of 128 tokens
    layouts     dense, the update alone: the prompt computed once for its 8 samples, or
                8 times
    long-tail   the update alone: 64 x 8 rollouts of 64 + 1 to 512 tokens, log-normal,
                mean a quarter of the limit, half of the groups without signal; pruned
                and packed, and every rollout in a padded row of its own

Machines differ and are noisy: compare figures of one run with each other, not with
another day's.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rollouts import BENCH_SMALL, in_turns, log_normal_lengths, peer, table

from opo_jax.learner import Algorithm, PolicyGradientLearner
from opo_jax.models import ModelConfig, Policy
from opo_jax.rollouts import Rollouts
from opo_jax.sampler.engine import generate

# model, prompts, prompt tokens, samples, response tokens
QUICKSTART = ModelConfig(32, 128, 384, 2, 4, 2, 32), 32, 15, 8, 32
DENSE = BENCH_SMALL, 16, 64, 8, 128
LONG_TAIL = BENCH_SMALL, 64, 64, 8, 512
# Tokens of a micro-batch: what runs fastest on two cores, and needs little memory.
MICRO_BATCH = 2176
PLAIN = dict(share_prompts=False, prune=False, pack=False)


class Learner:
  """An update with its state, on rollouts that stay the same."""

  def __init__(self, policy, rollouts: Rollouts, rewards: np.ndarray, **options):
    algorithm = Algorithm(require_on_policy=False, **options)
    self.learner = PolicyGradientLearner(algorithm, optax.adamw(1e-6))
    self.rollouts, self.rewards = rollouts, rewards.astype(np.float32)
    self.state, self.metrics = self.learner.init(policy), {}

  def learn(self):
    self.state, measured = self.learner.update(self.state, self.rollouts, self.rewards)
    self.metrics = measured.scalars
    return jax.block_until_ready(self.state.policy)

  def temporary_bytes(self) -> int:
    """What the update of a full batch needs besides state and rollouts."""
    program = self.learner.lower(self.state, self.rollouts).traced
    return program.lower().compile().memory_analysis().temp_size_in_bytes


def make(
  config, prompts, prompt_tokens, samples, tokens, *, lengths, signal=1.0, **options
) -> Learner:
  """A learner on random tokens; only a share `signal` of the groups has one."""
  rng, N = np.random.default_rng(0), prompts * samples
  lengths = np.full(N, tokens) if lengths is None else lengths
  mask = np.arange(tokens) < lengths[:, None]
  logprobs = jnp.where(mask, -np.log(config.vocab_size), 0.0)
  rollouts = Rollouts(
    prompts=jnp.asarray(rng.integers(3, config.vocab_size, (prompts, prompt_tokens))),
    prompt_lengths=jnp.full(prompts, prompt_tokens),
    tokens=jnp.asarray(rng.integers(3, config.vocab_size, (N, tokens))),
    logprobs=logprobs,
    sampling_logprobs=logprobs,
    mask=jnp.asarray(mask),
    lengths=jnp.asarray(lengths),
    prompt_ids=jnp.repeat(jnp.arange(prompts), samples),
    finished=jnp.ones(N, bool),
    temperature=jnp.float32(1.0),
    version=jnp.int32(0),
  )
  rewards = (
    rng.random((prompts, samples)) * (np.arange(prompts) % 16 < 16 * signal)[:, None]
  )
  policy = Policy(config, jax.random.key(0))
  return Learner(policy, rollouts, rewards.reshape(-1), **options)


def milliseconds(function, repeats):
  """Median after one warm-up call, which compiles."""
  times = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(1e3 * (time.perf_counter() - start))
  return statistics.median(times[1:]), times[0]


def whole_step(name, shape, repeats, python):
  config, prompts, prompt_tokens, samples, tokens = shape
  policy = Policy(config, jax.random.key(0))
  rng = np.random.default_rng(0)
  asked = rng.integers(3, config.vocab_size, (prompts, prompt_tokens)).tolist()

  def rollout():
    return generate(
      policy, asked, samples_per_prompt=samples, max_new_tokens=tokens, eos_ids=()
    )

  times = {"rollout": milliseconds(rollout, repeats)}
  rewards = rng.integers(0, 2, prompts * samples)
  learner = Learner(policy, rollout(), rewards, micro_batch_tokens=MICRO_BATCH)
  times["update"] = milliseconds(learner.learn, repeats)
  total = sum(median for median, _ in times.values())
  print("\nshape         phase     first call     median    tokens/s    share of step")
  for phase, (median, first) in times.items():
    rate = 1e3 * prompts * samples * tokens / median
    print(
      f"{name:12}  {phase:8} {first:8.0f} ms {median:8.0f} ms  {rate:10.0f}"
      f"    {median / total:12.0%}"
    )

  def step():
    learner.rollouts = rollout()
    return learner.learn()

  if python:
    print(f"\nwhole step of {name}")
    times = in_turns({"opo_jax": step}, repeats)
    for label in ("TRL", "Tunix"):
      times[label] = peer(python, label.lower(), "step", repeats)
    table(prompts * samples * tokens, times)


def compare(title, learners: dict[str, Learner], repeats: int) -> None:
  """The same update in several ways, in turns."""
  print(f"\n{title}")
  times = in_turns({name: each.learn for name, each in learners.items()}, repeats)
  tokens = int(next(iter(learners.values())).rollouts.mask.sum())
  table(tokens, times)
  for name, each in learners.items():
    metrics = {k: float(v) for k, v in each.metrics.items() if k.startswith("update/")}
    print(f"{name:36}  {metrics}")


def main(repeats: int, only: list[str], python: str | None) -> None:
  print(
    f"{jax.default_backend()}, {jax.device_count()} device(s), JAX {jax.__version__}"
  )
  if "quickstart" in only:
    whole_step("quickstart", QUICKSTART, repeats, None)
  if "dense" in only:
    whole_step("bench-small", DENSE, repeats, python)
  options = dict(micro_batch_tokens=MICRO_BATCH)
  if "layouts" in only:
    learners = {
      "prompts shared": make(*DENSE, lengths=None, **options),
      "prompts repeated": make(*DENSE, lengths=None, share_prompts=False, **options),
    }
    compare("update of dense", learners, repeats)
  if "long-tail" in only:
    options |= dict(lengths=log_normal_lengths(512, 512), signal=0.5)
    learners = {
      "pruned and packed": make(*LONG_TAIL, **options),
      "padded, not pruned": make(*LONG_TAIL, **options, **PLAIN),
    }
    compare("update of long-tail", learners, repeats)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=5)
  tasks = ["quickstart", "dense", "layouts", "long-tail"]
  parser.add_argument("--only", nargs="+", choices=tasks, default=tasks)
  parser.add_argument("--peers", help="the interpreter of the peers' venv")
  arguments = parser.parse_args()
  main(arguments.repeats, arguments.only, arguments.peers)
