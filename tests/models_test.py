"""The decoder computes what transformers computes, however its inputs are laid out."""

import collections
import functools
import json
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opo_jax import build, models, sampler
from opo_jax import learner as trainer
from opo_jax.config import Config, Mesh, Model, Optimizer
from opo_jax.devices import sharding
from opo_jax.models import hf, transformer
from opo_jax.models.attention import Keys, attention
from opo_jax.models.card import model_card
from opo_jax.models.config_json import config_from, config_to, read_config
from opo_jax.models.rope import Llama3Scaling, YarnScaling
from opo_jax.models.transformer import REMAT, Policy
from opo_jax.planning.programs import abstract_run
from opo_jax.rollouts import prompt_columns

# What transformers computed; tests/golden/make_golden.py says with what.
FAMILIES = sorted(
  path.stem for path in (pathlib.Path(__file__).parent / "golden").glob("*.npz")
)


@functools.cache
def golden_arrays(family):
  with np.load(pathlib.Path(__file__).parent / "golden" / f"{family}.npz") as file:
    return dict(file)


GOLDEN = golden_arrays("qwen2")


def golden(prefix, family="qwen2"):
  return {
    name.removeprefix(prefix): array
    for name, array in golden_arrays(family).items()
    if name.startswith(prefix)
  }


def golden_weights(family="qwen2"):
  return {
    name: array.astype(np.float32) / 32
    for name, array in golden("weights/", family).items()
  }


def golden_config(family="qwen2"):
  return json.loads(golden_arrays(family)["config"].item())


def write_model(directory, config=None, weights=None, num_files=1, family="qwen2"):
  """A Hugging Face directory of the golden model, with changes to config.json."""
  directory.mkdir(exist_ok=True)
  config = golden_config(family) | (config or {})
  (directory / "config.json").write_text(json.dumps(config))
  weights = golden_weights(family) if weights is None else weights
  names = sorted(weights)
  files = ["model.safetensors"]
  if num_files > 1:
    files = [
      f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)
    ]
    where = {name: files[i % num_files] for i, name in enumerate(names)}
    index = json.dumps({"metadata": {}, "weight_map": where})
    (directory / "model.safetensors.index.json").write_text(index)
  for i, file in enumerate(files):
    save_file({name: weights[name] for name in names[i::num_files]}, directory / file)
  return directory


def random_policy(**changes):
  """Every parameter random: biases and norm scales too; no size equals another."""
  sizes = dict(
    vocab_size=61,
    width=20,
    mlp_width=28,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=700.0,
    norm_epsilon=1e-4,
    tie_embeddings=False,
    initializer_range=0.3,
  )
  config = models.ModelConfig(**(sizes | changes))
  like = jax.eval_shape(
    lambda key: Policy(config, key, eos_ids=(7, 3)), jax.random.key(0)
  )
  random = np.random.default_rng(0)

  def fill(path, leaf):
    noise = random.normal(size=leaf.shape).astype(np.float32)
    is_scale = ".scale" in jax.tree_util.keystr(path)
    return jnp.asarray(1 + 0.2 * noise if is_scale else 0.35 * noise)

  return jax.tree_util.tree_map_with_path(fill, like)


@pytest.fixture(scope="module", params=["every token", "sliding window"])
def policy(request):
  if request.param == "every token":
    return random_policy()
  return random_policy(
    qkv_bias=False, qk_norm=True, sliding_window=4, sliding_layers=(0, 2)
  )


@jax.jit
def logits_of(policy, tokens, positions=None, segment_ids=None):
  return policy.logits(tokens, positions=positions, segment_ids=segment_ids)


def random_tokens(seed, *shape, vocab_size=61):
  return np.random.default_rng(seed).integers(0, vocab_size, shape, dtype=np.int32)


def assert_close(actual, expected, atol=3e-5):
  """Float32 sums in another order: about 1e-5 at logits of order 10."""
  np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def assert_same_bits(actual, expected):
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.dtype == expected.dtype
  assert actual.shape == expected.shape
  assert actual.tobytes() == expected.tobytes()


