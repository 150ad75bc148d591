"""Every knob of a run on one page. Each is a flag: `--rollout.group-size 16`.

The comment on a field says what it means, its unit, and the rooms that read it.
Only `build`, `run`, `loop` and the commands know these classes; all other rooms take
plain values.
"""

import dataclasses
import difflib
import json
import operator
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Model:
  """The policy. With `path` it is loaded, and the sizes below are not read."""

  # Directory or hub id in Hugging Face format, or empty: fresh weights. (run, build)
  path: str = ""
  # Of `path` take config.json alone, and fresh weights of that shape. (build)
  fresh: bool = False
  # Rows of the embedding, at least the tokenizer's size. (build)
  vocab_size: int = 32
  # Model width. (build)
  width: int = 128
  # Hidden width of the gated MLP. (build)
  mlp_width: int = 384
  # Transformer layers. (build)
  num_layers: int = 2
  # Query heads. (build)
  num_heads: int = 4
  # Key-value heads; divides num_heads. (build)
  num_kv_heads: int = 2
  # Width of one head. (build)
  head_dim: int = 32
  # Standard deviation of a fresh weight. (build)
  initializer_range: float = 0.02
  # Activations. auto: bfloat16 on accelerators, float32 on CPUs. Log-probs are
  # float32 in any case. (build)
  dtype: Literal["auto", "float32", "bfloat16"] = "auto"
  # Parameters. bfloat16 halves them, and swallows steps smaller than 1/256 of a
  # weight. Adapters are float32 in any case. (build)
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  # Columns of low-rank adapters (LoRA), which RL then trains alone; 0: none, it trains
  # every parameter. See docs/lora.md. (build, commands)
  lora_rank: int = 0
  # The adapters' product is scaled by this / lora_rank. (build)
  lora_alpha: float = 32.0
  # Layers with an adapter: names of ours (query) or of PEFT (q_proj) with commas
  # between them, or all-linear. (build)
  lora_targets: str = "all-linear"
  # What whole sequences go through: an einsum, cuDNN's kernel on NVIDIA GPUs, splash
  # attention on TPUs. auto: the kernel where there is one. (build)
  attention: Literal["auto", "einsum", "cudnn", "splash"] = "auto"
  # What the backward pass computes again instead of keeping it: nothing; attention
  # (its tokens x tokens arrays); a whole block; everything (some blocks at a time);
  # or offload, which keeps each block's input in the host's memory. (build)
  remat: Literal["none", "attention", "block", "everything", "offload"] = "none"


@dataclass(frozen=True)
class Data:
  """Problems and their prompts."""

  # Names of the training problems (data/sources.py), with weights where there are
  # several: "gsm8k:1 math:2". (run)
  train: str = "arithmetic"
  # Key of the question in jsonl:, parquet: and hf: data; empty: the usual ones. (run)
  prompt_field: str = ""
  # Key of the answer there; empty: the usual ones. (run)
  answer_field: str = ""
  # Evaluation sets whose problems, or nearly the same ones, are left out of training:
  # "math500 aime24". (run)
  decontaminate_against: str = ""
  # JSON lines of problem ids with the start model's pass rates; empty: none. (run)
  pass_rate_file: str = ""
  # With that file: problems solved less often than this are left out. (run)
  min_pass_rate: float = 0.0
  # With that file: problems solved more often than this are left out. (run)
  max_pass_rate: float = 1.0
  # `arithmetic`, `preferences`, a directory, a hub id, or empty: the model's own. (run)
  tokenizer: str = "arithmetic"
  # The system turn of every prompt; empty: none. (run)
  system: str = ""
  # Put after every question, on a line of its own. (run)
  instruction: str = ""


@dataclass(frozen=True)
class Reward:
  """From a response to a number."""

  # arithmetic, math, or a function of your own: package.module:function. preferences is
  # the true score of that task, which no labeller tells; reward_model takes no
  # processes. (run)
  verifier: str = "arithmetic"
  # Of reward_model: a run directory that has one, or a directory or hub id in Hugging
  # Face format; empty: trained on pairs first, see reward_model.*. (run)
  model: str = ""
  # Processes that verify; 0 verifies in this one, without a time limit. (run)
  workers: int = 0
  # Wall-clock limit of one answer; beyond it the answer is unscorable. (run)
  timeout_s: float = 5.0
  # What a worker may take beyond its start, GiB of address space. (run)
  memory_gib: float = 2.0
  # What a response cut off at the length limit earns: 0, what its text earns, or
  # nothing, and it leaves baseline and loss. (run)
  truncated: Literal["incorrect", "scored", "left_out"] = "incorrect"
  # The run stops above this share of unscorable answers in a step. (run)
  max_unscorable_fraction: float = 0.2
  # Added for a response of the format below. (run)
  format_weight: float = 0.0
  # boxed: a closed box with something in it; think: that after one </think>. (run)
  format: Literal["boxed", "think"] = "boxed"
  # Taken off a response at the length limit, and less over the tokens before. (run)
  overlong_weight: float = 0.0
  # Tokens before the limit over which that grows (DAPO's soft overlong). (run)
  overlong_tokens: int = 0
  # Taken off for repeated n-grams of tokens, times their share. (run)
  repetition_weight: float = 0.0
  # n of those. (run)
  repetition_ngram: int = 20


