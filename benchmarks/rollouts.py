"""Rollouts per second: ours with and without refill, beside TRL and Tunix.

    python benchmarks/rollouts.py [--repeats 3] [--only dense long-tail step]
    make bench-peers                  (the same, with the peers in a venv of their own)

bench-small is a Qwen2 with vocabulary 4096, width 256, MLP 1024, 6 layers, 8 heads, 2
kv heads, tied, float32. All contenders get the same shapes, lengths and threads:

    dense      16 prompts of 64 tokens x 8 samples, all of exactly 128 new tokens
    long-tail  64 prompts of 64 tokens x 8 samples in 64 slots, each length given:
               log-normal, mean a quarter of the limit of 512. With refill off, 64
               rollouts wait for the longest of them, with and without moving the busy
               slots of a batch together when most are idle
    step       the time of one decode step over its floor: the bytes of parameters and
               attended cache over the measured bandwidth of a copy, or its FLOPs over
               the measured rate of a matrix product, whichever takes longer; on a GPU
               or TPU also for Qwen2 shapes of 0.5B and 1.5B parameters in bfloat16

Machines differ and are noisy: what is compared is measured here in one run, our own
variants in turns and a peer between two of ours (in long-tail: after), and the ratios
are what counts.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax.models import ModelConfig, Policy
from opo_jax.sampler import decoding, generate, schedule

BENCH_SMALL = ModelConfig(4096, 256, 1024, 6, 8, 2, 32)
ACCELERATOR_SHAPES = {
  "Qwen2 0.5B": ModelConfig(151936, 896, 4864, 24, 14, 2, 64),
  "Qwen2 1.5B": ModelConfig(151936, 1536, 8960, 28, 12, 2, 128),
}
PEERS = pathlib.Path(__file__).parent / "peers"
SAMPLES, PROMPT_TOKENS = 8, 64


def prompts(count: int, seed: int = 0) -> list[list[int]]:
  return np.random.default_rng(seed).integers(3, 4096, (count, PROMPT_TOKENS)).tolist()


def log_normal_lengths(count: int, limit: int) -> np.ndarray:
  """Log-normal lengths in [1, limit], their mean a quarter of the limit."""
  normal = np.random.default_rng(1).standard_normal(count)
  scales = np.exp(np.linspace(0, np.log(limit), 1000))
  lengths = np.clip(scales[:, None] * np.exp(normal), 1, limit).astype(int)
  return lengths[np.abs(lengths.mean(axis=1) - limit / 4).argmin()]


def seconds(function) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


def in_turns(contenders: dict, repeats: int) -> dict[str, list[float]]:
  """Seconds of each contender, one after the other, after a call that compiles."""
  for function in contenders.values():
    jax.block_until_ready(function())
  times = {name: [] for name in contenders}
  for _ in range(repeats):
    for name, function in contenders.items():
      times[name].append(seconds(function))
  return times


def peer(python: str | None, name: str, task: str, repeats: int, lengths=None):
  """Seconds of a peer's script, which runs in its own interpreter; None without one."""
  if python is None:
    return None
  command = [python, PEERS / f"{name}_peer.py", "--task", task]
  command += ["--repeats", str(repeats), "--threads", str(len(os.sched_getaffinity(0)))]
  with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    if lengths is not None:
      json.dump([int(length) for length in lengths], file)
      file.flush()
      command += ["--lengths", file.name]
    done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"{name} did not run:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.strip().splitlines()[-1])["seconds"]


def table(tokens: int, times: dict[str, list[float] | None]) -> None:
  """Median, range, tokens/s, and how many times as fast the first row is."""
  times = {name: values for name, values in times.items() if values}
  first = statistics.median(next(iter(times.values())))
  print(f"{'':36}  median s  (min, max)        tokens/s  first is faster by")
  for name, values in times.items():
    median = statistics.median(values)
    print(
      f"{name:36}  {median:8.2f}  ({min(values):.2f}, {max(values):.2f})"
      f"  {tokens / median:12.0f}  {median / first:8.2f}"
    )


def dense(policy: Policy, repeats: int, python: str | None) -> None:
  asked = prompts(16)

  def ours():
    return generate(
      policy, asked, samples_per_prompt=SAMPLES, max_new_tokens=128, eos_ids=()
    )

  print("\ndense: 16 x 8 rollouts of 64 + 128 tokens")
  before = in_turns({"opo_jax": ours}, repeats)
  peers = {
    "TRL": peer(python, "trl", "dense", repeats),
    "Tunix": peer(python, "tunix", "dense", repeats),
  }
  after = in_turns({"opo_jax": ours}, repeats)
  table(16 * 8 * 128, {"opo_jax": before["opo_jax"] + after["opo_jax"], **peers})