def assert_same_parameters(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for ours, theirs in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert_same_bits(ours, theirs)


def parameters(policy):
  """{name: array}, for messages that name the parameter."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(policy)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_close_parameters(actual, expected, rtol):
  """Norm of the difference over the norm, for each parameter."""
  assert actual.keys() == expected.keys()
  for name, ours in actual.items():
    error = np.linalg.norm(ours - expected[name]) / np.linalg.norm(expected[name])
    assert error < rtol, f"{name}: {error}"


# --- transformers -------------------------------------------------------------------


@jax.jit
def loss_logits_and_gradient(policy, tokens, lengths, coefficients):
  """What the golden files hold, in one program."""
  real = jnp.arange(tokens.shape[1]) < lengths[:, None]

  def loss(policy):
    logits = policy.logits(tokens, segment_ids=real.astype(jnp.int32))
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    logprobs = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    outputs = logits * real[..., None], logprobs * real[:, 1:]
    return (coefficients * logprobs).sum(), outputs

  return jax.grad(loss, has_aux=True)(policy)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_logprobs_and_gradients_equal_those_of_transformers(family, tmp_path):
  arrays = golden_arrays(family)
  policy = models.load(write_model(tmp_path / "model", family=family))
  gradient, (logits, logprobs) = loss_logits_and_gradient(
    policy, arrays["tokens"], arrays["lengths"], arrays["coefficients"]
  )
  # 1e-5 measured; a default rope_theta is off by 0.6, a default epsilon by 6e-4.
  assert_close(logits, arrays["logits"], atol=5e-5)
  assert_close(logprobs, arrays["logprobs"], atol=5e-5)
  # A gradient is shaped as a policy is, and so can be written under their names.
  models.save(gradient, tmp_path)
  # 5e-6 measured; a scale wrong by 1e-4 is seen.
  actual = load_file(tmp_path / "model.safetensors")
  assert_close_parameters(actual, golden("gradients/", family), rtol=5e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_tied_sliding_window"])
def test_left_padded_rows_equal_transformers(family, tmp_path):
  arrays = golden_arrays(family)
  policy = models.load(write_model(tmp_path, family=family))
  tokens, lengths = arrays["tokens"], arrays["lengths"]
  T = tokens.shape[1]
  positions, segment_ids = prompt_columns(lengths, T)
  shifted = np.stack(
    [np.roll(row, T - n) for row, n in zip(tokens, lengths, strict=True)]
  )
  logits = np.asarray(logits_of(policy, shifted, positions, segment_ids))
  for row, expected, n in zip(logits, arrays["logits"], lengths, strict=True):
    assert_close(row[T - n :], expected[:n], atol=5e-5)


@pytest.mark.parametrize(
  "family", ["qwen2", "qwen3_layer_types_yarn", "llama_3_2_tied_all_biases"]
)
def test_greedy_text_equals_that_of_transformers(family, tmp_path):
  arrays = golden_arrays(family)
  policy = models.load(write_model(tmp_path, family=family))
  P = arrays["prompts"].shape[1]
  prompts = [
    row[P - n :].tolist()
    for row, n in zip(arrays["prompts"], arrays["prompt_lengths"], strict=True)
  ]
  eos, expected = arrays["eos"].item(), arrays["greedy"]
  rollouts = sampler.generate(
    policy,
    prompts,
    max_new_tokens=expected.shape[1],
    temperature=0.0,
    eos_ids=(eos,),
  )
  # The end token is sampled and counts; later columns are padding.
  lengths = np.where(
    (expected == eos).any(1), (expected == eos).argmax(1) + 1, expected.shape[1]
  )
  assert lengths.max() == 10
  np.testing.assert_array_equal(rollouts.lengths, lengths)
  for row, theirs, n in zip(rollouts.tokens, expected, lengths, strict=True):
    assert row[:n].tolist() == theirs[:n].tolist()


# --- config.json --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_older_form_of_a_config_is_the_newer_one(family):
  newer = golden_config(family)
  older = {k: v for k, v in newer.items() if k != "rope_parameters"}
  rope = dict(newer["rope_parameters"])
  older["rope_theta"] = rope.pop("rope_theta")
  older["rope_scaling"] = None
  if (kind := rope.pop("rope_type")) != "default":
    older["rope_scaling"] = {"type": kind, **rope}
  if family == "qwen2_5_tied_sliding_window":
    del older["layer_types"]  # use_sliding_window and max_window_layers say it
  assert config_from(older) == config_from(newer)
  assert config_from(older | newer) == config_from(newer)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_written_and_read_is_the_same(family):
  config = config_from(golden_config(family))
  values = config_to(config)
  assert config_from(values) == config
  wanted = golden_config(family)
  # With layer_types, max_window_layers is not read.
  for field in wanted.keys() & values.keys() - {"rope_parameters", "max_window_layers"}:
    assert values[field] == wanted[field], field
  # Readers that know one form of the rotary settings alone read the same.
  for form in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}):
    assert config_from({k: v for k, v in values.items() if k not in form}) == config


def test_missing_fields_mean_what_they_mean_to_transformers():
  sizes = dict(vocab_size=64, hidden_size=48, intermediate_size=8, num_hidden_layers=40)
  sizes |= dict(num_attention_heads=12)
  llama = config_from(sizes | dict(model_type="llama"))
  assert (llama.num_kv_heads, llama.head_dim, llama.max_positions) == (12, 4, 2048)
  assert not (llama.qkv_bias or llama.out_bias or llama.mlp_bias or llama.qk_norm)
  qwen2 = config_from(sizes | dict(model_type="qwen2", num_key_value_heads=4))
  assert (qwen2.num_kv_heads, qwen2.head_dim, qwen2.rope_theta) == (4, 4, 10_000.0)
  assert qwen2.qkv_bias and not qwen2.out_bias and not qwen2.tie_embeddings
  assert qwen2.sliding_window is None and qwen2.sliding_layers == ()
  qwen3 = config_from(sizes | dict(model_type="qwen3", num_key_value_heads=4))
  assert qwen3.head_dim == 128 and qwen3.qk_norm and not qwen3.qkv_bias
  sliding = dict(model_type="qwen3", num_key_value_heads=4, use_sliding_window=True)
  assert config_from(sizes | sliding).sliding_layers == tuple(range(28, 40))
  assert config_from(sizes | sliding).sliding_window == 4096


def test_configs_as_the_hub_has_them_are_read():
  shared = dict(
    attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, use_cache=True,
    torch_dtype="bfloat16", transformers_version="4.44.0", tie_word_embeddings=False,
  )  # fmt: skip
  r1_qwen_7b = shared | dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", bos_token_id=151643,
    eos_token_id=151643, hidden_size=3584, intermediate_size=18944, vocab_size=152064,
    max_position_embeddings=131072, max_window_layers=28, num_attention_heads=28,
    num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=10000,
    sliding_window=4096, use_mrope=False, use_sliding_window=False,
  )  # fmt: skip
  assert config_from(r1_qwen_7b) == models.ModelConfig(
    152064, 3584, 18944, 28, 28, 4, 128, max_positions=131072, tie_embeddings=False
  )
  llama_31_8b = shared | dict(
    architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False,
    bos_token_id=128000, eos_token_id=[128001, 128008, 128009], hidden_size=4096,
    intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False,
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
    pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0, vocab_size=128256,
    rope_scaling=dict(
      factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
      original_max_position_embeddings=8192, rope_type="llama3",
    ),
  )  # fmt: skip
  assert config_from(llama_31_8b) == models.ModelConfig(
    128256, 4096, 14336, 32, 32, 8, 128, max_positions=131072, tie_embeddings=False,
    rope_theta=500000.0, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192),
    norm_epsilon=1e-5, qkv_bias=False,
  )  # fmt: skip
  qwen3_06b = shared | dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False,
    bos_token_id=151643, eos_token_id=151645, head_dim=128, hidden_size=1024,
    intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28,
    num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8,
    rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None,
    tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936,
  )  # fmt: skip
  assert config_from(qwen3_06b) == models.ModelConfig(
    151936, 1024, 3072, 28, 16, 8, 128, max_positions=40960, rope_theta=1000000,
    qkv_bias=False, qk_norm=True,
  )  # fmt: skip


def test_yarn_sharpens_attention_as_its_fields_say():
  def factor(**fields):
    return YarnScaling(4.0, 32, **fields).attention_factor

  assert factor() == pytest.approx(0.1 * np.log(4) + 1)
  assert factor(attention_factor=0.7) == 0.7
  assert factor(mscale=2.0) == factor()  # both, or neither
  assert factor(mscale=2.0, mscale_all_dim=0.5) == pytest.approx(
    (0.2 * np.log(4) + 1) / (0.05 * np.log(4) + 1)
  )


# --- files --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3_tied", "llama_3_2_tied_all_biases"])
def test_import_then_export_is_the_identity(family, tmp_path):
  path = write_model(tmp_path / "model", family=family)
  models.save(models.load(path), tmp_path)
  written, expected = load_file(tmp_path / "model.safetensors"), golden_weights(family)
  assert written.keys() == expected.keys()
  for name in expected:
    assert_same_bits(written[name], expected[name])


@pytest.mark.parametrize("tied, dtype", [(True, "float32"), (False, "bfloat16")])
def test_export_then_import_is_the_identity(tied, dtype, tmp_path):
  policy = random_policy(tie_embeddings=tied)
  policy = jax.tree.map(lambda leaf: leaf.astype(dtype), policy)
  models.save(policy, tmp_path)
  loaded = models.load(tmp_path, param_dtype=dtype)
  assert loaded.config == policy.config
  assert set(loaded.eos_ids) == {7, 3}
  weights = load_file(tmp_path / "model.safetensors")
  assert ("lm_head.weight" in weights) == (not tied)
  assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
  assert_same_parameters(jax.tree.leaves(loaded), jax.tree.leaves(policy))


def test_export_in_several_files_is_the_export_in_one(tmp_path):
  policy, limit = random_policy(), 9_000
  models.save(policy, tmp_path / "one")
  models.save(policy, tmp_path / "many", max_file_bytes=limit)
  index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
  files = sorted((tmp_path / "many").glob("*.safetensors"))
  assert len(files) > 3
  assert files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
  together, size = {}, 0
  for file in files:
    tensors = load_file(file)
    assert {index["weight_map"][name] for name in tensors} == {file.name}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert num_bytes <= limit or len(tensors) == 1
    together |= tensors
    size += num_bytes
  assert index["metadata"]["total_size"] == size
  expected = load_file(tmp_path / "one" / "model.safetensors")
  assert together.keys() == expected.keys() == index["weight_map"].keys()
  for name in expected:
    assert_same_bits(together[name], expected[name])
  assert_same_parameters(
    jax.tree.leaves(models.load(tmp_path / "many")), jax.tree.leaves(policy)
  )


def test_file_that_the_index_names_must_be_there(tmp_path):
  path = write_model(tmp_path, num_files=3)
  (path / "model-00002-of-00003.safetensors").unlink()
  with pytest.raises(ValueError, match=r"lacks \['model-00002-of-00003"):
    models.load(path)


def test_quantised_weights_are_refused_and_derived_ones_are_not_read(tmp_path):
  weights = golden_weights()
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  path = write_model(tmp_path, weights=weights | {name: np.ones(2, np.float32)})
  assert models.load(path).config.num_layers == 2
  name = "model.layers.0.mlp.up_proj.weight"
  weights[name] = weights[name].astype(np.int8)
  with pytest.raises(ValueError, match=rf"quantised: {{'{name}': 'I8'}}"):
    models.load(write_model(tmp_path, weights=weights))


def test_hub_id_is_downloaded_weights_only_when_they_are_needed(tmp_path, monkeypatch):
  path, asked = write_model(tmp_path / "snapshot"), []

  def download(repo, *, allow_patterns, ignore_patterns):
    assert ignore_patterns == ["*/*"]
    asked.append((repo, tuple(allow_patterns)))
    return str(path)

  monkeypatch.setattr("huggingface_hub.snapshot_download", download)
  assert read_config("someone/qwen") == read_config(path)
  assert asked == [("someone/qwen", ("*.json",))]
  assert_same_parameters(models.load("someone/qwen"), models.load(path))
  assert asked[-1] == ("someone/qwen", ("*.json", "*.safetensors"))


def test_fresh_weights_are_those_of_the_family():
  """Normal matrices, zero biases, scales of one, as `transformers` draws them."""
  config = config_from(
    golden_config("llama_3_2_tied_all_biases")
    | dict(hidden_size=96, intermediate_size=192, vocab_size=256)
  )
  fresh = jax.jit(lambda key: Policy(config, key))(jax.random.key(0))
  for name, leaf in parameters(fresh).items():
    if ".bias" in name:
      assert (leaf == 0).all(), name
    elif ".scale" in name:
      assert (leaf == 1).all(), name
    else:
      # At least 768 numbers in a layer: 0.17 within 10 standard errors and 0 too.
      for layer in leaf.reshape(-1, *leaf.shape[-2:]):
        assert abs(layer.std() - 0.17) < 0.04, name
        assert abs(layer.mean()) < 0.04, name
        assert abs(layer).max() > 2.5 * 0.17, name  # not uniform


def test_tied_policy_equals_untied_policy_with_equal_tables(tmp_path):
  tied = random_policy(tie_embeddings=True)
  models.save(tied, tmp_path)
  weights = load_file(tmp_path / "model.safetensors")
  weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
  save_file(weights, tmp_path / "model.safetensors")
  # A copy is accepted beside a tied config, too: some files have it.
  assert models.load(tmp_path).untied is None

  config = json.loads((tmp_path / "config.json").read_text())
  config["tie_word_embeddings"] = False
  (tmp_path / "config.json").write_text(json.dumps(config))
  untied = models.load(tmp_path)
  tokens = random_tokens(0, 2, 5)
  assert_same_bits(logits_of(untied, tokens), logits_of(tied, tokens))


def test_tied_config_beside_another_unembedding_is_refused(tmp_path):
  path = write_model(tmp_path, dict(tie_word_embeddings=True))
  with pytest.raises(ValueError, match=r"lm_head\.weight is not model\.embed_tokens"):
    models.load(path)


def test_bfloat16_weights_become_float32_parameters(tmp_path):
  rounded = {k: v.astype(ml_dtypes.bfloat16) for k, v in golden_weights().items()}
  policy = models.load(write_model(tmp_path, weights=rounded))
  models.save(policy, tmp_path / "again")
  written = load_file(tmp_path / "again" / "model.safetensors")
  for name, array in rounded.items():
    assert_same_bits(written[name], array.astype(np.float32))


def test_end_tokens_are_those_of_both_files(tmp_path):
  path = write_model(tmp_path, dict(eos_token_id=0))
  assert models.load(path).eos_ids == (0,)
  (path / "generation_config.json").write_text('{"eos_token_id": [9, 0, 4]}')
  assert models.load(path).eos_ids == (0, 4, 9)
  assert models.load(path, eos_ids=(2,)).eos_ids == (2,)
  assert models.load(path, eos_ids=()).eos_ids == ()


def test_weights_that_do_not_match_are_all_listed(tmp_path):
  weights = golden_weights()
  q, k, v = (f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
  norm = "model.layers.0.input_layernorm.weight"
  del weights[f"{q}.bias"], weights[norm]
  weights["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 24), np.float32)
  weights["model.layers.0.self_attn.q_norm.weight"] = np.zeros(4, np.float32)
  weights[f"{k}.weight"] = weights[f"{k}.weight"].T.copy()
  weights[f"{v}.bias"] = np.zeros(24, np.float32)
  with pytest.raises(ValueError) as error:
    models.load(write_model(tmp_path, weights=weights))
  missing, rest = str(error.value).split("unknown")
  unknown, misshaped = rest.split("of another shape")
  assert f"{q}.bias" in missing and norm in missing
  assert "model.layers.2.mlp.up_proj.weight" in unknown
  assert "model.layers.0.self_attn.q_norm.weight" in unknown
  assert f"'{k}.weight': '(24, 8) instead of (8, 24)'" in misshaped
  assert f"'{v}.bias': '(24,) instead of (8,)'" in misshaped
  assert str(error.value).count("_proj") == 4  # nothing that is right is listed


@pytest.mark.parametrize("wrong", ["missing", "unknown", "of another shape"])
def test_one_weight_that_does_not_match_is_refused(tmp_path, wrong):
  weights, name = golden_weights(), "model.layers.1.mlp.down_proj.weight"
  if wrong == "missing":
    del weights[name]
  elif wrong == "unknown":
    name = name.replace("mlp", "experts")
    weights[name] = np.zeros(3, np.float32)
  else:
    weights[name] = weights[name][:, 1:].copy()
  with pytest.raises(ValueError, match=rf"{wrong} [\[{{]'{name}"):
    models.load(write_model(tmp_path, weights=weights))


def test_no_weights_and_weights_in_two_files_are_refused(tmp_path):
  path = write_model(tmp_path)
  norm = {"model.norm.weight": np.ones(24, np.float32)}
  save_file(norm, path / "other.safetensors")
  with pytest.raises(
    ValueError, match=r"norm\.weight lies in model\.safetensors and in other"
  ):
    models.load(path)
  for file in path.glob("*.safetensors"):
    file.unlink()
  with pytest.raises(ValueError, match="has no weights"):
    models.load(path)


def test_path_that_is_no_policy_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"has no config\.json"):
    models.load(tmp_path)
  with pytest.raises(ValueError, match=r"No policy at '.*nothing-here'"):
    models.load(tmp_path / "nothing-here")


@pytest.mark.parametrize(
  "field, value",
  [
    ("model_type", "qwen3_moe"),
    ("model_type", "qwen2_vl"),
    ("architectures", ["Qwen2ForSequenceClassification"]),
    ("hidden_act", "gelu"),
    ("is_causal", False),
    ("attention_bias", True),  # not Qwen2's, and transformers would not read it
    ("attention_dropout", 0.1),
    ("use_mrope", True),
    ("quantization_config", {"bits": 4}),
    ("partial_rotary_factor", 0.5),
    ("layer_types", ["sliding_attention", "full_attention"]),  # the window is off
    ("layer_types", ["full_attention", "linear_attention"]),
    ("layer_types", ["full_attention"]),
    ("rope_theta", 1e4),  # rope_parameters has another
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}),
    ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e6}),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e6}),
    ("rope_parameters", {"rope_type": "default", "factor": 2.0}),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "short_factor": [1.0]}),
    ("rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
    ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
  ],
)
def test_unsupported_config_is_refused_by_name(field, value):
  with pytest.raises(ValueError) as error:
    config_from(golden_config() | {field: value})
  assert f"{field} = {value!r}" in str(error.value)


def test_field_that_switches_nothing_on_is_no_reason_to_refuse():
  off = dict(use_mrope=False, attention_dropout=0.0, auto_map=None, quantization={})
  assert config_from(golden_config() | off) == config_from(golden_config())


def test_incomplete_config_is_refused_by_name():
  config = golden_config()
  del config["hidden_size"], config["num_key_value_heads"]
  with pytest.raises(ValueError, match=r"lacks.*hidden_size.*num_key_value_heads"):
    config_from(config)


@pytest.mark.parametrize(
  "changes",
  [
    dict(mlp_bias=True),
    dict(qkv_bias=False, out_bias=True),
    dict(qk_norm=True),  # with a bias on query, key and value alone
    dict(qkv_bias=False),  # Llama's width is a multiple of its heads
    dict(qkv_bias=False, width=24, sliding_window=4, sliding_layers=(0,)),
  ],
)
def test_policy_that_no_family_can_tell_is_not_exported(changes, tmp_path):
  with pytest.raises(ValueError, match="No family of the Hugging Face format"):
    models.save(random_policy(**changes), tmp_path)
  assert not list(tmp_path.iterdir())


# --- layouts of the same tokens -----------------------------------------------------


def test_cached_decoding_equals_the_full_forward(policy):
  """Prompts prefilled once and shared, then one token at a time, then two."""
  prompt_lengths, P, samples, T = np.array([2, 5]), 5, 3, 6
  N, config = len(prompt_lengths) * samples, policy.config
  prompts, responses = random_tokens(1, 2, P), random_tokens(2, N, T)

  positions, segment_ids = prompt_columns(prompt_lengths, P)
  prefill = jax.jit(Policy.hidden)
  _, (prompt_keys, prompt_values) = prefill(policy, prompts, positions, segment_ids)
  prompt_mask = (segment_ids > 0)[:, None]
  # Columns not written yet hold numbers that would be seen at once.
  shape = (config.num_layers, N, config.num_kv_heads, T, config.head_dim)
  keys, values = jnp.full(shape, 50.0), jnp.full(shape, -50.0)
  first = np.repeat(prompt_lengths, samples)[:, None]

  @jax.jit
  def decode(tokens, t, keys, values):
    written = jnp.broadcast_to(jnp.arange(T) < t, (N, 1, T))
    hidden, (key, value) = policy.hidden(
      tokens,
      first + t + jnp.arange(tokens.shape[1]),
      cache=(
        Keys(prompt_keys, prompt_values, prompt_mask, positions=positions),
        Keys(keys, values, written, positions=first + jnp.arange(T)),
      ),
    )
    return (
      policy.project(hidden),
      jax.lax.dynamic_update_slice(keys, key, (0, 0, 0, t, 0)),
      jax.lax.dynamic_update_slice(values, value, (0, 0, 0, t, 0)),
    )

  decoded = []
  for start, stop in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6)]:
    logits, keys, values = decode(responses[:, start:stop], start, keys, values)
    decoded.append(logits)
  decoded = np.concatenate(decoded, axis=1)

  for row in range(N):
    n = prompt_lengths[row // samples]
    prompt = prompts[row // samples, P - n :]
    full = logits_of(policy, np.concatenate([prompt, responses[row]])[None])
    assert_close(decoded[row], full[0, n:])


def test_sampler_records_the_learners_logprobs_under_a_sliding_window():
  policy = random_policy(sliding_window=4, sliding_layers=(0, 2))
  prompts = [random_tokens(seed, n).tolist() for seed, n in enumerate((7, 1, 3, 5))]
  # Fewer slots than rows: a slot that takes the next row has old keys in its ring.
  rollouts = sampler.generate(
    policy, prompts, samples_per_prompt=3, max_new_tokens=9, slots=5, eos_ids=(3, 8, 20)
  )
  lengths = np.asarray(rollouts.lengths)
  assert lengths.min() < 4 and lengths.max() == 9
  learner = trainer.response_logprobs(policy, rollouts)
  # A window one token wider is off by more than 0.1.
  assert_close(rollouts.logprobs, learner)


def test_packed_segments_equal_separate_rows(policy):
  lengths = [5, 1, 4]
  rows = [random_tokens(seed, n) for seed, n in enumerate(lengths)]
  padding = random_tokens(9, 2)
  tokens = np.concatenate([rows[0], rows[1], padding[:1], rows[2], padding[1:]])
  segment_ids = np.repeat([3, 1, 0, 2, 0], [5, 1, 1, 4, 1])  # in no order
  positions = np.concatenate([np.arange(n) for n in (5, 1, 1, 4, 1)])
  packed = logits_of(policy, tokens[None], positions[None], segment_ids[None])[0]
  for row, start in zip(rows, (0, 5, 7), strict=True):
    assert_close(packed[start : start + len(row)], logits_of(policy, row[None])[0])


def test_packed_segments_do_not_see_each_other(policy):
  segment_ids = np.repeat([[1, 2, 3]], [3, 4, 2], axis=1)
  positions = np.concatenate([np.arange(n) for n in (3, 4, 2)])[None]
  tokens, other = random_tokens(0, 1, 9), random_tokens(1, 1, 9)
  for segment in (1, 2, 3):
    own = segment_ids == segment
    mixed = np.where(own, tokens, other)
    # Same program, same operands where it counts: equal to the last bit.
    assert_same_bits(
      logits_of(policy, mixed, positions, segment_ids)[own],
      logits_of(policy, tokens, positions, segment_ids)[own],
    )


def test_padding_never_changes_a_real_token(policy):
  left, right = np.array([3, 0, 1]), np.array([2, 4, 0])
  T = 8
  columns = np.arange(T)
  real = (columns >= left[:, None]) & (columns < T - right[:, None])
  positions = np.maximum(columns - left[:, None], 0)
  tokens = random_tokens(3, 3, T)
  outputs = []
  for padding in (np.zeros_like(tokens), random_tokens(4, 3, T), tokens[:, ::-1]):
    padded = np.where(real, tokens, padding)
    logits = logits_of(policy, padded, positions, real.astype(np.int32))
    assert np.isfinite(logits).all()
    outputs.append(np.asarray(logits)[real])
  assert_same_bits(outputs[1], outputs[0])
  assert_same_bits(outputs[2], outputs[0])
  for row, (start, stop) in enumerate(zip(left, T - right, strict=True)):
    alone = logits_of(policy, tokens[row : row + 1, start:stop])[0]
    assert_close(outputs[0][np.nonzero(real)[0] == row], alone)


def test_padding_gets_a_finite_gradient_of_zero(policy):
  real = np.array([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]])
  tokens = np.where(real, random_tokens(5, 2, 6) % 13, 13)  # 13 is in padding alone

  @jax.jit
  @jax.grad
  def gradient(policy):
    logits = policy.logits(tokens, segment_ids=real)
    return (jax.nn.log_softmax(logits)[..., 7] * real).sum()

  actual = parameters(gradient(policy))
  assert all(np.isfinite(leaf).all() for leaf in actual.values())
  rows = np.abs(actual[".embedding.value"]).max(-1)
  assert set(np.nonzero(rows)[0]) == set(tokens[real > 0])


def test_no_token_sees_a_later_one(policy):
  tokens, other = random_tokens(6, 2, 7), random_tokens(7, 2, 7)
  for t in (1, 4, 6):
    changed = np.where(np.arange(7) < t, tokens, other)
    before, after = logits_of(policy, tokens), logits_of(policy, changed)
    assert_same_bits(after[:, :t], before[:, :t])
    assert (np.abs(after[:, t] - before[:, t]).max(-1) > 0.1).all()


def test_keys_without_positions_are_refused_under_a_sliding_window():
  policy = random_policy(sliding_window=4, sliding_layers=(1,))
  tokens = random_tokens(0, 1, 3)
  positions = np.arange(3)[None]
  keys = np.zeros((3, 1, 2, 3, 8), np.float32)  # layer, row, head, position, width
  cache = (Keys(keys, keys, np.ones((1, 1, 3), bool)),)
  with pytest.raises(ValueError, match=r"Keys\.positions"):
    policy.hidden(tokens, positions + 3, cache=cache)


def test_window_of_the_whole_text_is_no_window():
  tokens = random_tokens(0, 2, 7)
  windows = dict(sliding_layers=(0, 1, 2))
  wide = random_policy(sliding_window=7, **windows)
  narrow = random_policy(sliding_window=6, **windows)
  expected = logits_of(random_policy(), tokens)
  assert_close(logits_of(wide, tokens), expected)
  difference = np.abs(logits_of(narrow, tokens) - expected).max(-1)
  assert (difference[:, :6] < 3e-5).all() and (difference[:, 6] > 0.01).all()


def test_only_distances_between_positions_matter(policy):
  tokens = random_tokens(8, 2, 9)
  positions = np.broadcast_to(np.arange(9), tokens.shape)
  expected = logits_of(policy, tokens, positions)
  assert_close(logits_of(policy, tokens, positions + 31), expected)
  stretched = logits_of(policy, tokens, positions + positions // 2)
  assert np.abs(stretched - expected).max() > 0.1


def test_matrices_kept_in_the_compute_dtype_give_the_same_bits():
  config = random_policy().config
  wide = jax.jit(lambda key: Policy(config, key, dtype=jnp.bfloat16))(jax.random.key(3))
  narrow = jax.jit(Policy.in_compute_dtype)(wide)
  assert narrow.layers.mlp.up.kernel[...].dtype == jnp.bfloat16
  assert narrow.layers.mlp_norm.scale[...].dtype == jnp.float32
  tokens = random_tokens(1, 3, 7)
  np.testing.assert_array_equal(narrow.logits(tokens), wide.logits(tokens))


# --- attention ----------------------------------------------------------------------


def numpy_attention(query, key, value, mask):
  """One query, one head at a time, in float64; head h reads key-value head h // R."""
  B, T, H, E = query.shape
  query, key, value = (x.astype(np.float64) for x in (query, key, value))
  repeats = H // key.shape[1]
  out = np.zeros((B, T, H, value.shape[-1]))
  for b, t, h in np.ndindex(B, T, H):
    seen = np.nonzero(mask[b, t])[0]
    scores = key[b, h // repeats, seen] @ query[b, t, h] / np.sqrt(E)
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights / weights.sum() @ value[b, h // repeats, seen]
  return out


def attend(query, *parts, window=None, positions=None):
  """`attention` as one program."""
  run = jax.jit(functools.partial(attention, window=window))
  return run(query, parts, positions=positions)


def random_attention(B=6, T=4, S=7, H=6, K=2, E=10):
  random = np.random.default_rng(11)
  query = random.normal(size=(B, T, H, E)).astype(np.float32)
  key, value = random.normal(size=(2, B, K, S, E)).astype(np.float32)
  mask = random.random((B, T, S)) < 0.6
  mask[..., 0] = True
  return 3 * query, key, value, mask


def test_attention_equals_a_loop_over_queries_and_heads():
  query, key, value, mask = random_attention()
  expected = numpy_attention(query, key, value, mask)
  actual = attend(query, Keys(key, value, mask))
  # Float32 scores of order 10: 1e-6 each.
  assert_close(actual, expected, atol=1e-5)


def test_split_keys_equal_keys_in_one_part():
  query, key, value, mask = random_attention()
  parts = [
    Keys(key[:, :, i:j], value[:, :, i:j], mask[:, :, i:j])
    for i, j in [(0, 3), (3, 4), (4, 7)]
  ]
  expected = attend(query, Keys(key, value, mask))
  assert_close(attend(query, *parts), expected, atol=1e-5)
  # A part that is masked out altogether adds nothing, whatever it holds.
  blind = Keys(100 * key, -100 * value, np.zeros_like(mask))
  assert_close(attend(query, blind, *parts), expected, atol=1e-5)


def test_query_that_may_see_nothing_gives_no_nan():
  query, key, value, mask = random_attention()
  mask[1, 2] = False

  def total(query, key, value):
    out = attention(query, [Keys(key, value, mask), Keys(key, value, mask)])
    return jnp.where(mask.any(-1)[..., None, None], out, 0.0).sum(), out

  gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(query, key, value)
  assert np.isfinite(out).all()
  assert all(np.isfinite(gradient).all() for gradient in gradients)
  assert (gradients[0][1, 2] == 0).all() and (gradients[0][1, 1] != 0).all()


def test_shared_keys_equal_repeated_keys():
  """Two prompts for six rows, three in sequence each, with one mask per prompt."""
  query, key, value, mask = random_attention()
  own = Keys(key, value, mask)
  _, key, value, mask = random_attention(B=2, T=1, S=5)
  repeated = Keys(*(np.repeat(x, 3, axis=0) for x in (key, value, mask)))
  expected = attend(query, repeated, own)
  assert_close(attend(query, Keys(key, value, mask), own), expected, atol=1e-5)


@pytest.mark.parametrize("shared", ["in sequence", "by rows"])
def test_window_counts_back_from_each_query_under_shared_keys(shared):
  """Rows that share keys stand at different positions; the window moves with them."""
  query, key, value, mask = random_attention(B=6, T=1, S=9)
  key, value, mask = key[:2], value[:2], mask[:2]
  entry = np.array(
    [0, 0, 0, 1, 1, 1] if shared == "in sequence" else [1, 0, 1, 1, 0, 0]
  )
  key_positions = np.stack([np.arange(9), np.arange(9)[::-1]])  # in no order
  positions, window = np.array([[3], [8], [5], [8], [11], [6]]), 4
  seen = positions[:, :, None] - key_positions[entry][:, None] < window
  seen = mask[entry] & seen
  assert seen.any(-1).all() and (seen.sum(-1) < mask[entry].sum(-1)).any()
  expected = numpy_attention(query, key[entry], value[entry], seen)
  rows = None if shared == "in sequence" else entry[None]
  part = Keys(key, value, mask, rows=rows, positions=key_positions)
  actual = attend(query, part, positions=positions, window=window)
  assert_close(actual, expected, atol=1e-5)


# --- numbers, devices, programs -----------------------------------------------------


def sum_of_logprobs(policy, tokens, remat="none"):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = policy.hidden(tokens, positions, remat=remat)
  logprobs = jax.nn.log_softmax(policy.project(hidden[:, :-1]))
  return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).sum()


def test_remat_gives_the_same_gradient_in_less_memory():
  """Four layers, so that `everything` keeps two of their inputs."""
  policy = random_policy(num_layers=4, sliding_window=9, sliding_layers=(0, 2))
  tokens = random_tokens(12, 2, 96)
  gradients, sizes = {}, {}
  for remat in REMAT:
    program = jax.jit(jax.grad(sum_of_logprobs), static_argnums=2)
    compiled = program.lower(policy, tokens, remat).compile()
    gradients[remat] = parameters(compiled(policy, tokens))
    sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
    # The same sums, fused differently.
    assert_close_parameters(gradients[remat], gradients["none"], rtol=1e-5)
  assert sizes["block"] < 0.9 * sizes["attention"] < 0.8 * sizes["none"]
  with pytest.raises(ValueError, match="no rematerialisation 'blocks', only none, att"):
    policy.hidden(tokens, tokens, remat="blocks")


def test_bfloat16_activations_keep_float32_parameters_and_logits(tmp_path):
  models.save(random_policy(), tmp_path)
  full, half = models.load(tmp_path), models.load(tmp_path, dtype=jnp.bfloat16)
  assert_same_parameters(jax.tree.leaves(half), jax.tree.leaves(full))

  tokens = random_tokens(13, 2, 9)
  positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
  hidden, (keys, values) = jax.jit(Policy.hidden)(half, tokens, positions)
  assert hidden.dtype == keys.dtype == values.dtype == jnp.bfloat16
  logits = logits_of(half, tokens)
  assert logits.dtype == jnp.float32
  # Sums in float32: rounded to bfloat16, every logit would survive the cast.
  assert (logits.astype(jnp.bfloat16).astype(jnp.float32) != logits).mean() > 0.9
  expected = logits_of(full, tokens)
  # 8 bits are 0.4% per operation; 0.018 measured over three layers.
  assert np.abs(logits - expected).mean() < 0.05 * np.std(expected)

  gradient = jax.jit(jax.grad(sum_of_logprobs))(half, tokens)
  assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (8, 1, 1), (1, 1, 8)])
