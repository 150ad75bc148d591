"""Reward models: the score of `transformers`, trained on pairs, used as the reward."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from experiments.alignment_quickstart import get_config
from opo_jax import __main__ as command_line
from opo_jax import build, loop, metrics, models, reward_training, sft
from opo_jax.config import Checkpoint, Config, Eval, Record, Reward, Rollout
from opo_jax.data import arithmetic, preferences
from opo_jax.data.preferences import Pair, true_score
from opo_jax.devices import distributed, sharding
from opo_jax.evaluation import Response
from opo_jax.evaluation import graded as judging
from opo_jax.learner import TrainState
from opo_jax.models import ModelConfig, Policy
from opo_jax.rewards import reward_model
from opo_jax.rewards.reward_model import RewardModel, bradley_terry
from opo_jax.rollouts import prompt_columns
from opo_jax.run import Run
from opo_jax.scorer import on_host
from opo_jax.storage.checkpoint import fingerprint
from opo_jax.storage.json_files import JsonLines

GOLDEN = sorted((pathlib.Path(__file__).parent / "golden/reward_models").glob("*.npz"))
each_family = pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)


@functools.cache
def golden(file):
  """What transformers computed; tests/golden/make_golden.py says with what."""
  with np.load(file) as arrays:
    return dict(arrays)


def write_model(file, directory, config=(), weights=()):
  """The golden model in Hugging Face format, with changes."""
  directory.mkdir(exist_ok=True)
  arrays = golden(file)
  values = json.loads(arrays["config"].item()) | dict(config)
  (directory / "config.json").write_text(json.dumps(values))
  tensors = {
    name.removeprefix("weights/"): array.astype(np.float32) / 32
    for name, array in arrays.items()
    if name.startswith("weights/")
  }
  save_file(tensors | dict(weights), directory / "model.safetensors")
  return directory


@jax.jit
def scores_of(model, tokens, lengths):
  columns = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  real = (columns < lengths[:, None]).astype(jnp.int32)
  return model.scores(tokens, columns, real, lengths - 1)


# --- the model ----------------------------------------------------------------------


@each_family
def test_scores_and_gradients_equal_those_of_transformers(file, tmp_path):
  arrays = golden(file)
  model = reward_model.load(write_model(file, tmp_path / "model"))

  @functools.partial(jax.grad, has_aux=True)
  def gradient(model):
    scores = scores_of(model, arrays["tokens"], arrays["lengths"])
    return scores @ jnp.array([1.0, -2.0, 0.5]), scores

  gradients, scores = jax.jit(gradient)(model)
  assert scores.dtype == jnp.float32
  # 2e-6 measured; a score read one token off is wrong by 0.1 and more.
  np.testing.assert_allclose(scores, arrays["scores"], atol=5e-5)
  models.save(gradients, tmp_path / "gradients")
  ours = load_file(tmp_path / "gradients" / "model.safetensors")
  theirs = {n[10:]: a for n, a in arrays.items() if n.startswith("gradients/")}
  assert ours.keys() == theirs.keys() and "score.weight" in ours
  for name, expected in theirs.items():
    error = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected)
    assert error < 1e-4, name


@each_family
def test_rows_padded_on_the_left_score_the_same(file, tmp_path):
  arrays = golden(file)
  model = reward_model.load(write_model(file, tmp_path))
  tokens, lengths = arrays["tokens"], arrays["lengths"]
  T = tokens.shape[1]
  shifted = [np.roll(row, T - n) for row, n in zip(tokens, lengths, strict=True)]
  positions, real = prompt_columns(lengths, T)
  scores = jax.jit(RewardModel.scores)(
    model, np.stack(shifted), positions, real, np.full(3, T - 1)
  )
  np.testing.assert_allclose(scores, arrays["left_padded_scores"], atol=5e-5)


def test_an_end_token_that_is_the_padding_is_scored_here_and_skipped_there(tmp_path):
  """transformers looks for the last token that is not the padding, by its id."""
  arrays, lengths = golden(GOLDEN[1]), golden(GOLDEN[1])["lengths"]
  model = reward_model.load(write_model(GOLDEN[1], tmp_path))
  tokens, theirs = arrays["end_is_pad_tokens"], arrays["end_is_pad_scores"]
  earlier = scores_of(model, tokens, np.maximum(lengths - [1, 1, 0], 1))
  np.testing.assert_allclose(earlier, theirs, atol=5e-5)
  ours = scores_of(model, tokens, lengths)
  assert (abs(ours - theirs)[:2] > 0.1).all()


@functools.partial(jax.jit, static_argnames="mesh")
def make_policy(mesh=None):
  config = ModelConfig(24, 32, 48, 2, 4, 2, 8, initializer_range=0.3)
  return Policy(config, jax.random.key(0), eos_ids=(2,), mesh=mesh)


@functools.partial(jax.jit, static_argnames="mesh")
def make_model(mesh=None):
  return reward_model.from_policy(make_policy(mesh), jax.random.key(1))


def make_rollouts(num=10, max_new_tokens=9):
  """Rows of uneven lengths; some answers end with the token that fills up rows, 0."""
  random = np.random.RandomState(0)
  prompts = [random.randint(3, 24, 1 + i % 5).tolist() for i in range(num)]
  answers = [[*random.randint(3, 24, i % 8).tolist(), 0] for i in range(num)]
  return sft.as_rollouts(
    prompts, answers, [True] * num, max_new_tokens=max_new_tokens
  ), [p + a for p, a in zip(prompts, answers, strict=True)]


def test_a_rollout_scores_what_its_prompt_and_answer_score_alone():
  rollouts, sequences = make_rollouts(num=4)
  model = make_model()

  def score(row):
    return float(scores_of(model, np.array([row]), np.array([len(row)]))[0])

  scores = reward_model.score(model, rollouts)
  # Float32 in other shapes.
  np.testing.assert_allclose(scores, [score(row) for row in sequences], atol=1e-5)
  # Not what the answer scores without its last token, whose id is that of padding.
  assert abs(scores[3] - score(sequences[3][:-1])) > 1e-2


def test_scores_do_not_depend_on_parts_devices_or_what_follows_the_end():
  rollouts, _ = make_rollouts()
  expected = reward_model.score(make_model(), rollouts)
  after = jnp.where(rollouts.mask, rollouts.tokens, 17)
  changed = dataclasses.replace(rollouts, tokens=after)
  for parts in (1, 3):
    scores = reward_model.score(make_model(), changed, parts=parts)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
  mesh = sharding.make_mesh(2, 2, 2)
  model = make_model(mesh)
  model = jax.device_put(model, sharding.tree_shardings(model, mesh))
  scores = reward_model.score(model, rollouts, parts=3)  # 10 rows in 12 places
  np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_a_reward_model_begins_as_the_policy_with_a_fresh_score():
  policy, model = make_policy(), make_model()
  tokens = np.arange(12).reshape(2, 6)
  positions = np.broadcast_to(np.arange(6), (2, 6))
  hidden = jax.jit(lambda policy: policy.hidden(tokens, positions)[0])
  expected = hidden(policy)
  np.testing.assert_array_equal(hidden(model), expected)
  last = jax.jit(RewardModel.scores)(
    model, tokens, positions, np.ones((2, 6), int), np.array([5, 2])
  )
  kernel = np.asarray(model.score.kernel[...])[:, 0]
  by_hand = np.stack([expected[0, 5] @ kernel, expected[1, 2] @ kernel])
  np.testing.assert_allclose(last, by_hand, rtol=1e-4)
  assert kernel.std() > 0 and model.untied is None


def test_exported_reward_model_is_read_back_bit_for_bit(tmp_path):
  model = make_model()
  models.save(model, tmp_path, tokenizer=preferences.tokenizer())
  again = reward_model.load(tmp_path)
  for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  values = json.loads((tmp_path / "config.json").read_text())
  assert values["architectures"] == ["Qwen2ForSequenceClassification"]
  assert values["id2label"] == {"0": "LABEL_0"} and values["pad_token_id"] == 0
  assert not (tmp_path / "generation_config.json").exists()
  assert load_file(tmp_path / "model.safetensors")["score.weight"].shape == (1, 32)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"id2label": {"0": "bad", "1": "good"}}, "num_labels = 2"),
    ({"id2label": None}, "num_labels = 2"),
    ({"num_labels": 3}, "num_labels = 3"),
    ({"architectures": ["Qwen2ForCausalLM"]}, "only Qwen2ForSequenceClassification"),
    ({"logit_scale": 0.5}, "logit_scale = 0.5"),
  ],
)
def test_what_is_no_reward_model_is_refused_by_name(changes, message, tmp_path):
  qwen2 = next(file for file in GOLDEN if file.stem == "qwen2")
  with pytest.raises(ValueError, match=message):
    reward_model.load(write_model(qwen2, tmp_path, config=changes))


def test_weights_that_do_not_belong_are_refused_by_name(tmp_path):
  head = {"lm_head.weight": np.zeros((67, 24), np.float32)}
  qwen2 = next(file for file in GOLDEN if file.stem == "qwen2")
  with pytest.raises(ValueError, match=r"unknown \['lm_head.weight'\]"):
    reward_model.load(write_model(qwen2, tmp_path, weights=head))
  classifier = {"architectures": ["Qwen2ForSequenceClassification"]}
  with pytest.raises(ValueError, match="only Qwen2ForCausalLM"):
    models.load(write_model(qwen2, tmp_path, config=classifier))


# --- Bradley-Terry ------------------------------------------------------------------


def test_the_loss_is_the_likelihood_of_the_preferences():
  random = np.random.RandomState(0)
  chosen, rejected, margin = random.normal(size=(3, 7))
  probability = 1 / (1 + np.exp(-(chosen - rejected - margin)))
  expected = -np.log(probability).mean() + 0.3 * ((chosen + rejected) ** 2).mean()
  loss, aux = jax.jit(functools.partial(bradley_terry, center=0.3))(
    chosen, rejected, margin=margin
  )
  assert float(loss) == pytest.approx(expected, rel=1e-6)
  assert float(aux["margin"]) == pytest.approx((chosen - rejected).mean(), rel=1e-5)
  assert float(aux["accuracy"]) == pytest.approx((chosen > rejected).mean())


def test_the_gradient_is_the_probability_of_the_error_and_stays_finite():
  chosen = jnp.array([0.0, 1.0, -1e4, 1e4], jnp.bfloat16)

  def loss(chosen, rejected):
    return bradley_terry(chosen, rejected)[0]

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(chosen, jnp.zeros(4, jnp.bfloat16))
  expected = -np.array([0.5, 1 / (1 + np.e), 1.0, 0.0]) / 4
  np.testing.assert_allclose(gradient[0].astype(float), expected, rtol=1e-2)
  np.testing.assert_allclose(gradient[1].astype(float), -expected, rtol=1e-2)


@pytest.mark.parametrize("shapes", [(2, 3), ((2, 1), (2, 1)), (0, 0)])
def test_scores_that_are_no_pairs_are_refused(shapes):
  with pytest.raises(ValueError, match="two arrays"):
    bradley_terry(*map(jnp.zeros, shapes))


@functools.cache
def expected_step(sequences):
  """A step of SGD of rate 0.1, with margin 0.5, from sequences padded on the right."""
  lengths = np.array([len(sequence) for sequence in sequences])
  tokens = np.stack([np.pad(s, (0, max(lengths) - len(s))) for s in sequences])

  def loss(model):
    scores = scores_of(model, tokens, lengths)
    ahead = scores[0::2] - scores[1::2] - 0.5  # chosen, rejected, chosen, rejected, …
    return -jax.nn.log_sigmoid(ahead).mean()

  @jax.jit
  def step(model):
    return jax.tree.map(lambda p, g: p - 0.1 * g, model, jax.grad(loss)(model))

  return step(make_model())


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_an_update_goes_down_the_gradient_of_the_pairs(shape):
  pairs, sequences = make_rollouts(num=8)
  optimizer = optax.sgd(0.1)
  mesh = None if shape is None else sharding.make_mesh(*shape)
  model = make_model(mesh)
  state = TrainState(model, optimizer.init(model), jnp.int32(0))
  if mesh is not None:
    state = jax.device_put(state, sharding.tree_shardings(state, mesh))

  update = reward_model.PairUpdate(optimizer, margin=0.5)
  state, metrics_ = update(state, pairs)
  assert int(state.step) == 1 and metrics_["grad_norm"] > 0
  expected = expected_step(tuple(map(tuple, sequences)))
  for ours, theirs in zip(
    jax.tree.leaves(state.policy), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


# --- the embedded task --------------------------------------------------------------


@pytest.mark.parametrize(
  ("response", "score"),
  [
    ("tea jam rice enjoy", 1.0),
    ("tea jam rice", 0.8),
    ("enjoy", 0.2),
    ("", 0.0),
    ("tea rice enjoy", 0.8 * 2 / 3 + 0.2),
    ("rice jam tea enjoy", 0.8 / 3 + 0.2 - 0.2),  # one in order, two too many
    ("tea er jam rice enjoy", 0.9),
    ("tea jam rice enjoy enjoy", 0.9),
    ("enjoy tea jam rice", 0.7),
    ("tea jam rice tea jam rice", 0.8 - 0.3),
  ],
)
def test_the_true_score_by_hand(response, score):
  assert true_score(response, "tea jam rice enjoy") == pytest.approx(score)


def test_no_other_answer_is_as_good_as_the_best():
  """All answers of up to four of five words, to an order of two."""
  words = ["tea", "jam", "rice", "er", "enjoy"]
  answers = [[]]
  for _ in range(4):
    answers += [[*a, w] for a in answers for w in words if len(a) < 4]
  best = {
    " ".join(a) for a in answers if true_score(" ".join(a), "tea jam enjoy") >= 1 - 1e-9
  }
  assert best == {"tea jam enjoy"}


def test_held_out_orders_and_pairs_do_not_occur_in_training():
  asked = {}
  for split in ("train", "test"):
    pairs = preferences.load_pairs("preferences", split)
    asked[split] = {pair.chosen.problem.question for pair in pairs}
    assert asked[split] <= {p.question for p in preferences.load(split)}
    assert all(one.problem == other.problem for one, other in pairs)
    assert all(one != other for one, other in pairs)
  assert not asked["train"] & asked["test"]
  assert len({p.question for p in preferences.load("train")}) == 1024


def test_labels_err_as_often_as_bradley_and_terry_say():
  pairs = preferences.load_pairs("preferences", "train")
  better = np.array([abs(preferences.true_margin(pair)) for pair in pairs])
  right = np.array([preferences.true_margin(pair) > 0 for pair in pairs])
  for low, high in ((0.01, 0.15), (0.15, 0.3), (0.3, 0.6)):
    chosen = (better > low) & (better < high)
    expected = 1 / (1 + np.exp(-preferences.SHARPNESS * better[chosen]))
    # Three standard errors; labels without error, or with twice as many, are outside.
    error = 3 * np.sqrt((expected * (1 - expected)).sum()) / chosen.sum()
    assert abs(right[chosen].mean() - expected.mean()) < error


def test_an_answer_is_as_long_as_it_may_be_only_if_it_never_stops():
  answers = preferences.demonstrations(preferences.load("train"), seed=3)
  for answer in answers:
    num_words = len(answer.response.split())
    assert 0 < num_words <= preferences.MAX_WORDS
    assert answer.ends == (num_words < preferences.MAX_WORDS)
  best = [true_score(a.response, a.problem.answer) > 1 - 1e-9 for a in answers]
  assert 0.1 < np.mean(best) < 0.3  # there is something to learn, and to build on


def jsonl(tmp_path, rows):
  path = tmp_path / "pairs.jsonl"
  texts = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
  path.write_text("\n".join(texts), "utf-8")
  return f"jsonl:{path}"


def test_a_file_of_pairs_is_split_by_prompt(tmp_path):
  rows = [
    {"prompt": f"{i // 2}\u2028?", "chosen": f"yes {i}", "rejected": "no"}
    for i in range(400)
  ]
  name = jsonl(tmp_path, rows)
  pairs = {split: preferences.load_pairs(name, split) for split in ("train", "test")}
  assert len(pairs["train"]) + len(pairs["test"]) == 400
  assert 10 <= len(pairs["test"]) <= 40
  prompts = {
    split: {pair.chosen.problem.question for pair in each}
    for split, each in pairs.items()
  }
  assert not prompts["train"] & prompts["test"]
  assert all(chosen.response != rejected.response == "no" and chosen.ends
             for each in pairs.values() for chosen, rejected in each)  # fmt: skip


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ('{"prompt": "a", "chosen": "b"', "line 2 is no pair"),
    ({"prompt": "a", "chosen": "b"}, "line 2 is no pair"),
    ({"prompt": "a", "chosen": [{"content": "b"}], "rejected": "c"}, "line 2 is no"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "line 2 has the same text"),
    ([1, 2], "line 2 is no pair"),
  ],
)
def test_a_line_that_is_no_pair_is_refused_with_its_number(tmp_path, bad, message):
  good = {"prompt": "a", "chosen": "b", "rejected": "c"}
  with pytest.raises(ValueError, match=message):
    preferences.load_pairs(jsonl(tmp_path, [good, bad]), "train")


@pytest.mark.parametrize("name", ["jsonl:nowhere.jsonl", "preference"])
def test_pairs_that_are_not_there_are_refused(name):
  with pytest.raises(ValueError, match=r"nowhere.jsonl cannot be read|there are `pref"):
    preferences.load_pairs(name, "train")


# --- judging ------------------------------------------------------------------------


def test_win_rates_are_those_of_all_pairs_of_answers():
  random = np.random.RandomState(1)
  ours, theirs = random.randint(0, 4, (5, 3)), random.randint(0, 4, (5, 2))
  ours, theirs = ours.astype(float), theirs.astype(float)
  ours[0, 1], theirs[1] = np.nan, np.nan
  rates = judging.win_rate(ours, theirs)
  for rate, mine, others in zip(rates, ours, theirs, strict=True):
    wins = [(a > b) + (a == b) / 2 for a in mine for b in others
            if not np.isnan(a + b)]  # fmt: skip
    assert rate == pytest.approx(np.mean(wins)) if wins else np.isnan(rate)
  np.testing.assert_allclose(judging.win_rate(theirs, theirs)[[0, 2, 3, 4]], 0.5)


def test_a_question_without_a_scorable_answer_is_left_out():
  def responses(rewards):
    return [
      Response(str(i // 2), i % 2, "tea", "tea enjoy", None, reward, 3 + i, i < 3)
      for i, reward in enumerate(rewards)
    ]

  ours = responses([1.0, 3.0, None, None, None, 4.0])
  row = judging.summary(ours, responses([0.0] * 6))
  assert row["reward_score"] == pytest.approx((2.0 + 4.0) / 2)
  assert row["reward_win_rate"] == 1.0
  assert row["unscorable_fraction"] == row["truncated_fraction"] == pytest.approx(0.5)
  assert row["response_length"] == 5.5
  assert row["reward_score_low"] <= row["reward_score"] <= row["reward_score_high"]
  alone = judging.summary(
    [
      dataclasses.replace(r, true_score=true_score(r.response, r.reference))
      for r in ours
    ]
  )
  assert alone["true_score"] == pytest.approx(0.8), "of all answers, scorable or not"
  assert not [name for name in alone if "win_rate" in name], "no opponent"


def test_scores_beyond_zero_and_one_are_not_counted_as_right_or_wrong():
  lengths, finished = np.array([3, 5, 7]), np.ones(3, bool)
  right_or_wrong = {"response_length/correct_mean", "response_length/wrong_mean"}
  for rewards, there in (([0.0, 1.0, np.nan], True), ([-0.1, 1.0, np.nan], False)):
    row = metrics.describe_responses(np.array(rewards), lengths, finished)
    assert (row.keys() & right_or_wrong == right_or_wrong) == there
    assert row["reward/mean"] == pytest.approx(np.nanmean(rewards))


# --- runs ---------------------------------------------------------------------------

SMALL = [
  "--steps=2",
  "--sft.steps=2",
  "--sft.batch-size=16",
  "--rollout.prompts-per-step=8",
  "--rollout.group-size=2",
  "--eval.problems=8",
  "--eval.samples=2",
  "--eval.every=2",
  "--checkpoint.every=2",
  "--record.kl-rollouts=8",
  "--reward-model.steps=4",
  "--reward-model.batch-size=16",
  "--reward-model.num-pairs=48",
  "--model.width=32",
  "--model.mlp-width=48",
  "--model.head-dim=8",
]


def small_config(**changes) -> Config:
  """What the flags SMALL make of alignment_quickstart."""
  base = get_config()
  small = dataclasses.replace(
    base,
    steps=2,
    model=dataclasses.replace(base.model, width=32, mlp_width=48, head_dim=8),
    sft=dataclasses.replace(base.sft, steps=2, batch_size=16),
    reward_model=dataclasses.replace(
      base.reward_model, steps=4, batch_size=16, num_pairs=48
    ),
    rollout=Rollout(prompts_per_step=8, group_size=2, max_new_tokens=17),
    eval=Eval(every=2, benchmarks=("preferences",), problems=8, samples=2),
    checkpoint=Checkpoint(every=2),
    record=Record(kl_rollouts=8),
  )
  return dataclasses.replace(small, **changes)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(rows):
  return [
    {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))}
    for row in rows
  ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run in which the reward model was trained first."""
  directory = tmp_path_factory.mktemp("runs") / "small"
  arguments = ["train", "alignment_quickstart", "--run", str(directory), *SMALL]
  assert command_line.main(arguments) == 0
  return directory


