"""Sampling: each prompt is prefilled once, its responses are decoded in slots.

    prompts ──prefill, once each──▶ keys and values of the prompts, one entry a prompt
    queue of rollouts ──▶ slots: draw, record, feed back ──▶ tokens, log-probs, lengths
            ▲                       │
            └── a slot is free when its response has ended ──┘

A slot whose response has ended takes the next rollout from the queue inside the jitted
loop, in the very next iteration: nothing is recompiled and nobody waits. The keys and
values of a slot lie in a ring of columns: all slots write the same column, and a slot
attends to as many of the last columns as its response is long, so that a refill has
nothing to clear.

The loop is left only when its shapes should change, some dozen times in a whole batch:
the ring is doubled when a response outgrows it, and halved when the long ones are
gone; when the queue is empty and most slots are idle, the busy ones move together.

The random key of a token is derived from (seed, prompt index, sample index, position)
and from nothing else, so a rollout depends neither on the number of slots and devices
nor on its neighbours.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax import sharding
from opo_jax.models.attention import Keys
from opo_jax.models.transformer import Policy
from opo_jax.rollouts import Rollouts, prompt_columns

# The shortest ring of columns, and the fewest slots of a shard that are moved together.
_MIN_WIDTH, _MIN_SLOTS = 64, 16
# Prompt tokens of a shard that are prefilled at a time.
_PREFILL_TOKENS = 16384
# At most so many neighbouring tokens are first drawn as one, and blocks of them do not
# cross the devices when so many share a row. See `_invert_twice`.
_BLOCK, _MAX_TENSOR = 128, 16


def generate(
  policy: Policy,
  prompts: Sequence[Sequence[int]],
  *,
  samples_per_prompt: int = 1,
  max_new_tokens: int | Sequence[int],
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  eos_ids: Sequence[int] | None = None,
  stop: Sequence[Sequence[int]] = (),
  seed: int | Sequence[int] = 0,
  slots: int | None = None,
  cache_dtype: str | None = None,
  version: int = -1,
) -> Rollouts:
  """Samples responses.

  Args:
    policy: what to sample from.
    prompts: token ids of each prompt, lengths may differ.
    samples_per_prompt: responses to each, row `g * samples_per_prompt + s` is sample s
      of prompt g.
    max_new_tokens: T, the longest response; or a limit for each of the rows.
    temperature: divides the logits; 0 is greedy, and then `logprobs` are those of the
      policy at temperature 1.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: of these, keep the smallest set of most probable tokens with this mass.
    min_p: of these, keep the tokens at least this times as probable as the first.
    eos_ids: tokens that end a response; None takes the policy's own, `()` none. The
      first one sampled belongs to the response.
    stop: sequences of tokens that end a response, and belong to it.
    seed: of all random keys; or a seed for each of the rows, which then depends on
      nothing else and can be sampled again alone.
    slots: responses decoded at a time, rounded up to fill the mesh; None takes as many
      as the memory holds.
    cache_dtype: of stored keys and values; None is the policy's. A narrower one samples
      from another distribution than the learner sees.
    version: of the policy, kept in the rollouts.

  Returns:
    Rollouts of `len(prompts) * samples_per_prompt` rows.

  Raises:
    ValueError: an empty prompt or list of prompts, a setting out of its range.
  """
  decoding = _Decoding(
    policy,
    prompts,
    samples_per_prompt=samples_per_prompt,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    eos_ids=eos_ids,
    stop=stop,
    seed=seed,
    slots=slots,
    cache_dtype=cache_dtype,
  )
  while decoding.advance():
    pass
  return decoding.rollouts(version)


def stream(
  policy: Policy,
  prompt: Sequence[int],
  *,
  every: int = 8,
  **options,
) -> Iterator[list[int]]:
  """Samples one response and gives its tokens as they come, for a person to read.

  Args:
    policy: what to sample from.
    prompt: token ids.
    every: tokens between two looks.
    options: those of `generate`.

  Yields:
    the new tokens; together the response of `generate` with the same options.
  """
  decoding = _Decoding(policy, [prompt], **options)
  shown, busy = 0, True
  while busy:
    busy = decoding.advance(every)
    rollouts = decoding.rollouts(version=-1)
    length = int(rollouts.lengths[0])
    yield np.asarray(rollouts.tokens)[0, shown:length].tolist()
    shown = length


def compiled_programs() -> int:
  """How many programs this process has compiled for sampling: a few, for a whole run.

  A prefill for each bucket of prompts, and a decode loop for each size of ring and
  number of slots that was needed.
  """
  return sum(jitted._cache_size() for jitted in _PROGRAMS)


def bucket(length: int) -> int:
  """The width that prompts are padded to: the next of 16, 24, 32, 48, 64, 96, …

  Few widths mean few compiled programs; these waste a third at most.
  """
  size = 16
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


def count_bucket(count: int) -> int:
  """The number that prompts are filled up to: the next of 1 … 16, 18, 20 … 32, 36 …

  What is filled up is prefilled and never sampled; an eighth at most.
  """
  step = 1 << max((count - 1).bit_length() - 4, 0)
  return -(-count // step) * step


# --- what the compiled programs are made of ---------------------------------------


@dataclasses.dataclass(frozen=True)
class _Settings:
  """What is compiled into the programs."""

  shards: int  # of the batch; each has prompts, queue and slots of its own
  samples_per_prompt: int
  max_new_tokens: int
  eos_ids: tuple[int, ...]
  stop: tuple[tuple[int, ...], ...]
  greedy: bool
  filtered: bool
  cache_dtype: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Distribution:
  """How logits become a distribution: scalars, so that a new value compiles nothing."""

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Prompts:
  """What prefill leaves, one entry a prompt. G counts the prompts of all shards."""

  keys: jax.Array  # [L, G, K, P, E]
  values: jax.Array  # [L, G, K, P, E]
  hidden: jax.Array  # [G, D], predicts the first token of the response
  lengths: jax.Array  # [G]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Queue:
  """The rollouts asked for. A shard's rows lie together, the real ones in front."""

  keys: jax.Array  # [N] random keys
  limits: jax.Array  # [N] longest response
  counts: jax.Array  # [shards] real rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
  """S responses in the making."""

  step: jax.Array  # scalar; the ring's next column is `step % W`
  row: jax.Array  # [S] which row of its shard a slot samples; -1: none, idle
  length: jax.Array  # [S] tokens drawn for it so far
  hidden: jax.Array  # [S, D], predicts the next token
  keys: jax.Array  # [L, S, K, W, E], a ring of W columns
  values: jax.Array  # [L, S, K, W, E]
  recent: jax.Array  # [S, M] the last tokens, where sequences may stop a response
  next_row: jax.Array  # [shards] the head of each shard's queue


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Drawn:
  """What has been sampled; the fields are those of Rollouts."""

  tokens: jax.Array  # [N, T]
  logprobs: jax.Array  # [N, T]
  sampling_logprobs: jax.Array | None  # [N, T]; None: the same
  lengths: jax.Array  # [N]
  finished: jax.Array  # [N]