def test_each_device_looks_up_and_learns_its_own_part_of_the_table(sizes):
  mesh = sharding.make_mesh(*sizes)
  table = jnp.asarray(np.random.default_rng(0).normal(size=(24, 16)), jnp.float32)
  tokens = random_tokens(14, 8, 5, vocab_size=24)  # each about twice

  def looked_up(table, mesh):
    x = transformer._look_up(table, tokens, jnp.bfloat16, mesh)
    return (x.astype(jnp.float32) * jnp.arange(1.0, 17)).sum(-1), x

  def gradient(table):
    return jax.grad(lambda table: (looked_up(table, mesh)[0] ** 2).sum())(table)

  layout = sharding.named(mesh, "vocab", "embed")
  spread = jax.device_put(table, layout)
  found = jax.jit(looked_up, static_argnums=1)(spread, mesh)[1]
  assert np.array_equal(found, table.astype(jnp.bfloat16)[tokens])
  expected = jax.jit(
    jax.grad(lambda table: (looked_up(table, None)[0] ** 2).sum())
  )(table)  # fmt: skip
  compiled = jax.jit(gradient).lower(spread).compile()
  np.testing.assert_allclose(compiled(spread), expected, rtol=1e-5, atol=1e-5)
  assert compiled.output_shardings.is_equivalent_to(layout, 2)


