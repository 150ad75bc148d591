"""`export`: a run's policy in the Hugging Face format, or its adapters in PEFT's."""

import json
import pathlib
from typing import Any

from opo_jax.config import Config
from opo_jax.models import lora, save, save_adapter
from opo_jax.models.card import model_card
from opo_jax.models.config_json import generation_config
from opo_jax.run import Run, load_policy
from opo_jax.storage.json_files import read_json


def export(
  config: Config,
  directory: pathlib.Path,
  out: pathlib.Path,
  *,
  adapter_alone: bool = False,
) -> pathlib.Path:
  """Writes the last checkpoint's policy in the Hugging Face format.

  Its tokenizer with the chat template, generation config and a model card with the
  run's figures lie beside it.

  Args:
    config: of the run.
    directory: of the run.
    out: an empty or missing directory.
    adapter_alone: write the adapters in PEFT's format instead of the policy with
      adapters merged in; and the base policy under `base/`, where only this run has it.

  Raises:
    ValueError: `out` is not empty, or the run trained no adapters.
  """
  if adapter_alone and not config.model.lora_rank:
    raise ValueError(
      f"{directory} trained every parameter, and has no adapter for --format peft; use"
      " --format merged."
    )
  if out.exists() and any(out.iterdir()):
    raise ValueError(f"{out} is not empty; give another OUT= directory.")
  run = Run(config, directory)
  step = run.directory.checkpoint_steps()[-1]
  lines = (directory / "metrics.jsonl").read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if row["step"] <= step]
  policy = load_policy(run, step)
  path = config.model.path
  has_start_model = bool(path) and not config.model.fresh
  card = model_card(
    name=config.experiment or out.name,
    base=("" if pathlib.Path(path).is_dir() else path) if has_start_model else None,
    settings=_card_settings(config, policy),
    rows=rows,
    run=read_json(directory / "run.json"),
    library="peft" if adapter_alone else "transformers",
  )
  generation = generation_config(path) if path else None
  if not adapter_alone:
    save(policy, out, tokenizer=run.tokenizer, generation=generation, card=card)
    return out
  if not has_start_model or config.sft.steps:
    # The base that the adapters belong to exists nowhere else.
    path = str((out / "base").resolve())
    save(lora.without(policy), path, tokenizer=run.tokenizer, generation=generation)
  save_adapter(policy, out, base=path, tokenizer=run.tokenizer, card=card)
  return out


def _card_settings(config: Config, policy: Any) -> dict[str, Any]:
  """The settings that the model card shows, by their name there."""
  algorithm, rollout, size = config.algorithm, config.rollout, config.model
  settings = {
    "advantage": algorithm.advantage,
    "loss": algorithm.loss,
    "updates per batch": algorithm.updates_per_batch,
    "data": config.data.train,
    "prompts per step": rollout.prompts_per_step,
    "responses per prompt": rollout.group_size,
    "max new tokens": rollout.max_new_tokens,
    "sampling temperature": rollout.temperature,
    "learning rate": config.optimizer.learning_rate,
    "SFT steps": config.sft.steps,
    "activations": policy.dtype,
  }
  if size.lora_rank:
    settings |= {
      "LoRA rank": size.lora_rank,
      "LoRA alpha": size.lora_alpha,
      "LoRA targets": size.lora_targets,
    }
  return settings
