"""All settings of a run, one page. Each is a flag: `--rollout.group-size 16`.

A field's comment and a section's docstring are their `--help` texts; a field's type
carries its limits. Only the modules that assemble a run read these classes; all others
take plain values.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Limits:
  """Which numbers a field takes: `low` to `high`, or above `low` if `low_is_open`."""

  low: float
  high: float = math.inf
  low_is_open: bool = False

  def allow(self, value: float) -> bool:
    above = self.low < value if self.low_is_open else self.low <= value
    return above and value <= self.high

  def __str__(self) -> str:
    low = f"above {self.low}" if self.low_is_open else f"at least {self.low}"
    return low if self.high == math.inf else f"{low} and at most {self.high}"


PositiveInt = Annotated[int, Limits(1)]
NonNegativeInt = Annotated[int, Limits(0)]
PositiveFloat = Annotated[float, Limits(0, low_is_open=True)]
NonNegativeFloat = Annotated[float, Limits(0)]
Probability = Annotated[float, Limits(0, 1)]
PositiveProbability = Annotated[float, Limits(0, 1, low_is_open=True)]


@dataclass(frozen=True)
class Model:
  """The policy. With `path`, the checkpoint sets the architecture, not these sizes."""

  # Directory or hub id in Hugging Face format. Empty: randomly initialised weights of
  # the sizes below.
  path: str = ""
  # Read only config.json from `path`; initialise the weights randomly.
  fresh: bool = False
  # Rows of the embedding; at least the tokenizer's vocabulary size.
  vocab_size: PositiveInt = 32
  # Model width (hidden size).
  width: PositiveInt = 128
  # Hidden width of the gated MLP.
  mlp_width: PositiveInt = 384
  # Transformer layers.
  num_layers: PositiveInt = 2
  # Query heads.
  num_heads: PositiveInt = 4
  # Key-value heads; divides num_heads.
  num_kv_heads: PositiveInt = 2
  # Width of one attention head.
  head_dim: PositiveInt = 32
  # Standard deviation of the random initialisation.
  initializer_range: float = 0.02
  # Data type of activations. auto: bfloat16 on accelerators, float32 on CPUs. Log-probs
  # are float32 in any case.
  dtype: Literal["auto", "float32", "bfloat16"] = "auto"
  # Data type of parameters. bfloat16 halves their memory and rounds away updates
  # smaller than 1/256 of a weight. LoRA adapters are float32 in any case.
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  # Rank of the LoRA adapters; RL then trains only these. 0: RL trains all parameters.
  # See docs/lora.md.
  lora_rank: NonNegativeInt = 0
  # Scale of the adapters: their product is multiplied by lora_alpha / lora_rank.
  lora_alpha: NonNegativeFloat = 32.0
  # Linear layers that get an adapter: our names (query) or PEFT's (q_proj), separated
  # by commas, or all-linear.
  lora_targets: str = "all-linear"
  # Attention kernel for whole sequences (prefill and learner): einsum, cudnn (NVIDIA
  # GPUs) or splash (TPUs). auto: the device's kernel where it supports the model, else
  # einsum.
  attention: Literal["auto", "einsum", "cudnn", "splash"] = "auto"
  # Rematerialisation: what the backward pass recomputes instead of storing. attention:
  # the attention scores; block: all of a transformer block but its input; everything:
  # several blocks from the input of the first; offload: as block, with the blocks'
  # inputs in host memory.
  remat: Literal["none", "attention", "block", "everything", "offload"] = "none"


@dataclass(frozen=True)
class Data:
  """Training problems, tokenizer and prompt format."""

  # Sources of training problems (docs/data.md), with weights if there are several:
  # "gsm8k:1 math:2".
  train: str = "arithmetic"
  # Key of the question in jsonl:, parquet: and hf: sources. Empty: the common keys.
  prompt_field: str = ""
  # Key of the reference answer in these sources. Empty: the common keys.
  answer_field: str = ""
  # Benchmarks to decontaminate the training problems against: duplicates and near
  # duplicates of their test problems are removed. "math500 aime24".
  decontaminate_against: str = ""
  # JSON lines of problem ids and pass rates of the start policy. Empty: no filter.
  pass_rate_file: str = ""
  # Remove training problems with a pass rate below this (needs pass_rate_file).
  min_pass_rate: NonNegativeFloat = 0.0
  # Remove training problems with a pass rate above this (needs pass_rate_file).
  max_pass_rate: float = 1.0
  # `arithmetic`, `preferences`, a directory or a hub id. Empty: the model's own.
  tokenizer: str = "arithmetic"
  # System message of every prompt. Empty: none.
  system: str = ""
  # Instruction appended to every question, on its own line.
  instruction: str = ""


@dataclass(frozen=True)
class Reward:
  """The reward of a response: verifier or reward model, and reward shaping."""

  # arithmetic, math, preferences (the true score of that task), reward_model, or a
  # function of your own: package.module:function.
  verifier: str = "arithmetic"
  # Reward model for the verifier reward_model: a run directory that holds one, or a
  # directory or hub id in Hugging Face format. Empty: train one first
  # (--reward-model.*).
  model: str = ""
  # Verifier processes. 0: verify in-process, without a time limit.
  workers: NonNegativeInt = 0
  # Wall-clock limit of verifying one response, seconds. A response that exceeds it is
  # unscorable.
  timeout_s: PositiveFloat = 5.0
  # Memory limit of a verifier process: address space beyond that at its start, GiB.
  memory_gib: PositiveFloat = 2.0
  # Reward of a response truncated at max_new_tokens. incorrect: 0; scored: score the
  # text; masked: mask the response out of baseline and loss.
  truncated: Literal["incorrect", "scored", "masked"] = "incorrect"
  # Stop the run if a larger fraction of a step's responses is unscorable.
  max_unscorable_fraction: NonNegativeFloat = 0.2
  # Reward added to a response that follows `format`.
  format_weight: NonNegativeFloat = 0.0
  # boxed: a closed, non-empty \boxed{}; think: reasoning that ends with one </think>,
  # then the box.
  format: Literal["boxed", "think"] = "boxed"
  # Weight of DAPO's soft overlong penalty: subtracted in full from a response of
  # max_new_tokens.
  overlong_weight: NonNegativeFloat = 0.0
  # Tokens before max_new_tokens over which the soft overlong penalty grows linearly.
  overlong_tokens: int = 0
  # Weight of the repetition penalty: subtracted times the fraction of repeated n-grams.
  repetition_weight: NonNegativeFloat = 0.0
  # n of the repetition penalty's n-grams, tokens.
  repetition_ngram: PositiveInt = 20


@dataclass(frozen=True)
class RewardModel:
  """Training of a reward model on preference pairs, from the start policy's weights."""

  # Preference pairs: `preferences`, or jsonl:PATH with the keys prompt, chosen and
  # rejected.
  pairs: str = "preferences"
  # Number of training pairs, taken from the beginning. 0: all.
  num_pairs: NonNegativeInt = 0
  # Optimiser steps.
  steps: PositiveInt = 200
  # Pairs per optimiser step.
  batch_size: PositiveInt = 64
  # Peak learning rate: linear warm-up over the first tenth of the steps, then cosine
  # decay to 0.
  learning_rate: NonNegativeFloat = 1e-3
  # Margin of the Bradley-Terry loss, subtracted from chosen minus rejected score.
  margin: NonNegativeFloat = 0.0
  # Weight of the penalty (chosen score + rejected score)^2, which centers scores at 0.
  center: NonNegativeFloat = 0.01


