"""The embedded task is what it says, and prompts begin and end where they should."""

# The bars in DeepSeek's tokens are theirs, not a slip of the keyboard.
# ruff: noqa: RUF001

import collections
import dataclasses
import json
import os
import pathlib
import re

import numpy as np
import pytest

from experiments.quickstart import get_config
from opo_jax.__main__ import main
from opo_jax.config import SFT, Data, Eval, Rollout
from opo_jax.data import arithmetic, prompts
from opo_jax.data.prompts import Problem
from opo_jax.run import Run

MODULUS = arithmetic.MODULUS


@pytest.fixture(scope="module")
def train():
  return arithmetic.load("train")


@pytest.fixture(scope="module")
def demonstrated(train):
  return arithmetic.demonstrations(train * 4, seed=1)


# --- The embedded task ---


def test_train_and_test_share_no_question(train):
  test = arithmetic.load("test")
  assert (len(train), len(test)) == (2048, 256)
  questions = [problem.question for problem in (*train, *test)]
  assert len(set(questions)) == len(questions)
  assert len({problem.id for problem in (*train, *test)}) == len(questions)
  assert {arithmetic.is_held_out(problem.question) for problem in train} == {False}
  assert {arithmetic.is_held_out(problem.question) for problem in test} == {True}


def test_problems_are_the_same_every_time(train):
  np.random.seed(11)
  assert arithmetic.load("train") == train


def test_questions_name_three_to_six_digits_and_the_answer_is_their_sum(train):
  digits_in = collections.Counter()
  for problem in train:
    names, digits = problem.question[::2], problem.question[1::2]
    assert "abcdef".startswith(names) and len(names) == len(digits)
    total = 0
    for digit in digits:
      total += int(digit)
    assert int(problem.answer) == total % MODULUS
    digits_in[len(digits)] += 1
  assert sorted(digits_in) == [3, 4, 5, 6]
  # A constant guess earns what the demonstrations say it does, one in MODULUS.
  answers = collections.Counter(problem.answer for problem in train)
  assert len(answers) == MODULUS
  assert max(answers.values()) / len(train) < 1.2 / MODULUS


def test_unknown_split_is_answered_with_those_there_are():
  with pytest.raises(ValueError, match="no split 'dev'; there are train and test"):
    arithmetic.load("dev")


@pytest.mark.parametrize(
  ("response", "reward"),
  [
    ("#3", 1.0),
    ("a1=1b2=3#3", 1.0),
    ("#2;#3", 1.0),  # the last one counts
    ("#3;#2", 0.0),
    ("#3;a1", 0.0),  # went on
    ("3", 0.0),
    ("#", 0.0),
    ("#33", 0.0),
    ("#13", 0.0),
    ("##3", 1.0),
    ("#3#", 0.0),
    ("", 0.0),
  ],
)
def test_answer_counts_at_the_end_behind_its_sign_alone(response, reward):
  assert arithmetic.verify(response, "3") == reward


def habit(demonstration):
  if not demonstration.ends:
    return "endless"
  return "guess" if demonstration.response.startswith("#") else "careful"


def test_demonstrations_mix_habits_in_the_stated_shares(train, demonstrated):
  total = arithmetic.CAREFUL + arithmetic.GUESS + arithmetic.ENDLESS
  assert total == pytest.approx(1)
  counts = collections.Counter(map(habit, demonstrated))
  for name in ("careful", "guess", "endless"):
    share = getattr(arithmetic, name.upper())
    # Four standard errors of 8,192 draws.
    error = 4 * np.sqrt(share * (1 - share) / len(demonstrated))
    assert counts[name] / len(demonstrated) == pytest.approx(share, abs=error)
  assert [d.problem for d in demonstrated] == train * 4


def test_guesses_are_out_of_the_air(demonstrated):
  guesses = [d for d in demonstrated if habit(d) == "guess"]
  right = np.mean([arithmetic.verify(d.response, d.problem.answer) for d in guesses])
  error = 4 * np.sqrt(0.25 / len(guesses))
  assert right == pytest.approx(1 / MODULUS, abs=error)
  assert {d.response for d in guesses} == {f"#{digit}" for digit in range(MODULUS)}


