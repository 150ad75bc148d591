"""Attention by every backend this machine has: errors, time, and share of the peak.

    python benchmarks/attention.py [--lengths 1024 4096 16384] [--heads 28 4]

One row of tokens, the heads of a 7B model, forward and backward. `packed` is the same
row in four segments, as training packs responses. Errors are root mean squares against
the einsum in float32, over the root mean square of what it gives: outputs, and the
worst of the three gradients. FLOPs are those of the causal half: 4 E H T^2 / 2 forward,
twice that backward, what a kernel computes again not counted. The backends take turns,
and CPU times are noisy on a shared machine: look at the ratios of one run.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax.devices import sharding
from opo_jax.models.attention import BACKENDS, Keys, attention, choose_backend

# Dense bfloat16 TFLOP/s of one device, from its maker's data sheet.
PEAKS = {
  "NVIDIA A100": 312,
  "NVIDIA H100": 989,
  "NVIDIA H100 PCIe": 756,
  "NVIDIA H200": 989,
  "TPU v4": 275,
  "TPU v5 lite": 197,
  "TPU v5": 459,
  "TPU v6 lite": 918,
}


def program(backend, segment_ids):
  def weighted_sum(query, key, value, weight):
    out = attention(query, [Keys(key, value)], segment_ids=segment_ids, backend=backend)
    return (weight * out).sum(dtype=jnp.float32), out

  def run(*operands):
    gradients, out = jax.grad(weighted_sum, (0, 1, 2), has_aux=True)(*operands)
    return out, *gradients

  return jax.jit(run)


def operands(length, heads, head_dim, dtype):
  num_heads, num_kv_heads = heads
  keys = jax.random.split(jax.random.key(0), 4)
  of_queries = (1, length, num_heads, head_dim)
  of_keys = (1, num_kv_heads, length, head_dim)
  shapes = of_queries, of_keys, of_keys, of_queries
  return [
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def errors(outputs, exact):
  def rms(array):
    return float(jnp.sqrt(jnp.mean(jnp.square(array.astype(jnp.float32)))))

  out, *gradients = [
    rms(x.astype(jnp.float32) - y) / rms(y) for x, y in zip(outputs, exact, strict=True)
  ]
  return out, max(gradients)


def seconds(run, inputs):
  start = time.perf_counter()
  jax.block_until_ready(run(*inputs))
  return time.perf_counter() - start


def backends(dtype, head_dim):
  for name in BACKENDS:
    try:
      yield choose_backend(
        name, platform=sharding.platform(None), dtype=dtype, head_dim=head_dim
      )
    except ValueError as error:
      print(error)


def main(lengths, heads, head_dim, dtype, repeats) -> None:
  device = jax.devices()[0]
  # The longest name that begins as the device's does: "TPU v5 lite" is no "TPU v5".
  known = [kind for kind in PEAKS if device.device_kind.startswith(kind)]
  peak = PEAKS[max(known, key=len)] if known else None
  print(
    f"{device.device_kind}, JAX {jax.__version__}: {heads[0]} heads, {heads[1]} of"
    f" keys, of width {head_dim}, {dtype}; peak {peak or 'not known'} TFLOP/s"
  )
  names = list(backends(dtype, head_dim))
  print("backend  tokens  layout  error, out  gradient      median   TFLOP/s  of peak")
  for length in lengths:
    packed = np.sort(np.random.default_rng(0).integers(1, 5, (1, length)))
    for layout, segment_ids in {"one": None, "packed": packed}.items():
      inputs = operands(length, heads, head_dim, dtype)
      wide = [array.astype(jnp.float32) for array in inputs]
      with jax.default_matmul_precision("highest"):
        exact = program("einsum", segment_ids)(*wide)
      runs = {name: program(name, segment_ids) for name in names}
      found = {name: errors(run(*inputs), exact) for name, run in runs.items()}
      times = {name: [] for name in names}
      for _ in range(repeats):
        for name, run in runs.items():
          times[name].append(seconds(run, inputs))
      for name in names:
        median = statistics.median(times[name])
        line = f"{name:7} {length:7}  {layout:7}"
        line += f"{found[name][0]:11.1e} {found[name][1]:9.1e} {1e3 * median:8.1f} ms"
        if layout == "one":
          rate = 3 * 2 * head_dim * heads[0] * length**2 / median / 1e12
          line += f" {rate:9.2f}" + (f" {rate / peak:8.1%}" if peak else "")
        print(line)


if __name__ == "__main__":
  on_cpu = sharding.platform(None) == "cpu"
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  lengths = [256, 1024] if on_cpu else [1024, 4096, 16384]
  parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
  parser.add_argument("--heads", type=int, nargs=2, default=[28, 4])
  parser.add_argument("--head-dim", type=int, default=128)
  dtype = "float32" if on_cpu else "bfloat16"
  parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=dtype)
  parser.add_argument("--repeats", type=int, default=5)
  flags = parser.parse_args()
  main(flags.lengths, flags.heads, flags.head_dim, flags.dtype, flags.repeats)
