"""Our decoder beside that of `transformers`, on the same files and the same tokens.

Errors are measured against PyTorch in float32. In bfloat16 no two programs agree to
more than bfloat16 holds, so there `transformers`' own bfloat16 error is the measure.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import reference
import torch
from safetensors.numpy import load_file

from opo_jax import models
from opo_jax.models.attention import Keys
from opo_jax.models.transformer import Policy
from opo_jax.rollouts import prompt_columns

LAYOUTS = ("right-padded", "left-padded", "packed", "cached")
PROMPT_WIDTH = 8


def measure(name: str) -> dict[str, dict[str, float]]:
  """Differences of one family.

  Returns:
    For "float32": {quantity: largest absolute difference, or largest relative norm of
    a parameter's gradient}. For "bfloat16": {quantity: the root mean square of our
    error over that of transformers, both against float32}.
  """
  model = reference.make_model(name)
  inputs = reference.make_inputs(model.config.vocab_size)
  exact = _theirs(model, inputs)
  with tempfile.TemporaryDirectory() as directory:
    directory = pathlib.Path(directory)
    model.save_pretrained(directory / "float32")
    ours = _ours(directory / "float32", inputs, jnp.float32)
    model.to(torch.bfloat16).save_pretrained(directory / "bfloat16")
    ours_half = _ours(directory / "bfloat16", inputs, jnp.bfloat16)
  theirs_half = _theirs(model, inputs)
  assert ours.keys() == exact.keys() == ours_half.keys()
  return {
    "float32": _summary(ours, exact, _largest, _relative_norm),
    "bfloat16": _summary(ours_half, exact, *[_times_worse(theirs_half)] * 2),
  }


def _summary(actual, exact, of_outputs, of_gradients):
  summary = {}
  for key in exact:
    is_gradient = key.startswith("gradients/")
    error = (of_gradients if is_gradient else of_outputs)(key, actual[key], exact[key])
    row = "gradient" if is_gradient else key
    summary[row] = max(summary.get(row, 0.0), error)
  return summary


def _largest(key, actual, exact):
  assert actual.shape == exact.shape, key
  return float(np.abs(actual - exact).max())


def _relative_norm(key, actual, exact):
  assert actual.shape == exact.shape, key
  return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))


def _times_worse(theirs):
  def times_worse(key, actual, exact):
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(theirs[key] - exact))

  return times_worse


def _theirs(model, inputs) -> dict[str, np.ndarray]:
  arrays = reference.compute(model, inputs)
  return {
    "right-padded": arrays.pop("logits"),
    "left-padded": reference.left_padded(model, inputs),
    "packed": reference.packed(model, inputs),
    "cached": reference.cached(model, inputs, PROMPT_WIDTH),
    **arrays,
  }


def _ours(path, inputs, dtype) -> dict[str, np.ndarray]:
  policy = models.load(path, dtype=dtype)
  tokens, lengths = inputs["tokens"], inputs["lengths"]
  real = np.arange(tokens.shape[1]) < lengths[:, None]

  def loss(policy):
    logits = policy.logits(tokens, segment_ids=real.astype(np.int32))
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    logprobs = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    return (inputs["coefficients"] * logprobs).sum(), (logits, logprobs)

  gradient, (logits, logprobs) = jax.jit(jax.grad(loss, has_aux=True))(policy)
  with tempfile.TemporaryDirectory() as directory:
    # A gradient is shaped as a policy is, and so can be written under their names.
    models.save(gradient, directory)
    gradients = load_file(pathlib.Path(directory) / "model.safetensors")
  return {
    "right-padded": np.asarray(logits * real[..., None]),
    "logprobs": np.asarray(logprobs * real[:, 1:]),
    "left-padded": _left_padded(policy, inputs),
    "packed": _packed(policy, inputs),
    "cached": _cached(policy, inputs),
    **{f"gradients/{name}": array for name, array in gradients.items()},
  }


def _left_padded(policy, inputs):
  tokens, real = reference.shift(inputs)
  positions, segment_ids = prompt_columns(inputs["lengths"], tokens.shape[1])
  logits = jax.jit(Policy.logits)(
    policy, tokens, positions=positions, segment_ids=segment_ids
  )
  return np.asarray(logits * real[..., None])


def _packed(policy, inputs):
  lengths = inputs["lengths"]
  rows = [row[:n] for row, n in zip(inputs["tokens"], lengths, strict=True)]
  return np.asarray(
    jax.jit(Policy.logits)(
      policy,
      np.concatenate(rows)[None],
      positions=np.concatenate([np.arange(n) for n in lengths])[None],
      segment_ids=np.repeat(np.arange(1, len(lengths) + 1), lengths)[None],
    )
  )


def _cached(policy, inputs):
  """Left-padded rows: a part at once, then token by token, as the sampler does."""
  tokens, real = reference.shift(inputs)
  B, T = tokens.shape
  positions, segment_ids = prompt_columns(inputs["lengths"], T)
  P, config = PROMPT_WIDTH, policy.config
  hidden, (keys, values) = jax.jit(Policy.hidden)(
    policy, tokens[:, :P], positions[:, :P], segment_ids[:, :P]
  )
  out = [policy.project(hidden)]
  prompt = Keys(
    keys, values, (segment_ids[:, :P] > 0)[:, None], positions=positions[:, :P]
  )
  shape = (config.num_layers, B, config.num_kv_heads, T - P, config.head_dim)
  keys, values = jnp.zeros(shape, keys.dtype), jnp.zeros(shape, values.dtype)

  @jax.jit
  def decode(token, t, keys, values):
    written = (jnp.arange(T - P) < t) & real[:, P:]
    hidden, (key, value) = policy.hidden(
      token[:, None],
      jax.lax.dynamic_slice_in_dim(positions, P + t, 1, axis=1),
      cache=(prompt, Keys(keys, values, written[:, None], positions=positions[:, P:])),
    )
    column = (0, 0, 0, t, 0)
    keys = jax.lax.dynamic_update_slice(keys, key, column)
    values = jax.lax.dynamic_update_slice(values, value, column)
    return policy.project(hidden), keys, values

  for t in range(T - P):
    logits, keys, values = decode(tokens[:, P + t], t, keys, values)
    out.append(logits)
  return np.asarray(jnp.concatenate(out, axis=1)) * real[..., None]