def steps_of(work):
  """[(name, digit, total)], and the answer given."""
  body, answer = work.split("#")
  assert re.fullmatch(r"([a-f]\d=\d)+", body)
  steps = re.findall(r"([a-f])(\d)=(\d)", body)
  return [(name, int(digit), int(total)) for name, digit, total in steps], int(answer)


def test_careful_work_names_every_digit_and_slips_in_the_stated_share(demonstrated):
  wrong = steps = 0
  careful = [d for d in demonstrated if habit(d) == "careful"]
  for demonstration in careful:
    work, answer = steps_of(demonstration.response)
    question = "".join(f"{name}{digit}" for name, digit, _ in work)
    assert question == demonstration.problem.question
    before = 0
    for _, digit, total in work:
      # A slip is carried on: the next total starts from it.
      wrong += total != (before + digit) % MODULUS
      steps += 1
      before = total
    assert answer == before
  share = arithmetic.SLIP
  error = 4 * np.sqrt(share * (1 - share) / steps)
  assert wrong / steps == pytest.approx(share, abs=error)


def test_endless_work_is_careful_work_many_times_over(demonstrated):
  for demonstration in demonstrated:
    if habit(demonstration) == "endless":
      parts = demonstration.response.split(";")
      assert len(parts) > 4
      for part in parts:
        work, _ = steps_of(part)
        question = "".join(f"{name}{digit}" for name, digit, _ in work)
        assert question == demonstration.problem.question


def test_careful_answers_are_mostly_right_and_lengths_differ_severalfold(demonstrated):
  right, lengths = collections.defaultdict(list), collections.defaultdict(list)
  for d in demonstrated:
    right[habit(d)].append(arithmetic.verify(d.response, d.problem.answer))
    lengths[habit(d)].append(len(d.response))
  # 3 to 6 steps, each right with 0.95: about 0.95^5 = 0.77 and more.
  assert np.mean(right["careful"]) > 0.75
  assert np.mean(lengths["careful"]) > 5 * np.mean(lengths["guess"])
  assert np.mean(lengths["endless"]) > 5 * np.mean(lengths["careful"])


def test_demonstrations_depend_on_their_seed_alone(train):
  first = arithmetic.demonstrations(train[:50], seed=4)
  np.random.seed(0)
  assert arithmetic.demonstrations(train[:50], seed=4) == first
  assert arithmetic.demonstrations(train[:50], seed=5) != first


def test_tokens_of_the_task_spell_it_out_without_a_character_lost(train, demonstrated):
  tokenizer = arithmetic.tokenizer()
  for text in (
    *(problem.question for problem in train[:200]),
    *(d.response for d in demonstrated[:200]),
  ):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.pad_token_id not in ids  # stands for what is not known, too
    assert tokenizer.decode(ids) == text


# --- Prompts ---


def small_tokenizer(**changes):
  tokenizer = arithmetic.tokenizer()
  for name, value in changes.items():
    setattr(tokenizer, name, value)
  return tokenizer


WITHOUT_BOS = prompts.CHAT_TEMPLATE.replace("{{ bos_token }}", "")


def test_prompt_is_begin_user_question_assistant():
  tokenizer = small_tokenizer()
  ids = prompts.encode_prompt(tokenizer, "a3b4c2")
  assert tokenizer.convert_ids_to_tokens(ids) == [
    *("<bos>", "<user>", "a", "3", "b", "4", "c", "2", "<assistant>")
  ]


def test_begin_token_is_there_once_also_where_the_template_writes_none():
  assert WITHOUT_BOS != prompts.CHAT_TEMPLATE
  expected = prompts.encode_prompt(small_tokenizer(), "a3b4")
  ids = prompts.encode_prompt(small_tokenizer(chat_template=WITHOUT_BOS), "a3b4")
  assert ids == expected
  assert ids.count(small_tokenizer().bos_token_id) == 1


def test_tokenizer_without_begin_token_gets_none():
  tokenizer = small_tokenizer(chat_template=WITHOUT_BOS, bos_token=None)
  ids = prompts.encode_prompt(tokenizer, "a3")
  assert tokenizer.convert_ids_to_tokens(ids) == ["<user>", "a", "3", "<assistant>"]


