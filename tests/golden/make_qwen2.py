"""Writes qwen2.npz: what `transformers` computes with a tiny Qwen2 model.

PyTorch is not a dependency of this project; to make the file again, in an environment
of its own:

    pip install torch==2.13.0 transformers==5.23.0 numpy
    python tests/golden/make_qwen2.py

Arrays of the file:

    config             config.json as `save_pretrained` writes it, text
    weights/NAME       float32, Hugging Face names and layout
    tokens [B, T]      rows of 11, 7 and 1 tokens, right-padded with token 5
    lengths [B]
    coefficients [B, T - 1]   of the log-probs in the loss; 0 on padding
    logits [B, T, V]   rows at padding are set to 0
    logprobs [B, T - 1]       of tokens[:, 1:]; 0 on padding
    gradients/NAME     of sum(coefficients * logprobs)
    prompts [G, P]     right-aligned, padded with the end token
    prompt_lengths [G]
    eos                the end token of the continuations
    greedy [G, M]      continuations; after the end token the end token again
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

# Nothing is a default: three query heads share a key-value head, heads of an unusual
# width, a large rotary base and epsilon.
CONFIG = dict(
  vocab_size=97,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=6,
  num_key_value_heads=2,
  rms_norm_eps=1e-5,
  rope_parameters={"rope_type": "default", "rope_theta": 5e5},
  max_position_embeddings=640,
  tie_word_embeddings=False,
  initializer_range=0.13,
  bos_token_id=2,
  pad_token_id=5,
)
LENGTHS = (11, 7, 1)
PROMPT_LENGTHS = (6, 2, 9)
NEW_TOKENS = 14


def make_model(seed: int, **changes) -> Qwen2ForCausalLM:
  """A model whose every weight is random: biases and norm scales too.

  Weights are large, so that attention is far from uniform and a wrong rotary base or
  bias moves the logits by far more than rounding does.
  """
  torch.manual_seed(seed)
  config = Qwen2Config(**(CONFIG | changes))
  config._attn_implementation = "eager"
  model = Qwen2ForCausalLM(config).to(torch.float32).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      fan_in = weight.shape[-1] if weight.ndim == 2 else 1
      noise = torch.randn(weight.shape)
      if name.endswith("norm.weight"):
        weight.copy_(1 + 0.3 * noise)
      elif name.endswith("bias") or "embed" in name or "lm_head" in name:
        weight.copy_(0.5 * noise)
      else:
        weight.copy_(1.5 * noise / fan_in**0.5)
  return model


def make_inputs(seed: int, vocab_size: int) -> dict[str, np.ndarray]:
  random = np.random.default_rng(seed)
  B, T = len(LENGTHS), max(LENGTHS)
  real = np.arange(T) < np.array(LENGTHS)[:, None]
  tokens = np.where(real, random.integers(0, vocab_size, (B, T)), 5)
  coefficients = random.normal(size=(B, T - 1)) * real[:, 1:]
  return dict(
    tokens=tokens.astype(np.int32),
    lengths=np.array(LENGTHS, np.int32),
    coefficients=coefficients.astype(np.float32),
  )


def compute(model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Logits, log-probs and gradients; padding is told by the attention mask alone."""
  tokens = torch.tensor(inputs["tokens"], dtype=torch.long)
  real = torch.arange(tokens.shape[1]) < torch.tensor(inputs["lengths"])[:, None]
  model.zero_grad()
  logits = model(tokens, attention_mask=real.long()).logits
  logprobs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
  (torch.tensor(inputs["coefficients"]) * logprobs).sum().backward()
  return dict(
    logits=(logits * real[..., None]).detach().numpy(),
    logprobs=(logprobs * real[:, 1:]).detach().numpy(),
    **{f"gradients/{n}": p.grad.numpy() for n, p in model.named_parameters()},
  )


def generate(model, seed: int) -> dict[str, np.ndarray]:
  """Greedy continuations, ended by a token that one of the rows does produce."""
  random = np.random.default_rng(seed)
  G, P = len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)
  real = np.arange(P) >= P - np.array(PROMPT_LENGTHS)[:, None]
  tokens = np.where(real, random.integers(0, model.config.vocab_size, (G, P)), 5)

  def run(eos):
    out = model.generate(
      torch.tensor(np.where(real, tokens, 5 if eos is None else eos)),
      attention_mask=torch.tensor(real).long(),
      do_sample=False,
      max_new_tokens=NEW_TOKENS,
      eos_token_id=eos,
      pad_token_id=5 if eos is None else eos,
      output_scores=True,
      return_dict_in_generate=True,
    )
    best = torch.stack(out.scores).topk(2).values
    # A near tie would be decided by rounding.
    assert (best[..., 0] - best[..., 1]).min() > 2e-3, "another seed, please"
    return out.sequences[:, P:].numpy()

  eos = int(run(None)[1, 5])
  greedy = run(eos)
  prompts = np.where(real, tokens, eos)
  return dict(
    prompts=prompts.astype(np.int32),
    prompt_lengths=np.array(PROMPT_LENGTHS, np.int32),
    eos=np.int32(eos),
    greedy=greedy.astype(np.int32),
  )


def config_json(model) -> str:
  with tempfile.TemporaryDirectory() as directory:
    model.config.save_pretrained(directory)
    return json.dumps(json.loads((pathlib.Path(directory) / "config.json").read_text()))


def main():
  model = make_model(seed=0)
  inputs = make_inputs(seed=1, vocab_size=CONFIG["vocab_size"])
  weights = {f"weights/{n}": w.detach().numpy() for n, w in model.named_parameters()}
  arrays = inputs | compute(model, inputs) | generate(model, seed=2) | weights
  file = pathlib.Path(__file__).with_name("qwen2.npz")
  np.savez_compressed(file, config=config_json(model), **arrays)
  print(file, file.stat().st_size, "bytes")
  print("greedy", arrays["greedy"].tolist(), "end token", int(arrays["eos"]))
  print("logits' standard deviation", arrays["logits"][0].std())


if __name__ == "__main__":
  main()