@dataclass(frozen=True)
class SFT:
  """Supervised fine-tuning on demonstrations, before RL."""

  # Optimiser steps. 0: no SFT.
  steps: NonNegativeInt = 0
  # Demonstrations per optimiser step.
  batch_size: PositiveInt = 128
  # Peak learning rate: linear warm-up over the first tenth of the steps, then cosine
  # decay to 0.
  learning_rate: NonNegativeFloat = 2e-3


@dataclass(frozen=True)
class Rollout:
  """Sampling of the rollouts that RL trains on."""

  # Prompts per step; each is one group of responses.
  prompts_per_step: PositiveInt = 32
  # Responses per prompt.
  group_size: PositiveInt = 8
  # Maximum prompt length, tokens. Problems with longer prompts are removed.
  max_prompt_tokens: PositiveInt = 512
  # Maximum response length, tokens, including the end token.
  max_new_tokens: PositiveInt = 24
  # Sampling temperature, above 0; the learner's log-probs use it too.
  temperature: float = 1.0
  # Top-k sampling: keep the k most probable tokens. 0: all; on-policy training needs 0.
  top_k: NonNegativeInt = 0
  # Nucleus (top-p) sampling: keep the most probable tokens up to this cumulative
  # probability. On-policy training needs 1.
  top_p: PositiveProbability = 1.0
  # Min-p sampling: keep tokens whose probability is at least min_p times the largest.
  # On-policy training needs 0.
  min_p: Probability = 0.0
  # Decoding slots: responses that are decoded at the same time. 0: as many as fit into
  # memory.
  slots: NonNegativeInt = 0
  # Data type of the KV cache. Empty: that of the activations. With a narrower type,
  # sampler and learner differ; onpolicy/logprob_diff_* measure by how much.
  cache_dtype: Literal["", "float32", "bfloat16"] = ""
  # While sampling, hold the full weights on every fsdp shard instead of gathering them
  # for every token. Memory per device: the policy's size / mesh.tensor.
  gather_weights: bool = True


