"""What `transformers` computes with PyTorch is what this decoder computes.

`make test-parity` runs these in an environment of their own, which has PyTorch.
"""

import functools
import json

import compare
import jax
import numpy as np
import pytest
import reference
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opo_jax import models, sampler
from opo_jax.__main__ import main
from opo_jax.data import arithmetic, prompts
from opo_jax.models.transformer import Policy

measure = functools.cache(compare.measure)


@pytest.mark.parametrize("name", reference.CASES)
def test_float32_equals_transformers_in_every_layout(name):
  differences = measure(name)["float32"]
  for layout in (*compare.LAYOUTS, "logprobs"):
    assert differences[layout] < 1e-4, layout
  assert differences["gradient"] < 1e-4


@pytest.mark.parametrize("name", reference.CASES)
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(name):
  ratios = measure(name)["bfloat16"]
  # Rounding is a draw: in the gradient of one bias it falls twice as far at times.
  for quantity, ratio in ratios.items():
    assert ratio < (4.0 if quantity == "gradient" else 1.5), quantity


@torch.no_grad()
def greedy_texts(directory, questions, max_new_tokens):
  """Greedy texts with `transformers` alone."""
  tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
  model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
  assert model.dtype == torch.float32
  turns = [[{"role": "user", "content": question}] for question in questions]
  inputs = tokenizer.apply_chat_template(
    turns,
    add_generation_prompt=True,
    padding=True,
    return_dict=True,
    return_tensors="pt",
  )
  out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
  new = out[:, inputs["input_ids"].shape[1] :]
  return tokenizer.batch_decode(new, skip_special_tokens=True)


def our_greedy_texts(policy, tokenizer, questions, max_new_tokens):
  rollouts = sampler.generate(
    policy,
    [prompts.encode_prompt(tokenizer, question) for question in questions],
    max_new_tokens=max_new_tokens,
    temperature=0.0,
  )
  return prompts.decode_responses(
    tokenizer, np.asarray(rollouts.tokens), np.asarray(rollouts.lengths)
  )


QUESTIONS = ["a3b4c2", "a1", "c4c4b2a3b1"]


@pytest.mark.parametrize("name", reference.CASES)
def test_exported_policy_is_the_model_and_says_the_same(name, tmp_path):
  """Every model has more rows in its vocabulary than the tokenizer has tokens."""
  tokenizer, model = arithmetic.tokenizer(), reference.make_model(name)
  assert model.config.vocab_size > len(tokenizer)
  model.save_pretrained(tmp_path / "theirs")
  policy = models.load(tmp_path / "theirs", eos_ids=(tokenizer.eos_token_id,))
  models.save(policy, tmp_path / "ours", tokenizer=tokenizer, max_file_bytes=10_000)

  again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
  assert type(again) is type(model)
  expected = model.state_dict()
  assert again.state_dict().keys() == expected.keys()
  for weight, tensor in again.state_dict().items():
    assert torch.equal(tensor, expected[weight]), weight
  for field, value in reference.CASES[name].items():
    if field not in ("rope_parameters", "max_window_layers"):
      assert getattr(again.config, field) == value, field

  texts = our_greedy_texts(policy, tokenizer, QUESTIONS, 12)
  assert texts == greedy_texts(tmp_path / "ours", QUESTIONS, 12)
  assert len(set(texts)) > 1


@pytest.mark.parametrize("name", reference.CASES)
def test_fresh_weights_are_drawn_as_transformers_draws_them(name, tmp_path):
  model = reference.make_fresh_model(name)
  model.save_pretrained(tmp_path / "theirs")
  config = models.read_config(tmp_path / "theirs")
  models.save(Policy(config, jax.random.key(0)), tmp_path)
  ours = load_file(tmp_path / "model.safetensors")
  theirs = load_file(tmp_path / "theirs" / "model.safetensors")
  assert ours.keys() == theirs.keys()
  for weight, tensor in theirs.items():
    # They set the padding token's row to zero, which attention never sees.
    tensor = np.delete(tensor, 5, axis=0) if "embed" in weight else tensor
    std = config.initializer_range if tensor.ndim == 2 else 0.0
    for draw in (ours[weight], tensor):
      assert abs(draw.std() - std) <= 5 * std / np.sqrt(2 * draw.size), weight
      assert abs(draw.mean() - tensor.mean()) <= 8 * std / np.sqrt(draw.size), weight


def test_exported_run_says_in_transformers_what_it_says_here(tmp_path):
  run, out = tmp_path / "run", tmp_path / "out"
  flags = (
    "--steps 1 --sft.steps 2 --rollout.prompts-per-step 8 --rollout.group-size 2"
    " --eval.problems 8 --eval.samples 1 --model.width 32 --model.mlp-width 48"
    " --model.initializer-range 0.4"
  )
  assert main(["train", "quickstart", "--run", str(run), *flags.split()]) == 0
  assert main(["export", str(run), str(out)]) == 0
  policy, tokenizer = models.load(out), AutoTokenizer.from_pretrained(out)
  texts = our_greedy_texts(policy, tokenizer, QUESTIONS, 12)
  assert texts == greedy_texts(out, QUESTIONS, 12)
  config = json.loads((out / "generation_config.json").read_text())
  assert config["eos_token_id"] == [tokenizer.eos_token_id]