def test_one_command_trains_the_reward_model_and_the_policy(trained):
  rows = lines(trained / "reward_model" / "metrics.jsonl")
  assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
  assert rows[3].keys() >= {"loss", "accuracy", "margin", "grad_norm", "time/step_s"}
  assert [r["step"] for r in rows if "eval/pairs/accuracy_low" in r] == [0, 2, 4]
  assert 0 <= rows[0]["eval/pairs/true_accuracy"] <= 1
  rows = lines(trained / "metrics.jsonl")
  assert [row["step"] for row in rows] == [0, 1, 2]
  for row in rows[1:]:
    # Only a group of equal answers, of two short ones here, has equal scores.
    assert row["groups/zero_advantage_fraction"] < 1
    assert row["onpolicy/logprob_diff_max"] < 1e-4
    assert "policy/kl_to_start" in row and "response_length/correct_mean" not in row
  assert rows[0]["eval/preferences/true_win_rate"] == 0.5, "the start against itself"
  for row in (rows[0], rows[2]):
    for who in ("reward", "true"):
      for name in ("score", "win_rate"):
        key = f"eval/preferences/{who}_{name}"
        assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
  assert (trained / "report.html").exists()


def test_the_rewards_are_the_models_scores_of_what_was_sampled(trained):
  samples = lines(trained / "samples.jsonl")
  model = reward_model.load(reward_model.find(trained))
  tokenizer = preferences.tokenizer()
  rows, rewards = [], []
  for sample in samples:
    text = f"<bos><user>{sample['prompt']}<assistant>{sample['response']}"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens += [tokenizer.eos_token_id] * sample["finished"]
    if len(tokens) - len(sample["prompt"].split()) - 3 != sample["length"]:
      continue  # a special token in the middle, which a text does not show
    rows.append(tokens)
    rewards.append(sample["reward"])
  assert len(rows) > len(samples) / 2
  lengths = np.array([len(row) for row in rows])
  padded = np.zeros((len(rows), lengths.max()), int)
  for row, tokens in zip(padded, rows, strict=True):
    row[: len(tokens)] = tokens
  np.testing.assert_allclose(scores_of(model, padded, lengths), rewards, atol=1e-4)


