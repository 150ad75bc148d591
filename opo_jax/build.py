"""Config -> the device parts of a run: mesh, policy, optimisers, sampler, updates.

What `train` runs and what can be compiled ahead of time is the same: it is made here.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from opo_jax import learner as trainer
from opo_jax import sampler
from opo_jax.advantages import ESTIMATORS
from opo_jax.config import Config, near_names
from opo_jax.config import Eval as EvalConfig
from opo_jax.config import Rollout as RolloutConfig
from opo_jax.devices import sharding
from opo_jax.models import ModelConfig, Policy, lora, save, save_adapter
from opo_jax.models.card import model_card
from opo_jax.models.config_json import end_tokens, generation_config, read_config
from opo_jax.models.hf import read_weights
from opo_jax.rewards import reward_model
from opo_jax.rollouts import Rollouts


@dataclass(frozen=True)
class Ahead:
  """A program of a run, traced from shapes alone.

  Attributes:
    name: reshard, prefill, decode or update.
    traced: to be lowered.
    arguments: by kind, the shapes and layout of what it is given; of reshard and
      prefill, of the weights, keys and values that they leave, too. `weights` are the
      sampler's own copy.
    rounds: of its loop whose number of rounds is decided as it runs: micro-batches.
    slots: responses decoded at a time, over all devices.
    half: of decode, the same with half of the ring's columns.
  """

  name: str
  traced: jax.stages.Traced
  arguments: dict[str, Any]
  rounds: int = 1
  slots: int = 0
  half: jax.stages.Traced | None = None


@dataclass(frozen=True)
class Parts:
  """The device side of a run.

  Attributes:
    mesh: of all devices.
    init: () -> the fresh or loaded policy, laid out over the mesh.
    like: shapes and layout of the policy.
    like_state: shapes and layout of the RL phase's TrainState.
    start: policy -> TrainState of the RL phase, at step 0.
    start_sft: policy -> TrainState of the warm start.
    sample: (policy, prompts, distribution, samples_per_prompt=, seed=, first_prompt=,
      version=) -> Rollouts; `distribution` is `config.rollout` or `config.eval`.
    stream: (policy, prompt, distribution, seed=) -> the tokens of one response, as they
      come.
    sampling_programs: () -> how many programs were compiled for sampling.
    sampling_memory: () -> slots of a training step, and what they take of a device.
    update: the RL update.
    imitate: the warm start's update: maximum likelihood of demonstrations.
    start_reward: policy -> TrainState of a reward model that begins as this policy.
    update_reward: the reward model's update on preference pairs.
    load_reward: directory or hub id -> reward model, laid out over the mesh.
    kl_to_start: (start policy, rollouts, rows [n]) -> mean KL on these rows.
    export: (policy, directory, tokenizer=, rows=, run=, adapter_alone=) writes the
      Hugging Face format, or PEFT's, with the run's metrics and run.json in its model
      card.
    learning_rate: optimiser step -> learning rate of the RL phase.
    trace: (prompt_tokens=, free_bytes=) -> the programs of a step at their largest.
  """

  mesh: Mesh
  init: Callable[[], Policy]
  like: Policy
  like_state: trainer.TrainState
  start: Callable[[Policy], trainer.TrainState]
  start_sft: Callable[[Policy], trainer.TrainState]
  sample: Callable[..., Rollouts]
  stream: Callable[..., Iterator[list[int]]]
  sampling_programs: Callable[[], int]
  sampling_memory: Callable[[], tuple[int, int]]
  update: trainer.Update
  imitate: trainer.Update
  start_reward: Callable[[Policy], trainer.TrainState]
  update_reward: reward_model.PairUpdate
  load_reward: Callable[..., reward_model.RewardModel]
  kl_to_start: Callable[..., jax.Array]
  export: Callable[..., None]
  learning_rate: Callable[[int], float]
  trace: Callable[..., list[Ahead]]


def build(
  config: Config,
  *,
  eos_ids: tuple[int, ...],
  vocab_size: int,
  mesh: Mesh | None = None,
  shape: ModelConfig | None = None,
) -> Parts:
  """Makes the parts.

  Args:
    config: the run.
    eos_ids: the tokens that end a response, those of `model_end_tokens` among them.
    vocab_size: the tokenizer's; the policy's may be larger, not smaller.
    mesh: of devices that need not be there; None: of all that are.
    shape: of the policy; None: as config or config.json say.

  Raises:
    ValueError: sizes that do not fit the mesh or each other.
  """
  size = config.mesh
  mesh = mesh or sharding.make_mesh(size.data, size.fsdp, size.tensor)
  if config.model.remat == "offload":
    instead = "use --model.remat everything"
    sharding.check_host_memory(mesh, "--model.remat offload", instead)
  model_config = shape or read_shape(config)
  _check_vocabulary(model_config.vocab_size, vocab_size)
  key = jax.random.key(config.seed)
  dtype = config.model.dtype
  if dtype == "auto":
    dtype = "bfloat16" if sharding.on_accelerator(mesh) else "float32"

  def fresh(key):
    return Policy(
      model_config,
      key,
      eos_ids=eos_ids,
      mesh=mesh,
      dtype=dtype,
      param_dtype=config.model.param_dtype,
      attention=config.model.attention,
    )

  like = jax.eval_shape(fresh, key)
  layout = sharding.tree_shardings(like, mesh)
  like = sharding.abstract(like, layout)

  def init():
    if config.model.path and not config.model.fresh:
      return read_weights(config.model.path, like)
    return jax.jit(fresh, out_shardings=layout)(key)

  schedule = _schedule(config)
  optimizer = _adamw(config, schedule)
  offload = config.optimizer.offload
  start = functools.partial(_start, optimizer, mesh, offload, _adapters(config))
  like_state = _like_state(optimizer, mesh, offload, _adapters(config), like)
  share_prompts = not sharding.on_accelerator(mesh)
  update = trainer.Update(_algorithm(config, share_prompts=share_prompts), optimizer)
  warm_optimizer = _adamw(config, _rise_and_fall(config.sft))
  pairs = config.reward_model
  reward_optimizer = _adamw(config, _rise_and_fall(pairs))
  reward_from = jax.jit(
    functools.partial(reward_model.from_policy, key=jax.random.fold_in(key, 2))
  )

  return Parts(
    mesh=mesh,
    init=init,
    like=like,
    like_state=like_state,
    start=start,
    start_sft=functools.partial(_start, warm_optimizer, mesh, offload, lambda p: p),
    sample=functools.partial(_sample, config.rollout),
    stream=functools.partial(_stream, config.rollout),
    sampling_programs=sampler.compiled_programs,
    sampling_memory=functools.partial(_sampling_memory, config.rollout, like),
    update=update,
    # A demonstration is a response with reward 1; REINFORCE then is maximum
    # likelihood, and the update needs no second loss.
    imitate=trainer.Update(
      trainer.Algorithm(
        estimator=ESTIMATORS["reinforce"],
        objective=trainer.OBJECTIVES["policy_gradient"],
        require_on_policy=False,
        micro_batch_tokens=config.algorithm.micro_batch_tokens,
        remat=config.model.remat,
        share_prompts=False,  # nobody to share with
      ),
      warm_optimizer,
    ),
    start_reward=functools.partial(
      _start, reward_optimizer, mesh, offload, reward_from
    ),
    update_reward=reward_model.PairUpdate(
      reward_optimizer,
      margin=pairs.margin,
      center=pairs.center,
      remat=config.model.remat,
    ),
    load_reward=functools.partial(
      reward_model.load, mesh=mesh, dtype=dtype, param_dtype=dtype
    ),
    kl_to_start=functools.partial(
      trainer.kl_to_start, micro_batch_tokens=config.algorithm.micro_batch_tokens
    ),
    export=functools.partial(_export, config),
    learning_rate=schedule,
    trace=functools.partial(_trace, config, like, like_state, update),
  )


def model_end_tokens(config: Config) -> tuple[int, ...]:
  """The end tokens that the model itself names; none for fresh weights."""
  return end_tokens(config.model.path) if config.model.path else ()


def demonstrations(
  prompts: Sequence[Sequence[int]],
  responses: Sequence[Sequence[int]],
  ends: Sequence[bool],
  *,
  max_new_tokens: int,
) -> Rollouts:
  """Demonstrations as rollouts, one to a prompt, so that the update can imitate them.

  Args:
    prompts: token ids.
    responses: token ids, the end token included where there is one.
    ends: whether the response ends (by its end token) or is cut off.
    max_new_tokens: T; a longer response is cut off there.
  """
  num, width = len(prompts), sampler.bucket(max(map(len, prompts)))
  prompts_GP = np.zeros((num, width), np.int32)
  tokens_NT = np.zeros((num, max_new_tokens), np.int32)
  lengths = np.array([min(len(r), max_new_tokens) for r in responses], np.int32)
  for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    prompts_GP[row, width - len(prompt) :] = prompt
    tokens_NT[row, : lengths[row]] = response[: lengths[row]]
  return Rollouts(
    prompts=jnp.asarray(prompts_GP),
    prompt_lengths=jnp.array([len(p) for p in prompts], jnp.int32),
    tokens=jnp.asarray(tokens_NT),
    logprobs=jnp.zeros((num, max_new_tokens), jnp.float32),
    sampling_logprobs=jnp.zeros((num, max_new_tokens), jnp.float32),
    mask=jnp.arange(max_new_tokens) < lengths[:, None],
    lengths=jnp.asarray(lengths),
    prompt_ids=jnp.arange(num, dtype=jnp.int32),
    finished=jnp.array(
      [e and len(r) <= max_new_tokens for e, r in zip(ends, responses, strict=True)]
    ),
    temperature=jnp.float32(1.0),
    version=jnp.int32(-1),
  )


def check_batch(config: Config, mesh: Mesh) -> None:
  """Refuses batches that do not fill the mesh, with the multiple that would."""
  shards, prompts = sharding.batch_shards(mesh), config.rollout.prompts_per_step
  if prompts % shards:
    raise ValueError(
      f"{prompts} prompts do not fill {shards} devices; use a multiple of {shards}"
      f" (--rollout.prompts-per-step {-(-prompts // shards) * shards})."
    )
  if config.sft.steps and config.sft.batch_size % shards:
    size = config.sft.batch_size
    raise ValueError(
      f"{size} demonstrations do not fill {shards} devices; use a multiple of {shards}"
      f" (--sft.batch-size {-(-size // shards) * shards})."
    )


def read_shape(config: Config) -> ModelConfig:
  """The policy's numbers: of `model.path`'s config.json, or of the config."""
  size = config.model
  if size.path:
    return read_config(size.path)
  return ModelConfig(
    vocab_size=size.vocab_size,
    width=size.width,
    mlp_width=size.mlp_width,
    num_layers=size.num_layers,
    num_heads=size.num_heads,
    num_kv_heads=size.num_kv_heads,
    head_dim=size.head_dim,
    initializer_range=size.initializer_range,
  )


def _check_vocabulary(policy_size, tokenizer_size):
  if policy_size < tokenizer_size:
    raise ValueError(
      f"The tokenizer has {tokenizer_size} tokens, the policy {policy_size}; use at"
      f" least {tokenizer_size} (--model.vocab-size), or the policy's own tokenizer"
      " (--data.tokenizer)."
    )


def _adapters(config: Config) -> Callable[[Policy], Policy]:
  """policy -> the policy that RL trains: with adapters, where the config has a rank."""
  size = config.model
  if not size.lora_rank:
    return lambda policy: policy
  return functools.partial(
    lora.add,
    key=jax.random.fold_in(jax.random.key(config.seed), 1),
    rank=size.lora_rank,
    alpha=size.lora_alpha,
    targets=size.lora_targets.split(","),
  )


def _start(optimizer, mesh, offload, adapt, policy) -> trainer.TrainState:
  trained, frozen = lora.split(adapt(policy))
  fresh = functools.partial(_fresh, optimizer)
  layout = _layout(jax.eval_shape(fresh, trained), mesh, offload)
  state = jax.jit(fresh, out_shardings=layout)(trained)
  return dataclasses.replace(state, policy=lora.join(state.policy, frozen))


def _like_state(optimizer, mesh, offload, adapt, like) -> trainer.TrainState:
  """Shapes and layout of what `_start` gives."""
  trained, frozen = lora.split(jax.eval_shape(adapt, like))
  state = jax.eval_shape(functools.partial(_fresh, optimizer), trained)
  state = sharding.abstract(state, _layout(state, mesh, offload))
  frozen = sharding.abstract(frozen, sharding.tree_shardings(frozen, mesh))
  return dataclasses.replace(state, policy=lora.join(state.policy, frozen))


def _fresh(optimizer, trained) -> trainer.TrainState:
  # A copy: the state is donated to every update, `policy` stays the caller's. What is
  # frozen is not donated, and both share it.
  trained = jax.tree.map(jnp.copy, trained)
  return trainer.TrainState(trained, optimizer.init(trained), jnp.int32(0))


def _layout(state: trainer.TrainState, mesh: Mesh, offload: bool) -> trainer.TrainState:
  layout = sharding.tree_shardings(state, mesh)
  if not offload:
    return layout
  moments = sharding.on_host(layout.opt_state, state.opt_state, mesh)
  return dataclasses.replace(layout, opt_state=moments)


def _sample(
  rollout: RolloutConfig,
  policy: Policy,
  prompts: Sequence[Sequence[int]],
  distribution: RolloutConfig | EvalConfig,
  **options: Any,
) -> Rollouts:
  return sampler.generate(
    policy,
    prompts,
    slots=rollout.slots or None,
    **_sampling(rollout, distribution),
    **options,
  )


def _trace(
  config: Config,
  like: Policy,
  like_state: trainer.TrainState,
  update: trainer.Update,
  *,
  prompt_tokens: int,
  free_bytes: int | None = None,
) -> list[Ahead]:
  rollout = config.rollout
  sampling = sampler.trace(
    like,
    num_prompts=rollout.prompts_per_step,
    prompt_tokens=prompt_tokens,
    samples_per_prompt=rollout.group_size,
    max_new_tokens=rollout.max_new_tokens,
    temperature=rollout.temperature,
    slots=rollout.slots or None,
    cache_dtype=rollout.cache_dtype or None,
    gather_weights=rollout.gather_weights,
    free_bytes=free_bytes,
  )
  rollouts = _like_rollouts(rollout, like.mesh, sampler.bucket(prompt_tokens))
  traced, micro_batches = update.trace(like_state, rollouts)
  ahead = [Ahead(**program) for program in sampling]
  return [*ahead, Ahead("update", traced, {"rollouts": rollouts}, rounds=micro_batches)]


def _like_rollouts(rollout: RolloutConfig, mesh: Mesh, prompt_columns: int) -> Rollouts:
  """Shapes and layout of what `generate` gives."""
  G, T = rollout.prompts_per_step, rollout.max_new_tokens
  N = G * rollout.group_size

  def like(dtype, *shape, over="batch"):
    axes = (over, *(None,) * (len(shape) - 1)) if shape else ()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, *axes))

  logprobs = like(jnp.float32, N, T)
  return Rollouts(
    prompts=like(jnp.int32, G, prompt_columns, over=None),
    prompt_lengths=like(jnp.int32, G, over=None),
    tokens=like(jnp.int32, N, T),
    logprobs=logprobs,
    sampling_logprobs=logprobs,
    mask=like(bool, N, T),
    lengths=like(jnp.int32, N),
    prompt_ids=like(jnp.int32, N, over=None),
    finished=like(bool, N),
    temperature=like(jnp.float32),
    version=like(jnp.int32),
  )


def _export(
  config: Config,
  policy: Policy,
  directory: str | pathlib.Path,
  *,
  tokenizer: Any,
  rows: list[dict[str, Any]],
  run: dict[str, Any],
  adapter_alone: bool = False,
) -> None:
  algorithm, rollout, path = config.algorithm, config.rollout, config.model.path
  directory, has_start_model = pathlib.Path(directory), path and not config.model.fresh
  base = "" if pathlib.Path(path).is_dir() else path
  card = model_card(
    name=config.experiment or directory.name,
    base=base if has_start_model else None,
    settings={
      "advantage": algorithm.advantage,
      "loss": algorithm.loss,
      "updates per batch": algorithm.updates_per_batch,
      "data": config.data.train,
      "prompts a step": rollout.prompts_per_step,
      "responses to each": rollout.group_size,
      "longest response": rollout.max_new_tokens,
      "sampling temperature": rollout.temperature,
      "learning rate": config.optimizer.learning_rate,
      "supervised warm start, steps": config.sft.steps,
      "activations": policy.dtype,
    }
    | _adapter_settings(config.model),
    rows=rows,
    run=run,
    library="peft" if adapter_alone else "transformers",
  )
  whole = {
    "tokenizer": tokenizer,
    "generation": generation_config(path) if path else None,
  }
  if not adapter_alone:
    save(policy, directory, card=card, **whole)
    return
  if not has_start_model or config.sft.steps:
    # What the adapters lie beside is nowhere else.
    path = str((directory / "base").resolve())
    save(lora.without(policy), path, **whole)
  save_adapter(policy, directory, base=path, tokenizer=tokenizer, card=card)


def _adapter_settings(size) -> dict[str, Any]:
  if not size.lora_rank:
    return {}
  return {
    "LoRA rank": size.lora_rank,
    "LoRA alpha": size.lora_alpha,
    "LoRA targets": size.lora_targets,
  }


def _stream(
  rollout: RolloutConfig,
  policy: Policy,
  prompt: Sequence[int],
  distribution: RolloutConfig | EvalConfig,
  *,
  seed: int,
) -> Iterator[list[int]]:
  return sampler.stream(policy, prompt, seed=seed, **_sampling(rollout, distribution))


def _sampling_memory(rollout: RolloutConfig, like: Policy) -> tuple[int, int]:
  return sampler.memory_bytes(
    like,
    rollout.prompts_per_step * rollout.group_size,
    rollout.max_new_tokens,
    rollout.slots or None,
    rollout.cache_dtype or None,
  )


def _sampling(rollout, distribution) -> dict[str, Any]:
  return {
    "max_new_tokens": rollout.max_new_tokens,
    "cache_dtype": rollout.cache_dtype or None,
    "gather_weights": rollout.gather_weights,
    "temperature": distribution.temperature,
    "top_k": distribution.top_k,
    "top_p": distribution.top_p,
    "min_p": distribution.min_p,
  }


def _algorithm(config: Config, *, share_prompts: bool = True) -> trainer.Algorithm:
  algorithm = config.algorithm
  objective = _choose(trainer.OBJECTIVES, algorithm.loss, "loss")
  clip = {"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high}
  options = {"policy_gradient": {}, "tis": {"cap": algorithm.tis_cap}}
  options = options.get(algorithm.loss, clip)
  # An option left at 0 stays as the loss has it.
  objective = functools.partial(objective, **{k: v for k, v in options.items() if v})
  rows = config.rollout.prompts_per_step * config.rollout.group_size
  constant = rows // algorithm.updates_per_batch * config.rollout.max_new_tokens
  return trainer.Algorithm(
    estimator=_choose(ESTIMATORS, algorithm.advantage, "advantage"),
    objective=objective,
    aggregation=algorithm.aggregation,
    normalizer=float(constant) if algorithm.aggregation == "constant" else None,
    updates_per_batch=algorithm.updates_per_batch,
    micro_batch_tokens=algorithm.micro_batch_tokens,
    require_on_policy=algorithm.updates_per_batch == 1,
    remat=config.model.remat,
    share_prompts=share_prompts,
    split=lora.split,
    join=lora.join,
  )


def _choose(table, name, flag):
  if name not in table:
    raise ValueError(f"--algorithm.{flag} has no {name!r}; {near_names(name, table)}")
  return table[name]


def _schedule(config: Config) -> Callable[[Any], Any]:
  optimizer = config.optimizer
  peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
  decay_steps = max(config.steps * config.algorithm.updates_per_batch - warmup, 1)
  after = {
    "constant": optax.constant_schedule(peak),
    "cosine": optax.cosine_decay_schedule(peak, decay_steps),
    "linear": optax.linear_schedule(peak, 0.0, decay_steps),
  }[optimizer.schedule]
  if not warmup:
    return after
  rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([rise, after], [warmup])


def _rise_and_fall(settings) -> Callable[[Any], Any]:
  """A tenth of the steps up to the peak, then a cosine to 0."""
  steps = max(settings.steps, 1)
  return optax.warmup_cosine_decay_schedule(
    0.0, settings.learning_rate, steps // 10, steps
  )


def _adamw(config: Config, schedule) -> optax.GradientTransformation:
  optimizer = config.optimizer
  adamw = optax.chain(
    optax.clip_by_global_norm(optimizer.max_grad_norm),
    optax.adamw(
      schedule,
      b1=optimizer.b1,
      b2=optimizer.b2,
      eps=optimizer.epsilon,
      weight_decay=optimizer.weight_decay,
      mu_dtype=optimizer.moment_dtype,
    ),
  )

  # Whatever the parameters are kept in, the step is computed in float32.
  def init(policy):
    return adamw.init(_in_float32(policy))

  def update(gradients, state, policy):
    return adamw.update(_in_float32(gradients), state, _in_float32(policy))

  def update_offloaded(gradients, state, policy):
    state = jax.device_put(state, jax.memory.Space.Device)
    step, state = update(gradients, state, policy)
    host = jax.tree.map(
      lambda leaf: jax.device_put(leaf, jax.memory.Space.Host) if leaf.ndim else leaf,
      state,
    )
    return step, host

  if optimizer.offload:
    return optax.GradientTransformation(init, update_offloaded)
  return optax.GradientTransformation(init, update)


def _in_float32(tree):
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
