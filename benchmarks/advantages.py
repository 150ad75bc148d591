"""Time and memory of the advantages beside their plain versions.

    python benchmarks/advantages.py [--rows 1024 8192 65536] [--group 8] [--repeats 20]

Each estimator on the same rows, group ids shuffled:

    ours     one fused segment reduction, `opo_jax.advantages`
    unfused  the same arithmetic with a segment sum for each column
    formula  jitted too, the bare formula: no rows that are not valid, no empty groups,
             no zero that is exact, and a segment sum for each of its sums
    loop     a Python loop over rows and groups on the host, as public trainers have it

and, where JAX sees several devices, the first two with rows sharded over all. The
versions take turns, so that a busy machine slows all of them; compare the ratios of one
run. Memory is what the compiled program needs beside its arguments and result.
(XLA_FLAGS=--xla_force_host_platform_device_count=8 simulates devices on a CPU: that
shows what it costs to exchange sums, not what more devices are worth.)
"""

import argparse
import collections
import functools
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opo_jax import advantages
from opo_jax.advantages import ESTIMATORS


def unfused(name, *arrays, num_groups):
  def sums(columns, ids, num_groups):
    return [
      jax.ops.segment_sum(column, ids, num_segments=num_groups)[ids]
      for column in columns
    ]

  with mock.patch.object(advantages, "_group_sums", sums):
    return ESTIMATORS[name](*arrays, num_groups=num_groups)


def formula(name, rewards, lengths, ids, *, num_groups):
  """The formula as it reads, a segment sum for each of its sums."""
  total = functools.partial(jax.ops.segment_sum, num_segments=num_groups)
  lengths = lengths.astype(jnp.float32)
  if name == "grpo":
    count = total(jnp.ones_like(rewards), ids)
    centred = rewards - (total(rewards, ids) / count)[ids]
    std = jnp.sqrt(total(centred**2, ids) / jnp.maximum(count - 1, 1))
    return centred / (std[ids] + 1e-6)
  weights, weighted = total(lengths, ids)[ids], total(lengths * rewards, ids)[ids]
  if name == "opo_loo":
    weights, weighted = weights - lengths, weighted - lengths * rewards
  return rewards - weighted / weights


def loop(name, rewards, lengths, ids):
  """Rows into lists by group, then row by row, in NumPy."""
  groups = collections.defaultdict(list)
  for row, group in enumerate(ids.tolist()):
    groups[group].append(row)
  result = np.zeros(len(rewards), np.float32)
  for rows in groups.values():
    r, weights = rewards[rows], lengths[rows].astype(np.float32)
    if name == "grpo":
      result[rows] = (r - r.mean()) / (r.std(ddof=1) + 1e-6)
    elif name == "opo":
      result[rows] = r - (weights * r).sum() / weights.sum()
    else:
      others = (weights * r).sum() - weights * r
      result[rows] = r - others / (weights.sum() - weights)
  return result


def medians(functions, repeats):
  """Milliseconds of each, in turns, after a call that compiles."""
  times = {name: [] for name in functions}
  for turn in range(repeats + 1):
    for name, function in functions.items():
      # The loop takes seconds: three turns of it are enough.
      if name == "loop" and turn > 3:
        continue
      start = time.perf_counter()
      jax.block_until_ready(function())
      times[name].append(1e3 * (time.perf_counter() - start))
  return {name: statistics.median(values[1:]) for name, values in times.items()}


def main(num_rows: list[int], group_size: int, repeats: int) -> None:
  devices = jax.devices()
  print(f"{jax.default_backend()}, {len(devices)} device(s), JAX {jax.__version__}")
  print("estimator  rows   version               median   x ours   temporary")
  sharding = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
  rng = np.random.default_rng(0)
  for rows in num_rows:
    num_groups = rows // group_size
    host = (
      rng.integers(0, 2, rows).astype(np.float32),
      rng.integers(1, 8192, rows).astype(np.int32),
      rng.permutation(rows).astype(np.int32) % num_groups,
    )
    local = jax.device_put(host, devices[0])
    for name in ("opo", "opo_loo", "grpo"):
      fused = functools.partial(ESTIMATORS[name], num_groups=num_groups)
      apart = functools.partial(unfused, name, num_groups=num_groups)
      plain = functools.partial(formula, name, num_groups=num_groups)
      inputs = {"ours": (fused, local), "unfused": (apart, local)}
      inputs["formula"] = plain, local
      if len(devices) > 1:
        sharded = jax.device_put(host, sharding)
        inputs["ours, sharded"] = fused, sharded
        inputs["unfused, sharded"] = apart, sharded
      compiled = {
        version: jax.jit(function).lower(*arrays).compile()
        for version, (function, arrays) in inputs.items()
      }
      functions = {
        version: functools.partial(program, *inputs[version][1])
        for version, program in compiled.items()
      }
      functions["loop"] = functools.partial(loop, name, *host)
      results = {version: np.asarray(f()) for version, f in functions.items()}
      for version, result in results.items():
        np.testing.assert_allclose(
          result, results["ours"], rtol=1e-3, atol=1e-4, err_msg=f"{name}, {version}"
        )
      times = medians(functions, repeats)
      for version, median in times.items():
        memory = "on the host"
        if version in compiled:
          size = compiled[version].memory_analysis().temp_size_in_bytes
          memory = f"{size / 1024:8.0f} KiB"
        ratio = median / times["ours"]
        print(
          f"{name:9} {rows:7}   {version:16} {median:7.3f} ms {ratio:8.2f}   {memory}"
        )


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, nargs="+", default=[1024, 8192, 65536])
  parser.add_argument("--group", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=20)
  arguments = parser.parse_args()
  main(arguments.rows, arguments.group, arguments.repeats)
