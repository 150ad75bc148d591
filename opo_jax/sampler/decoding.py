"""Decoding: the compiled programs of the sampler, and the pytrees they pass on.

    prompts ──prefill, once each──▶ keys and values of the prompts, one entry a prompt
    queue of rollouts ──▶ slots: draw, record, feed back ──▶ tokens, log-probs, lengths
            ▲                       │
            └── a slot is free when its response has ended ──┘

A slot whose response has ended takes the next rollout from the queue inside the jitted
loop, in the very next iteration: nothing is recompiled and nobody waits. The keys and
values of a slot lie in a ring of columns: all slots write the same column, and a slot
attends to as many of the last columns as its response is long, so that a refill has
nothing to clear.

The loop is left only when its shapes should change: the ring doubles when a response
outgrows it and halves when the long ones are gone; when the queue is empty and most
slots are idle, the busy ones move together.

Every shard of the batch has prompts, a queue and slots of its own, so that while it
decodes nothing but a few numbers crosses the shards.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from opo_jax.devices import sharding
from opo_jax.models.attention import Keys
from opo_jax.models.transformer import Policy
from opo_jax.rollouts import prompt_columns
from opo_jax.sampler.tokens import TokenSampling, draw

# The shortest ring of columns, and the fewest slots of a shard that are moved together.
MIN_WIDTH, MIN_SLOTS = 64, 16
# What a shard prefills at a time, at most: tokens, and attention scores.
_PREFILL_TOKENS, _PREFILL_SCORES = 2**14, 2**28


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is compiled into the programs."""

  shards: int  # of the batch; each has prompts, queue and slots of its own
  samples_per_prompt: int
  max_new_tokens: int
  eos_ids: tuple[int, ...]
  stop: tuple[tuple[int, ...], ...]
  cache_dtype: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
  """What prefill leaves, one entry a prompt. G counts the prompts of all shards."""

  keys: jax.Array  # [L, G, K, P, E]
  values: jax.Array  # [L, G, K, P, E]
  hidden: jax.Array  # [G, D], predicts the first token of the response
  lengths: jax.Array  # [G]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
  """The rollouts asked for. A shard's rows lie together, the real ones in front."""

  keys: jax.Array  # [N] random keys
  limits: jax.Array  # [N] longest response
  counts: jax.Array  # [shards] real rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
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
class Drawn:
  """What has been sampled; the fields are those of Rollouts."""

  tokens: jax.Array  # [N, T]
  logprobs: jax.Array  # [N, T]
  sampling_logprobs: jax.Array | None  # [N, T]; None: the same
  lengths: jax.Array  # [N]
  finished: jax.Array  # [N]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ended:
  """Rows that have ended, as they are handed out before the others have."""

  rows: jax.Array  # [n] where Rollouts will have them; -1: none
  prompt_ids: jax.Array  # [n]
  tokens: jax.Array  # [n, T]
  lengths: jax.Array  # [n]
  finished: jax.Array  # [n]


@functools.partial(jax.jit, static_argnames="gathered")
@jax.named_scope("reshard")
def sampling_weights(policy: Policy, gathered: bool) -> Policy:
  """The policy as decoding reads it at every token, changed over once for a batch.

  Args:
    policy: in the learner's layout and dtype.
    gathered: every `fsdp` shard has whole weights, those of its `tensor` part.

  Returns:
    The same numbers in the compute dtype.
  """
  if policy.mesh is None:
    return policy.in_compute_dtype()
  like = jax.eval_shape(Policy.in_compute_dtype, policy)
  rules = sharding.GATHERED if gathered else sharding.RULES
  layout = sharding.tree_shardings(like, policy.mesh, rules)

  def change(array, like, layout):
    return jax.lax.with_sharding_constraint(array.astype(like.dtype), layout)

  def change_stacked(array, like, layout):
    # Layer by layer: all at once, they would be there twice while they are changed.
    of_one = layout.update(spec=layout.spec[1:])
    array = jax.lax.map(lambda one: change(one, like, of_one), array)
    return change(array, like, layout)

  def of_leaf(path, *leaves):
    stacked = getattr(path[0], "name", None) == "layers"
    return (change_stacked if stacked else change)(*leaves)

  return jax.tree_util.tree_map_with_path(of_leaf, policy, like, layout)