@dataclass(frozen=True)
class Algorithm:
  """Advantage estimator, policy-gradient objective and gradient accumulation."""

  # Advantage estimator.
  advantage: Literal[
    "opo",
    "opo_loo",
    "opo_batch",
    "mean",
    "grpo",
    "rloo",
    "reinforce",
    "reinforce_pp",
    "maxrl",
  ] = "opo"
  # Objective. tis: policy_gradient with truncated importance sampling.
  loss: Literal["policy_gradient", "tis", "ppo_clip", "gspo", "cispo"] = (
    "policy_gradient"
  )
  # Aggregation of the token losses. constant: divide by the step's rollouts x
  # max_new_tokens (Dr. GRPO). The GSPO paper uses sequence_mean_token_mean.
  aggregation: Literal[
    "token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "constant"
  ] = "token_mean"
  # Optimiser steps per rollout batch. 1: exact on-policy.
  updates_per_batch: PositiveInt = 1
  # Gradient accumulation: tokens per micro-batch, over all devices, prompts and padding
  # included. 0: no accumulation. Memory grows with it; below a few thousand tokens per
  # device the matrix units are underused.
  micro_batch_tokens: NonNegativeInt = 16_384
  # ppo_clip, gspo, cispo: lower clip range, 1 - clip_low. 0: the loss's default (0.2,
  # 3e-4, 1).
  clip_low: NonNegativeFloat = 0.0
  # ppo_clip, gspo, cispo: upper clip range, 1 + clip_high. 0: the loss's default (0.2,
  # 4e-4, 4). DAPO: ppo_clip with 0.28.
  clip_high: NonNegativeFloat = 0.0
  # tis: upper bound of a token's importance weight. 0: the loss's default, 2.
  tis_cap: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class Optimizer:
  """AdamW. SFT and the reward model have their own learning rate and share the rest."""

  # Peak learning rate.
  learning_rate: NonNegativeFloat = 1e-6
  # Optimiser steps of linear warm-up.
  warmup_steps: NonNegativeInt = 0
  # Learning-rate schedule after the warm-up.
  schedule: Literal["constant", "cosine", "linear"] = "constant"
  # Decay rate of the first moment.
  b1: float = 0.9
  # Decay rate of the second moment.
  b2: float = 0.99
  # Data type of the first moment. The second moment is always float32: in bfloat16, a
  # b2 close to 1 would no longer change it.
  moment_dtype: Literal["float32", "bfloat16"] = "float32"
  # Added to the square root of the second moment.
  epsilon: float = 1e-8
  # Decoupled weight decay.
  weight_decay: NonNegativeFloat = 0.0
  # Gradient clipping: maximum global norm.
  max_grad_norm: NonNegativeFloat = 1.0
  # Store the moments in host memory; they are on the devices only during the update.
  offload: bool = False


@dataclass(frozen=True)
class Mesh:
  """Device mesh. One size may be -1: the devices that the others leave."""

  # Data parallelism: replicas of the model, each with its share of the batch.
  data: int = 1
  # Fully sharded data parallelism: shards of parameters, optimiser state and batch.
  fsdp: int = -1
  # Tensor parallelism: shards of heads, MLP and vocabulary.
  tensor: int = 1


@dataclass(frozen=True)
class Checkpoint:
  """Checkpoints, from which a run resumes."""

  # Steps between checkpoints; the last step is always saved.
  every: PositiveInt = 20
  # Number of checkpoints to keep, the newest ones.
  keep: PositiveInt = 2


