"""Batch: the rows of one call while they are sampled.

The host's half of the decode loop: it deals prompts and rows over the shards, chooses
the sizes of ring and slots, and calls the compiled programs.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax.devices import memory, sharding
from opo_jax.models.transformer import Policy
from opo_jax.rollouts import Rollouts
from opo_jax.sampler import decoding, prefill, schedule
from opo_jax.sampler.params import SamplingParams
from opo_jax.sampler.state import Ended, Queue, slot_bytes

# Responses reported at a time, at most.
MAX_ENDED = 256


class Batch:
  """The rows of one call while they are sampled: chooses shapes, calls programs."""

  def __init__(
    self,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    limits: np.ndarray,
    seeds: np.ndarray,
    own_seeds: bool,
    first_prompt: int,
    num_slots: int,
    cache_dtype: str,
  ):
    """Prefills the prompts and puts the first rows into slots.

    Args:
      policy: the sampler's own weights.
      prompts: token ids.
      params: `eos_ids` resolved.
      limits: [rows] longest response.
      seeds: [rows].
      own_seeds: the keys of a row depend on its seed only.
      first_prompt: the index of the first prompt in the random keys.
      num_slots: of a shard, at most.
      cache_dtype: of keys and values.
    """
    self.policy, self.params, self.cache_dtype = policy, params, cache_dtype
    self.tokens_GP, self.lengths_G = _right_aligned(prompts)
    self.order = order = _deal(len(prompts), params.samples_per_prompt, policy.mesh)
    self.reported = None
    keys_N = _row_keys(order, seeds, own_seeds, first_prompt, params, policy.mesh)
    self.queue = _queue(order, keys_N, limits, policy.mesh)
    self.num_slots = min(order.rows_of_shard, num_slots)
    self.width = schedule.ring(0, params.max_new_tokens)
    # While every row has its own slot, the rows of a group are contiguous, and the keys
    # of their prompt are read once for all of them.
    self.in_groups = self.num_slots == order.rows_of_shard
    chosen = np.maximum(order.prompts, 0)
    tokens_GP, lengths_G = (
      sharding.put(array[chosen], policy.mesh, "batch")
      for array in (self.tokens_GP, self.lengths_G)
    )
    with memory.explained(self._advice):
      self.prompts = prefill.prefill(policy, tokens_GP, lengths_G, cache_dtype)
      self.slots, self.responses = prefill.start(
        policy, self.prompts, self.queue, params, self.num_slots, self.width
      )

  def decode(self, steps: int = 2**30) -> bool:
    """Decodes `steps` tokens, or until shapes should change; whether rows are left."""
    with memory.explained(self._advice):
      self.slots, self.responses, progress = decoding.decode(
        self.slots,
        self.responses,
        self.policy,
        self.prompts,
        self.queue,
        self.params,
        jnp.int32(steps),
        self.in_groups,
      )
      busy, longest, waiting = (int(scalar) for scalar in progress)
      if busy:
        self._fit(busy, longest, waiting)
      return busy > 0

  def _fit(self, busy: int, longest: int, waiting: int) -> None:
    """Gives the ring and the slots the sizes that the rows in progress need."""
    most = self.params.max_new_tokens
    if longest >= self.width:
      self._resize(self.num_slots, schedule.ring(longest, most))
    while schedule.too_wide(longest, self.width):
      self._resize(self.num_slots, schedule.ring((self.width - 1) // 2, most))
    while not waiting and schedule.mostly_idle(busy, self.num_slots, most):
      self._resize(schedule.fewer_slots(self.num_slots), self.width)

  def _resize(self, num_slots: int, width: int) -> None:
    self.slots = decoding.resize(self.slots, num_slots, width)
    self.in_groups &= num_slots == self.num_slots
    self.num_slots, self.width = num_slots, width

  def ended(self) -> Ended:
    """Responses that have ended since the last call, `MAX_ENDED` at most."""
    rows = self.order.rows
    if self.reported is None:
      self.reported = jnp.zeros(len(rows), bool)
    self.reported, ended = decoding.ended(
      self.slots,
      self.responses,
      self.reported,
      rows,
      self.params.samples_per_prompt,
      self.policy.mesh,
      min(MAX_ENDED, len(rows)),
    )
    return ended

  def rollouts(self, version: int | jax.Array) -> Rollouts:
    """What has been sampled, in the order of the prompts."""
    responses, params = self.responses, self.params
    real = self.order.rows >= 0
    if not real.all():
      where = np.flatnonzero(real)
      responses = jax.tree.map(lambda array: array[where], responses)
    sampling_logprobs = responses.sampling_logprobs
    if sampling_logprobs is None:
      sampling_logprobs = responses.logprobs
    num_prompts, T = len(self.lengths_G), params.max_new_tokens
    return Rollouts(
      prompts=jnp.asarray(self.tokens_GP),
      prompt_lengths=jnp.asarray(self.lengths_G),
      tokens=responses.tokens,
      logprobs=responses.logprobs,
      sampling_logprobs=sampling_logprobs,
      mask=jnp.arange(T) < responses.lengths[:, None],
      lengths=responses.lengths,
      prompt_ids=jnp.repeat(
        jnp.arange(num_prompts, dtype=jnp.int32), params.samples_per_prompt
      ),
      finished=responses.finished,
      temperature=jnp.float32(1.0 if params.is_greedy else params.temperature),
      version=jnp.int32(version),
      filtered=not params.is_policy,
    )

  def _advice(self) -> str:
    """What to do when sampling runs out of memory."""
    config, mesh, T = self.policy.config, self.policy.mesh, self.params.max_new_tokens
    shards = sharding.batch_shards(mesh)
    slots = self.num_slots * shards
    taken = self.num_slots * slot_bytes(config, mesh, T, self.cache_dtype)
    needed = f"Sampling ran out of memory with {slots} slots, which take up to"
    needed += f" {memory.gib(taken)} of a device"
    if slots == shards:
      return (
        f"{needed}; use fewer tokens (--rollout.max-new-tokens {T // 2}) or more"
        " devices along a tensor axis (--mesh.tensor)."
      )
    return f"{needed}; use half of them (--rollout.slots {max(slots // 2, shards)})."


# --- prompts and rows over the shards ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Order:
  """Which prompts and rows each shard has; -1 is padding.

  Attributes:
    prompts: [G] int, the prompts of shard 0, its padding, those of shard 1, …
    rows: [N] int32, the row in Rollouts of each shard's rows, likewise.
    counts: [shards] int32, the rows of each shard without padding.
  """

  prompts: np.ndarray
  rows: np.ndarray
  counts: np.ndarray

  @property
  def rows_of_shard(self) -> int:
    return len(self.rows) // len(self.counts)


def _deal(num_prompts, samples_per_prompt, mesh) -> _Order:
  """Deals prompts over the shards in order and evenly; pads all shards to one size.

  5 prompts of 2 samples on 2 shards: prompts 0 1 2 | 3 4 -1, rows 0 1 2 3 4 5 | 6 7 8 9
  -1 -1, counts 6 4.
  """
  dealt = np.array_split(np.arange(num_prompts), sharding.batch_shards(mesh))
  prompts = np.full((len(dealt), schedule.count_bucket(len(dealt[0]))), -1)
  for entries, part in zip(prompts, dealt, strict=True):
    entries[: len(part)] = part
  prompts = prompts.reshape(-1)
  rows = prompts[:, None] * samples_per_prompt + np.arange(samples_per_prompt)
  rows = np.where(prompts[:, None] >= 0, rows, -1).reshape(-1)
  counts = [len(part) * samples_per_prompt for part in dealt]
  return _Order(prompts, rows.astype(np.int32), np.array(counts, np.int32))


def _row_keys(order, seeds, own_seeds, first_prompt, params, mesh) -> jax.Array:
  """A random key for each row of the queues, of its place in the whole list."""
  rows = np.maximum(order.rows, 0)
  places = rows + first_prompt * params.samples_per_prompt
  return prefill.row_keys(
    sharding.put(seeds[rows].astype(np.uint32), mesh, "batch"),
    sharding.put(places.astype(np.int32), mesh, "batch"),
    None if own_seeds else params.samples_per_prompt,
  )


def _queue(order, keys_N, limits, mesh) -> Queue:
  limits_N = limits[np.maximum(order.rows, 0)].astype(np.int32)
  return Queue(
    keys=keys_N,
    limits=sharding.put(limits_N, mesh, "batch"),
    counts=sharding.put(order.counts, mesh, "batch"),
  )


def _right_aligned(prompts) -> tuple[np.ndarray, np.ndarray]:
  """Prompts [G, P], padded on the left to a bucket, and their lengths [G]."""
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), schedule.bucket(lengths.max())), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[len(row) - len(prompt) :] = prompt
  return tokens, lengths
