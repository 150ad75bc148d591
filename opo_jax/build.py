"""Config -> the typed parts of a run: mesh, policy, sampler, scorer, learner.

Each function builds one part. `loop.train` calls them in order; planning calls the same
ones for devices that are absent, so that it compiles the programs that training runs.
"""

import jax
import optax
from jax.sharding import Mesh

from opo_jax.config import Config
from opo_jax.config import Eval as EvalConfig
from opo_jax.devices import memory, sharding
from opo_jax.learner import Algorithm, PolicyGradientLearner, optimizer
from opo_jax.models import ModelConfig, Policy, lora
from opo_jax.models.config_json import read_config
from opo_jax.models.hf import read_weights
from opo_jax.sampler import JaxSampler, SamplingParams


def make_mesh(config: Config) -> Mesh:
  """The mesh over all devices.

  Raises:
    ValueError: sizes that do not fill the devices, or offloading that they do not
      support.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  check_remat(config, mesh)
  return mesh


def check_remat(config: Config, mesh: Mesh) -> None:
  """Refuses `--model.remat offload` where devices cannot read the host's memory."""
  if config.model.remat == "offload":
    instead = "use --model.remat everything"
    sharding.check_host_memory(mesh, "--model.remat offload", instead)


def check_batch(config: Config, mesh: Mesh) -> None:
  """Refuses batches that do not fill the mesh, and names the next multiple that does.

  Raises:
    ValueError: prompts or SFT examples that do not divide over the batch shards.
  """
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


# --- the policy -------------------------------------------------------------------


def model_config(config: Config) -> ModelConfig:
  """The policy's shape, from the config.json of `model.path` or from the config."""
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


def check_vocabulary(policy_size: int, tokenizer_size: int) -> None:
  """Refuses a policy with fewer tokens than the tokenizer has."""
  if policy_size < tokenizer_size:
    raise ValueError(
      f"The tokenizer has {tokenizer_size} tokens, the policy {policy_size}; use at"
      f" least {tokenizer_size} (--model.vocab-size), or the policy's own tokenizer"
      " (--data.tokenizer)."
    )


def compute_dtype(config: Config, mesh: Mesh) -> str:
  """The dtype of activations: bfloat16 on accelerators unless the config names one."""
  if config.model.dtype != "auto":
    return config.model.dtype
  return "bfloat16" if sharding.on_accelerator(mesh) else "float32"


def abstract_policy(
  config: Config, mesh: Mesh, *, eos_ids: tuple[int, ...], shape: ModelConfig
) -> Policy:
  """Shapes, dtypes and shardings of the policy; allocates nothing.

  Args:
    config: of the run.
    mesh: of devices that may be absent.
    eos_ids: the tokens that end a response.
    shape: what `model_config` gives.

  Raises:
    ValueError: a dimension that the mesh does not divide.
  """
  policy = jax.eval_shape(
    lambda key: _fresh_policy(config, mesh, eos_ids, shape, key),
    jax.random.key(config.seed),
  )
  return sharding.abstract(policy, sharding.tree_shardings(policy, mesh))


def init_policy(config: Config, abstract: Policy) -> Policy:
  """Loads the policy of `model.path`, or initialises one randomly, onto the mesh."""
  if config.model.path and not config.model.fresh:
    return read_weights(config.model.path, abstract)
  initialise = jax.jit(
    lambda key: _fresh_policy(
      config, abstract.mesh, abstract.eos_ids, abstract.config, key
    ),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
  )
  return initialise(jax.random.key(config.seed))


def _fresh_policy(config, mesh, eos_ids, shape, key) -> Policy:
  return Policy(
    shape,
    key,
    eos_ids=eos_ids,
    mesh=mesh,
    dtype=compute_dtype(config, mesh),
    param_dtype=config.model.param_dtype,
    attention=config.model.attention,
  )


def add_adapters(config: Config, policy: Policy) -> Policy:
  """The policy that RL trains: with LoRA adapters where the config has a rank.

  Args:
    config: of the run.
    policy: arrays; or shapes, inside `jax.eval_shape`.
  """
  size = config.model
  if not size.lora_rank:
    return policy
  return lora.add(
    policy,
    key=jax.random.fold_in(jax.random.key(config.seed), 1),
    rank=size.lora_rank,
    alpha=size.lora_alpha,
    targets=size.lora_targets.split(","),
  )


# --- sampler ----------------------------------------------------------------------