def test_sharded_policy_gives_the_logits_of_one_device(tmp_path):
  models.save(random_policy(vocab_size=62), tmp_path)
  alone = models.load(tmp_path)
  mesh = sharding.make_mesh(1, 4, 2)
  spread = models.load(tmp_path, mesh=mesh)
  assert_same_parameters(jax.tree.leaves(spread), jax.tree.leaves(alone))

  def shard_shape(param):
    shards = param[...].addressable_shards
    assert len({shard.device for shard in shards}) == 8
    (shape,) = {shard.data.shape for shard in shards}
    return shape

  # [3, 20, 48] over fsdp 4 and tensor 2, and so on; layers are not split.
  block = spread.layers
  assert shard_shape(spread.embedding) == (62 // 2, 20 // 4)
  assert shard_shape(spread.untied) == (62 // 2, 20 // 4)
  assert shard_shape(block.attention.query.kernel) == (3, 20 // 4, 48 // 2)
  assert shard_shape(block.attention.query.bias) == (3, 48 // 2)
  assert shard_shape(block.attention.key.kernel) == (3, 20 // 4, 16 // 2)
  assert shard_shape(block.attention.out.kernel) == (3, 48 // 2, 20 // 4)
  assert shard_shape(block.mlp.up.kernel) == (3, 20 // 4, 28 // 2)
  assert shard_shape(block.mlp.down.kernel) == (3, 28 // 2, 20 // 4)
  assert shard_shape(block.mlp_norm.scale) == (3, 20)

  tokens = random_tokens(14, 4, 6, vocab_size=62)
  segment_ids = np.array([[1] * 6, [0, 0, 1, 1, 1, 1], [1] * 3 + [2] * 3, [1] * 6])
  logits = logits_of(
    spread, sharding.put(tokens, mesh, "batch", None), segment_ids=segment_ids
  )
  assert_close(logits, logits_of(alone, tokens, segment_ids=segment_ids))
  few = tokens[:3]  # rows that the shards do not divide
  assert_close(jax.jit(Policy.logits)(spread, few), logits_of(alone, few))
  gradient = jax.jit(jax.grad(sum_of_logprobs))
  # Sums over devices come in another order.
  assert_close_parameters(
    parameters(gradient(spread, tokens)),
    parameters(gradient(alone, tokens)),
    rtol=1e-5,
  )


def test_every_device_reads_its_own_slice_and_nothing_twice(tmp_path, monkeypatch):
  models.save(random_policy(vocab_size=62), tmp_path)
  read = collections.defaultdict(list)
  original = hf._slice

  def slice_(file, name, index):
    array = original(file, name, index)
    read[name].append(array.size)
    return array

  monkeypatch.setattr(hf, "_slice", slice_)
  models.load(tmp_path, mesh=sharding.make_mesh(1, 4, 2))
  weights = load_file(tmp_path / "model.safetensors")
  assert read.keys() == weights.keys()
  for name, sizes in read.items():
    assert sum(sizes) == weights[name].size, name
    # Matrices over all 8 devices, biases over the 2 of the tensor axis.
    parts = 1 if "norm" in name else 2 if name.endswith("bias") else 8
    assert len(sizes) == parts, name


@pytest.mark.parametrize("remat", ["none", "everything"])
def test_program_does_not_grow_with_depth(remat):
  tokens = random_tokens(15, 2, 5)

  def size(num_layers):
    policy = random_policy(num_layers=num_layers)
    program = jax.grad(lambda policy: sum_of_logprobs(policy, tokens, remat))
    # Printed, an equation is a line with " = ", those of inner programs included.
    return str(jax.make_jaxpr(program)(policy)).count(" = ")

  assert size(2) == size(6) > 100


# --- models as a run builds them ----------------------------------------------------


def built(**changes):
  config = Config(**changes)
  mesh, shape = build.make_mesh(config), build.model_config(config)
  return abstract_run(config, mesh, shape, eos_ids=(1,))


def test_activations_are_bfloat16_on_accelerators_alone(monkeypatch):
  assert built().policy.dtype == jnp.float32
  monkeypatch.setattr(sharding, "on_accelerator", lambda mesh: True)
  parts = built()
  assert parts.policy.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(parts.policy)} == {
    jnp.dtype("float32")
  }
  assert built(model=Model(dtype="float32")).policy.dtype == jnp.float32


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_parameters_and_optimiser_each_have_their_dtype(param_dtype, moment_dtype):
  parts = built(
    model=Model(param_dtype=param_dtype), optimizer=Optimizer(moment_dtype=moment_dtype)
  )
  found = {
    name: {
      str(leaf.dtype)
      for path, leaf in jax.tree_util.tree_flatten_with_path(parts.state)[0]
      if name in jax.tree_util.keystr(path) and leaf.ndim
    }
    for name in (".policy", ".mu", ".nu")
  }
  assert found == {".policy": {param_dtype}, ".mu": {moment_dtype}, ".nu": {"float32"}}


def test_step_of_bfloat16_parameters_is_computed_in_float32():
  """One step of AdamW by hand: g / (|g| + epsilon), whatever the dtypes."""
  optimizer = build.adamw(
    Config(optimizer=Optimizer(max_grad_norm=1e9, epsilon=1e-3)), lambda step: 1.0
  )
  policy = {"w": jnp.array([1.0, -2.0], jnp.bfloat16)}
  gradient = {"w": jnp.array([2e-3, -5e-4], jnp.bfloat16)}
  step, _ = optimizer.update(gradient, optimizer.init(policy), policy)
  g = np.asarray(gradient["w"], np.float32)
  assert step["w"].dtype == jnp.float32
  np.testing.assert_allclose(step["w"], -g / (np.abs(g) + 1e-3), rtol=1e-5)


def test_fresh_reads_only_config_json(tmp_path):
  (tmp_path / "config.json").write_text(
    json.dumps(golden_config("qwen3_tied") | dict(hidden_size=24))
  )
  changes = dict(
    model=Model(path=str(tmp_path), fresh=True), seed=3, mesh=Mesh(data=8, fsdp=1)
  )
  policy = build.init_policy(Config(**changes), built(**changes).policy)
  expected = Policy(read_config(tmp_path), jax.random.key(3), eos_ids=(1,))
  actual, expected = parameters(policy), parameters(expected)
  assert actual.keys() == expected.keys()
  for name, leaf in actual.items():
    assert_close(leaf, expected[name], atol=1e-6)


def test_model_card_names_a_hub_id_and_no_directory():
  known = dict(name="r", settings={"loss": "x"}, rows=[], run={"commit": "abc"})
  card = model_card(base="Qwen/Qwen3-8B", **known)
  assert "\nbase_model: Qwen/Qwen3-8B\n" in card and "from Qwen/Qwen3-8B." in card
  assert "| loss | `x` |" in card and "| commit | `abc` |" in card
  for base in ("", None):
    assert "base_model" not in model_card(base=base, **known)


TWO_PROCESSES = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
from opo_jax import models
from opo_jax.devices import sharding
from opo_jax.models import hf
count, original = [0], hf._slice
def slice_(file, name, index):
  array = original(file, name, index)
  count[0] += array.size if ".mlp." in name else 0
  return array
hf._slice = slice_
policy = models.load(directory, mesh=sharding.make_mesh(1, 8, 1))
print("read", count[0])
models.save(policy, directory + "/again", max_file_bytes=9_000)
"""


@pytest.mark.slow
def test_two_processes_read_half_each_and_write_one_model(tmp_path):
  policy = random_policy(width=24, vocab_size=64)
  models.save(policy, tmp_path)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", TWO_PROCESSES, str(rank), port, str(tmp_path)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  outputs = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  half = sum(leaf.size for leaf in jax.tree.leaves(policy.layers.mlp)) // 2
  for out, _ in outputs:
    assert f"read {half}\n" in out
  again = models.load(tmp_path / "again")
  assert_same_parameters(jax.tree.leaves(again), jax.tree.leaves(policy))
