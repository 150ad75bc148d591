"""Sampling: each prompt is prefilled once, its responses are decoded together.

The decode loop is one jitted `while_loop` that ends when every row has ended. The
random key of a token is derived from (seed, prompt index, sample index, position) and
from nothing else, so a rollout does not depend on the batch it was sampled in.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax import sharding
from opo_jax.models.attention import Keys
from opo_jax.models.transformer import Policy
from opo_jax.rollouts import Rollouts, prompt_columns


def generate(
  policy: Policy,
  prompts: Sequence[Sequence[int]],
  *,
  samples_per_prompt: int = 1,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  eos_ids: Sequence[int] | None = None,
  seed: int = 0,
  slots: int | None = None,
  version: int = -1,
) -> Rollouts:
  """Samples responses.

  Args:
    policy: what to sample from.
    prompts: token ids of each prompt, lengths may differ.
    samples_per_prompt: responses to each, row `g * samples_per_prompt + s` is sample s
      of prompt g.
    max_new_tokens: T, the longest response.
    temperature: divides the logits; 0 is greedy, and then the recorded log-probs are
      those of the policy at temperature 1.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: keep the smallest set of most probable tokens that has this mass.
    eos_ids: tokens that end a response; None takes the policy's own, `()` none. The
      first one sampled belongs to the response.
    seed: of all random keys.
    slots: rows decoded at a time, in whole groups that fill the mesh (so possibly more
      than asked for); None decodes all.
    version: of the policy, kept in the rollouts.

  Returns:
    Rollouts of `len(prompts) * samples_per_prompt` rows.

  Raises:
    ValueError: an empty prompt or list of prompts, a setting out of its range.
  """
  _check(policy, prompts, samples_per_prompt, max_new_tokens, temperature, top_k, top_p)
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  width = bucket(lengths.max())
  tokens = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[width - len(prompt) :] = prompt

  wave = len(prompts)
  if slots is not None:
    wave = min(wave, max(1, slots // samples_per_prompt))
  shards = sharding.batch_shards(policy.mesh)
  wave = -(-wave // shards) * shards  # the rows of a wave fill the mesh
  settings = _Settings(
    samples_per_prompt=samples_per_prompt,
    max_new_tokens=max_new_tokens,
    eos_ids=tuple(policy.eos_ids if eos_ids is None else eos_ids),
    greedy=temperature == 0.0,
    top_k=top_k,
    top_p=top_p,
  )
  waves = []
  for start in range(0, len(prompts), wave):
    # The last wave is filled up with its first prompt and cut back: one shape.
    index = np.arange(start, start + wave)
    real = index < len(prompts)
    index = np.where(real, index, start)
    drawn = _sample(
      policy,
      sharding.put(tokens[index], policy.mesh),
      sharding.put(lengths[index], policy.mesh),
      sharding.put(index, policy.mesh),
      jax.random.key(seed),
      jnp.float32(temperature if temperature else 1.0),
      settings,
    )
    rows = slice(0, int(real.sum()) * samples_per_prompt)
    waves.append(drawn if real.all() else jax.tree.map(lambda x: x[rows], drawn))  # noqa: B023
  drawn = waves[0]
  if len(waves) > 1:
    drawn = jax.tree.map(lambda *parts: jnp.concatenate(parts), *waves)
  return Rollouts(
    prompts=jnp.asarray(tokens),
    prompt_lengths=jnp.asarray(lengths),
    tokens=drawn.tokens,
    logprobs=drawn.logprobs,
    mask=drawn.mask,
    lengths=drawn.mask.sum(-1, dtype=jnp.int32),
    prompt_ids=jnp.repeat(
      jnp.arange(len(prompts), dtype=jnp.int32), samples_per_prompt
    ),
    finished=drawn.finished,
    temperature=jnp.float32(temperature if temperature else 1.0),
    version=jnp.int32(version),
  )


@dataclasses.dataclass(frozen=True)
class _Settings:
  """What is compiled into a sampling program."""

  samples_per_prompt: int
  max_new_tokens: int
  eos_ids: tuple[int, ...]
  greedy: bool
  top_k: int
  top_p: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Drawn:
  """What has been sampled so far; the fields are those of Rollouts."""

  tokens: jax.Array  # [N, T]
  logprobs: jax.Array  # [N, T]
  mask: jax.Array  # [N, T]
  finished: jax.Array  # [N]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Decoding:
  """The state of the decode loop."""

  t: jax.Array  # the response position that comes next
  hidden: jax.Array  # [N, D], predicts the token at position t
  keys: jax.Array  # [L, N, T, K, E] of the responses
  values: jax.Array
  drawn: _Drawn


@functools.partial(jax.jit, static_argnames="settings")
def _sample(
  policy: Policy,
  prompts_GP: jax.Array,
  prompt_lengths_G: jax.Array,
  prompt_index_G: jax.Array,
  key: jax.Array,
  temperature: jax.Array,
  settings: _Settings,
) -> _Drawn:
  config, mesh = policy.config, policy.mesh
  P, T = prompts_GP.shape[1], settings.max_new_tokens
  samples = settings.samples_per_prompt
  N = prompts_GP.shape[0] * samples

  with jax.named_scope("prefill"):
    positions_GP, segment_ids_GP = prompt_columns(prompt_lengths_G, P)
    hidden_GPD, (prompt_keys, prompt_values) = policy.hidden(
      prompts_GP, positions_GP, segment_ids_GP
    )
  prompt_mask_G1P = (segment_ids_GP > 0)[:, None]
  row_keys_N = _row_keys(key, prompt_index_G, samples)
  eos_ids = jnp.array(settings.eos_ids, jnp.int32)
  first_position_N = jnp.repeat(prompt_lengths_G, samples)
  response_positions_NT = first_position_N[:, None] + jnp.arange(T)

  def rows(shape, dtype, axes=("batch",)):
    empty = jnp.zeros(shape, dtype)
    return sharding.constrain(empty, mesh, *axes, *(None,) * (len(shape) - len(axes)))

  cache_shape = (config.num_layers, N, T, config.num_kv_heads, config.head_dim)
  start = _Decoding(
    t=jnp.int32(0),
    hidden=jnp.repeat(hidden_GPD[:, -1], samples, axis=0),
    keys=rows(cache_shape, policy.dtype, (None, "batch")),
    values=rows(cache_shape, policy.dtype, (None, "batch")),
    drawn=_Drawn(
      tokens=rows((N, T), jnp.int32),
      logprobs=rows((N, T), jnp.float32),
      mask=rows((N, T), bool),
      finished=rows((N,), bool),
    ),
  )

  def unfinished(state: _Decoding):
    return (state.t < T) & ~state.drawn.finished.all()

  def decode(state: _Decoding) -> _Decoding:
    t, drawn = state.t, state.drawn
    token_keys_N = jax.vmap(jax.random.fold_in, (0, None))(row_keys_N, t)
    token_N, logprob_N = _draw(
      policy.project(state.hidden), token_keys_N, temperature, settings
    )
    alive_N = ~drawn.finished
    token_N = jnp.where(alive_N, token_N, 0)
    drawn = _Drawn(
      tokens=drawn.tokens.at[:, t].set(token_N),
      logprobs=drawn.logprobs.at[:, t].set(jnp.where(alive_N, logprob_N, 0.0)),
      mask=drawn.mask.at[:, t].set(alive_N),
      finished=drawn.finished | (token_N[:, None] == eos_ids).any(-1) & alive_N,
    )
    # The scan over layers reads the cache and returns the new column alone, which is
    # then written in place: the cache is never copied.
    earlier_1T = jnp.broadcast_to(jnp.arange(T) < t, (N, 1, T))
    hidden_N1D, (key, value) = policy.hidden(
      token_N[:, None],
      (first_position_N + t)[:, None],
      cache=(
        Keys(prompt_keys, prompt_values, prompt_mask_G1P, positions_GP),
        Keys(state.keys, state.values, earlier_1T, response_positions_NT),
      ),
    )
    column = (0, 0, t, 0, 0)
    return _Decoding(
      t=t + 1,
      hidden=hidden_N1D[:, 0],
      keys=jax.lax.dynamic_update_slice(state.keys, key, column),
      values=jax.lax.dynamic_update_slice(state.values, value, column),
      drawn=drawn,
    )

  with jax.named_scope("decode"):
    return jax.lax.while_loop(unfinished, decode, start).drawn


def _row_keys(key, prompt_index_G, samples):
  """One key a row, of (seed, prompt index, sample index)."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  per_prompt = fold(key, prompt_index_G)
  per_row = jax.vmap(fold, (0, None))(per_prompt, jnp.arange(samples))
  return per_row.reshape(-1)


