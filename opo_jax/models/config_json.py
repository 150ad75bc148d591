"""Converts config.json <-> ModelConfig, for every family, in older and newer forms.

A field that the tables below do not list is refused by name: it may change the output.
"""

import dataclasses
import json
import pathlib
from typing import Any

from opo_jax.models.config import ModelConfig
from opo_jax.models.rope import SCALINGS

# model_type -> the prefix of its classes, and the fields of its config.json that change
# the output, with their defaults; `...` has none.
_COMMON = dict(
  vocab_size=...,
  hidden_size=...,
  intermediate_size=...,
  num_hidden_layers=...,
  num_attention_heads=...,
  rms_norm_eps=1e-6,
  rope_theta=None,
  rope_scaling=None,
  rope_parameters=None,
  layer_types=None,
  tie_word_embeddings=False,
  initializer_range=0.02,
)
_SLIDING = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28)
_FAMILIES = {
  "llama": (
    "Llama",
    _COMMON
    | dict(attention_bias=False, mlp_bias=False)
    | dict(num_key_value_heads=None, head_dim=None, max_position_embeddings=2048),
  ),
  "qwen2": (
    "Qwen2",
    _COMMON
    | _SLIDING
    | dict(num_key_value_heads=..., head_dim=None, max_position_embeddings=32_768),
  ),
  "qwen3": (
    "Qwen3",
    _COMMON
    | _SLIDING
    | dict(num_key_value_heads=..., head_dim=128, max_position_embeddings=32_768)
    | dict(attention_bias=False),
  ),
}
# Fields that change the output, with the only supported value.
_FIXED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "is_causal": True}
# Fields that do not change the output, or that are read elsewhere (end tokens).
_SILENT = """
  model_type architectures transformers_version torch_dtype dtype _name_or_path
  name_or_path model_name use_cache bos_token_id eos_token_id pad_token_id
  pretraining_tp return_dict use_return_dict output_hidden_states output_attentions
  id2label label2id problem_type chunk_size_feed_forward _attn_implementation
  attn_implementation _attn_implementation_autoset keys_to_ignore_at_inference
  tokenizer_class task_specific_params finetuning_task torchscript unsloth_fixed
  unsloth_version
"""


def read_config(path: str | pathlib.Path, *, head: str = "CausalLM") -> ModelConfig:
  """Reads a ModelConfig from config.json.

  Args:
    path: a directory, or a hub id.
    head: the required architecture, `CausalLM` or `SequenceClassification`.

  Raises:
    ValueError: an architecture or a field that is not supported, by name.
  """
  text = (find_directory(path) / "config.json").read_text()
  return config_from(json.loads(text), head=head)


