"""What `peft` makes of an exported adapter is the policy that was trained."""

import jax
import numpy as np
import pytest
import reference
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from opo_jax import models
from opo_jax.__main__ import main
from opo_jax.data import arithmetic
from opo_jax.models import lora
from opo_jax.models.transformer import Policy


@torch.no_grad()
def their_logits(model, tokens):
  return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def adapted(path, targets):
  """The model in a directory with adapters that do something; their scale is 2.5."""
  policy = lora.add(
    models.load(path), jax.random.key(0), rank=3, alpha=7.5, targets=targets
  )
  for i, (_, adapter) in enumerate(lora.adapters(policy)):
    noise = 0.2 * np.random.RandomState(i).normal(size=adapter.b.shape)
    adapter.b[...] = np.float32(noise)
  return policy


@pytest.mark.parametrize(
  ("name", "targets"),
  [
    ("Qwen2", ["all-linear"]),
    ("Qwen3, layer types, yarn", ["query", "value", "down"]),
    ("Llama 3.2 tied, all biases", ["k_proj", "o_proj", "gate_proj", "up_proj"]),
  ],
)
def test_peft_and_merged_exports_compute_what_the_policy_does(name, targets, tmp_path):
  reference.make_model(name).save_pretrained(tmp_path / "base")
  policy = adapted(tmp_path / "base", targets)
  models.save_adapter(policy, tmp_path / "adapter", base=str(tmp_path / "base"))
  models.save(policy, tmp_path / "merged")
  tokens = np.random.RandomState(3).randint(8, policy.config.vocab_size, (3, 17))
  ours = np.asarray(jax.jit(Policy.logits)(policy, tokens))

  base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  assert np.abs(their_logits(base, tokens) - ours).max() > 0.1
  found = PeftModel.from_pretrained(base, tmp_path / "adapter")
  config = found.peft_config["default"]
  assert set(config.target_modules) == {
    lora.LAYERS[layer][1] for layer in lora.layer_names(targets)
  }
  # Every matrix of ours is in their model: none that `peft` passed over in silence.
  num_adapters = sum("lora_" in name for name, _ in found.named_parameters())
  num_layers = policy.config.num_layers
  assert num_adapters == 2 * num_layers * len(lora.layer_names(targets))
  np.testing.assert_allclose(their_logits(found, tokens), ours, atol=1e-4)
  merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
  np.testing.assert_allclose(their_logits(merged, tokens), ours, atol=1e-4)


def test_a_runs_adapter_finds_its_base_and_says_what_the_merged_export_says(tmp_path):
  run = tmp_path / "run"
  flags = (
    "--steps 1 --sft.steps 2 --rollout.prompts-per-step 8 --rollout.group-size 2"
    " --eval.problems 8 --eval.samples 1 --model.width 32 --model.mlp-width 48"
  )
  assert main(["train", "lora_quickstart", "--run", str(run), *flags.split()]) == 0
  assert main(["export", str(run), str(tmp_path / "merged")]) == 0
  out = tmp_path / "adapter"
  assert main(["export", str(run), str(out), "--format", "peft"]) == 0
  tokens = np.random.RandomState(3).randint(3, len(arithmetic.tokenizer()), (2, 12))
  theirs = their_logits(AutoPeftModelForCausalLM.from_pretrained(out), tokens)
  merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
  np.testing.assert_allclose(theirs, their_logits(merged, tokens), atol=1e-4)
