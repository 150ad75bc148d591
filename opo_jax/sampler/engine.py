"""Sampling: prompts in, `Rollouts` out.

`generate` is the host's side: it checks, lays prompts and queue out over the mesh, and
calls the programs of `decoding` until nothing is left to sample. It reads three numbers
whenever the device's loop stops, which is a dozen times in a batch, not once a token.

The random key of a token is derived from (seed, prompt index, sample index, position)
and from nothing else, so a rollout depends neither on the number of slots and devices
nor on its neighbours.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax.devices import distributed, memory, sharding
from opo_jax.models.transformer import Policy
from opo_jax.rollouts import Rollouts
from opo_jax.sampler import decoding
from opo_jax.sampler import tokens as distribution
from opo_jax.sampler.decoding import Ended

# Between two looks at what has ended: tokens at least, and looks in the time that the
# longest response takes. A look costs a fraction of a token's time.
MIN_TOKENS_A_LOOK, LOOKS = 32, 16
# What is handed out at a time, at most.
MOST_ENDED = 256


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
  first_prompt: int = 0,
  slots: int | None = None,
  cache_dtype: str | None = None,
  gather_weights: bool = True,
  version: int | jax.Array = -1,
  on_ended: Callable[[Ended], None] | None = None,
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
    first_prompt: the index of the first prompt in the random keys. A list sampled in
      parts, each with its place in the list, gives what the whole list gives.
    slots: responses decoded at a time, rounded up to fill the mesh; None takes as many
      as the memory holds.
    cache_dtype: of stored keys and values; None is the policy's. A narrower one samples
      from another distribution than the learner sees.
    gather_weights: keep whole weights on every `fsdp` shard while sampling, rather than
      gather them again for every token. Takes the size of the policy, over `tensor`.
    version: of the policy, kept in the rollouts.
    on_ended: is given rows that have ended while others are still sampled, each row
      once at most, the last ones never. It changes no rollout. Its arrays are not
      waited for; whoever reads them should do that on a thread.

  Returns:
    Rollouts of `len(prompts) * samples_per_prompt` rows.

  Raises:
    ValueError: an empty prompt or list of prompts, a setting out of its range.
  """
  sampling = _Sampling(
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
    first_prompt=first_prompt,
    slots=slots,
    cache_dtype=cache_dtype,
    gather_weights=gather_weights,
  )
  if on_ended is None:
    while sampling.advance():
      pass
  else:
    tokens = max(MIN_TOKENS_A_LOOK, sampling.settings.max_new_tokens // LOOKS)
    while sampling.advance(tokens):
      on_ended(sampling.ended())
  return sampling.rollouts(version)


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
  sampling = _Sampling(policy, [prompt], **options)
  shown, busy = 0, True
  while busy:
    busy = sampling.advance(every)
    rollouts = sampling.rollouts(version=-1)
    length = int(rollouts.lengths[0])
    yield np.asarray(rollouts.tokens)[0, shown:length].tolist()
    shown = length


def trace(
  policy: Policy,
  *,
  num_prompts: int,
  prompt_tokens: int,
  samples_per_prompt: int,
  max_new_tokens: int,
  temperature: float = 1.0,
  slots: int | None = None,
  cache_dtype: str | None = None,
  gather_weights: bool = True,
  free_bytes: int | None = None,
) -> list[dict[str, Any]]:
  """The programs that `generate` would run, for devices that may not be there.

  Args:
    policy: of `jax.ShapeDtypeStruct`s with their shardings, on a mesh.
    num_prompts: G.
    prompt_tokens: of the longest prompt.
    samples_per_prompt: responses to each.
    max_new_tokens: T.
    temperature: above 0.
    slots: responses decoded at a time; None: as many as `generate` would take.
    cache_dtype, gather_weights: as for `generate`.
    free_bytes: of one device, before the sampler has weights of its own; None asks the
      device. Where those leave less than a quarter of it, a quarter counts.

  Returns:
    For reshard (where the sampler keeps its own weights), prefill, and decode at its
    largest: `name`, `traced`, the shapes of its `arguments` by kind, how many `slots`
    there are over all devices, and for decode `half`: the same with half of the ring's
    columns.
  """
  shards = sharding.batch_shards(policy.mesh)
  per_shard = count_bucket(-(-num_prompts // shards))
  cache_dtype = str(jnp.dtype(cache_dtype or policy.dtype))
  gather_weights, copied = _own_weights(policy, gather_weights)
  reshard = decoding.sampling_weights.trace(policy, gather_weights) if copied else None
  rules = sharding.GATHERED if gather_weights else sharding.RULES
  policy = jax.eval_shape(Policy.in_compute_dtype, policy)
  policy = sharding.abstract(
    policy, sharding.tree_shardings(policy, policy.mesh, rules)
  )
  if slots is None:
    if free_bytes is not None and copied:  # `generate` asks when they are there
      left = free_bytes - sharding.share_bytes(policy)
      free_bytes = max(left, free_bytes // 4)
    slots = shards * _slots_that_fit(
      policy.config, policy.mesh, max_new_tokens, cache_dtype, free_bytes
    )
  num_slots = min(per_shard * samples_per_prompt, -(-slots // shards))
  programs = decoding.trace(
    policy,
    distribution.make(policy.config.vocab_size, temperature=temperature),
    decoding.Settings(
      shards=shards,
      samples_per_prompt=samples_per_prompt,
      max_new_tokens=max_new_tokens,
      eos_ids=tuple(policy.eos_ids),
      stop=(),
      cache_dtype=cache_dtype,
    ),
    num_prompts=shards * per_shard,
    prompt_columns=bucket(prompt_tokens),
    num_slots=num_slots,
  )
  weights = {"weights": policy} if copied else {}
  half, _ = programs.pop("half")
  if reshard:
    programs = {"reshard": (reshard, {})} | programs
  return [
    {
      "name": name,
      "traced": traced,
      "arguments": weights | arguments,
      "slots": num_slots * shards,
      "half": half if name == "decode" else None,
    }
    for name, (traced, arguments) in programs.items()
  ]


def compiled_programs() -> int:
  """How many programs this process has compiled for sampling: a few, for a whole run.

  A prefill for each bucket of prompts, and a decode loop for each size of ring and
  number of slots that was needed.
  """
  return sum(program._cache_size() for program in decoding.PROGRAMS)


def memory_bytes(
  policy: Policy,
  num_rows: int,
  max_new_tokens: int,
  slots: int | None = None,
  cache_dtype: str | None = None,
) -> tuple[int, int]:
  """The slots of `generate`, and what they take of a device when responses are longest.

  Args:
    policy: arrays or shapes.
    num_rows: responses asked for.
    max_new_tokens, slots, cache_dtype: as for `generate`.

  Returns:
    Slots of the whole mesh; bytes of one device.
  """
  shards = sharding.batch_shards(policy.mesh)
  size = (
    policy.config,
    policy.mesh,
    max_new_tokens,
    str(jnp.dtype(cache_dtype or policy.dtype)),
  )
  of_shard = -(-slots // shards) if slots else _slots_that_fit(*size)
  of_shard = min(of_shard, -(-num_rows // shards))
  return of_shard * shards, of_shard * _slot_bytes(*size)


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


class _Sampling:
  """One call of `generate`: the host side, which chooses shapes and reads three numbers
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
    first_prompt=0,
    slots=None,
    cache_dtype=None,
    gather_weights=True,
  ):
    eos_ids = policy.eos_ids if eos_ids is None else eos_ids
    _check_input(policy, prompts, samples_per_prompt, eos_ids, stop)
    limits = _per_row("max_new_tokens", max_new_tokens, prompts, samples_per_prompt, 1)
    seeds = _per_row("seed", seed, prompts, samples_per_prompt, 0)
    gather_weights, copied = _own_weights(policy, gather_weights)
    if copied:
      policy = decoding.sampling_weights(policy, gather_weights)
    self.policy, self.num_samples = policy, samples_per_prompt
    shards = sharding.batch_shards(policy.mesh)
    self.settings = decoding.Settings(
      shards=shards,
      samples_per_prompt=samples_per_prompt,
      max_new_tokens=int(limits.max()),
      eos_ids=tuple(map(int, eos_ids)),
      stop=tuple(tuple(map(int, sequence)) for sequence in stop),
      cache_dtype=str(jnp.dtype(cache_dtype or policy.dtype)),
    )
    self.distribution = distribution.make(
      policy.config.vocab_size,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      min_p=min_p,
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
    self.told = None

    def put(array, *axes):
      return sharding.put(array, policy.mesh, *axes)

    self.asked_rows = np.where(real, rows, -1).astype(np.int32)
    rows = np.maximum(rows, 0)
    self.queue = decoding.Queue(
      keys=decoding.row_keys(
        put(seeds[rows].astype(np.uint32), "batch"),
        put((rows + first_prompt * samples_per_prompt).astype(np.int32), "batch"),
        samples_per_prompt if np.ndim(seed) == 0 else None,
      ),
      limits=put(limits[rows].astype(np.int32), "batch"),
      counts=put(
        np.array([len(part) * samples_per_prompt for part in dealt], np.int32), "batch"
      ),
    )
    self.num_rows = per_shard * samples_per_prompt  # of a shard
    if slots is None:
      slots = shards * _slots_that_fit(
        policy.config,
        policy.mesh,
        self.settings.max_new_tokens,
        self.settings.cache_dtype,
      )
    self.num_slots = min(self.num_rows, -(-slots // shards))
    self.width = decoding.ring(0, self.settings.max_new_tokens)
    # While every row has its own slot, the rows of a group lie together, and the keys
    # of their prompt are read once for all of them.
    self.in_groups = self.num_slots == self.num_rows
    filled = np.maximum(index, 0)
    with memory.explained(self._advice):
      self.prompts = decoding.prefill(
        policy,
        put(self.tokens[filled], "batch"),
        put(self.lengths[filled], "batch"),
        self.settings,
      )
      self.slots, self.drawn = decoding.start(
        policy,
        self.prompts,
        self.queue,
        self.distribution,
        self.settings,
        self.num_slots,
        self.width,
      )

  def advance(self, steps: int = 2**30) -> bool:
    """Decodes `steps` tokens, or until shapes should change; says if more is left."""
    with memory.explained(self._advice):
      return self._advance(steps)

  def _advance(self, steps: int) -> bool:
    self.slots, self.drawn, (busy, longest, waiting) = decoding.decode(
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
    most = self.settings.max_new_tokens
    if not busy:
      return False
    if longest >= self.width:
      self._resize(self.num_slots, decoding.ring(longest, most))
    while decoding.too_wide(longest, self.width):
      self._resize(self.num_slots, decoding.ring((self.width - 1) // 2, most))
    while not waiting and decoding.mostly_idle(busy, self.num_slots, self.settings):
      self._resize(decoding.fewer_slots(self.num_slots), self.width)
    return True

  def ended(self) -> Ended:
    """Rows that have ended since it was last called, `MOST_ENDED` at most."""
    if self.told is None:
      self.told = jnp.zeros(len(self.asked_rows), bool)
    self.told, ended = decoding.ended(
      self.slots,
      self.drawn,
      self.told,
      self.asked_rows,
      self.settings,
      self.policy.mesh,
      min(MOST_ENDED, len(self.asked_rows)),
    )
    return ended

  def _resize(self, num_slots: int, width: int) -> None:
    self.slots = decoding.resize(self.slots, self.settings, num_slots, width)
    self.in_groups &= num_slots == self.num_slots
    self.num_slots, self.width = num_slots, width

  def _advice(self) -> str:
    """What to do about sampling that did not fit."""
    shards, T = self.settings.shards, self.settings.max_new_tokens
    slots = self.num_slots * shards
    taken = _slot_bytes(
      self.policy.config, self.policy.mesh, T, self.settings.cache_dtype
    )
    needed = f"Sampling ran out of memory with {slots} slots, which take up to"
    needed += f" {memory.gib(taken * self.num_slots)} of a device"
    if slots == shards:
      return (
        f"{needed}; use fewer tokens (--rollout.max-new-tokens {T // 2}) or more"
        " devices along a tensor axis (--mesh.tensor)."
      )
    return f"{needed}; use half of them (--rollout.slots {max(slots // 2, shards)})."

  def rollouts(self, version: int | jax.Array) -> Rollouts:
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
      temperature=self.distribution.temperature,
      version=jnp.int32(version),
      filtered=not self.distribution.is_policy,
    )


# --- input -------------------------------------------------------------------------


def _right_aligned(prompts):
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), bucket(lengths.max())), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[len(row) - len(prompt) :] = prompt
  return tokens, lengths


def _per_row(name, value, prompts, samples, least):
  """One whole number for all rows, or one for each, as an array."""
  num_rows, array = len(prompts) * samples, np.asarray(value)
  if array.ndim and array.shape != (num_rows,):
    raise ValueError(
      f"{name} has {len(array)} values for {len(prompts)} prompts x {samples} samples;"
      f" give one number, or {num_rows} of them."
    )
  if array.dtype.kind not in "iu" or array.min() < least or array.max() >= 2**32:
    raise ValueError(f"{name}={value} is no whole number from {least} to 2^32 - 1.")
  return np.broadcast_to(array, (num_rows,))


def _own_weights(policy: Policy, gather_weights: bool) -> tuple[bool, bool]:
  """Whether to gather, and whether sampling has weights of its own at all."""
  mesh, (embedding,) = policy.mesh, jax.tree.leaves(policy.embedding)
  gathered = gather_weights and mesh is not None and mesh.shape["fsdp"] > 1
  return gathered, gathered or embedding.dtype != policy.dtype


# Once for all steps: free memory wavers, and another number is another program.
@functools.cache
def _slots_that_fit(config, mesh, max_new_tokens, cache_dtype, free=None) -> int:
  """Slots of a shard, a power of two, that at their longest take half of the memory
  (bytes of one device) that is free when it is first asked for."""
  slot = _slot_bytes(config, mesh, max_new_tokens, cache_dtype)
  if free is None:  # the least of all processes: their programs must be the same
    free = np.array([sharding.free_bytes(mesh)])
    free = int(distributed.all_gather(free, None, jax.process_count()).min())
  budget = free // 2
  if slot > budget:
    raise ValueError(
      f"The keys and values of one response of {max_new_tokens} tokens take"
      f" {slot / 2**30:.1f} GiB, and {budget / 2**30:.1f} are to be had; use fewer"
      " tokens (--rollout.max-new-tokens) or more devices along a tensor axis"
      " (--mesh.tensor)."
    )
  return 1 << ((budget // slot).bit_length() - 1)


def _slot_bytes(config, mesh, max_new_tokens, cache_dtype) -> int:
  """What a slot takes of its shard's memory when its response is longest."""
  parts = 1 if mesh is None else mesh.shape["tensor"]
  heads = config.num_kv_heads
  heads = heads if heads % parts else heads // parts
  column = 2 * config.num_layers * heads * config.head_dim
  column *= jnp.dtype(cache_dtype).itemsize
  # A ring of half the size is still there while the next one is filled. Of the logits
  # there are some copies, sorted ones among them.
  return column * max_new_tokens * 3 // 2 + 8 * 4 * config.vocab_size // parts


def _check_input(policy, prompts, samples_per_prompt, eos_ids, stop) -> None:
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
  if samples_per_prompt < 1:
    raise ValueError(f"samples_per_prompt={samples_per_prompt}; it must be at least 1.")
  if np.ndim(eos_ids) != 1:
    raise ValueError(f"eos_ids={eos_ids!r}; give a sequence of token ids, () for none.")
  for sequence in stop:
    if isinstance(sequence, str) or np.ndim(sequence) != 1 or not len(sequence):
      raise ValueError(
        f"stop has {sequence!r}; each entry is a sequence of token ids, one at least."
      )
