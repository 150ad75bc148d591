"""How on-policy a run is: sampler against learner, by dtype and response length.

    python benchmarks/on_policy_gap.py [--model DIRECTORY] [--lengths 32 128 512]

Both are the same parameters and the same model code, but not the same program: the
sampler feeds one token at a time through stored keys and values, the learner whole
rows. Every difference is rounding. For each dtype of activations, dtype of the stored
keys and values, and length, on the backend it runs on:

    max, mean |log p_sampler - log p_learner| over all tokens, in nats
    KL(sampler || learner) per token, k3, and its standard error, in nats
    equal: the share of tokens whose two log-probs are the same float32
    first, last: the mean over the first and the last eighth of the positions

Without --model the policy is bench-small with weights large enough to be opinionated:
an entropy near that of a trained model, far below the log of the vocabulary.

Rows of more than 128 columns go through the platform's attention kernel, and decoding
does not. `--attention splash` has the kernel on a CPU too, simulated: the gap
without the chip.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax import losses, models
from opo_jax.learner import response_logprobs
from opo_jax.models.attention import BACKENDS
from opo_jax.sampler import generate

BENCH_SMALL = models.ModelConfig(4096, 256, 1024, 6, 8, 2, 32, initializer_range=0.12)
# Activations, stored keys and values.
DTYPES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"))


def gap(policy, prompts, length: int, cache_dtype: str) -> dict[str, float]:
  """The figures of one row of the table."""
  rollouts = generate(
    policy,
    prompts,
    samples_per_prompt=4,
    max_new_tokens=length,
    eos_ids=(),
    cache_dtype=cache_dtype,
  )
  learner = response_logprobs(policy, rollouts)
  difference = np.abs(np.asarray(rollouts.logprobs - learner, np.float64))
  kl = np.asarray(losses.kl(rollouts.logprobs, learner, rollouts.mask), np.float64)
  eighth = max(length // 8, 1)
  return {
    "max": difference.max(),
    "mean": difference.mean(),
    "kl": kl.mean(),
    "kl_error": kl.std() / np.sqrt(kl.size),
    "equal": (difference == 0).mean(),
    "first": difference[:, :eighth].mean(),
    "last": difference[:, -eighth:].mean(),
    "entropy": -np.asarray(learner, np.float64).mean(),
  }


def main(model: str | None, lengths: list[int], attention: str | None) -> None:
  print(f"{jax.default_backend()}, JAX {jax.__version__}")
  print(
    "activations  keys, values  length       max      mean        KL (+- error)"
    "   equal     first      last  entropy"
  )
  rng = np.random.default_rng(0)
  for dtype, cache_dtype in DTYPES:
    if model:
      policy = models.load(model, dtype=jnp.dtype(dtype))
    else:
      policy = models.Policy(BENCH_SMALL, jax.random.key(0), dtype=dtype)
    policy.attention = attention or policy.attention
    prompts = rng.integers(3, min(policy.config.vocab_size, 4096), (8, 48)).tolist()
    for length in lengths:
      row = gap(policy, prompts, length, cache_dtype)
      print(
        f"{dtype:11}  {cache_dtype:12}  {length:6}"
        f"  {row['max']:8.1e}  {row['mean']:8.1e}"
        f"  {row['kl']:8.1e} ({row['kl_error']:.0e})  {row['equal']:6.1%}"
        f"  {row['first']:8.1e}  {row['last']:8.1e}  {row['entropy']:7.2f}"
      )


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", help="directory or hub id in Hugging Face format")
  parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
  parser.add_argument("--attention", choices=BACKENDS, help="of whole sequences")
  arguments = parser.parse_args()
  main(arguments.model, arguments.lengths, arguments.attention)
