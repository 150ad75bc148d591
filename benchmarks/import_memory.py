"""How much memory reading a checkpoint takes beside the parameters themselves.

    python benchmarks/import_memory.py [gigabytes]

Writes a Qwen3 checkpoint of at least 2 GB in bfloat16, in files of 500 MB, and reads it
in a process of its own. On a CPU the parameters live in host memory too, so what counts
is the peak above them: on an accelerator that is all the host needs.
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCABULARY, WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM = 32_000, 2048, 8192, 16, 8, 128
FILE_BYTES = 500_000_000


def write(directory: pathlib.Path, gigabytes: float) -> int:
  """A checkpoint of random weights; gives its size in bytes."""
  layer = {
    "input_layernorm": (WIDTH,),
    "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
    "self_attn.q_norm": (HEAD_DIM,),
    "self_attn.k_norm": (HEAD_DIM,),
    "post_attention_layernorm": (WIDTH,),
    "mlp.gate_proj": (MLP, WIDTH),
    "mlp.up_proj": (MLP, WIDTH),
    "mlp.down_proj": (WIDTH, MLP),
  }
  size = 2 * sum(int(np.prod(shape)) for shape in layer.values())
  num_layers = int(np.ceil(gigabytes * 1e9 / size))
  config = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": num_layers,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "tie_word_embeddings": True,
  }
  (directory / "config.json").write_text(json.dumps(config))
  shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
  for i in range(num_layers):
    shapes |= {f"model.layers.{i}.{k}.weight": shape for k, shape in layer.items()}
  shapes["model.norm.weight"] = (WIDTH,)

  random, total, number, tensors, held = np.random.default_rng(0), 0, 0, {}, 0
  for name, shape in shapes.items():
    tensor = random.random(shape, np.float32).astype(ml_dtypes.bfloat16)
    tensors[name] = tensor
    held += tensor.nbytes
    total += tensor.nbytes
    if held >= FILE_BYTES:
      save_file(tensors, directory / f"model-{number:05}.safetensors")
      number, tensors, held = number + 1, {}, 0
  if tensors:
    save_file(tensors, directory / f"model-{number:05}.safetensors")
  return total


def read(directory: str) -> None:
  """Reads it and prints what it took, in bytes."""
  import jax
  import jax.numpy as jnp

  from opo_jax import models

  jnp.ones(3).block_until_ready()
  before = peak()
  start = time.perf_counter()
  policy = models.load(directory, param_dtype=jnp.bfloat16)
  parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(policy))
  largest = policy.embedding[...].nbytes
  print(
    json.dumps(
      {
        "seconds": time.perf_counter() - start,
        "peak": peak() - before,
        "parameters": parameters,
        "largest_tensor": largest,
      }
    )
  )


def peak() -> int:
  """Largest resident memory of this process so far, bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
  gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
  with tempfile.TemporaryDirectory() as directory:
    size = write(pathlib.Path(directory), gigabytes)
    command = [sys.executable, __file__, "--read", directory]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  taken = json.loads(out)
  above = taken["peak"] - taken["parameters"]
  print(
    f"checkpoint {size / 1e9:.2f} GB, largest tensor"
    f" {taken['largest_tensor'] / 1e9:.3f} GB: read in {taken['seconds']:.1f} s; peak"
    f" resident memory {taken['peak'] / 1e9:.2f} GB, of which parameters"
    f" {taken['parameters'] / 1e9:.2f} GB, beside them {above / 1e9:.3f} GB"
  )


if __name__ == "__main__":
  if sys.argv[1:2] == ["--read"]:
    read(sys.argv[2])
  else:
    main()