@pytest.mark.parametrize("broken_after", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_broken_and_resumed_reward_model_equals_an_unbroken_one(
  trained, tmp_path, monkeypatch, broken_after
):
  write = JsonLines.write

  def break_down(self, row):
    write(self, row)
    if row["step"] == broken_after and "margin" in row:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(JsonLines, "write", break_down)
    with pytest.raises(KeyboardInterrupt):
      reward_training.train(small_config(), tmp_path / "run")
  assert not (tmp_path / "run" / "reward_model" / "model").exists()
  model = reward_training.train(small_config(), tmp_path / "run")
  resumed, unbroken = (
    timeless(lines(run / "reward_model" / "metrics.jsonl"))
    for run in (tmp_path / "run", trained)
  )
  assert resumed == unbroken
  name = "model.safetensors"
  assert (model / name).read_bytes() == (
    trained / "reward_model" / "model" / name
  ).read_bytes()


def test_the_same_command_goes_on_and_changes_nothing(trained, capsys):
  files = [p for p in trained.rglob("*") if p.is_file() and "tensorboard" not in str(p)]
  kept = {"metrics.jsonl", "model.safetensors", "samples.jsonl", "config.json"}
  before = {p: p.read_bytes() for p in files if p.name in kept}
  for command in ("reward-model", "train"):
    arguments = [command, "alignment_quickstart", "--run", str(trained), *SMALL]
    assert command_line.main(arguments) == 0
  assert {p: p.read_bytes() for p in before} == before
  assert "reward_model/model" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_can_take_the_reward_model_of_another(trained, tmp_path):
  config = small_config(
    reward=Reward(verifier="reward_model", truncated="scored", model=str(trained))
  )
  loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run" / "reward_model").exists()
  ours, theirs = (
    timeless(lines(run / "metrics.jsonl")) for run in (tmp_path / "run", trained)
  )
  assert ours == theirs


def using(path):
  return small_config(
    reward=Reward(verifier="reward_model", truncated="scored", model=str(path))
  )


def test_a_reward_model_of_another_vocabulary_is_refused(tmp_path):
  models.save(make_model(), tmp_path / "model", tokenizer=arithmetic.tokenizer())
  with pytest.raises(ValueError, match="does not share the policy's vocabulary"):
    loop.train(using(tmp_path / "model"), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_settings_of_a_reward_model_that_cannot_work_are_refused_at_once(tmp_path):
  with pytest.raises(ValueError, match=r"--reward.truncated scored"):
    small_config(reward=Reward(verifier="reward_model"))
  base = small_config()

  def pairs(**changes):
    return small_config(reward_model=dataclasses.replace(base.reward_model, **changes))

  unfinished = tmp_path / "unfinished"
  unfinished.mkdir()
  (unfinished / "run.json").write_text("{}")
  for config, message in (
    (using(tmp_path / "none"), "no such directory"),
    (using(unfinished), "run without a finished reward model"),
    (pairs(pairs="jsonl:none"), "cannot be read"),
    (pairs(batch_size=18), r"--reward-model.batch-size 24"),
  ):
    with pytest.raises(ValueError, match=message):
      loop.train(config, tmp_path / "run")
  with pytest.raises(ValueError, match="names a reward model already"):
    reward_training.train(using(tmp_path), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def sampled(run):
  """Problems, and the start policy's rollouts as a scorer reads them."""
  problems = preferences.load("train")[:8]
  rollouts = build.make_sampler(run.config).sample(
    run.directory.load_start(run.abstract_policy),
    run.encode(problems),
    build.rollout_params(run.config),
    seed=1,
  )
  return problems, on_host(rollouts, run.mesh)


def scored(run, problems, rollouts):
  with run.make_scorer() as scorer:
    scorer.begin(problems)
    return scorer.finish(rollouts).verified


def test_a_score_that_is_not_finite_is_unscorable_and_stops_the_run_above_a_share(
  trained, monkeypatch
):
  run = Run(small_config(), trained)
  problems, rollouts = sampled(run)
  exact, score = scored(run, problems, rollouts), reward_model.score
  assert np.isfinite(exact).all() and len(exact) == 16

  def broken(*arguments, **options):
    return score(*arguments, **options).at[:bad].set(values[:bad])

  values = jnp.array([jnp.nan, jnp.inf, -jnp.inf, jnp.nan])
  monkeypatch.setattr(reward_model, "score", broken)
  bad = 3
  rewards = scored(run, problems, rollouts)
  assert np.isnan(rewards[:3]).all()
  np.testing.assert_array_equal(rewards[3:], exact[3:])
  bad = 4
  with pytest.raises(RuntimeError, match=r"25%.*preferences/train/0: .* gave nan"):
    scored(run, problems, rollouts)


def test_a_cut_off_response_is_scored_as_it_is(trained):
  run = Run(small_config(), trained)
  problems, rollouts = sampled(run)
  cut = dataclasses.replace(rollouts, finished=np.zeros(16, bool))
  np.testing.assert_array_equal(
    scored(run, problems, cut), scored(run, problems, rollouts)
  )


def test_rewards_do_not_depend_on_the_parts_in_which_they_are_scored(
  trained, monkeypatch
):
  parts, score = [], reward_model.score

  def counted(*arguments, **options):
    parts.append(options["parts"])
    return score(*arguments, **options)

  monkeypatch.setattr(reward_model, "score", counted)
  base, rewards = small_config(), []
  for tokens in (0, 16_384, 64):
    algorithm = dataclasses.replace(base.algorithm, micro_batch_tokens=tokens)
    run = Run(small_config(algorithm=algorithm), trained)
    rewards.append(scored(run, *sampled(run)))
  assert parts == [1, 1, 2]  # 16 rows, and each of 8 devices has one at least
  np.testing.assert_allclose(rewards[1], rewards[0], atol=1e-5)
  np.testing.assert_allclose(rewards[2], rewards[0], atol=1e-5)


def test_a_finished_run_is_evaluated_by_scores_and_wins(trained, tmp_path, capsys):
  arguments = ["eval", str(trained), "--out", str(tmp_path), "--eval.chunk=3"]
  assert command_line.main(arguments) == 0
  results = json.loads((tmp_path / "results.json").read_text())
  policies = results["policies"]
  last = lines(trained / "metrics.jsonl")[-1]
  assert policies["start"]["eval/preferences/reward_win_rate"] == 0.5
  name = "eval/preferences/true_score"
  assert policies["step 2"][name] == pytest.approx(last[name], abs=1e-6)
  assert "true wins" in capsys.readouterr().out
  assert 0 < policies["step 2"]["eval/preferences/distinct_2"] <= 1
  # Which reward model it was, and the true score that it does not see, are kept.
  own = Run(small_config(), trained).make_scorer().model
  assert results["settings"]["reward"]["scored_by"] == fingerprint(own)
  for row in lines(tmp_path / "step_2" / "preferences.responses.jsonl"):
    assert row["true_score"] == true_score(row["response"], row["reference"])
  # A graded reward has no pass rate.
  assert not [*tmp_path.rglob("*.problems.jsonl")]


def test_several_processes_are_refused_in_one_line(tmp_path, monkeypatch):
  run = Run(small_config(), tmp_path / "run")
  monkeypatch.setattr(distributed, "is_single_process", lambda: False)
  with pytest.raises(ValueError, match="scores in one process"):
    run.make_scorer()


@pytest.mark.slow
def test_pairs_of_a_file_train_a_reward_model_without_a_truth(tmp_path):
  problems = [p.question for p in preferences.load("train")]
  problems += [p.question for p in preferences.load("test")]
  rows = [
    {"prompt": q, "chosen": f"{q} enjoy", "rejected": "er"}
    for q in problems[:60] + problems[-20:]
  ]
  base = small_config()
  settings = dataclasses.replace(
    base.reward_model, pairs=jsonl(tmp_path, rows), num_pairs=0
  )
  reward_training.train(small_config(reward_model=settings), tmp_path / "run")
  last = lines(tmp_path / "run" / "reward_model" / "metrics.jsonl")[-1]
  assert "eval/pairs/accuracy" in last and "eval/pairs/true_accuracy" not in last


def test_answers_become_rows_in_the_order_of_their_pairs(trained):
  pairs = preferences.load_pairs("preferences", "test")[:4]
  run = Run(small_config(), trained)
  rollouts = reward_training.as_rollouts(run, pairs)
  tokens, lengths = np.asarray(rollouts.tokens), np.asarray(rollouts.lengths)
  texts = [
    run.tokenizer.decode(row[:n], skip_special_tokens=True)
    for row, n in zip(tokens, lengths, strict=True)
  ]
  assert texts == [answer.response for pair in pairs for answer in pair]
  assert isinstance(pairs[0], Pair) and RewardModel.head == "SequenceClassification"