@functools.partial(jax.jit, static_argnames="settings")
def prefill(
  policy: Policy, tokens_GP: jax.Array, lengths_G: jax.Array, settings: Settings
) -> Prompts:
  """Keys, values and the last hidden state of every prompt, some prompts at a time."""
  (G, P), shards = tokens_GP.shape, settings.shards
  per_shard = G // shards
  most = min(_PREFILL_TOKENS, _PREFILL_SCORES // (P * policy.config.num_heads)) // P
  chunks = -(-per_shard // max(most, 1))
  chunk = -(-per_shard // chunks)

  def split(array):  # [G, ...] -> [chunks, shards * chunk, ...]
    array = _by_shard(array, shards)
    padding = [(0, 0), (0, chunks * chunk - per_shard)]
    array = jnp.pad(array, padding + [(0, 0)] * (array.ndim - 2), mode="edge")
    array = array.reshape(shards, chunks, chunk, *array.shape[2:])
    return array.swapaxes(0, 1).reshape(chunks, shards * chunk, *array.shape[3:])

  def join(array):
    array = array.reshape(chunks, shards, chunk, *array.shape[2:]).swapaxes(0, 1)
    array = array.reshape(shards, chunks * chunk, *array.shape[3:])
    return array[:, :per_shard].reshape(G, *array.shape[2:])

  def prefill_chunk(inputs):
    tokens, lengths = inputs
    hidden, (keys, values) = policy.hidden(tokens, *prompt_columns(lengths, P))
    # The prompts' axis first, so that chunks join along it.
    keys, values = (jnp.moveaxis(x, 1, 0) for x in (keys, values))
    dtype = settings.cache_dtype
    return hidden[:, -1], keys.astype(dtype), values.astype(dtype)

  with jax.named_scope("prefill"):
    inputs = (split(tokens_GP), split(lengths_G))
    hidden, keys, values = jax.tree.map(join, jax.lax.map(prefill_chunk, inputs))
  return Prompts(
    keys=_on_mesh(policy, jnp.moveaxis(keys, 0, 1), cache=True),
    values=_on_mesh(policy, jnp.moveaxis(values, 0, 1), cache=True),
    hidden=_on_mesh(policy, hidden),
    lengths=lengths_G,
  )


@functools.partial(jax.jit, static_argnames="samples_per_prompt")
def row_keys(seeds_N, rows_N, samples_per_prompt):
  """One key a row, of (seed, prompt index, sample index), or of its own seed alone."""

  def row_key(seed, row):
    key = jax.random.key(seed)
    if samples_per_prompt is None:
      return key
    prompt, sample = row // samples_per_prompt, row % samples_per_prompt
    return jax.random.fold_in(jax.random.fold_in(key, prompt), sample)

  return jax.vmap(row_key)(seeds_N, rows_N)


@functools.partial(jax.jit, static_argnames=("settings", "num_slots", "width"))
def start(policy, prompts, queue, distribution, settings, num_slots, width):
  """The first rollouts of each shard's queue in its slots; nothing drawn yet."""
  config, shards = policy.config, settings.shards
  S, N, T = num_slots * shards, queue.limits.shape[0], settings.max_new_tokens
  first = jnp.tile(jnp.arange(num_slots, dtype=jnp.int32), shards)
  row = jnp.where(first < jnp.repeat(queue.counts, num_slots), first, -1)

  def empty(shape, dtype):
    return _on_mesh(policy, jnp.zeros(shape, dtype))

  ring = (config.num_layers, S, config.num_kv_heads, width, config.head_dim)
  ring = jnp.zeros(ring, settings.cache_dtype)
  slots = Slots(
    step=jnp.int32(0),
    row=_on_mesh(policy, row),
    length=empty((S,), jnp.int32),
    hidden=_take(prompts.hidden, _prompt_of(row, settings), shards),
    keys=_on_mesh(policy, ring, cache=True),
    values=_on_mesh(policy, ring, cache=True),
    recent=empty((S, max(map(len, settings.stop), default=0)), jnp.int32) - 1,
    next_row=_on_mesh(policy, jnp.minimum(num_slots, queue.counts)),
  )
  drawn = Drawn(
    tokens=empty((N, T), jnp.int32),
    logprobs=empty((N, T), jnp.float32),
    sampling_logprobs=None if distribution.is_policy else empty((N, T), jnp.float32),
    lengths=empty((N,), jnp.int32),
    finished=empty((N,), bool),
  )
  return slots, drawn


@functools.partial(
  jax.jit, static_argnames=("settings", "in_groups"), donate_argnums=(0, 1)
)
def decode(
  slots: Slots,
  drawn: Drawn,
  policy: Policy,
  prompts: Prompts,
  queue: Queue,
  distribution: TokenSampling,
  steps: jax.Array,
  settings: Settings,
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
  prompt_positions_GP, prompt_segments_GP = prompt_columns(
    prompts.lengths, prompts.keys.shape[3]
  )
  last = slots.step + steps

  def situation(slots: Slots):
    busy = (slots.row >= 0).reshape(shards, -1).sum(-1).max()
    return busy, slots.length.max(), (slots.next_row < queue.counts).any()

  def goes_on(carry):
    slots, _ = carry
    busy, longest, waiting = situation(slots)
    resize = (longest >= W) & (settings.max_new_tokens > W)
    resize |= too_wide(longest, W)
    resize |= ~waiting & mostly_idle(busy, num_slots, settings)
    return (busy > 0) & ~resize & (slots.step < last)

  def decode_token(carry):
    slots, drawn = carry
    busy_S, t_S = slots.row >= 0, slots.length
    row_S = jnp.maximum(slots.row, 0)
    prompt_S = _prompt_of(slots.row, settings)

    keys_S = jax.vmap(jax.random.fold_in)(_take(queue.keys, row_S, shards), t_S)
    token_S, logprob_S, sampling_logprob_S = draw(
      policy.project(slots.hidden), keys_S, distribution
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
    position_S1 = (_take(prompts.lengths, prompt_S, shards) + t_S)[:, None]
    hidden_S1D, new = policy.hidden(
      token_S[:, None],
      position_S1,
      cache=(
        Keys(
          prompts.keys,
          prompts.values,
          (prompt_segments_GP > 0)[:, None],
          rows=None if in_groups else prompt_S.reshape(shards, num_slots),
          positions=prompt_positions_GP,
        ),
        Keys(
          slots.keys,
          slots.values,
          (age_W < t_S[:, None])[:, None],
          positions=position_S1 - 1 - age_W,
        ),
      ),
    )
    key, value = (x.astype(settings.cache_dtype) for x in new)
    column = (0, 0, 0, slots.step % W, 0)

    fresh_S = done_S | ~busy_S
    row_S, next_row = _refill(slots, queue, fresh_S, settings)
    first_hidden_SD = _take(prompts.hidden, _prompt_of(row_S, settings), shards)
    slots = Slots(
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
    slots, drawn = jax.lax.while_loop(goes_on, decode_token, (slots, drawn))
  return slots, drawn, situation(slots)


@functools.partial(
  jax.jit, static_argnames=("settings", "mesh", "most"), donate_argnums=2
)
def ended(slots, drawn, told_N, row_N, settings, mesh, most):
  """At most `most` rows that have ended and were not handed out before.

  Args:
    told_N: [N] bool, donated: what was handed out.
    row_N: [N] where Rollouts will have each of the shards' rows; -1: nowhere.

  Returns:
    what is handed out now, too; and `Ended`, the same on every device.
  """
  shards, N = settings.shards, told_N.shape[0]

  def begun_and_left(row_S, next_row):
    index = jnp.arange(N // shards)
    return (index < next_row) & (index[:, None] != row_S).all(1)

  ended_N = jax.vmap(begun_and_left)(_by_shard(slots.row, shards), slots.next_row)
  fresh_N = ended_N.reshape(-1) & ~told_N & (row_N >= 0)
  (chosen,) = jnp.nonzero(fresh_N, size=most, fill_value=N)
  told_N = told_N.at[chosen].set(True, mode="drop")
  rows = row_N.at[chosen].get(mode="fill", fill_value=-1)
  chosen = jnp.minimum(chosen, N - 1)
  handed_out = Ended(
    rows=rows,
    prompt_ids=jnp.maximum(rows, 0) // settings.samples_per_prompt,
    tokens=drawn.tokens[chosen],
    lengths=drawn.lengths[chosen],
    finished=drawn.finished[chosen],
  )
  return told_N, jax.tree.map(
    lambda x: sharding.constrain(x, mesh, *(None,) * x.ndim), handed_out
  )


@functools.partial(jax.jit, static_argnames=("settings", "num_slots", "width"))
def resize(slots: Slots, settings: Settings, num_slots: int, width: int) -> Slots:
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

  return Slots(
    step=slots.step,
    row=move(slots.row),
    length=move(slots.length),
    hidden=move(slots.hidden),
    keys=jax.vmap(move)(keys),
    values=jax.vmap(move)(values),
    recent=move(slots.recent),
    next_row=slots.next_row,
  )


PROGRAMS = (sampling_weights, prefill, row_keys, start, decode, ended, resize)


def ring(longest, most: int) -> int:
  """Columns of the ring while no response is longer; `most` at most."""
  width = MIN_WIDTH
  while width <= longest:
    width *= 2
  return min(width, most)


def mostly_idle(busy, num_slots: int, settings: Settings):
  """Whether the busy slots of a shard should move together, their queue being empty."""
  # Short responses are over before another program has been compiled for them.
  worth_it = settings.max_new_tokens >= 4 * MIN_WIDTH and num_slots > MIN_SLOTS
  return worth_it & (busy <= fewer_slots(num_slots))


def fewer_slots(num_slots: int) -> int:
  """What a shard's slots shrink to: a ladder of few sizes, for few programs."""
  return max(MIN_SLOTS, num_slots // 4)


def too_wide(longest, width: int):
  """Whether the ring should shrink."""
  return (4 * longest < width) & (width > MIN_WIDTH)


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
  return Drawn(
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
  return row.reshape(-1), next_row


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
  return sharding.constrain(array, policy.mesh, *_axes(policy, array, cache=cache))


def _axes(policy, array, *, cache):
  if not cache:
    return ("batch", *(None,) * (array.ndim - 1))
  mesh = policy.mesh
  whole = mesh is None or array.shape[2] % mesh.shape["tensor"]
  return (None, "batch", None if whole else "kv_heads", None, None)


def trace(
  policy: Policy,
  distribution: TokenSampling,
  settings: Settings,
  *,
  num_prompts: int,
  prompt_columns: int,
  num_slots: int,
) -> dict[str, tuple[jax.stages.Traced, dict[str, Any]]]:
  """The programs at their largest, from shapes alone: nothing is allocated or run.

  Args:
    policy: of `jax.ShapeDtypeStruct`s with their shardings, in its compute dtype.
    distribution: as for `decode`.
    settings: as for `decode`.
    num_prompts: G, of all shards.
    prompt_columns: P.
    num_slots: of a shard.

  Returns:
    `prefill` and `decode`, to be lowered, and what each is given besides the policy, or
    leaves, by kind. The ring has all its columns; in `half`, half of them.
  """
  num_rows = num_prompts * settings.samples_per_prompt

  def on_mesh(tree):
    """Where `_on_mesh` puts these; keys and values are known by their five axes."""

    def place(leaf):
      axes = _axes(policy, leaf, cache=leaf.ndim == 5) if leaf.ndim else ()
      return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding.named(policy.mesh, *axes)
      )

    return jax.tree.map(place, tree)

  def like(*shape, dtype=jnp.int32):
    return on_mesh(jax.ShapeDtypeStruct(shape, dtype))

  asked = (like(num_prompts, prompt_columns), like(num_prompts), settings)
  prompts = on_mesh(
    jax.eval_shape(functools.partial(prefill, settings=settings), policy, *asked[:2])
  )
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_rows))
  queue = Queue(on_mesh(keys), like(num_rows), like(settings.shards))
  in_groups = num_slots * settings.shards == num_rows

  def decode_with(width):
    begin = functools.partial(
      start, settings=settings, num_slots=num_slots, width=width
    )
    slots, drawn = on_mesh(jax.eval_shape(begin, policy, prompts, queue, distribution))
    decoded = decode.trace(
      slots, drawn, policy, prompts, queue, distribution, like(), settings, in_groups
    )
    cache = (prompts.keys, prompts.values, slots.keys, slots.values)
    return decoded, {"cache": cache, "rollouts": (drawn, queue)}

  left = {"rollouts": asked[:2], "cache": (prompts.keys, prompts.values)}
  return {
    "prefill": (prefill.trace(policy, *asked), left),
    "decode": decode_with(settings.max_new_tokens),
    "half": decode_with(max(settings.max_new_tokens // 2, 1)),
  }