@dataclass(frozen=True)
class RewardModel:
  """A reward model, trained on preference pairs; it begins as the start policy."""

  # `preferences`, or jsonl:PATH with the texts prompt, chosen, rejected. (rewards)
  pairs: str = "preferences"
  # Training pairs that are used, from the first on; 0 takes all. (rewards)
  num_pairs: int = 0
  # Optimiser steps. (build, reward_training)
  steps: int = 200
  # Pairs per step. (rewards)
  batch_size: int = 64
  # Peak, reached after a tenth of the steps; a cosine then falls to 0. (build)
  learning_rate: float = 1e-3
  # By how much more than the rejected answer the chosen one should score. (build)
  margin: float = 0.0
  # Weight of the squared sum of a pair's scores, which keeps them around 0. (build)
  center: float = 0.01


@dataclass(frozen=True)
class Sft:
  """Supervised learning on demonstrations, before RL."""

  # Optimiser steps; 0 leaves the phase out. (run, build)
  steps: int = 0
  # Demonstrations per step. (run, build)
  batch_size: int = 128
  # Peak, reached after a tenth of the steps; a cosine then falls to 0. (build)
  learning_rate: float = 2e-3


@dataclass(frozen=True)
class Rollout:
  """Sampling for training."""

  # Prompts, that is groups, in a step. (loop, build)
  prompts_per_step: int = 32
  # Responses to each prompt. (run, build)
  group_size: int = 8
  # Longest prompt, tokens; a problem with a longer one is left out. (run)
  max_prompt_tokens: int = 512
  # Longest response, tokens, the end token included. (run, build)
  max_new_tokens: int = 24
  # Of sampler and learner alike; above 0. (build)
  temperature: float = 1.0
  # Keep the k most probable tokens; 0 keeps all, as on-policy training must. (build)
  top_k: int = 0
  # Keep the most probable tokens of this mass; 1 as on-policy training must. (build)
  top_p: float = 1.0
  # Keep tokens this times as probable as the first; 0, likewise. (build)
  min_p: float = 0.0
  # Responses decoded at a time; 0: as many as the memory holds. (build)
  slots: int = 0
  # Of stored keys and values; empty: as the activations. Narrower is not quite
  # on-policy, and onpolicy/logprob_diff_* say by how much. (build)
  cache_dtype: Literal["", "float32", "bfloat16"] = ""
  # While sampling, keep whole weights on every fsdp shard instead of gathering them for
  # every token; takes the policy's size over mesh.tensor. (build)
  gather_weights: bool = True


@dataclass(frozen=True)
class Algorithm:
  """From rewards to a gradient."""

  # Name of the advantage estimator. (build)
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
  # Name of the objective; tis is policy_gradient with truncated importance
  # sampling. (build)
  loss: Literal["policy_gradient", "tis", "ppo_clip", "gspo", "cispo"] = (
    "policy_gradient"
  )
  # How token losses become one number; constant divides by the step's rows x
  # max_new_tokens (Dr. GRPO), gspo's paper has sequence_mean_token_mean. (build)
  aggregation: Literal[
    "token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "constant"
  ] = "token_mean"
  # Optimiser steps per rollout batch; 1 is exact on-policy. (build)
  updates_per_batch: int = 1
  # Tokens of a part in which one optimiser step's gradient is accumulated, over all
  # devices, prompts and padding included; 0: all at once. Memory grows with it, and
  # below a few thousand a device the matrix units starve. (build)
  micro_batch_tokens: int = 16_384
  # ppo_clip, gspo, cispo: how far the ratio may fall below 1; 0: as far as the loss
  # has it by default (0.2, 3e-4, 1). (build)
  clip_low: float = 0.0
  # ppo_clip, gspo, cispo: how far the ratio may rise above 1; 0: as far as the loss
  # has it by default (0.2, 4e-4, 4). DAPO: ppo_clip and 0.28. (build)
  clip_high: float = 0.0
  # tis: the largest weight of a token; 0: as large as the loss has it, 2. (build)
  tis_cap: float = 0.0


