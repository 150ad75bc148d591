"""`JaxSampler`: prompts in, `Rollouts` out, and what that takes.

It checks the input and decodes a `Batch` until no rows are left. The host reads three
scalars whenever the device's loop stops: a dozen times a batch, not once a token.

The random key of a token is derived from (seed, prompt index, sample index, position)
only, so a rollout depends neither on the number of slots and devices nor on the other
rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax.devices import distributed, sharding
from opo_jax.devices.aot import AotProgram
from opo_jax.models.transformer import Policy
from opo_jax.rollouts import Rollouts
from opo_jax.sampler import batch, decoding, lowering, prefill
from opo_jax.sampler.params import SamplingParams
from opo_jax.sampler.schedule import bucket, count_bucket
from opo_jax.sampler.state import Ended, slot_bytes

# `on_ended` is called every 32 tokens, or 16 times while the longest response is
# sampled, whichever is rarer. A call costs a fraction of a token's time.
MIN_REPORT_TOKENS, MAX_REPORTS = 32, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class JaxSampler:
  """Samples from a `Policy` on its own mesh.

  Attributes:
    slots: responses decoded at a time, rounded up to fill the mesh; None takes as many
      as memory holds.
    cache_dtype: of stored keys and values; None is the policy's. A narrower dtype
      samples from another distribution than the learner computes.
    gather_weights: keep whole weights on every `fsdp` shard while sampling, instead of
      gathering them for every token. Takes the size of the policy, over `tensor`.
  """

  slots: int | None = None
  cache_dtype: str | None = None
  gather_weights: bool = True

  def __post_init__(self):
    if self.slots is not None and self.slots < 1:
      raise ValueError(f"slots={self.slots}; use 1 or more, or None (what fits).")

  def sample(
    self,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    seed: int | Sequence[int],
    first_prompt: int = 0,
    limits: Sequence[int] | None = None,
    version: int | jax.Array = -1,
    on_ended: Callable[[Ended], None] | None = None,
  ) -> Rollouts:
    """Samples `params.samples_per_prompt` responses to each prompt.

    Args:
      policy: to sample from.
      prompts: token ids of each prompt; lengths may differ.
      params: how to sample.
      seed: of all random keys; or a seed for each row, which then depends on nothing
        else and can be sampled again alone.
      first_prompt: the index of the first prompt in the random keys. A list sampled in
        parts, each at its place in the list, gives what the whole list gives.
      limits: the longest response of each row, where rows differ; `max_new_tokens` at
        most.
      version: of the policy, kept in the rollouts.
      on_ended: called with responses that have ended while others are still sampled,
        each row once at most, the last rows never. It changes no rollout. Its arrays
        are not waited for: read them on a thread.

    Returns:
      Rollouts; row `g * samples_per_prompt + s` is sample s of prompt g.

    Raises:
      ValueError: an empty prompt or list of prompts, a token outside the vocabulary, a
        value out of its range.
    """
    rows = self._start(policy, prompts, params, seed, first_prompt, limits)
    if on_ended is None:
      while rows.decode():
        pass
    else:
      tokens = max(MIN_REPORT_TOKENS, params.max_new_tokens // MAX_REPORTS)
      while rows.decode(tokens):
        on_ended(rows.ended())
    return rows.rollouts(version)

  def stream(
    self,
    policy: Policy,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    seed: int,
    every: int = 8,
  ) -> Iterator[list[int]]:
    """Samples one response and yields its tokens as they are sampled.

    Args:
      policy: to sample from.
      prompt: token ids.
      params: how to sample; `samples_per_prompt` counts as 1.
      seed: as for `sample`.
      every: tokens between two yields.

    Yields:
      the new tokens; together they are the response that `sample` returns.
    """
    params = dataclasses.replace(params, samples_per_prompt=1)
    row = self._start(policy, [prompt], params, seed)
    shown, busy = 0, True
    while busy:
      busy = row.decode(every)
      rollouts = row.rollouts(version=-1)
      length = int(rollouts.lengths[0])
      yield np.asarray(rollouts.tokens)[0, shown:length].tolist()
      shown = length

  def memory_bytes(
    self, policy: Policy, num_rows: int, params: SamplingParams
  ) -> tuple[int, int]:
    """Slots of `sample`, and their memory when responses are longest.

    Args:
      policy: arrays or shapes.
      num_rows: responses to sample.
      params: how to sample.

    Returns:
      Slots of the whole mesh; bytes of one device.
    """
    shards = sharding.batch_shards(policy.mesh)
    per_shard = min(self._slots_of_shard(policy, params), -(-num_rows // shards))
    return per_shard * shards, per_shard * self._slot_bytes(policy, params)

  def lower(
    self,
    abstract_policy: Policy,
    params: SamplingParams,
    *,
    num_prompts: int,
    prompt_tokens: int,
    free_bytes: int | None = None,
  ) -> list[AotProgram]:
    """The programs that `sample` would run, at their largest.

    Args:
      abstract_policy: of `jax.ShapeDtypeStruct`s with their shardings, on a mesh.
      params: how to sample.
      num_prompts: of a batch.
      prompt_tokens: of the longest prompt.
      free_bytes: of one device, before the sampler makes its own copy of the weights;
        None asks the devices. If the copy leaves less than a quarter of it, a quarter
        is assumed.

    Returns:
      reshard (if the sampler copies the weights), prefill and decode.
    """
    policy, params = abstract_policy, params.for_policy(abstract_policy)
    shards = sharding.batch_shards(policy.mesh)
    per_shard = count_bucket(-(-num_prompts // shards))
    gathered, copied = self._copies_weights(policy)
    reshard = prefill.sampling_weights.trace(policy, gathered) if copied else None
    policy = _abstract_weights(policy, gathered)
    if free_bytes is not None and copied:  # `sample` asks when the copy exists
      free_bytes = max(free_bytes - sharding.share_bytes(policy), free_bytes // 4)
    num_slots = self._slots_of_shard(policy, params, free_bytes)
    num_slots = min(num_slots, per_shard * params.samples_per_prompt)
    prefill_program, cached_prompts = lowering.lower_prefill(
      policy,
      num_prompts=shards * per_shard,
      prompt_columns=bucket(prompt_tokens),
      cache_dtype=self._cache_dtype(policy),
    )
    decode_program = lowering.lower_decode(
      policy, cached_prompts, params, num_slots=num_slots
    )
    programs = [prefill_program, decode_program]
    if copied:
      programs.insert(0, AotProgram("reshard", reshard, {}))
    weights = {"weights": policy} if copied else {}
    return [
      dataclasses.replace(
        program, arguments=weights | program.arguments, slots=num_slots * shards
      )
      for program in programs
    ]

  def _start(self, policy, prompts, params, seed, first_prompt=0, limits=None):
    """Checks the input, prefills the prompts and puts the first rows into slots."""
    _check_prompts(prompts, policy.config.vocab_size)
    params = params.for_policy(policy)
    num_rows = len(prompts) * params.samples_per_prompt
    longest = params.max_new_tokens
    limits = longest if limits is None else limits
    limits = _per_row("max_new_tokens", limits, num_rows, 1, longest)
    seeds = _per_row("seed", seed, num_rows, 0, 2**32 - 1)
    gathered, copied = self._copies_weights(policy)
    if copied:
      policy = prefill.sampling_weights(policy, gathered)
    return batch.Batch(
      policy,
      prompts,
      params,
      limits=limits,
      seeds=seeds,
      own_seeds=np.ndim(seed) == 1,
      first_prompt=first_prompt,
      num_slots=self._slots_of_shard(policy, params),
      cache_dtype=self._cache_dtype(policy),
    )

  def _copies_weights(self, policy: Policy) -> tuple[bool, bool]:
    """Whether to gather the weights, and whether the sampler copies them at all."""
    mesh, (embedding,) = policy.mesh, jax.tree.leaves(policy.embedding)
    gathered = self.gather_weights and mesh is not None and mesh.shape["fsdp"] > 1
    return gathered, gathered or embedding.dtype != policy.dtype

  def _cache_dtype(self, policy: Policy) -> str:
    return str(jnp.dtype(self.cache_dtype or policy.dtype))

  def _slots_of_shard(self, policy, params, free_bytes=None) -> int:
    if self.slots is not None:
      return -(-self.slots // sharding.batch_shards(policy.mesh))
    dtype = self._cache_dtype(policy)
    return _slots_that_fit(
      policy.config, policy.mesh, params.max_new_tokens, dtype, free_bytes
    )

  def _slot_bytes(self, policy, params) -> int:
    dtype = self._cache_dtype(policy)
    return slot_bytes(policy.config, policy.mesh, params.max_new_tokens, dtype)


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
  """Samples responses: `JaxSampler.sample` with everything as keywords.

  Args:
    policy: to sample from.
    prompts: token ids of each prompt; lengths may differ.
    samples_per_prompt, temperature, top_k, top_p, min_p, eos_ids, stop: see
      `SamplingParams`.
    max_new_tokens: T, the longest response; or a limit for each row.
    seed, first_prompt, version, on_ended: see `JaxSampler.sample`.
    slots, cache_dtype, gather_weights: see `JaxSampler`.

  Returns:
    Rollouts of `len(prompts) * samples_per_prompt` rows; row
    `g * samples_per_prompt + s` is sample s of prompt g.

  Raises:
    ValueError: an empty prompt or list of prompts, a value out of its range.
  """
  limits = max_new_tokens if np.ndim(max_new_tokens) else None
  params = SamplingParams(
    max_new_tokens=max_new_tokens if limits is None else max(limits, default=0),
    samples_per_prompt=samples_per_prompt,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    eos_ids=eos_ids,
    stop=stop,
  )
  sampler = JaxSampler(
    slots=slots, cache_dtype=cache_dtype, gather_weights=gather_weights
  )
  return sampler.sample(
    policy,
    prompts,
    params,
    seed=seed,
    first_prompt=first_prompt,
    limits=limits,
    version=version,
    on_ended=on_ended,
  )


def compiled_programs() -> int:
  """How many programs this process has compiled for sampling: about ten in a run.

  A prefill for each bucket of prompts, and a decode loop for each size of ring and
  number of slots that was needed.
  """
  programs = (
    prefill.sampling_weights,
    prefill.prefill,
    prefill.row_keys,
    prefill.start,
    decoding.decode,
    decoding.ended,
    decoding.resize,
  )
  return sum(program._cache_size() for program in programs)


# --- input and memory ----------------------------------------------------------------


def _per_row(name, value, num_rows, least, most) -> np.ndarray:
  """One whole number for all rows, or one for each, as an array [num_rows]."""
  array = np.asarray(value)
  if array.ndim and array.shape != (num_rows,):
    raise ValueError(
      f"{name} has {len(array)} values for {num_rows} rows (prompts x samples); give"
      f" one number, or {num_rows} of them."
    )
  if array.dtype.kind not in "iu" or array.min() < least or array.max() > most:
    raise ValueError(f"{name}={value}; it must be a whole number, {least} to {most}.")
  return np.broadcast_to(array, (num_rows,))


def _check_prompts(prompts, vocab_size) -> None:
  if not len(prompts):
    raise ValueError("There are no prompts to sample from; pass at least one.")
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(
        f"Prompt {i} is empty; a prompt needs at least one token (a begin-of-sequence"
        " token will do)."
      )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
      raise ValueError(
        f"Prompt {i} has a token outside the policy's vocabulary of {vocab_size}; use"
        " the tokenizer that the policy was made for."
      )


def _abstract_weights(policy: Policy, gathered: bool) -> Policy:
  """Shapes and layout of the weights that decoding reads."""
  rules = sharding.GATHERED if gathered else sharding.RULES
  policy = jax.eval_shape(Policy.in_compute_dtype, policy)
  layout = sharding.tree_shardings(policy, policy.mesh, rules)
  return sharding.abstract(policy, layout)


# Cached, so that it is chosen once for all steps: free memory wavers, and another
# number of slots is another program.
@functools.cache
def _slots_that_fit(config, mesh, max_new_tokens, cache_dtype, free_bytes=None) -> int:
  """Slots of a shard, a power of two, that at their longest take half of free memory.

  Args:
    config: of the policy.
    mesh: or None.
    max_new_tokens: T.
    cache_dtype: of keys and values.
    free_bytes: of one device; None asks the devices.

  Raises:
    ValueError: not even one slot fits.
  """
  slot = slot_bytes(config, mesh, max_new_tokens, cache_dtype)
  if free_bytes is None:  # the least of all processes: their programs must be the same
    free = np.array([sharding.free_bytes(mesh)])
    free_bytes = int(distributed.all_gather(free, None, jax.process_count()).min())
  budget = free_bytes // 2
  if slot > budget:
    raise ValueError(
      f"The keys and values of one response of {max_new_tokens} tokens take"
      f" {slot / 2**30:.1f} GiB, and {budget / 2**30:.1f} are available; use fewer"
      " tokens (--rollout.max-new-tokens) or more devices along a tensor axis"
      " (--mesh.tensor)."
    )
  return 1 << ((budget // slot).bit_length() - 1)