class _Decoding:
  """One call of `generate`: the host side, which chooses shapes and reads four numbers
  whenever the device's loop has stopped."""

  def __init__(
    self,
    policy,
    prompts,
    *,
    max_new_tokens,
    samples_per_prompt=1,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    eos_ids=None,
    stop=(),
    seed=0,
    slots=None,
    cache_dtype=None,
  ):
    limits = _per_row("max_new_tokens", max_new_tokens, prompts, samples_per_prompt)
    _check_prompts(policy, prompts)
    _check_settings(
      policy, limits, samples_per_prompt, temperature, top_k, top_p, min_p, stop
    )
    self.policy, self.num_samples = policy, samples_per_prompt
    self.temperature = temperature
    shards = sharding.batch_shards(policy.mesh)
    self.settings = _Settings(
      shards=shards,
      samples_per_prompt=samples_per_prompt,
      max_new_tokens=int(limits.max()),
      eos_ids=tuple(policy.eos_ids if eos_ids is None else eos_ids),
      stop=tuple(tuple(map(int, sequence)) for sequence in stop if len(sequence)),
      greedy=temperature == 0.0,
      filtered=top_k > 0 or top_p < 1.0 or min_p > 0.0,
      cache_dtype=str(jnp.dtype(cache_dtype or policy.dtype)),
    )
    self.distribution = _Distribution(
      jnp.float32(temperature or 1.0),
      jnp.int32(top_k),
      jnp.float32(top_p),
      jnp.float32(min_p),
    )

    # Prompts are dealt out in order, evenly, and every shard is filled up with padding.
    self.tokens, self.lengths = _right_aligned(prompts)
    dealt = np.array_split(np.arange(len(prompts)), shards)
    per_shard = count_bucket(len(dealt[0]))
    index = np.full((shards, per_shard), -1)
    for entries, part in zip(index, dealt, strict=True):
      entries[: len(part)] = part
    index = index.reshape(-1)
    rows = np.repeat(index * samples_per_prompt, samples_per_prompt)
    rows += np.tile(np.arange(samples_per_prompt), len(index))
    real = np.repeat(index >= 0, samples_per_prompt)
    # Where each asked row is found among the shards' rows.
    self.where = np.flatnonzero(real)
    self.in_order = real.all()

    def put(array, *axes):
      return sharding.put(array, policy.mesh, *axes)

    filled = np.maximum(index, 0)
    self.prompts = _prefill(
      policy,
      put(self.tokens[filled], "batch"),
      put(self.lengths[filled], "batch"),
      self.settings,
    )
    rows = np.maximum(rows, 0)
    seeds = _per_row("seed", seed, prompts, samples_per_prompt)[rows]
    self.queue = _Queue(
      keys=_row_keys(
        put(seeds.astype(np.uint32), "batch"),
        put(rows.astype(np.int32), "batch"),
        samples_per_prompt if np.ndim(seed) == 0 else None,
      ),
      limits=put(limits[rows].astype(np.int32), "batch"),
      counts=put(
        np.array([len(part) * samples_per_prompt for part in dealt], np.int32), "batch"
      ),
    )
    self.num_rows = per_shard * samples_per_prompt  # of a shard
    if slots is None:
      slots = shards * _slots_that_fit(policy, self.settings, self.prompts)
    self.num_slots = min(self.num_rows, -(-slots // shards))
    self.width = self._ring(0)
    # While every row has its own slot, the rows of a group lie together, and the keys
    # of their prompt are read once for all of them.
    self.in_groups = self.num_slots == self.num_rows
    self.slots, self.drawn = _start(
      policy, self.prompts, self.queue, self.settings, self.num_slots, self.width
    )

  def advance(self, steps: int = 2**30) -> bool:
    """Decodes `steps` tokens, or until other shapes are wanted; says if more is left."""
    self.slots, self.drawn, (busy, longest, waiting) = _decode(
      self.slots,
      self.drawn,
      self.policy,
      self.prompts,
      self.queue,
      self.distribution,
      jnp.int32(steps),
      self.settings,
      self.in_groups,
    )
    busy, longest, waiting = int(busy), int(longest), bool(waiting)
    if not busy:
      return False
    num_slots, width = self.num_slots, self.width
    if not waiting and _mostly_idle(busy, num_slots):
      num_slots = max(_MIN_SLOTS, 1 << (busy - 1).bit_length())
    if longest >= width:
      width = self._ring(longest)
    elif _too_wide(longest, width):
      width = self._ring(2 * longest)  # room to grow, no going to and fro
    if (num_slots, width) != (self.num_slots, self.width):
      self.slots = _resize(self.slots, self.settings, num_slots, width)
      self.in_groups &= num_slots == self.num_slots
      self.num_slots, self.width = num_slots, width
    return True

  def _ring(self, longest: int) -> int:
    """Columns of the ring for responses that are this long now."""
    width = _MIN_WIDTH
    while width <= longest:
      width *= 2
    return min(width, self.settings.max_new_tokens)

  def rollouts(self, version: int) -> Rollouts:
    """What has been sampled, in the order it was asked for."""
    drawn = self.drawn
    if not self.in_order:
      drawn = jax.tree.map(lambda array: array[self.where], drawn)
    T = self.settings.max_new_tokens
    sampling_logprobs = drawn.sampling_logprobs
    return Rollouts(
      prompts=jnp.asarray(self.tokens),
      prompt_lengths=jnp.asarray(self.lengths),
      tokens=drawn.tokens,
      logprobs=drawn.logprobs,
      sampling_logprobs=drawn.logprobs
      if sampling_logprobs is None
      else sampling_logprobs,
      mask=jnp.arange(T) < drawn.lengths[:, None],
      lengths=drawn.lengths,
      prompt_ids=jnp.repeat(
        jnp.arange(len(self.tokens), dtype=jnp.int32), self.num_samples
      ),
      finished=drawn.finished,
      temperature=jnp.float32(self.temperature or 1.0),
      version=jnp.int32(version),
      filtered=self.settings.filtered or self.settings.greedy,
    )


# --- the compiled programs ---------------------------------------------------------


@functools.partial(jax.jit, static_argnames="settings")
def _prefill(
  policy: Policy, tokens_GP: jax.Array, lengths_G: jax.Array, settings: _Settings
) -> _Prompts:
  """Keys, values and the last hidden state of every prompt, some prompts at a time."""
  G, P = tokens_GP.shape
  shards = settings.shards
  chunk = math.gcd(G // shards, max(1, _PREFILL_TOKENS // P))
  chunks = G // shards // chunk

  def split(array):  # [G, ...] -> [chunks, shards * chunk, ...]
    array = array.reshape(shards, chunks, chunk, *array.shape[1:])
    return array.swapaxes(0, 1).reshape(chunks, shards * chunk, *array.shape[3:])

  def join(array):
    array = array.reshape(chunks, shards, chunk, *array.shape[2:])
    return array.swapaxes(0, 1).reshape(G, *array.shape[3:])

  def prefill(inputs):
    tokens, lengths = inputs
    hidden, (keys, values) = policy.hidden(tokens, *prompt_columns(lengths, P))
    # The prompts' axis first, so that chunks join along it.
    keys, values = (jnp.moveaxis(x, 1, 0) for x in (keys, values))
    dtype = settings.cache_dtype
    return hidden[:, -1], keys.astype(dtype), values.astype(dtype)

  with jax.named_scope("prefill"):
    inputs = (split(tokens_GP), split(lengths_G))
    hidden, keys, values = jax.tree.map(join, jax.lax.map(prefill, inputs))
  return _Prompts(
    keys=_on_mesh(policy, jnp.moveaxis(keys, 0, 1), cache=True),
    values=_on_mesh(policy, jnp.moveaxis(values, 0, 1), cache=True),
    hidden=_on_mesh(policy, hidden),
    lengths=lengths_G,
  )


@functools.partial(jax.jit, static_argnames="samples_per_prompt")
def _row_keys(seeds_N, rows_N, samples_per_prompt):
  """One key a row, of (seed, prompt index, sample index), or of its own seed alone."""

  def row_key(seed, row):
    key = jax.random.key(seed)
    if samples_per_prompt is None:
      return key
    prompt, sample = row // samples_per_prompt, row % samples_per_prompt
    return jax.random.fold_in(jax.random.fold_in(key, prompt), sample)

  return jax.vmap(row_key)(seeds_N, rows_N)


@functools.partial(jax.jit, static_argnames=("settings", "num_slots", "width"))
def _start(policy, prompts, queue, settings, num_slots, width):
  """The first rollouts of each shard's queue in its slots; nothing drawn yet."""
  config, shards = policy.config, settings.shards
  S, N, T = num_slots * shards, queue.limits.shape[0], settings.max_new_tokens
  first = jnp.tile(jnp.arange(num_slots, dtype=jnp.int32), shards)
  row = jnp.where(first < jnp.repeat(queue.counts, num_slots), first, -1)

  def empty(shape, dtype):
    return _on_mesh(policy, jnp.zeros(shape, dtype))

  ring = (config.num_layers, S, config.num_kv_heads, width, config.head_dim)
  ring = jnp.zeros(ring, settings.cache_dtype)
  slots = _Slots(
    step=jnp.int32(0),
    row=_on_mesh(policy, row),
    length=empty((S,), jnp.int32),
    hidden=_take(prompts.hidden, _prompt_of(row, settings), shards),
    keys=_on_mesh(policy, ring, cache=True),
    values=_on_mesh(policy, ring, cache=True),
    recent=empty((S, max(map(len, settings.stop), default=0)), jnp.int32) - 1,
    next_row=_on_mesh(policy, jnp.minimum(num_slots, queue.counts)),
  )
  filtered = settings.filtered or settings.greedy
  drawn = _Drawn(
    tokens=empty((N, T), jnp.int32),
    logprobs=empty((N, T), jnp.float32),
    sampling_logprobs=empty((N, T), jnp.float32) if filtered else None,
    lengths=empty((N,), jnp.int32),
    finished=empty((N,), bool),
  )
  return slots, drawn


@functools.partial(
  jax.jit, static_argnames=("settings", "in_groups"), donate_argnums=(0, 1)
)
def _decode(
  slots: _Slots,
  drawn: _Drawn,
  policy: Policy,
  prompts: _Prompts,
  queue: _Queue,
  distribution: _Distribution,
  steps: jax.Array,
  settings: _Settings,
  in_groups: bool,
):
  """Decodes until the shapes should change, all is done, or `steps` are over.

  Args:
    in_groups: slot i is, or was, row i.

  Returns:
    slots, drawn, and three scalars: the busy slots of the busiest shard, the longest
    response in a slot, whether a queue has rows left.
  """
  shards = settings.shards
  S, W = slots.row.shape[0], slots.keys.shape[3]
  num_slots = S // shards
  prompt_mask_G1P = (prompt_columns(prompts.lengths, prompts.keys.shape[3])[1] > 0)[
    :, None
  ]
  last = slots.step + steps

  def situation(slots: _Slots):
    busy = (slots.row >= 0).reshape(shards, -1).sum(-1).max()
    return busy, slots.length.max(), (slots.next_row < queue.counts).any()

  def goes_on(carry):
    slots, _ = carry
    busy, longest, waiting = situation(slots)
    resize = (longest >= W) & (settings.max_new_tokens > W)
    resize |= _too_wide(longest, W)
    resize |= ~waiting & _mostly_idle(busy, num_slots)
    return (busy > 0) & ~resize & (slots.step < last)

  def decode(carry):
    slots, drawn = carry
    busy_S, t_S = slots.row >= 0, slots.length
    row_S = jnp.maximum(slots.row, 0)
    prompt_S = _prompt_of(slots.row, settings)

    keys_S = jax.vmap(jax.random.fold_in)(_take(queue.keys, row_S, shards), t_S)
    token_S, logprob_S, sampling_logprob_S = _draw(
      policy.project(slots.hidden), keys_S, distribution, settings
    )
    token_S = jnp.where(busy_S, token_S, 0)
    recent_SM = jnp.concatenate([slots.recent, token_S[:, None]], axis=1)[:, 1:]
    ended_S = busy_S & _ends(token_S, recent_SM, settings)
    done_S = ended_S | (t_S + 1 >= _take(queue.limits, row_S, shards))
    drawn = _record(
      drawn, slots, token_S, logprob_S, sampling_logprob_S, ended_S, settings
    )

    # The scan over layers reads the ring and returns the new column alone, which is
    # then written in place: the ring is never copied.
    age_W = (slots.step - 1 - jnp.arange(W)) % W
    hidden_S1D, new = policy.hidden(
      token_S[:, None],
      (_take(prompts.lengths, prompt_S, shards) + t_S)[:, None],
      cache=(
        Keys(
          prompts.keys,
          prompts.values,
          prompt_mask_G1P,
          rows=None if in_groups else prompt_S.reshape(shards, num_slots),
        ),
        Keys(slots.keys, slots.values, (age_W < t_S[:, None])[:, None]),
      ),
    )
    key, value = (x.astype(settings.cache_dtype) for x in new)
    column = (0, 0, 0, slots.step % W, 0)

    row_S, next_row, fresh_S = _refill(slots, queue, done_S | ~busy_S, settings)
    first_hidden_SD = _take(prompts.hidden, _prompt_of(row_S, settings), shards)
    slots = _Slots(
      step=slots.step + 1,
      row=row_S,
      length=jnp.where(fresh_S, 0, t_S + 1),
      hidden=jnp.where(fresh_S[:, None], first_hidden_SD, hidden_S1D[:, 0]),
      keys=jax.lax.dynamic_update_slice(slots.keys, key, column),
      values=jax.lax.dynamic_update_slice(slots.values, value, column),
      recent=jnp.where(fresh_S[:, None], -1, recent_SM),
      next_row=next_row,
    )
    return slots, drawn

  with jax.named_scope("decode"):
    slots, drawn = jax.lax.while_loop(goes_on, decode, (slots, drawn))
  return slots, drawn, situation(slots)


@functools.partial(jax.jit, static_argnames=("settings", "num_slots", "width"))
def _resize(slots: _Slots, settings: _Settings, num_slots: int, width: int) -> _Slots:
  """The same responses in another number of slots a shard, or columns of the ring."""
  shards = settings.shards
  keys, values, W = slots.keys, slots.values, slots.keys.shape[3]
  if width != W:
    # The last iteration that will have written a column of the new ring; what is older
    # than the old ring is longer ago than any response, and never attended to.
    written = slots.step - 1 - (slots.step - 1 - jnp.arange(width)) % width
    keys, values = (jnp.take(x, written % W, axis=3) for x in (keys, values))
  if num_slots * shards == slots.row.shape[0]:
    return dataclasses.replace(slots, keys=keys, values=values)

  idle = (slots.row < 0).reshape(shards, -1)
  chosen = jnp.argsort(idle, axis=1, stable=True)[:, :num_slots].reshape(-1)

  def move(array):
    return _take(array, chosen, shards)

  return _Slots(
    step=slots.step,
    row=move(slots.row),
    length=move(slots.length),
    hidden=move(slots.hidden),
    keys=jax.vmap(move)(keys),
    values=jax.vmap(move)(values),
    recent=move(slots.recent),
    next_row=slots.next_row,
  )


_PROGRAMS = (_prefill, _row_keys, _start, _decode, _resize)


def _mostly_idle(busy, num_slots: int):
  """Whether the busy slots of a shard should move together, their queue being empty."""
  return (4 * busy <= num_slots) & (num_slots > _MIN_SLOTS)


def _too_wide(longest, width: int):
  """Whether the ring should shrink."""
  return (4 * longest < width) & (width > _MIN_WIDTH)


def _prompt_of(row_S, settings):
  """The prompt of each slot, counted within its shard; 0 for an idle slot."""
  return jnp.maximum(row_S, 0) // settings.samples_per_prompt


def _ends(token_S, recent_SM, settings):
  """Whether a response ends with this token."""
  ends_S = (token_S[:, None] == jnp.array(settings.eos_ids, jnp.int32)).any(-1)
  for sequence in settings.stop:
    tail = recent_SM[:, recent_SM.shape[1] - len(sequence) :]
    ends_S |= (tail == jnp.array(sequence)).all(-1)
  return ends_S


def _record(drawn, slots, token_S, logprob_S, sampling_logprob_S, ended_S, settings):
  """Writes one token of every busy slot to its row."""
  shards = settings.shards

  def write(array, values, *columns):
    def within(array, rows, values, *columns):
      rows = jnp.where(rows < 0, array.shape[0], rows)  # idle: out of range, dropped
      return array.at[(rows, *columns)].set(values, mode="drop", unique_indices=True)

    parts = (_by_shard(x, shards) for x in (array, slots.row, values, *columns))
    return jax.vmap(within)(*parts).reshape(array.shape)

  sampling_logprobs = drawn.sampling_logprobs
  if sampling_logprobs is not None:
    sampling_logprobs = write(sampling_logprobs, sampling_logprob_S, slots.length)
  return _Drawn(
    tokens=write(drawn.tokens, token_S, slots.length),
    logprobs=write(drawn.logprobs, logprob_S, slots.length),
    sampling_logprobs=sampling_logprobs,
    lengths=write(drawn.lengths, slots.length + 1),
    finished=write(drawn.finished, ended_S),
  )


def _refill(slots, queue, free_S, settings):
  """Gives free slots the next rows of their shard's queue, as far as there are any."""
  free = _by_shard(free_S, settings.shards)
  row = slots.next_row[:, None] + jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1
  row = jnp.where(row < queue.counts[:, None], row, -1)
  row = jnp.where(free, row, _by_shard(slots.row, settings.shards))
  taken = free.sum(axis=1, dtype=jnp.int32)
  next_row = jnp.minimum(slots.next_row + taken, queue.counts)
  return row.reshape(-1), next_row, free_S


def _draw(logits_SV, keys_S, distribution, settings):
  """A token, its log-prob under the policy, and under what it was drawn from."""
  scaled_SV = logits_SV / distribution.temperature
  scaled_SV -= scaled_SV.max(-1, keepdims=True)
  weights_SV = jnp.exp(scaled_SV)
  kept_SV = weights_SV
  log_total_S = jnp.log(weights_SV.sum(-1))
  if settings.filtered:
    kept_SV = jnp.where(_kept(scaled_SV, distribution), weights_SV, 0.0)
  if settings.greedy:
    token_S = scaled_SV.argmax(-1).astype(jnp.int32)
  else:
    uniform_S2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_S)
    token_S = _invert_twice(kept_SV, uniform_S2)
  scaled_S = jnp.take_along_axis(scaled_SV, token_S[:, None], axis=1)[:, 0]
  logprob_S = scaled_S - log_total_S
  if settings.greedy:
    return token_S, logprob_S, jnp.zeros_like(logprob_S)
  if not settings.filtered:
    return token_S, logprob_S, None
  return token_S, logprob_S, scaled_S - jnp.log(kept_SV.sum(-1))


def _invert_twice(weights_SV, uniform_S2):
  """A token with probability proportional to its weight.

  The inverse of the cumulative distribution, taken twice: once over blocks of tokens
  and once inside the block drawn. Two uniform numbers a token, where Gumbel noise needs
  V of them, and twice the resolution of one: about 2^-46.

  Args:
    weights_SV: at least one positive in each row.
    uniform_S2: in [0, 1).
  """
  S, V = weights_SV.shape
  # The size of a block depends on the vocabulary alone: tokens must not on the mesh.
  size = _BLOCK if V % _MAX_TENSOR else math.gcd(V // _MAX_TENSOR, _BLOCK)
  weights = jnp.pad(weights_SV, ((0, 0), (0, -V % size))).reshape(S, -1, size)
  block_S = _invert(weights.sum(-1), uniform_S2[:, 0])
  inside = jnp.take_along_axis(weights, block_S[:, None, None], axis=1)[:, 0]
  return block_S * size + _invert(inside, uniform_S2[:, 1])


def _invert(weights_SN, uniform_S):
  """The first index whose cumulative weight exceeds the uniform share of the total."""
  positive_SN = weights_SN > 0
  cumulative_SN = jnp.cumsum(weights_SN, axis=-1)
  share_S1 = uniform_S[:, None] * cumulative_SN[:, -1:]
  # Rounding must not choose what has no weight, so where it leaves nothing above the
  # share, the last index with any weight is taken.
  above_SN = (cumulative_SN > share_S1) & positive_SN
  last_S = positive_SN.shape[1] - 1 - positive_SN[:, ::-1].argmax(-1)
  index_S = jnp.where(above_SN.any(-1), above_SN.argmax(-1), last_S)
  return index_S.astype(jnp.int32)


def _kept(scaled_SV, distribution):
  """Which tokens top-k, then top-p, then min-p leave over: [S, V] bool."""
  # One sort and one threshold, taken from the very values it is compared with.
  sorted_SV = jnp.sort(scaled_SV, axis=-1, descending=True)
  V = sorted_SV.shape[1]
  top_k = jnp.where(distribution.top_k > 0, distribution.top_k, V)
  kept_SV = jnp.arange(V) < top_k
  # A token is kept while the mass before it is below top_p: the first always is.
  probs_SV = jax.nn.softmax(jnp.where(kept_SV, sorted_SV, -jnp.inf))
  before_SV = jnp.cumsum(probs_SV, axis=-1) - probs_SV
  kept_SV &= (before_SV < distribution.top_p) | (distribution.top_p >= 1.0)
  kept_SV &= sorted_SV >= sorted_SV[:, :1] + jnp.log(distribution.min_p)
  threshold_S1 = jnp.where(kept_SV, sorted_SV, jnp.inf).min(-1, keepdims=True)
  return scaled_SV >= threshold_S1


# --- shards: what belongs to one stays on it ------------------------------------------


def _by_shard(array, shards):
  """[shards * n, ...] -> [shards, n, ...]."""
  return array.reshape(shards, array.shape[0] // shards, *array.shape[1:])


def _take(array, index, shards):
  """`array[index]`, where each shard's indices count from its own first entry."""
  taken = jax.vmap(lambda array, index: array[index])(
    _by_shard(array, shards), _by_shard(index, shards)
  )
  return taken.reshape(index.size, *array.shape[1:])


def _on_mesh(policy, array, *, cache=False):
  """Rows lie over the batch axes; keys and values also over their heads."""
  mesh = policy.mesh
  if not cache:
    return sharding.constrain(array, mesh, "batch", *(None,) * (array.ndim - 1))
  whole = mesh is None or array.shape[2] % mesh.shape["tensor"]
  heads = None if whole else "kv_heads"
  return sharding.constrain(array, mesh, None, "batch", heads, None, None)


# --- input -------------------------------------------------------------------------


def _right_aligned(prompts):
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), bucket(lengths.max())), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[len(row) - len(prompt) :] = prompt
  return tokens, lengths


def _per_row(name, value, prompts, samples):
  """One number for all rows, or one for each, as an array."""
  num_rows = len(prompts) * samples
  if np.ndim(value) and len(value) != num_rows:
    raise ValueError(
      f"{name} has {len(value)} values for {len(prompts)} prompts x {samples} samples;"
      f" give one number, or {num_rows} of them."
    )
  return np.broadcast_to(np.asarray(value), (num_rows,))


def _slots_that_fit(policy, settings, prompts) -> int:
  """Slots of a shard whose rings, at their longest, fill half of the free memory."""
  config, parts = policy.config, 1
  if policy.mesh is not None and not config.num_kv_heads % policy.mesh.shape["tensor"]:
    parts = policy.mesh.shape["tensor"]
  column = 2 * config.num_layers * config.num_kv_heads * config.head_dim // parts
  column *= jnp.dtype(settings.cache_dtype).itemsize
  # A ring of half the size is still there while the next one is filled.
  slot = column * settings.max_new_tokens * 3 // 2
  budget = sharding.free_bytes(policy.mesh) // 2
  if slot > budget:
    raise ValueError(
      f"The keys and values of one response of {settings.max_new_tokens} tokens take"
      f" {slot / 2**30:.1f} GiB, and {budget / 2**30:.1f} are to be had; use fewer"
      " tokens (--rollout.max-new-tokens) or more devices along a tensor axis"
      " (--mesh.tensor)."
    )
  return budget // slot


def _check_prompts(policy, prompts) -> None:
  if not len(prompts):
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


def _check_settings(
  policy, limits, samples, temperature, top_k, top_p, min_p, stop
) -> None:
  vocab_size = policy.config.vocab_size
  for name, value, good in (
    ("samples_per_prompt", samples, samples >= 1),
    ("max_new_tokens", limits.min(initial=1), limits.min(initial=1) >= 1),
    ("temperature", temperature, temperature >= 0),
    ("top_k", top_k, 0 <= top_k <= vocab_size),
    ("top_p", top_p, 0 < top_p <= 1),
    ("min_p", min_p, 0 <= min_p <= 1),
  ):
    if not good:
      raise ValueError(f"{name}={value} is out of its range.")
  for sequence in stop:
    if isinstance(sequence, int | str) or not len(sequence):
      raise ValueError(
        f"stop has {sequence!r}; each entry is a sequence of token ids, one at least."
      )