def make_sampler(config: Config) -> JaxSampler:
  """The sampler, with the run's slots, cache dtype and layout of weights."""
  rollout = config.rollout
  return JaxSampler(
    slots=rollout.slots or None,
    cache_dtype=rollout.cache_dtype or None,
    gather_weights=rollout.gather_weights,
  )


def rollout_params(config: Config) -> SamplingParams:
  """How training samples."""
  rollout = config.rollout
  return SamplingParams(
    samples_per_prompt=rollout.group_size,
    max_new_tokens=rollout.max_new_tokens,
    temperature=rollout.temperature,
    top_k=rollout.top_k,
    top_p=rollout.top_p,
    min_p=rollout.min_p,
  )


def eval_params(config: Config) -> SamplingParams:
  """How evaluation samples: `config.eval`'s filters, training's response length."""
  settings: EvalConfig = config.eval
  return SamplingParams(
    samples_per_prompt=settings.samples,
    max_new_tokens=config.rollout.max_new_tokens,
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    min_p=settings.min_p,
  )


# --- learner ----------------------------------------------------------------------


def make_learner(config: Config, mesh: Mesh) -> PolicyGradientLearner:
  """The learner of the RL phase."""
  return PolicyGradientLearner(
    algorithm(config, share_prompts=not sharding.on_accelerator(mesh)),
    adamw(config, rl_schedule(config)),
    offload=config.optimizer.offload,
  )


def make_sft_learner(config: Config) -> PolicyGradientLearner:
  """The learner of the SFT phase.

  A demonstration is a response with reward 1: REINFORCE then is maximum likelihood, so
  that SFT needs no second loss.
  """
  return PolicyGradientLearner(
    Algorithm(
      estimator="reinforce",
      objective="policy_gradient",
      require_on_policy=False,
      micro_batch_tokens=config.algorithm.micro_batch_tokens,
      remat=config.model.remat,
      share_prompts=False,  # every prompt has one response
    ),
    adamw(config, optimizer.sft_schedule(config.sft.learning_rate, config.sft.steps)),
    offload=config.optimizer.offload,
  )


def algorithm(config: Config, *, share_prompts: bool = True) -> Algorithm:
  """What the learner compiles into its update."""
  settings, rollout = config.algorithm, config.rollout
  rows = rollout.prompts_per_step * rollout.group_size
  constant = rows // settings.updates_per_batch * rollout.max_new_tokens
  return Algorithm(
    estimator=settings.advantage,
    objective=settings.loss,
    aggregation=settings.aggregation,
    normalizer=float(constant) if settings.aggregation == "constant" else None,
    # An option left at 0 keeps the default of the loss.
    clip_low=settings.clip_low or None,
    clip_high=settings.clip_high or None,
    tis_cap=settings.tis_cap or None,
    updates_per_batch=settings.updates_per_batch,
    micro_batch_tokens=settings.micro_batch_tokens,
    require_on_policy=settings.updates_per_batch == 1,
    remat=config.model.remat,
    share_prompts=share_prompts,
  )


def rl_schedule(config: Config) -> optax.Schedule:
  """Optimiser step -> learning rate of the RL phase."""
  settings = config.optimizer
  return optimizer.learning_rate_schedule(
    settings.schedule,
    settings.learning_rate,
    warmup_steps=settings.warmup_steps,
    total_steps=config.steps * config.algorithm.updates_per_batch,
  )


def adamw(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
  """AdamW with the run's settings and a schedule."""
  settings = config.optimizer
  return optimizer.adamw(
    schedule,
    b1=settings.b1,
    b2=settings.b2,
    epsilon=settings.epsilon,
    weight_decay=settings.weight_decay,
    moment_dtype=settings.moment_dtype,
    max_grad_norm=settings.max_grad_norm,
    offload=settings.offload,
  )


def update_memory(config: Config, mesh: Mesh) -> memory.UpdateMemory:
  """What the update takes of a device, and what to do if it does not fit."""
  rollout = config.rollout
  longest = rollout.max_prompt_tokens + rollout.max_new_tokens
  rows = rollout.prompts_per_step * rollout.group_size
  whole = rows // config.algorithm.updates_per_batch * longest
  return memory.UpdateMemory(
    device_bytes=sharding.device_bytes(mesh),
    tokens=config.algorithm.micro_batch_tokens or whole,
    # One row a shard is the least.
    least_tokens=sharding.batch_shards(mesh) * longest,
    offload=config.optimizer.offload,
    remat=config.model.remat,
  )