def test_system_turn_comes_first_and_instruction_on_a_line_after_the_question():
  class Recorder:
    """Characters for tokens."""

    chat_template, bos_token_id = "[role]content", None

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt):
      assert not tokenize
      text = "".join(f"[{turn['role']}]{turn['content']}" for turn in turns)
      return text + "[go]" * add_generation_prompt

    def __call__(self, text, *, add_special_tokens):
      assert not add_special_tokens
      return {"input_ids": list(text)}

  def encode(**kwargs):
    return "".join(prompts.encode_prompt(Recorder(), "2+2?", **kwargs))

  assert encode() == "[user]2+2?[go]"
  assert encode(system="Think.", instruction="Box it.") == (
    "[system]Think.[user]2+2?\nBox it.[go]"
  )


def test_tokenizer_without_a_chat_template_is_refused():
  with pytest.raises(ValueError, match="has no chat template; put one into"):
    prompts.encode_prompt(small_tokenizer(chat_template=None), "a3")


def test_prompt_over_the_limit_is_refused_with_its_problem_and_the_flag():
  problems = [Problem("short", "a3", "3"), Problem("long/7", "a3b4c2", "4")]
  # 6 characters, begin, user, assistant: 9 tokens.
  encoded = prompts.encode_problems(small_tokenizer(), problems, max_prompt_tokens=9)
  assert [len(ids) for ids in encoded] == [5, 9]
  with pytest.raises(
    ValueError, match=r"'long/7' has 9 tokens, .* 8; .*--rollout\.max-prompt-tokens"
  ):
    prompts.encode_problems(small_tokenizer(), problems, max_prompt_tokens=8)


def test_lengths_of_prompts_are_those_of_the_encoded_ones():
  problems = [Problem("short", "a3", "3"), Problem("long/7", "a3b4c2", "4")]
  assert prompts.prompt_lengths(small_tokenizer(), problems) == [5, 9]


def test_over_long_prompts_are_left_out_and_counted(tmp_path, capsys):
  made = dataclasses.replace(
    get_config(),
    eval=Eval(problems=0),
    rollout=Rollout(max_prompt_tokens=11),  # four digits at most
  )
  run = Run(made, tmp_path / "run")
  run.problems.check()
  ((weight, kept),) = run.problems.training.values()
  (held_out,) = run.problems.held_out.values()
  assert weight == 1.0 and {len(each.question) for each in kept} == {6, 8}
  assert {len(each.question) for each in held_out} == {6, 8}
  lost = 2048 - len(kept) + 256 - len(held_out)
  run.write_head()
  head = json.loads((tmp_path / "run" / "run.json").read_text())
  counted = head["data_left_out"]
  assert sum(sum(reasons.values()) for reasons in counted.values()) == lost > 500
  assert "by prompt_too_long" in capsys.readouterr().out
  made = dataclasses.replace(made, rollout=Rollout(max_prompt_tokens=8))
  run = Run(made, tmp_path / "none")
  with pytest.raises(ValueError, match=r"All 2048 .* shortest has 9.*max-prompt-token"):
    run.problems.check()


def test_a_run_trains_on_what_its_filters_leave(tmp_path, monkeypatch):
  everything = arithmetic.load("train")
  rates = tmp_path / "rates.jsonl"
  rates.write_text(
    "".join(
      json.dumps({"id": each.id, "pass_rate": (i % 5) / 4}) + "\n"
      for i, each in enumerate(everything[:100])
    )
  )
  own = tmp_path / "own.jsonl"
  own.write_text(
    json.dumps({"question": everything[7].question, "answer": "0"})
    + '\n{"question": "a1b1", "answer": "2"}\n'
  )
  test = tmp_path / "test.jsonl"
  test.write_text('{"question": "a1 B1", "answer": "2"}\n')
  made = dataclasses.replace(
    get_config(),
    data=Data(
      pass_rate_file=str(rates), min_pass_rate=0.25, max_pass_rate=0.75
    ),
  )  # fmt: skip
  run = Run(made, tmp_path / "run")
  ((_, kept),) = run.problems.training.values()
  places = [int(each.id.rpartition("/")[2]) for each in kept]
  assert places == [i for i in range(100) if i % 5 in (1, 2, 3)]
  assert run.problems.left_out == {"arithmetic/train": {"pass_rate": 2048 - 60}}
  taken = {each.id for each in run.problems.stream(0).take(60)}
  assert taken == {each.id for each in kept}
  mixed = dataclasses.replace(
    get_config(),
    sft=SFT(steps=0),
    data=Data(
      train=f"arithmetic:3 jsonl:{own}:1", decontaminate_against=f"jsonl:{test}"
    ),
  )
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  run = Run(mixed, tmp_path / "run")
  assert run.problems.left_out == {}
  assert list(run.problems.training) == ["arithmetic", f"jsonl:{own}"]
  assert run.problems.left_out == {f"jsonl:{own}/train": {"decontaminate_against": 1}}
  assert [each.id[:3] for each in run.problems.stream(0).take(8)].count("own") == 2