@dataclass(frozen=True)
class Eval:
  """Held-out evaluation, during training and by `make eval`."""

  # Steps between evaluations. 0: only before the first and after the last step.
  every: NonNegativeInt = 20
  # Names of the benchmarks (docs/data.md).
  benchmarks: tuple[str, ...] = ("arithmetic",)
  # Split of the benchmarks. train measures pass rates of the training problems, for
  # data.pass_rate_file.
  split: Literal["test", "train"] = "test"
  # Problems per benchmark, taken from the beginning. 0: all.
  problems: NonNegativeInt = 128
  # Responses per problem; pass@k is reported for k = 1, 2, 4 … 64 up to this number.
  samples: PositiveInt = 8
  # Problems between two writes of `make eval`; an interruption loses at most these.
  chunk: PositiveInt = 64
  # Sampling temperature. 0: greedy decoding.
  temperature: NonNegativeFloat = 1.0
  # Top-k sampling: keep the k most probable tokens. 0: all.
  top_k: NonNegativeInt = 0
  # Nucleus (top-p) sampling: keep the most probable tokens up to this cumulative
  # probability.
  top_p: PositiveProbability = 1.0
  # Min-p sampling: keep tokens whose probability is at least min_p times the largest.
  min_p: Probability = 0.0


@dataclass(frozen=True)
class Record:
  """Additional measurements and logging."""

  # Rollouts per step on which the KL divergence to the start policy is measured. 0: not
  # measured.
  kl_rollouts: NonNegativeInt = 128
  # Rollouts per step that are written to samples.jsonl.
  samples: NonNegativeInt = 4
  # Steps between lines on the terminal.
  print_every: PositiveInt = 10


@dataclass(frozen=True)
class Profile:
  """Profiler trace for XProf and TensorBoard."""

  # First and last step to trace, both included: 5:8. Empty: no trace.
  steps: str = ""

  @property
  def span(self) -> tuple[int, int] | None:
    """First and last step."""
    if not self.steps:
      return None
    first, last = self.steps.split(":")
    return int(first), int(last)


@dataclass(frozen=True)
class Distributed:
  """Addresses of a multi-process run. TPU pods, GKE and SLURM are detected; elsewhere
  give all three flags. config.json leaves them out."""

  # Address of process 0, host:port.
  coordinator: str = ""
  # Number of processes.
  num_processes: int = 0
  # Index of this process, from 0.
  process_id: int = -1


@dataclass(frozen=True)
class Config:
  """A training run.

  Raises:
    ValueError: a value outside its limits, or values that contradict each other. All
      that can be checked without a device is checked on construction.
  """

  # Name of the experiment, shown in the report and in the model card.
  experiment: str = ""
  # Random seed of weights, data order and sampling.
  seed: NonNegativeInt = 0
  # RL steps.
  steps: PositiveInt = 100

  model: Model = field(default_factory=Model)
  data: Data = field(default_factory=Data)
  reward: Reward = field(default_factory=Reward)
  reward_model: RewardModel = field(default_factory=RewardModel)
  sft: SFT = field(default_factory=SFT)
  rollout: Rollout = field(default_factory=Rollout)
  algorithm: Algorithm = field(default_factory=Algorithm)
  optimizer: Optimizer = field(default_factory=Optimizer)
  mesh: Mesh = field(default_factory=Mesh)
  distributed: Distributed = field(default_factory=Distributed)
  checkpoint: Checkpoint = field(default_factory=Checkpoint)
  eval: Eval = field(default_factory=Eval)
  record: Record = field(default_factory=Record)
  profile: Profile = field(default_factory=Profile)

  def __post_init__(self):
    for flag, value, limits in _limited_fields(self):
      if not limits.allow(value):
        raise ValueError(f"{flag} is {value}; it must be {limits}.")
    _check_data(self.data)
    _check_reward(self.reward, self.rollout.max_new_tokens)
    _check_rollout(self.rollout, self.algorithm.updates_per_batch)
    _check_algorithm(self.algorithm, self.rollout.prompts_per_step)
    _check_eval(self.eval)
    _check_profile(self.profile, self.steps)


