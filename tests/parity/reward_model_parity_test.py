"""Reward models beside the classifiers of `transformers`, in both directions."""

import numpy as np
import pytest
import reference
import torch
from transformers import AutoModelForSequenceClassification

from opo_jax import models
from opo_jax.data import preferences
from opo_jax.rewards import reward_model


def our_scores(model, inputs):
  tokens, lengths = inputs["tokens"], inputs["lengths"]
  columns = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  real = (columns < lengths[:, None]).astype(np.int32)
  return np.asarray(model.scores(tokens, columns, real, lengths - 1))


@pytest.mark.parametrize("name", reference.REWARD_CASES)
def test_a_classifier_of_transformers_scores_the_same_here(name, tmp_path):
  theirs = reference.make_reward_model(name)
  theirs.save_pretrained(tmp_path)
  inputs = reference.make_inputs(theirs.config.vocab_size)
  expected = reference.reward_scores(theirs, inputs)
  ours = our_scores(reward_model.load(tmp_path), inputs)
  np.testing.assert_allclose(ours, expected["scores"], atol=1e-5)
  np.testing.assert_allclose(ours, expected["left_padded_scores"], atol=1e-5)


@pytest.mark.parametrize("name", reference.REWARD_CASES)
def test_an_exported_reward_model_is_the_same_there(name, tmp_path):
  theirs = reference.make_reward_model(name)
  theirs.save_pretrained(tmp_path / "theirs")
  tokenizer = preferences.tokenizer()
  model = reward_model.load(tmp_path / "theirs")
  models.save(model, tmp_path / "ours", tokenizer=tokenizer)
  again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
  assert type(again) is type(theirs) and again.config.num_labels == 1
  expected = theirs.state_dict()
  assert again.state_dict().keys() == expected.keys()
  for weight, tensor in again.state_dict().items():
    assert torch.equal(tensor, expected[weight]), weight

  # Scored with `transformers` alone.
  texts = ["<bos><user>tea jam<assistant>tea jam enjoy<end>", "<bos><user>tea<end>"]
  tokenizer.padding_side = "right"
  batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
  with torch.no_grad():
    scores = again(**batch).logits[:, 0].numpy()
  inputs = {
    "tokens": batch["input_ids"].numpy().astype(np.int32),
    "lengths": batch["attention_mask"].sum(-1).numpy().astype(np.int32),
  }
  np.testing.assert_allclose(our_scores(model, inputs), scores, atol=1e-5)