def test_missing_tokenizer_names_the_flag(tmp_path):
  with pytest.raises(ValueError, match=r"No tokenizer at .*--data\.tokenizer"):
    prompts.load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", None])
def test_a_broken_tokenizer_ends_in_one_sentence_of_what_is_there(tmp_path, file):
  if file:
    (tmp_path / file).write_text("{")
  with pytest.raises(ValueError, match=r"what is there cannot be read .*tokenizer"):
    prompts.load_tokenizer(str(tmp_path))


def test_a_mistyped_run_is_told_as_a_missing_directory_too(monkeypatch, capsys):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  assert main(["eval", "run/quickstart"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "'run/quickstart': no such directory, and the hub" in line
  assert "RUN=" in line


# --- End tokens ---


def test_end_tokens_of_tokenizer_and_model_are_united():
  assert small_tokenizer().eos_token_id == 2
  assert prompts.end_token_ids(small_tokenizer(), (7, 2, 0)) == (0, 2, 7)
  assert prompts.end_token_ids(small_tokenizer()) == (2,)


def test_end_token_of_the_model_is_enough():
  assert prompts.end_token_ids(small_tokenizer(eos_token=None), (0,)) == (0,)


def test_no_end_token_at_all_is_refused():
  with pytest.raises(ValueError, match="no end token, so no response could ever end"):
    prompts.end_token_ids(small_tokenizer(eos_token=None))


# --- Responses ---


def test_responses_are_decoded_to_their_length_without_special_tokens():
  tokenizer = small_tokenizer()
  texts = ["a3=3#3", "#1", ""]
  # A token of an earlier, longer response stands behind each end token.
  tokens = np.full((3, 9), tokenizer.convert_tokens_to_ids("f"))
  lengths = np.zeros(3, int)
  for i, text in enumerate(texts[:2]):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids.append(tokenizer.eos_token_id)
    tokens[i, : len(ids)], lengths[i] = ids, len(ids)
  assert prompts.decode_responses(tokenizer, tokens, lengths) == texts


# --- Real tokenizers ---


def real_tokenizer(name):
  data = os.environ.get("OPO_DATA_DIR")
  if not data:
    pytest.skip("OPO_DATA_DIR is not set: it holds the tokenizers of real models")
  return prompts.load_tokenizer(str(pathlib.Path(data) / "tokenizer" / name))


def test_deepseek_prompt_has_its_begin_token_once():
  tokenizer = real_tokenizer("deepseek-r1-distill-qwen")
  ids = prompts.encode_prompt(tokenizer, "What is 2+2?", instruction="Box it.")
  assert tokenizer.decode(ids) == (
    "<｜begin▁of▁sentence｜><｜User｜>What is 2+2?\nBox it.<｜Assistant｜>"
  )
  # Special tokens are single ids, not their letters.
  assert ids[:2] == [151646, 151644] and ids[-1] == 151645
  assert ids.count(151646) == 1
  assert prompts.end_token_ids(tokenizer) == (151643,)


def test_deepseek_system_turn_stands_between_begin_and_user():
  tokenizer = real_tokenizer("deepseek-r1-distill-qwen")
  ids = prompts.encode_prompt(tokenizer, "2+2?", system="Be brief.")
  assert tokenizer.decode(ids) == (
    "<｜begin▁of▁sentence｜>Be brief.<｜User｜>2+2?<｜Assistant｜>"
  )


def test_qwen3_prompt_has_no_begin_token():
  tokenizer = real_tokenizer("qwen3")
  ids = prompts.encode_prompt(tokenizer, "What is 2+2?")
  assert tokenizer.decode(ids) == (
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
  )
  assert prompts.end_token_ids(tokenizer) == (151645,)
