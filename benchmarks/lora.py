"""What adapters cost and save: bytes of a 7B policy, and the time of a decoded token.

    .venv/bin/python benchmarks/lora.py [--rank 32] [--no-time]

Bytes are those of the arrays that a run holds, from their shapes: nothing is allocated.
Time is that of sampling on this machine with adapters applied at every token, over that
with merged weights, in turn.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
import time

import jax

from opo_jax import build, sampler
from opo_jax.config import Config, Mesh, Model
from opo_jax.models import ModelConfig, Policy, lora
from opo_jax.planning.programs import abstract_run

# config.json of DeepSeek-R1-Distill-Qwen-7B, by its shapes.
QWEN_7B = {
  "architectures": ["Qwen2ForCausalLM"],
  "model_type": "qwen2",
  "hidden_act": "silu",
  "vocab_size": 152_064,
  "hidden_size": 3584,
  "intermediate_size": 18_944,
  "num_hidden_layers": 28,
  "num_attention_heads": 28,
  "num_key_value_heads": 4,
  "max_position_embeddings": 131_072,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000,
  "tie_word_embeddings": False,
}
COLUMNS = ("policy", "start policy", "gradient", "optimiser", "sampler's copy")


def held(model: Model) -> tuple[int, dict[str, int]]:
  """Numbers that are trained, and bytes of what lives from step to step."""
  config = Config(model=model, mesh=Mesh(fsdp=len(jax.devices())))
  mesh, shape = build.make_mesh(config), build.model_config(config)
  state = abstract_run(config, mesh, shape).state
  trained, frozen = lora.split(state.policy)
  copied = jax.tree.leaves(state.policy) if model.param_dtype != model.dtype else []
  return sum(leaf.size for leaf in jax.tree.leaves(trained)), {
    "policy": size(state.policy),
    # What the KL to the start is measured against: frozen weights are shared with it.
    "start policy": 0 if jax.tree.leaves(frozen) else size(trained),
    "gradient": size(trained),
    "optimiser": size(state.opt_state),
    "sampler's copy": 2 * sum(leaf.size for leaf in copied),
  }


def size(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory(rank: int) -> None:
  with tempfile.TemporaryDirectory() as directory:
    (pathlib.Path(directory) / "config.json").write_text(json.dumps(QWEN_7B))
    full = Model(path=directory, fresh=True, dtype="bfloat16")
    half = dataclasses.replace(full, param_dtype="bfloat16")
    cases = {
      "every parameter, float32": full,
      f"LoRA rank {rank}, base float32": dataclasses.replace(full, lora_rank=rank),
      f"LoRA rank {rank}, base bfloat16": dataclasses.replace(half, lora_rank=rank),
    }
    print(f"| GB | trained | {' | '.join(COLUMNS)} | together |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for name, model in cases.items():
      trained, row = held(model)
      cells = [f"{row[column] / 1e9:.2f}" for column in COLUMNS]
      print(
        f"| {name} | {trained / 1e6:,.0f} M | {' | '.join(cells)}"
        f" | **{sum(row.values()) / 1e9:.1f}** |"
      )


def decoding(rank: int, repeats: int = 10) -> None:
  """A policy of 7 M parameters: 32 responses of 64 tokens."""
  config = ModelConfig(
    vocab_size=512,
    width=256,
    mlp_width=1024,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
  )
  base = Policy(config, jax.random.key(0))
  adapted = lora.add(base, jax.random.key(1), rank=rank)
  policies = {"merged": lora.merge(adapted), "applied": adapted}
  seconds = {name: [] for name in policies}
  for repeat in range(repeats + 1):
    for name, policy in policies.items():
      start = time.perf_counter()
      rollouts = sampler.generate(
        policy, [[1, 2, 3]] * 32, max_new_tokens=64, eos_ids=(), seed=repeat
      )
      jax.block_until_ready(rollouts)
      if repeat:  # the first compiles
        seconds[name].append(time.perf_counter() - start)
  best = {name: min(times) for name, times in seconds.items()}
  print(
    f"\n32 x 64 tokens: {best['applied']:.3f} s with adapters of rank {rank} applied,"
    f" {best['merged']:.3f} s merged: {best['applied'] / best['merged']:.2f} times as"
    f" long (the fastest of {repeats} each, in turn; {jax.devices()[0].device_kind})"
  )


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rank", type=int, default=32)
  parser.add_argument("--no-time", action="store_true", help="bytes alone")
  arguments = parser.parse_args()
  memory(arguments.rank)
  if not arguments.no_time:
    decoding(arguments.rank)