def long_tail(policy: Policy, repeats: int, python: str | None) -> None:
  asked, slots = prompts(64), 64
  lengths = log_normal_lengths(64 * SAMPLES, 512)
  options = dict(samples_per_prompt=SAMPLES, eos_ids=())

  def refill():
    return generate(policy, asked, max_new_tokens=lengths, slots=slots, **options)

  def batches():
    """Refill off: 64 rollouts at a time, the next 64 when the longest has ended."""
    step = slots // SAMPLES
    return [
      generate(
        policy,
        asked[i : i + step],
        max_new_tokens=lengths[i * SAMPLES : (i + step) * SAMPLES],
        **options,
      )
      for i in range(0, len(asked), step)
    ]

  print(
    f"\nlong-tail: 64 x 8 rollouts of 64 + 1 to 512 tokens in 64 slots, mean"
    f" {lengths.mean():.0f}"
  )
  contenders = {
    "opo_jax, refill": refill,
    "opo_jax, refill off, busy ones moved": batches,
  }
  times = in_turns(contenders, repeats)
  most, schedule.MIN_SLOTS = schedule.MIN_SLOTS, slots
  decoding.decode.clear_cache()
  times |= in_turns({"opo_jax, refill off": batches}, repeats)
  schedule.MIN_SLOTS = most
  times["TRL"] = peer(python, "trl", "long_tail", 1, lengths)
  table(int(lengths.sum()), times)


def decode_step(repeats: int) -> None:
  accelerator = jax.default_backend() != "cpu"
  dtype = jnp.bfloat16 if accelerator else jnp.float32
  bandwidth, rate = measure_bandwidth(accelerator), measure_rate(accelerator, dtype)
  print(
    f"\nstep: copies at {bandwidth / 1e9:.0f} GB/s, products at {rate / 1e12:.2f}"
    f" TFLOP/s in {jnp.dtype(dtype).name}"
  )
  print(
    "shape        slots  rounds  length   ms/step   floor: bytes     FLOPs"
    "    floor / step"
  )
  shapes = {"bench-small": BENCH_SMALL} | (ACCELERATOR_SHAPES if accelerator else {})
  for name, config in shapes.items():
    policy = Policy(config, jax.random.key(0), dtype=dtype)
    for slots, tokens, rounds in itertools.product(
      (64, 256) if accelerator else (64, 128),
      (512, 2048) if accelerator else (128, 512),
      (1, 2),
    ):
      time_s = decode_step_s(policy, slots, tokens, rounds, repeats)
      floors = decode_floors(config, slots, tokens, dtype, bandwidth, rate)
      print(
        f"{name:12} {slots:5}  {rounds:6}  {tokens:6}  {1e3 * time_s:8.2f}"
        f"  {1e3 * floors[0]:13.2f}  {1e3 * floors[1]:8.2f}"
        f"  {max(floors) / time_s:12.0%}"
      )


def decode_step_s(policy, slots, tokens, rounds, repeats) -> float:
  """Seconds of one decode step, the mean over whole responses.

  In one round, the rows of a group lie together and share their prompt's keys; in two,
  slots are refilled, and each gathers its prompt's.
  """
  asked = prompts(rounds * slots // SAMPLES)

  def rollouts(length):
    options = dict(samples_per_prompt=SAMPLES, eos_ids=(), slots=slots)
    return lambda: generate(policy, asked, max_new_tokens=length, **options)

  times = in_turns({"short": rollouts(1), "long": rollouts(tokens)}, repeats)
  short, long = (statistics.median(times[name]) for name in ("short", "long"))
  return (long - short) / (rounds * (tokens - 1))


def decode_floors(config, slots, tokens, dtype, bandwidth, rate) -> tuple[float, float]:
  """Seconds that moving the bytes, and that the FLOPs, of one step take at least."""
  D, F, E = config.width, config.mlp_width, config.head_dim
  H, K = config.num_heads, config.num_kv_heads
  layer = D * E * (H + 2 * K) + H * E * D + 3 * D * F
  matrices = config.num_layers * layer + config.vocab_size * D
  # A prompt's keys and values serve its whole group; a slot's own grow from 0.
  attended = PROMPT_TOKENS + tokens / 2
  cache = 2 * config.num_layers * K * E * slots * (PROMPT_TOKENS / SAMPLES + tokens / 2)
  bytes_moved = jnp.dtype(dtype).itemsize * (matrices + cache)
  flops = slots * (2 * matrices + 4 * config.num_layers * H * E * attended)
  return bytes_moved / bandwidth, flops / rate


def measure_bandwidth(accelerator: bool) -> float:
  """Bytes read and written per second by a copy."""
  array = jnp.zeros(2**28 if accelerator else 2**25, jnp.float32)
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  array = jax.block_until_ready(copy(array))
  best = float("inf")
  for _ in range(10):
    start = time.perf_counter()
    array = jax.block_until_ready(copy(array))
    best = min(best, time.perf_counter() - start)
  return 2 * array.nbytes / best


def measure_rate(accelerator: bool, dtype) -> float:
  """FLOP/s of a large matrix product."""
  n = 8192 if accelerator else 2048
  matrix = jnp.ones((n, n), dtype)
  product = jax.jit(lambda x: x @ x)
  jax.block_until_ready(product(matrix))
  return 2 * n**3 / min(seconds(lambda: product(matrix)) for _ in range(5))


def main(repeats: int, only: list[str], python: str | None) -> None:
  print(
    f"{jax.default_backend()}, {jax.device_count()} device(s), JAX {jax.__version__}"
  )
  policy = Policy(BENCH_SMALL, jax.random.key(0))
  if "dense" in only:
    dense(policy, repeats, python)
  if "long-tail" in only:
    long_tail(policy, repeats, python)
  if "step" in only:
    decode_step(repeats)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=3)
  tasks = ["dense", "long-tail", "step"]
  parser.add_argument("--only", nargs="+", choices=tasks, default=tasks)
  parser.add_argument("--peers", help="the interpreter of the peers' venv")
  arguments = parser.parse_args()
  main(arguments.repeats, arguments.only, arguments.peers)