@dataclass(frozen=True)
class Optimizer:
  """AdamW; the warm start has its own learning rate and shares the rest."""

  # Peak learning rate. (build)
  learning_rate: float = 1e-6
  # Optimiser steps of linear warm-up. (build)
  warmup_steps: int = 0
  # What follows the warm-up. (build)
  schedule: Literal["constant", "cosine", "linear"] = "constant"
  # Decay of the first moment. (build)
  b1: float = 0.9
  # Decay of the second moment. (build)
  b2: float = 0.99
  # First moment. The second stays float32: in bfloat16 a b2 near 1 stalls it. (build)
  moment_dtype: Literal["float32", "bfloat16"] = "float32"
  # Added to the root of the second moment. (build)
  epsilon: float = 1e-8
  # Decoupled weight decay. (build)
  weight_decay: float = 0.0
  # Gradients are scaled down to this global norm. (build)
  max_grad_norm: float = 1.0
  # Keep the moments in the hosts' memory, and on the devices only while they are
  # updated. (run, build)
  offload: bool = False


@dataclass(frozen=True)
class Mesh:
  """Devices; one size may be -1 and takes what is left."""

  # Copies of the model; each takes its share of the batch. (build)
  data: int = 1
  # Shards of parameters, optimiser state and batch. (build)
  fsdp: int = -1
  # Shards of heads, MLP and vocabulary. (build)
  tensor: int = 1


@dataclass(frozen=True)
class Checkpoint:
  """What a run keeps to go on from."""

  # Steps between checkpoints; the last step always has one. (loop)
  every: int = 20
  # The newest that are kept. (loop)
  keep: int = 2


@dataclass(frozen=True)
class Eval:
  """Held-out evaluation while training."""

  # Steps between evaluations; 0 evaluates at the start and at the end alone. (loop)
  every: int = 20
  # Names of the evaluation problems, see data/sources.py. (run)
  benchmarks: tuple[str, ...] = ("arithmetic",)
  # Whose problems: of `train`, too, the pass rates of a policy can be had. (run)
  split: Literal["test", "train"] = "test"
  # Problems of each, from the first on; 0 takes all. (run)
  problems: int = 128
  # Responses per problem; pass@k is reported for k = 1, 2, 4 … 64 up to this. (run)
  samples: int = 8
  # Problems that `eval` samples between two writes; a kill loses so many. (commands)
  chunk: int = 64
  # Sampling temperature; 0 is greedy. (build)
  temperature: float = 1.0
  # Keep the k most probable tokens; 0 keeps all. (build)
  top_k: int = 0
  # Keep the most probable tokens of this mass. (build)
  top_p: float = 1.0
  # Keep tokens this times as probable as the first. (build)
  min_p: float = 0.0


@dataclass(frozen=True)
class Record:
  """What is measured and written beside the training itself."""

  # Responses a step on which KL to the start is measured; 0: not measured. (run)
  kl_rollouts: int = 128
  # Responses a step written to samples.jsonl. (loop)
  samples: int = 4
  # Steps between lines on the terminal. (loop)
  print_every: int = 10


@dataclass(frozen=True)
class Profile:
  """A trace for XProf and TensorBoard."""

  # First and last step that are traced, such as 5:8; empty: none. (loop)
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
  """Where the processes of a run find each other. TPU pods, GKE and SLURM are
  recognised; elsewhere give all three. No part of what a run is: not in config.json."""

  # host:port of process 0. (loop)
  coordinator: str = ""
  # How many processes there are. (loop)
  num_processes: int = 0
  # Which of them this is, from 0. (loop)
  process_id: int = -1