def _draw(logits_NV, keys_N, temperature, settings):
  """A token and its log-prob under the distribution it was drawn from."""
  logprobs_NV = jax.nn.log_softmax(logits_NV / temperature)
  if settings.greedy:
    token_N = logits_NV.argmax(-1)
  else:
    if settings.top_k or settings.top_p < 1.0:
      logprobs_NV = _truncate(logprobs_NV, settings.top_k, settings.top_p)
    V = logits_NV.shape[1]
    noise_NV = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys_N)
    token_N = (logprobs_NV + noise_NV).argmax(-1)
  logprob_N = jnp.take_along_axis(logprobs_NV, token_N[:, None], axis=1)[:, 0]
  return token_N.astype(jnp.int32), logprob_N


def _truncate(logprobs_NV, top_k, top_p):
  """Log-probs of the distribution that top-k, then top-p leave over."""
  # One sort and one threshold, taken from the very values it is compared with.
  sorted_NV = jnp.sort(logprobs_NV, axis=-1, descending=True)
  kept_NV = jnp.arange(sorted_NV.shape[1]) < (top_k or sorted_NV.shape[1])
  if top_p < 1.0:
    # A token is kept while the mass before it is below top_p: the first always is.
    probs_NV = jax.nn.softmax(jnp.where(kept_NV, sorted_NV, -jnp.inf))
    kept_NV &= jnp.cumsum(probs_NV, axis=-1) - probs_NV < top_p
  threshold_N1 = jnp.where(kept_NV, sorted_NV, jnp.inf).min(-1, keepdims=True)
  kept_logprobs_NV = jnp.where(logprobs_NV >= threshold_N1, logprobs_NV, -jnp.inf)
  return jax.nn.log_softmax(kept_logprobs_NV)


def bucket(length: int) -> int:
  """The width that prompts are padded to: the next of 16, 24, 32, 48, 64, 96, …

  Few widths mean few compiled programs; these waste a third at most.
  """
  size = 16
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


def _check(policy, prompts, samples, max_new_tokens, temperature, top_k, top_p) -> None:
  if not prompts:
    raise ValueError("There are no prompts to sample from; pass at least one.")
  empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
  if empty:
    raise ValueError(
      f"Prompt {empty[0]} is empty; a prompt needs at least one token (a begin-of-"
      "sequence token will do)."
    )
  vocab_size = policy.config.vocab_size
  for i, prompt in enumerate(prompts):
    if min(prompt) < 0 or max(prompt) >= vocab_size:
      raise ValueError(
        f"Prompt {i} has a token outside of the policy's vocabulary of {vocab_size};"
        " use the tokenizer the policy was made for."
      )
  for name, value, good in (
    ("samples_per_prompt", samples, samples >= 1),
    ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
    ("temperature", temperature, temperature >= 0),
    ("top_k", top_k, 0 <= top_k <= vocab_size),
    ("top_p", top_p, 0 < top_p <= 1),
  ):
    if not good:
      raise ValueError(f"{name}={value} is out of its range.")
