"""The sampler's own weights: what changing the layout takes, and what it saves.

    python benchmarks/reshard.py [--repeats 3] [--tensor 2] [--tokens 32]

Rollouts are sampled in turns from weights that are changed over once for the batch
(`--rollout.gather-weights`) and from the learner's layout, whose weights are gathered
for every token. Qwen2.5-0.5B's widths, 6 layers, bfloat16 kept in float32, a prompt of
16 tokens and 2 responses for each shard, on all devices: `fsdp` is what `tensor`
leaves. Without an accelerator there are 8 simulated devices, whose links are copies.
"""

import argparse
import functools
import os
import statistics

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from rollouts import in_turns, prompts

from opo_jax.devices import sharding
from opo_jax.models import ModelConfig, Policy
from opo_jax.sampler import generate
from opo_jax.sampler.prefill import sampling_weights

SHAPE = ModelConfig(32_768, 896, 4864, 6, 14, 2, 64)


def main(repeats: int, tensor: int, tokens: int) -> None:
  if len(jax.devices()) < 2 * tensor:
    print(f"{len(jax.devices())} devices: no fsdp axis beside tensor {tensor}")
    return
  mesh = sharding.make_mesh(1, -1, tensor)
  fresh = functools.partial(Policy, SHAPE, dtype=jnp.bfloat16, mesh=mesh)
  layout = sharding.tree_shardings(jax.eval_shape(fresh, jax.random.key(0)), mesh)
  policy = jax.jit(fresh, out_shardings=layout)(jax.random.key(0))
  asked = [prompt[:16] for prompt in prompts(mesh.shape["fsdp"])]

  def sample(gather_weights):
    options = dict(samples_per_prompt=2, max_new_tokens=tokens, eos_ids=())
    return generate(policy, asked, gather_weights=gather_weights, **options)

  times = in_turns(
    {
      "reshard": lambda: sampling_weights(policy, True),
      "gathered once": lambda: sample(True),
      "gathered for every token": lambda: sample(False),
    },
    repeats,
  )
  kind = jax.devices()[0].device_kind
  sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  print(f"{kind}, {sizes}, JAX {jax.__version__}, {tokens} tokens a response")
  whole = statistics.median(times["gathered once"])
  print(f"{'':26}  median s  (min, max)     of sampling gathered once")
  for name, values in times.items():
    median = statistics.median(values)
    print(
      f"{name:26}  {median:8.3f}  ({min(values):.3f}, {max(values):.3f})"
      f"  {median / whole:8.1%}"
    )


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--tensor", type=int, default=2)
  parser.add_argument("--tokens", type=int, default=32)
  arguments = parser.parse_args()
  main(arguments.repeats, arguments.tensor, arguments.tokens)