def config_from(values: dict[str, Any], *, head: str = "CausalLM") -> ModelConfig:
  """Converts the values of config.json to a ModelConfig.

  Args:
    values: of config.json.
    head: as in `read_config`. A sequence classifier must have one label: a score.

  Raises:
    ValueError: an architecture or a field that is not supported, by name.
  """
  family = values.get("model_type")
  if family not in _FAMILIES:
    raise ValueError(
      f"config.json has model_type = {family!r}; supported are {sorted(_FAMILIES)}:"
      " dense text decoders (no mixture of experts, no multimodal model)."
    )
  name, defaults = _FAMILIES[family]
  architecture = f"{name}For{head}"
  architectures = values.get("architectures") or [architecture]
  if architectures != [architecture]:
    raise ValueError(
      f"config.json has architectures = {architectures!r}; of {family} only"
      f" {architecture} is supported here."
    )
  classifies = head == "SequenceClassification"
  if classifies:
    _check_one_label(values)
  for field, understood in _FIXED.items():
    if values.get(field, understood) != understood:
      raise ValueError(
        f"config.json has {field} = {values[field]!r}; only {understood!r} is"
        " supported."
      )
  silent = set(_SILENT.split()) | ({"num_labels"} if classifies else set())
  for field in values.keys() - defaults.keys() - _FIXED.keys() - silent:
    # None, False and 0 disable a feature that we lack anyway.
    if values[field]:
      raise ValueError(
        f"config.json has {field} = {values[field]!r}, which is not supported for"
        f" {family}. If it does not change the output, remove it from config.json."
      )
  missing = [
    field
    for field, default in defaults.items()
    if default is ... and field not in values
  ]
  if missing:
    raise ValueError(f"config.json lacks {missing}; give a Hugging Face config.")
  get = (defaults | values).get
  heads, qwen2 = get("num_attention_heads"), family == "qwen2"
  theta, scaling = _read_rope(get)
  window, layers = _read_windows(get)
  return ModelConfig(
    vocab_size=get("vocab_size"),
    width=get("hidden_size"),
    mlp_width=get("intermediate_size"),
    num_layers=get("num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=get("num_key_value_heads") or heads,
    head_dim=get("head_dim") or get("hidden_size") // heads,
    rope_theta=theta,
    rope_scaling=scaling,
    max_positions=get("max_position_embeddings"),
    norm_epsilon=get("rms_norm_eps"),
    qkv_bias=qwen2 or get("attention_bias"),
    out_bias=not qwen2 and get("attention_bias"),
    mlp_bias=get("mlp_bias", False),
    qk_norm=family == "qwen3",
    tie_embeddings=get("tie_word_embeddings"),
    sliding_window=window,
    sliding_layers=layers,
    initializer_range=get("initializer_range"),
  )


def _check_one_label(values):
  """Refuses a classifier with several labels: a reward model has one, the score."""
  # Without a table of labels there are two, as in transformers.
  num_labels = values.get("num_labels") or len(values.get("id2label") or (0, 1))
  if num_labels != 1:
    raise ValueError(
      f"config.json has num_labels = {num_labels!r} (by num_labels, or the length of"
      " id2label; 2 if both are missing); a reward model has 1."
    )


def _read_rope(get):
  """Theta and scaling, from the older form, the newer form, or both if they agree."""
  forms = []
  for field in ("rope_scaling", "rope_parameters"):
    form = {k: v for k, v in (get(field) or {}).items() if v is not None}
    if form:
      kind = form.pop("type", "default")
      kind = form.pop("rope_type", kind)
      theta = form.pop("rope_theta", get("rope_theta") or 10_000.0)
      forms.append((field, kind, theta, form))
  if len(forms) == 2 and forms[0][1:] != forms[1][1:]:
    raise ValueError(
      f"config.json has rope_scaling = {get('rope_scaling')!r} and rope_parameters ="
      f" {get('rope_parameters')!r}, which differ; keep the right one."
    )
  if not forms:
    return get("rope_theta") or 10_000.0, None
  field, kind, theta, values = forms[0]
  refusal = f"config.json has {field} = {get(field)!r};"
  if get("rope_theta") not in (None, theta):
    raise ValueError(f"{refusal} beside rope_theta = {get('rope_theta')!r}; keep one.")
  if values.pop("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError(f"{refusal} partial_rotary_factor other than 1 is not supported.")
  if kind != "default" and kind not in SCALINGS:
    raise ValueError(
      f"{refusal} rope_type {kind!r} is not supported, only 'default',"
      f" {', '.join(map(repr, SCALINGS))}."
    )
  fields = dataclasses.fields(SCALINGS[kind]) if kind != "default" else ()
  names = {each.name for each in fields}
  if "original_max_position_embeddings" in names:
    values.setdefault(
      "original_max_position_embeddings", get("max_position_embeddings")
    )
  needed = {each.name for each in fields if each.default is dataclasses.MISSING}
  unknown, missing = values.keys() - names, needed - values.keys()
  if unknown or missing:
    raise ValueError(
      f"{refusal} rope_type {kind!r} lacks {sorted(missing)} and does not know"
      f" {sorted(unknown)}."
    )
  return theta, SCALINGS[kind](**values) if fields else None


def _read_windows(get):
  """The sliding window and its layers; None and () if it is disabled."""
  num_layers, kinds = get("num_hidden_layers"), get("layer_types")
  window = get("sliding_window") if get("use_sliding_window") else None
  if kinds is None:
    first = get("max_window_layers") if window else num_layers
    layers = tuple(range(min(first, num_layers), num_layers))
    return (window, layers) if layers else (None, ())
  layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
  known = {"full_attention", "sliding_attention"}
  if len(kinds) != num_layers or set(kinds) - known or (layers and not window):
    raise ValueError(
      f"config.json has layer_types = {kinds!r}; supported is one of {sorted(known)}"
      f" for each of {num_layers} layers, and sliding_attention only with"
      " use_sliding_window and a sliding_window."
    )
  return (window, layers) if layers else (None, ())


def config_to(config: ModelConfig, *, head: str = "CausalLM") -> dict[str, Any]:
  """Converts a ModelConfig to the values of config.json: inverts `config_from`.

  Raises:
    ValueError: a combination that no family supports.
  """
  family = _family(config)
  # Older readers take rope_theta and rope_scaling, newer ones rope_parameters.
  rope, scaling = {"rope_type": "default"}, config.rope_scaling
  if scaling is not None:
    (kind,) = (name for name, cls in SCALINGS.items() if isinstance(scaling, cls))
    rope = {"rope_type": kind} | {
      name: value
      for name, value in dataclasses.asdict(scaling).items()
      if value is not None
    }
  values = {
    "architectures": [f"{_FAMILIES[family][0]}For{head}"],
    "model_type": family,
    "hidden_act": "silu",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_positions,
    "rope_theta": config.rope_theta,
    "rope_scaling": None if scaling is None else rope,
    "rope_parameters": rope | {"rope_theta": config.rope_theta},
    "rms_norm_eps": config.norm_epsilon,
    "tie_word_embeddings": config.tie_embeddings,
    "initializer_range": config.initializer_range,
  }
  if head == "SequenceClassification":
    values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
  if family != "qwen2":
    values["attention_bias"] = config.qkv_bias
  if family == "llama":
    return values | {"mlp_bias": config.mlp_bias}
  values["use_sliding_window"] = bool(config.sliding_window)
  if config.sliding_window:
    values["sliding_window"] = config.sliding_window
    values["max_window_layers"] = config.sliding_layers[0]
    values["layer_types"] = [
      "sliding_attention" if i in config.sliding_layers else "full_attention"
      for i in range(config.num_layers)
    ]
  return values


def _family(config: ModelConfig) -> str:
  """The family whose config.json can express all of it."""
  same_bias = config.qkv_bias == config.out_bias
  if config.qk_norm:
    family, possible = "qwen3", same_bias and not config.mlp_bias
  elif config.qkv_bias and not config.out_bias:
    family, possible = "qwen2", not config.mlp_bias
  else:
    possible = same_bias and not config.sliding_window
    family, possible = "llama", possible and not config.width % config.num_heads
  if not possible:
    raise ValueError(
      f"No family of the Hugging Face format has this combination of biases, q/k norm,"
      f" sliding window and head width ({family} is the nearest): {config}"
    )
  return family


def end_tokens(path: str | pathlib.Path) -> tuple[int, ...]:
  """The end tokens of config.json and generation_config.json together."""
  config = json.loads((find_directory(path) / "config.json").read_text())
  ids = set()
  for values in (config, generation_config(path)):
    listed = values.get("eos_token_id")
    ids.update(listed if isinstance(listed, list) else [listed])
  return tuple(sorted(ids - {None}))


def generation_config(path: str | pathlib.Path) -> dict[str, Any]:
  """The values of generation_config.json; {} without that file."""
  file = find_directory(path) / "generation_config.json"
  return json.loads(file.read_text()) if file.exists() else {}


def find_directory(path: str | pathlib.Path, *, weights: bool = False) -> pathlib.Path:
  """Finds the directory of a model, downloading a hub id.

  Args:
    path: a directory, or a hub id.
    weights: download the weights as well as the JSON files.

  Raises:
    ValueError: neither exists.
  """
  directory = pathlib.Path(path)
  if (directory / "config.json").is_file():
    return directory
  if directory.exists():
    raise ValueError(f"{directory} has no config.json; give a Hugging Face directory.")
  import huggingface_hub

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        str(path),
        allow_patterns=["*.json", "*.safetensors"] if weights else ["*.json"],
        ignore_patterns=["*/*"],  # the same weights in other formats
      )
    )
  except Exception as error:
    raise ValueError(
      f"No policy at {str(path)!r}: no such directory, and the hub did not provide it"
      f" ({type(error).__name__}); give a directory, or a hub id and a network"
      " (--model.path)."
    ) from error