# What changes time and memory alone: a run may go on with other values of these.
FREE_TO_CHANGE = {
  "--model.remat", "--reward.workers", "--rollout.slots", "--rollout.gather-weights",
  "--algorithm.micro-batch-tokens", "--optimizer.offload", "--record.print-every",
  "--profile.steps",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
  """A run."""

  # Name of the experiment, in config.json and the report. (plots)
  experiment: str = ""
  # Of weights, data order and sampling. (loop, run, build)
  seed: int = 0
  # RL steps. (loop, build)
  steps: int = 100
  # The policy.
  model: Model = field(default_factory=Model)
  # Problems and their prompts.
  data: Data = field(default_factory=Data)
  # From a response to a number.
  reward: Reward = field(default_factory=Reward)
  # A reward model, where the reward is one that is trained here.
  reward_model: RewardModel = field(default_factory=RewardModel)
  # Supervised learning before RL.
  sft: Sft = field(default_factory=Sft)
  # Sampling for training.
  rollout: Rollout = field(default_factory=Rollout)
  # From rewards to a gradient.
  algorithm: Algorithm = field(default_factory=Algorithm)
  # AdamW.
  optimizer: Optimizer = field(default_factory=Optimizer)
  # Devices.
  mesh: Mesh = field(default_factory=Mesh)
  # Several processes.
  distributed: Distributed = field(default_factory=Distributed)
  # What a run keeps to go on from.
  checkpoint: Checkpoint = field(default_factory=Checkpoint)
  # Held-out evaluation.
  eval: Eval = field(default_factory=Eval)
  # What is measured and written.
  record: Record = field(default_factory=Record)
  # A trace for XProf and TensorBoard.
  profile: Profile = field(default_factory=Profile)

  def __post_init__(self):
    """Checks what can be checked before any device is touched."""
    at_least = {
      1: "steps model.vocab_size model.width model.mlp_width model.num_layers"
      " model.num_heads model.num_kv_heads model.head_dim sft.batch_size"
      " reward_model.steps reward_model.batch_size"
      " rollout.prompts_per_step rollout.group_size rollout.max_prompt_tokens"
      " rollout.max_new_tokens algorithm.updates_per_batch"
      " checkpoint.every checkpoint.keep eval.samples eval.chunk record.print_every"
      " reward.repetition_ngram",
      0: "seed reward.workers reward.timeout_s reward.max_unscorable_fraction"
      " reward.memory_gib reward.format_weight reward.overlong_weight"
      " reward.repetition_weight data.min_pass_rate"
      " reward_model.num_pairs reward_model.learning_rate reward_model.margin"
      " reward_model.center sft.steps sft.learning_rate rollout.slots"
      " algorithm.micro_batch_tokens algorithm.clip_low"
      " algorithm.clip_high algorithm.tis_cap optimizer.learning_rate"
      " optimizer.warmup_steps optimizer.weight_decay optimizer.max_grad_norm"
      " eval.every eval.problems eval.temperature record.kl_rollouts record.samples"
      " rollout.top_k rollout.min_p eval.top_k eval.min_p model.lora_rank"
      " model.lora_alpha",
    }
    for least, names in at_least.items():
      for name in names.split():
        value = operator.attrgetter(name)(self)
        if value < least:
          flag = name.replace("_", "-")
          raise ValueError(f"--{flag} is {value}; it must be at least {least}.")
    if self.rollout.temperature <= 0:
      raise ValueError(
        f"--rollout.temperature is {self.rollout.temperature}; sampling for training"
        " needs one above 0 (1.0 samples the policy itself)."
      )
    for name, part in (("rollout", self.rollout), ("eval", self.eval)):
      if not 0 < part.top_p <= 1:
        raise ValueError(
          f"--{name}.top-p is {part.top_p}; it must be above 0 and at most 1."
        )
      if part.min_p > 1:
        raise ValueError(f"--{name}.min-p is {part.min_p}; it must be at most 1.")
    benchmarks = self.eval.benchmarks
    if not benchmarks or len(set(benchmarks)) < len(benchmarks):
      raise ValueError(
        f"--eval.benchmarks is {' '.join(benchmarks) or 'empty'}; name one or more,"
        " each once."
      )
    rollout = self.rollout
    filtered = rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_p > 0
    if filtered and self.algorithm.updates_per_batch == 1:
      raise ValueError(
        "--rollout.top-k, --rollout.top-p and --rollout.min-p leave tokens out that the"
        " learner counts, so this is not on-policy training. Leave them at 0, 1 and 0,"
        " or train off-policy with the ratio to what was sampled from"
        " (--algorithm.updates-per-batch 2 --algorithm.loss ppo_clip)."
      )
    reward = self.reward
    ours = ("arithmetic", "preferences", "reward_model")  # they take no time
    if reward.verifier not in ours and not reward.workers:
      raise ValueError(
        f"--reward.workers 0 would verify by {reward.verifier} without a time limit,"
        " and some answers take for ever; use --reward.workers 2."
      )
    for name, value in (
      ("timeout-s", reward.timeout_s),
      ("memory-gib", reward.memory_gib),
    ):
      if value <= 0:
        raise ValueError(f"--reward.{name} is {value}; it must be above 0.")
    limit = rollout.max_new_tokens
    if reward.overlong_weight and not 0 < reward.overlong_tokens <= limit:
      raise ValueError(
        f"--reward.overlong-tokens is {reward.overlong_tokens}; the penalty needs 1 to"
        f" {limit} tokens to grow over (--reward.overlong-tokens {max(1, limit // 5)})."
      )
    data = self.data
    narrowed = (data.min_pass_rate, data.max_pass_rate) != (0.0, 1.0)
    if narrowed and not data.pass_rate_file:
      raise ValueError(
        "--data.min-pass-rate and --data.max-pass-rate need the rates of the start"
        " model: --data.pass-rate-file."
      )
    if data.min_pass_rate > data.max_pass_rate:
      raise ValueError(
        f"--data.min-pass-rate {data.min_pass_rate} is above --data.max-pass-rate"
        f" {data.max_pass_rate}."
      )
    if reward.verifier == "reward_model" and reward.truncated == "incorrect":
      raise ValueError(
        "--reward.truncated incorrect gives 0, which is no low score of a reward model;"
        " use --reward.truncated scored, and it judges what is there."
      )
    updates = self.algorithm.updates_per_batch
    if updates > 1 and self.algorithm.loss == "policy_gradient":
      raise ValueError(
        f"--algorithm.updates-per-batch {updates} leaves the policy that sampled, and"
        " policy_gradient does not correct for it; use --algorithm.loss ppo_clip, or 1"
        " update for exact on-policy training (gspo, cispo and tis correct too)."
      )
    span = re.fullmatch(r"(\d+):(\d+)", self.profile.steps)
    if self.profile.steps and not (
      span and 1 <= int(span[1]) <= int(span[2]) <= self.steps
    ):
      raise ValueError(
        f"--profile.steps is {self.profile.steps!r}; give the first and the last step,"
        f" such as 5:8, from 1 to {self.steps} (--steps)."
      )
    prompts = self.rollout.prompts_per_step
    if prompts % updates:
      raise ValueError(
        f"{prompts} prompts do not split into {updates} updates of whole groups; use a"
        f" multiple of {updates} (--rollout.prompts-per-step"
        f" {-(-prompts // updates) * updates})."
      )


def to_dict(config: Config) -> dict[str, Any]:
  """Nested plain values, as in `config.json`: a tuple is a list there."""
  values = json.loads(json.dumps(dataclasses.asdict(config)))
  del values["distributed"]
  return values


def from_dict(values: dict[str, Any]) -> Config:
  """The inverse of `to_dict`.

  Raises:
    ValueError: an unknown or missing key, or a value of another type.
  """

  def build(cls, values, where):
    if not isinstance(values, dict):
      raise ValueError(
        f"config.json: {where.rstrip('.') or 'Config'} is no object of fields, got"
        f" {str(values)[:80]!r}; restore the file of the run."
      )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown, missing = values.keys() - fields.keys(), fields.keys() - values.keys()
    if unknown or missing:
      raise ValueError(
        f"config.json was written by another version of opo_jax: {where or 'Config'}"
        f" has unknown fields {sorted(unknown)} and misses {sorted(missing)}; check out"
        " the commit named in run.json."
      )
    kwargs = {
      name: build(fields[name].type, value, f"{where}{name}.")
      if dataclasses.is_dataclass(fields[name].type)
      else tuple(value)
      if isinstance(value, list)
      else value
      for name, value in values.items()
    }
    try:
      return cls(**kwargs)
    except TypeError as error:  # A check met a value of another type.
      raise ValueError(
        f"config.json: a value of {where.rstrip('.') or 'Config'} is of another type"
        f" ({error}); restore the file of the run."
      ) from error

  own = {"distributed": dataclasses.asdict(Distributed())}
  return build(Config, values | own if isinstance(values, dict) else values, "")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a file that a run has written, its config.json above all.

  Raises:
    ValueError: the file holds something else.
  """
  try:
    values = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON ({error}); restore the file.") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} holds no JSON object; restore the file.")
  return values


def differences(old: dict[str, Any], new: dict[str, Any], prefix="") -> list[str]:
  """Lines `--flag: old -> new` for every value that differs."""
  lines = []
  for key in sorted(old.keys() | new.keys()):
    before, after = old.get(key), new.get(key)
    if isinstance(before, dict) and isinstance(after, dict):
      lines += differences(before, after, f"{prefix}{key}.")
    elif before != after:
      flag = f"{prefix}{key}".replace("_", "-")
      lines.append(f"--{flag}: {before!r} -> {after!r}")
  return lines


def conflicts(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """The `differences` with which a run cannot go on."""
  return [
    line
    for line in differences(old, new)
    if line.partition(": ")[0] not in FREE_TO_CHANGE
  ]


def near_names(name: str, names) -> str:
  """The names a person may have meant, for an error message."""
  names = sorted(names)
  near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
  return f"did you mean {' or '.join(near)}?" if near else f"there are {names}."