def _limited_fields(section: Any, prefix: str = ""):
  """(flag, value, limits) of every field with limits, in this section and below."""
  for each in dataclasses.fields(section):
    name, value = f"{prefix}{each.name}", getattr(section, each.name)
    if dataclasses.is_dataclass(value):
      yield from _limited_fields(value, f"{name}.")
    for limits in getattr(each.type, "__metadata__", ()):  # of Annotated
      yield f"--{name}".replace("_", "-"), value, limits


def _check_data(data: Data) -> None:
  has_bounds = (data.min_pass_rate, data.max_pass_rate) != (0.0, 1.0)
  if has_bounds and not data.pass_rate_file:
    raise ValueError(
      "--data.min-pass-rate and --data.max-pass-rate need the pass rates of the start"
      " policy: --data.pass-rate-file."
    )
  if data.min_pass_rate > data.max_pass_rate:
    raise ValueError(
      f"--data.min-pass-rate {data.min_pass_rate} is above --data.max-pass-rate"
      f" {data.max_pass_rate}."
    )


def _check_reward(reward: Reward, max_new_tokens: int) -> None:
  # These always return at once, and need no time limit.
  in_process = ("arithmetic", "preferences", "reward_model")
  if reward.verifier not in in_process and not reward.workers:
    raise ValueError(
      f"--reward.workers 0 verifies in-process, without a time limit, and"
      f" {reward.verifier} may not return on some responses; use --reward.workers 2."
    )
  if reward.overlong_weight and not 0 < reward.overlong_tokens <= max_new_tokens:
    raise ValueError(
      f"--reward.overlong-tokens is {reward.overlong_tokens}; the soft overlong"
      f" penalty grows over 1 to {max_new_tokens} tokens (--reward.overlong-tokens"
      f" {max(1, max_new_tokens // 5)})."
    )
  if reward.verifier == "reward_model" and reward.truncated == "incorrect":
    raise ValueError(
      "--reward.truncated incorrect gives a truncated response the reward 0, which is"
      " no low score of a reward model; use --reward.truncated scored or masked."
    )


def _check_rollout(rollout: Rollout, updates_per_batch: int) -> None:
  if not rollout.temperature > 0:
    raise ValueError(
      f"--rollout.temperature is {rollout.temperature}; sampling for training needs one"
      " above 0 (1.0 samples from the policy itself)."
    )
  is_filtered = rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_p > 0
  if is_filtered and updates_per_batch == 1:
    raise ValueError(
      "--rollout.top-k, --rollout.top-p and --rollout.min-p remove tokens to which the"
      " learner assigns probability, so training is not on-policy. Leave them at 0, 1"
      " and 0, or train off-policy with the ratio to the sampling distribution"
      " (--algorithm.updates-per-batch 2 --algorithm.loss ppo_clip)."
    )


def _check_algorithm(algorithm: Algorithm, prompts_per_step: int) -> None:
  updates = algorithm.updates_per_batch
  if updates > 1 and algorithm.loss == "policy_gradient":
    raise ValueError(
      f"--algorithm.updates-per-batch {updates} is off-policy after the first update,"
      " and policy_gradient does not correct for it; use --algorithm.loss ppo_clip, or"
      " 1 update for exact on-policy training (gspo, cispo and tis correct too)."
    )
  if prompts_per_step % updates:
    raise ValueError(
      f"{prompts_per_step} prompts do not split into {updates} updates of whole groups;"
      f" use a multiple of {updates} (--rollout.prompts-per-step"
      f" {math.ceil(prompts_per_step / updates) * updates})."
    )


def _check_eval(evaluation: Eval) -> None:
  names = evaluation.benchmarks
  if not names or len(set(names)) < len(names):
    raise ValueError(
      f"--eval.benchmarks is {' '.join(names) or 'empty'}; name at least one benchmark,"
      " each only once."
    )


def _check_profile(profile: Profile, num_steps: int) -> None:
  span = re.fullmatch(r"(\d+):(\d+)", profile.steps)
  if profile.steps and not (span and 1 <= int(span[1]) <= int(span[2]) <= num_steps):
    raise ValueError(
      f"--profile.steps is {profile.steps!r}; give the first and the last step, such as"
      f" 5:8, from 1 to {num_steps} (--steps)."
    )


def near_names(name: str, names) -> str:
  """Suggests the most similar of `names`, for an error message."""
  names = sorted(names)
  near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
  return f"did you mean {' or '.join(near)}?" if near else f"there are {names}."
