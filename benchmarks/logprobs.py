"""Log-probs without all logits against plain `log_softmax`: time and memory.

    python benchmarks/logprobs.py [--tokens 2048] [--full] [--repeats 3]

Qwen2-0.5B's vocabulary and width, 151,936 x 896, in bfloat16. `--full` is 8,192
tokens, where the plain version takes about 16 GB. Memory is the temporary memory that
XLA plans for the compiled program, inputs and gradients aside. The two versions take
turns, and CPU seconds (all threads, this process only) stand beside wall time:
machines are shared and noisy, so look at the ratios of one run.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from opo_jax.logprobs import linear_logprobs


def plain(hidden, unembedding, targets):
  logits = jnp.einsum(
    "td,vd->tv", hidden, unembedding, preferred_element_type=jnp.float32
  )
  logprobs = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]


def blockwise(hidden, unembedding, targets):
  return linear_logprobs(hidden, unembedding, targets).logprob


def seconds(program, args):
  wall, cpu = time.perf_counter(), time.process_time()
  jax.block_until_ready(program(*args))
  return time.perf_counter() - wall, time.process_time() - cpu


def main(tokens: int, vocab: int, width: int, dtype: str, repeats: int) -> None:
  print(
    f"{jax.default_backend()}, {jax.device_count()} device(s), JAX {jax.__version__}:"
    f" {tokens} tokens x {vocab} words x width {width}, {dtype}"
  )
  keys = jax.random.split(jax.random.key(0), 4)
  args = (
    jax.random.normal(keys[0], (tokens, width)).astype(dtype),
    (0.05 * jax.random.normal(keys[1], (vocab, width))).astype(dtype),
    jax.random.randint(keys[2], (tokens,), 0, vocab),
    jax.random.normal(keys[3], (tokens,)),
  )

  def loss_of(version):
    def loss(hidden, unembedding, targets, weights):
      return jnp.vdot(weights, version(hidden, unembedding, targets))

    return loss

  phases = {
    "forward": lambda loss: loss,
    "forward + backward": lambda loss: jax.value_and_grad(loss, argnums=(0, 1)),
  }
  print("                      temporary    median wall     CPU time")
  for phase, transform in phases.items():
    programs = {
      version.__name__: jax.jit(transform(loss_of(version))).lower(*args).compile()
      for version in (plain, blockwise)
    }
    times = {name: [] for name in programs}
    for _ in range(repeats + 1):  # the first round warms up
      for name, program in programs.items():
        times[name].append(seconds(program, args))
    rows = {}
    for name, program in programs.items():
      wall, cpu = map(statistics.median, zip(*times[name][1:], strict=True))
      memory = program.memory_analysis().temp_size_in_bytes / 1e9
      rows[name] = memory, wall, cpu
      print(f"{name:20} {memory:8.3f} GB {wall:12.3f} s {cpu:10.3f} s  {phase}")
    ratios = [p / b for p, b in zip(rows["plain"], rows["blockwise"], strict=True)]
    print("plain / blockwise    {:8.1f}    {:12.2f}   {:10.2f}".format(*ratios))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=int, default=2048)
  parser.add_argument("--full", action="store_true", help="8,192 tokens")
  parser.add_argument("--vocab", type=int, default=151936)
  parser.add_argument("--width", type=int, default=896)
  parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
  parser.add_argument("--repeats", type=int, default=3)
  flags = parser.parse_args()
  tokens = 8192 if flags.full else flags.tokens
  main(tokens, flags.vocab, flags.width, flags.dtype, flags.repeats)
