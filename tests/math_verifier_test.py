"""Answers are judged by stated rules; the real reference solutions are right."""

import json
import logging
import os
import pathlib
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opo_jax.rewards import math_equal, math_reward, normal_answer, numeric
from opo_jax.rewards.answers import boxed, final_answer
from opo_jax.rewards.pool import RewardPool

ROOT = pathlib.Path(__file__).resolve().parent.parent


def in_box(answer):
  return rf"\boxed{{{answer}}}"


# --- The final answer ---


def test_the_last_box_or_else_the_last_mark_holds_the_final_answer():
  cases = [
    (r"so \boxed{3}, no: \boxed{4}", "4"),
    ("\\boxed{3}\n\\boxed{4}", "4"),
    (r"\boxed{3} is wrong and so \boxed{4}", "4"),
    (r"\boxed{3}. The answer is 4", "3"),
    (r"\boxed{3}, and this is the final answer.", "3"),
    (r"so \boxed{3}. Alternatively, we could add 1 and 2.", "3"),
    (r"so \boxed{3}. Alternatively, use algebra.", "3"),
    (r"so \boxed{3}. Otherwise it fails.", "3"),
    (r"$J$ is $\boxed{120}$ (or else $J$ would have more).", "120"),
    (r"so it is $-\frac32 - \frac12 - \boxed{2}$", "2"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed 7", "7"),
    (r"\fbox{7}", "7"),
    (r"\boxed{ {x } then \boxed{5}", "5"),
    (r"Put it into \boxed{}. The answer is 5.", "5"),
    (r"<think>It is \boxed{3}.</think> The answer is 4.", "4"),
    ("<think>Hm.</think><answer>9</answer>", "9"),
    ("48 / 2 = <<48/2=24>>24\n#### 1,234", "1,234"),
    ("#### 3\n#### 4", "4"),
    ("#### Step 1\nThe answer is 5", "5"),
    ("The answer is 5\n#### Check\nIt fits.", "5"),
    ("The answer is 42.", "42"),
    ("The answer is 42!", "42"),
    ("The answer is 3.5. I am sure.", "3.5"),
    ("The answer is 3. Wait, the answer is 4.", "4"),
    ("Is it 4? No the answer is 5", "5"),
    (r"The final answer is $\frac{1}{2}$. I hope it is correct.", r"$\frac{1}{2}$"),
    ("**Final Answer**: $42", "$42"),
    ("**Answer:** 42", "42"),
    ("**Answer: 42**", "42"),
    ("Answer:\n$$\n42\n$$\nDone.", "$$\n42\n$$"),
    ("The answer to the question is 18 dollars per day.", "18 dollars per day"),
    ("The answer is 41. A wrong answer is 42.", "41"),
  ]
  found = [(response, final_answer(response)) for response, _ in cases]
  assert [pair for pair in found if pair not in cases] == []
  assert [c for c in cases if not math_reward(*c)] == []


def test_boxes_in_a_row_are_a_list():
  cases = [
    (r"the roots are $\boxed{3}$ and $\boxed{4}$", "4, 3"),
    (r"\boxed{3}, \boxed{4}", "3,4"),
    (r"\boxed{1}\boxed{2}", "1,2"),
    (r"$\boxed{1} \text{ for } a \text{ and } \boxed{2}$", "1,2"),
    (r"$y_1 = \boxed{x}$ and $y_2 = \boxed{2x}$", "2x, x"),
    (r"\boxed{15\frac{39}{40}}, or $\boxed{\frac{639}{40}}$", r"\frac{639}{40}"),
  ]
  assert [c for c in cases if not math_reward(*c)] == []
  assert boxed(r"\boxed{1}, \boxed{2}") == "1, 2"
  assert boxed("1") is boxed(r"\boxed{1} and \boxed{2") is None


def test_a_response_without_box_or_mark_has_no_final_answer():
  responses = [
    "",
    "\x00" * 10,
    "5",
    "It must be 5",
    "She had 9 eggs, sold 4, so 5 remain.",
    "First I add.\nx = 5",
    "Total: **5**",
    "A: 5",
    "$5$",
    "no boxed",
    "Seven is boxed, and 8 {of them} more",
    r"\boxed{}",
    r"\boxed{5",
    r"\boxed{5} or rather \boxed{5",
    "\\boxed{5}\nthat was wrong, actually \\boxed{",
  ]
  assert [r for r in responses if final_answer(r) or math_reward(r, "5")] == []
  assert [r for r in responses if normal_answer(r)] == []


def test_a_denied_answer_does_not_count():
  responses = [
    "This is not my final answer: 42",
    "This is not the final answer: 42",
    "This isn't my answer: 42",
    "I don't think the answer is 42",
    "The answer is not 42.",
    "Wrong answer: 42",
    "Previous answer: 42",
    "Ignore the following final answer: 42",
    r"It is not \boxed{42}.",
    r"It cannot be $\boxed{42}$.",
    r"not \(\boxed{42}\)",
    r"The wrong answer is \boxed{42}",
    r"\boxed{42} is wrong",
    r"-\boxed{42}",
    r"4\boxed{2}",
    r"\boxed{\neq 42}",
    r"\boxed{42\text{ is wrong}}",
    r"\boxed{x = 7 \boxed{42}}",
  ]
  assert [r for r in responses if math_reward(r, "42") or math_reward(r, "2")] == []


# Each names 3 and 4, and is paid for neither of them.
HEDGES = [
  "The answer is 3 or 4.",
  "The answer is either 3 or 4",
  "The answer is 3. Or 4.",
  "The answer is 3.\nOr maybe 4.",
  "The answer is 3. Or four.",
  "The answer is 3. Otherwise 4.",
  "The answer is 3. If not, 4.",
  "The answer is 3. Could be 4.",
  "The answer is 3. It could also be 4.",
  "The answer is 3. Alternatively, it is 4.",
  "The answer is 3, or the answer is 4.",
  "Maybe the answer is 3, perhaps the answer is 4.",
  "The answer is 3? The answer is 4?",
  "The answer is 3 for A and 4 for B.",
  "The answer is one of 3, 4.",
  "The answer is 3; 4",
  "Answer: 3; 4; 5",
  "Answer: 3. 4. 5.",
  "Answer: 3! 4",
  "Answer: **3** 4",
  "Answer: 4 **3**",
  "**Answer: 3, 4**",
  "Answer: 4, 3</answer>",
  r"The answer is **3\cup 4**",
  "#### 3 or 4",
  "#### 3\nor 4",
  "#### 3 | 4",
  "#### 3 to 4",
  "<answer>3, 4</answer>",
  "<answer>3</answer> or 4",
  "<answer>3</answer>\nor 4",
  "<answer>3</answer>, 4",
  "<answer>3</answer> or <answer>4</answer>",
  "<answer>3</answer>, maybe <answer>4</answer>",
  r"\boxed{3} or 4",
  r"\boxed{3} or four",
  r"\boxed{3} or $x=4$",
  r"\boxed{3}, 4",
  r"\boxed{3} and 4",
  r"$\boxed{3}$, $4$",
  r"$\boxed{3}$ (or maybe $4$)",
  "\\boxed{3}\nor 4",
  r"\boxed{3}\text{ or }4",
  r"\boxed{3} or the final answer is 4",
  r"\boxed{3} and \boxed{4}",
  r"\boxed{3} or \boxed{4}",
  r"\boxed{3}, or perhaps \boxed{4}",
  r"\boxed{3}, maybe \boxed{4}",
  r"$\boxed{3}$ or possibly $\boxed{4}$",
  r"\boxed{3} (alternatively \boxed{4})",
  r"Either \boxed{3} or else \boxed{4}",
  r"If even, \boxed{3}; if odd, \boxed{4}",
  r"\boxed{3}. Or \boxed{4}.",
  r"\boxed{3}. Otherwise, it is \boxed{4}.",
  r"\boxed{3} / \boxed{4}",
  r"\boxed{3}; \boxed{4}",
  r"\boxed{3} | \boxed{4}",
  r"\boxed{3}? \boxed{4}?",
  r"\boxed{3} + \boxed{4}",
  r"\boxed{3} \\ \boxed{4}",
  r"\boxed{3 \text{ or } 4}",
  r"\boxed{3 \text{ cats, } 4 \text{ dogs}}",
  r"\boxed{3 \quad 4}",
  r"\boxed{3\text{ perhaps}}",
  r"\boxed{4\text{ maybe}}",
  r"\boxed{3\text{ four five}}",
  r"\boxed{3 \pm 1}",
  r"\boxed{**3\cdot 4**}",
  r"\boxed{**3\lor 4**}",
]
# What hedges inside of one answer look like: in a box, behind a mark, and alone.
HEDGED_ANSWERS = [
  "3 or 4",
  "3, 4",
  "3 and 4",
  "3 | 4",
  "3 to 4",
  "{3, 4}",
  r"\{3, 4\}",
  "x = 3, x = 4",
  "3 for cats and 4 for dogs",
  "3 if x is odd, else 4",
  "neither 3 nor 4",
  "not 3, and not 4",
  r"3\neq 4",
  r"3\lor 4",
  r"3\cup 4",
  "1+2 = 3 or 1+3 = 4",
  "1+3=4 (or 3)",
  "3?",
  "4 (maybe 3)",
]


def test_a_hedge_earns_nothing():
  responses = HEDGES + [
    form.replace("@", hedge)
    for hedge in HEDGED_ANSWERS
    for form in ("@", r"\boxed{@}", "#### @", "The answer is @.", "It is **@**.")
  ]
  assert len(responses) > 106
  for judge in (math_reward, math_equal):
    assert [r for r in responses if judge(r, "3") or judge(r, "4")] == []


def test_no_response_is_paid_for_two_values():
  cases = [
    (r"\boxed{3\approx 4}", "3 4"),
    (r"\boxed{x = 3 = 4}", "3 4"),
    (r"The answer is **3\approx 4**", "3 4"),
    (r"The answer is $3$ \approx $4$", "3 4"),
    ("The answer is 3, then the answer is 4", "3 4"),
    ("<answer>3</answer>, <answer>4</answer>", "3 4"),
    (r"\boxed{3}. Final answer: 4", "3 4"),
    (r"\boxed{1,234}", "1234 234"),
  ]
  paid = [(r, [math_reward(r, value) for value in v.split()]) for r, v in cases]
  assert [each for each in paid if sum(each[1]) > 1] == []


def test_letters_listed_and_numbers_that_touch_earn_nothing():
  cases = [
    (r"\boxed{A} or B", "A B"),
    (r"\boxed{A} or (B)", "A B"),
    (r"\boxed{x} or $y$", "x y"),
    (r"\boxed{\text{Monday}} or Tuesday", "Monday Tuesday"),
    ("Answer: A; B; C; D", "A B C D"),
    (r"\boxed{A. B. C. D}", "A B C D"),
    (r"\boxed{A: B: C: D}", "A B C D"),
    (r"\boxed{A. 3; B. 4}", "A B 3 4"),
    (r"\boxed{3 4}", "34 3 4 7 12"),
    (r"\boxed{3\quad 4}", "34 3 4 7 12"),
    (r"\boxed{3\,4}", "34 3 4 7 12"),
    (r"\boxed{3{4}}", "34 3 4 7 12"),
    (r"\boxed{3[4]}", "34 3 4 7 12"),
    (r"\boxed{0\binom{42}{1}}", "42"),
    ("The answer is 1 2 3.", "123 1 2 3 6"),
    ("#### 1 2 3", "123 1 2 3 6"),
  ]
  assert [c for c in cases if any(math_reward(c[0], v) for v in c[1].split())] == []


def test_a_repeated_question_earns_nothing():
  questions = [
    ("Simplify\n\\[\\frac{6x}{3}\\]", "2x"),
    ("Completely factor the expression: $$x^2 - 4$$", "(x-2)(x+2)"),
    ("Express 0.25 as a fraction.", "1/4"),
    ("Which is prime?\n\n(a) 4\n\n(b) 6\n\n(c) 7", "C"),
    ("Tom has 3 apples and 2 pears. How many pears has he?", "2"),
    ("What is 3 + 4?", "7"),
    ("Solve x + 3 = 9 for 2 cats", "9"),
    ("Evaluate 3 + 4 = 7", "7"),
    ("The answer is 12 because 3 + 4 = 7 and 7 + 5 makes 12.", "7"),
    ("What is the answer? It is 3 + 4", "7"),
  ]
  assert [q for q in questions if math_reward(*q) or math_equal(*q)] == []


def test_arithmetic_left_undone_equals_its_value_and_earns_nothing():
  undone = [
    ("3 + 4", "7"),
    ("3+4", "7"),
    (r"2\cdot 3", "6"),
    ("2(3)", "6"),
    ("14/2", "7"),
    (r"\frac{14}{2}", "7"),
    ("x^2 - x^2", "0"),
    ("5!", "120"),
    (r"2^{10} - 1000", "24"),
    ("(3 + 4, 1)", "(7, 1)"),
  ]
  assert [pair for pair in undone if not math_equal(*pair)] == []
  for form in (r"\boxed{@}", "#### @", "The answer is @.", r"\boxed{x = @}"):
    assert [u for u in undone if math_reward(form.replace("@", u[0]), u[1])] == []


def test_a_function_left_undone_earns_nothing():
  undone = [
    (r"\log_264", "6"),
    (r"\dbinom{31}{28}", "4495"),
    (r"\lceil{\sqrt{20}}\rceil^2", "25"),
    (r"\frac{-3+4i}{1+2i}", "1+2i"),
    ("(1+2i)6-3i", "6+9i"),
    (r"\arcsin(-\frac12)", r"-\frac{\pi}{6}"),
    (r"\gcd(4,8)", "4"),
    (r"\max(3,4)", "4"),
    (r"\lfloor 4.5\rfloor", "4"),
    (r"\sum_{i=1}^{4}1", "4"),
    (r"\lim_{x\to4}x", "4"),
    (r"\int_0^4 1\,dx", "4"),
    (r"4 \mod 7", "4"),
    ("|-4|", "4"),
    (r"n = \log_2 8", "n = 3"),
    (r"\log_2 8", r"3\text{ cm}"),
    (r"(\log_2 8, 1)", "(3, 1)"),
    ("[48]+[2]", "50"),
  ]
  assert [u for u in undone if math_reward(in_box(u[0]), u[1])] == []
  assert [u for u in undone if not math_reward(in_box(u[1]), u[1])] == []


def test_powers_roots_and_algebraic_forms_are_done():
  done = [
    (r"\sqrt{2}", r"\sqrt2"),
    ("2^{10}", "1024"),
    (r"1.5 \times 10^3", "1500"),
    (r"\log 2", r"\log 2"),
    (r"2\ln 2", r"\ln 4"),
    (r"\frac{1+i}{2}", r"\frac12 + \frac{i}{2}"),
    ("(6-5i)", "-5i+6"),
    (r"\frac 1 2", "0.5"),
    (r"3\text{ cats}", "3"),
    ("x + 3", "3 + x"),
    ("(x-1)(x+1)", "x^2 - 1"),
  ]
  assert [pair for pair in done if not math_reward(in_box(pair[0]), pair[1])] == []


# --- Exactness ---


def test_rational_numbers_are_compared_exactly():
  """Doubles, and any tolerance, would make pairs of these equal."""
  different = [
    ("123456789012", "123456789013"),
    (r"\frac{123456789012}{7}", r"\frac{123456789013}{7}"),
    ("0.123456789012", "0.123456789013"),
    ("2^{200}", "2^{200}+1"),
    ("9007199254740993", "9007199254740992"),
    ("1e-400", "2e-400"),
    (r"10^{-400}", r"2\cdot 10^{-400}"),
    (r"3\times10^{500}", r"4\times10^{500}"),
    ("1e-400", "0"),
    (r"x+10^{-20}", "x"),
    (r"\frac{x}{10^{30}}", r"\frac{2x}{10^{30}}"),
    ("(1, 123456789012)", "(1, 123456789013)"),
    ("x > 123456789012", "x > 123456789013"),
    ("x = 123456789012y", "x = 123456789013y"),
    (r"\log x + 10^{-20}", r"\log x"),
    ("0.333333333333", r"\frac13"),
    ("0.3333", r"\frac13"),
    ("42.0000001", "42"),
    ("0.30000000000000004", "0.3"),
    ("50.0000000001%", "0.5"),
    (r"\frac{1}{2044!}", r"\frac{1}{2004!}"),
    (r"1\cot x", r"2\cot x"),
  ]
  equal = [
    ("1e-400", "10^{-400}"),
    (r"\frac{2}{10^{400}}", "2e-400"),
    ("0.500000000000000000000000", r"\frac12"),
    ("123456789012.0", "123,456,789,012"),
    (r"2^{201}/2", "2^{200}"),
    (r"\sqrt{10^{60}}", "10^{30}"),
  ]
  assert [
    p for p in different if math_equal(*p) or math_reward(in_box(p[0]), p[1])
  ] == []
  assert [p for p in different if math_equal(*p[::-1])] == []
  assert [pair for pair in equal if not math_equal(*pair)] == []


def test_irrational_values_are_compared_by_their_relative_difference():
  different = [
    (r"123456789012\pi", r"123456789013\pi"),
    (r"10^{-400}\pi", r"2\cdot10^{-400}\pi"),
    (r"10^{-400}\sqrt{2}", r"2\cdot10^{-400}\sqrt{2}"),
    (r"\sqrt{2}", "1.4142135623730950488"),
    (r"\pi", "3.14159265358979323846"),
    (r"\sqrt{2}\cdot10^{20}+1", r"\sqrt{2}\cdot10^{20}"),
    (r"40\pi", "125.6637"),
    (r"\ln 2", "0.693147"),
    (r"10^{-400}\ln 2", r"10^{-400}\ln 3"),
  ]
  equal = [
    (r"\sqrt{8}\pi", r"2\sqrt2\pi"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"),
    (r"10^{-400}\sqrt{8}", r"2\cdot10^{-400}\sqrt{2}"),
    (r"(1+\sqrt2)(1-\sqrt2)", "-1"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
  ]
  assert [pair for pair in different if math_equal(*pair)] == []
  assert [pair for pair in equal if not math_equal(*pair)] == []


def test_numbers_too_large_to_compute_equal_nothing_and_are_not_computed():
  """Each would fill the memory, or take hours, in a process of the caller."""
  script = (
    "from opo_jax.rewards import math_equal, math_reward\n"
    "for number in ['9^{9^{9}}', '10^{10^{10}}', '(10^{6000})^{6000}', '1e9999',\n"
    "               '2^{10^5}', '(x^{9999})^{9999}', '9*10^{307}', '10^{10^{-9}}']:\n"
    "  box = '\\\\boxed{' + number + '}'\n"
    "  print(math_reward(box, '125.663'), math_equal(number, '125.663'))\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", script],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
    timeout=120,  # It takes a second.
  )
  assert done.stdout.split() == ["0.0", "False"] * 8


def test_values_are_decided_only_where_they_are_sure():
  equal = [("(x+1)^2", "x^2+2x+1"), ("2a(b-c)", "2ab-2ac"), (r"2\cdot-x", "-2x")]
  equal += [(r"1\frac{1}{2}", "1.5"), ("x^10", "x^{10}"), (r"\sqrt[3]{27}", "3")]
  different = [("x", "y"), ("2x", "x^2"), ("ab", "a+b"), (r"\sqrt{2}", "1.41421")]
  different += [("3 4", "34"), (r"0\frac{42}{1}", "42"), ("10^{10^{10}}", "1")]
  # 1/(2x) or x/2, a function or a product, no value, too close to tell, no expression.
  unsure = [("1/2x", "x"), ("f(x)", "fx"), ("1/0", "1"), (r"\sqrt{2}\sqrt{2}", "2")]
  unsure += [("sin x", "x"), (r"\sin x", "x"), ("((x)", "x"), ("", "x"), ("x=1", "1")]
  unsure += [("[1]", "1"), (r"\sqrt[3]{-8}", "-2"), ("abc", "cba"), ("i", "x")]
  for verdict, pairs in ((True, equal), (False, different), (None, unsure)):
    assert [p for p in pairs if numeric.compare(*p) is not verdict] == []


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**30), 10**30))
def test_every_way_of_writing_an_integer_is_that_integer_only(n):
  for text in (f"{n}", f"{n:,}", f"${n}$", f"{n}.0", rf"\boxed{{{n}}}", f"{n} apples"):
    assert math_equal(text, str(n))
    assert not math_equal(text, str(n + 1))


@settings(max_examples=100, deadline=None)
@given(st.fractions(max_denominator=10**20), st.fractions(max_denominator=10**20))
def test_two_fractions_are_equal_if_and_only_if_they_are_the_same(one, other):
  texts = rf"\frac{{{3 * one.numerator}}}{{{3 * one.denominator}}}", f"{other}"
  assert math_equal(*texts) == (one == other)
  assert math_equal(texts[0], f"{one}")


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="0145689 +-=.,$^%_{}()\\abfrcoxed#\n\x00é", max_size=40))
def test_no_short_text_raises_or_earns_anything(text):
  # Its digits are in none of the texts, and arithmetic left undone is no answer.
  for response in (text, in_box(text), f"#### {text}"):
    assert math_reward(response, "73") == 0.0


# --- References, limits, imports ---


def test_an_empty_reference_is_an_error_and_not_a_wrong_answer():
  for judge in (math_equal, math_reward):
    for reference in ("", " \n"):
      with pytest.raises(ValueError, match="reference is empty"):
        judge("5", reference)


def test_a_reference_may_be_a_whole_solution():
  assert math_equal("72", "48 / 2 = 24, and 48 + 24 = 72.\n#### 72")
  assert not math_equal("24", "48 / 2 = 24, and 48 + 24 = 72.\n#### 72")
  long = "We add and add. " * 60 + "So the answer is $14{,}916$. I hope it helps."
  assert math_reward(r"\boxed{14916}", long) == 1.0
  assert math_reward("#### 72", r"We have $24 + 48 = \boxed{72}$.") == 1.0


def test_a_long_response_of_anything_is_judged_in_linear_time():
  """In a process that can be ended: quadratic time would be hours."""
  pieces = ["#", "#### ", "\n####", "answer is \\[\n", "answer to ", "answer is $$\n"]
  pieces += ["\\boxed{", "\\boxed{3} ", "\\fbox  ", "\\boxed{3}$, $", "{", "}", "\\"]
  pieces += ["1", " ", "*", "\x00", "$", " or ", "(", "1 and ", "wrong answer: 3 ", "<"]
  pieces += ["<answer>", "answer is 3 or ", "not ", "\\frac{1}{", "\\text{", "is the "]
  script = (
    "import json, sys\n"
    "from opo_jax.rewards import math_equal, math_reward\n"
    "for piece in json.load(sys.stdin):\n"
    "  text = piece * (200_000 // len(piece))\n"
    "  for text in (text, 'answer is' + text):\n"
    "    assert not math_reward(text, '5') and not math_equal(text, '5')\n"
  )
  subprocess.run(
    [sys.executable, "-c", script],
    cwd=ROOT,
    input=json.dumps(pieces),
    text=True,
    check=True,
    timeout=300,  # It takes five seconds.
  )


def test_verification_works_off_the_main_thread_and_logs_nothing(caplog):
  results = []

  def work():
    results.append(math_reward(r"\boxed{\frac{\sqrt{4}}{2} \sin x}", r"\sin x + 0"))
    results.append(math_reward(r"\boxed{\frac{\begin{}{}{x}", "x"))

  with caplog.at_level(logging.DEBUG):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
  assert results == [1.0, 0.0]
  assert not [r for r in caplog.records if r.name.startswith("math_verify")]


def test_rewards_import_neither_jax_nor_sympy():
  script = (
    "import sys, opo_jax.rewards\n"
    "print([m for m in ('jax', 'sympy', 'math_verify') if m in sys.modules])\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"


# --- Real data ---


def rows_of(name):
  path = pathlib.Path(os.environ.get("OPO_DATA_DIR", "")) / name
  if not os.environ.get("OPO_DATA_DIR") or not path.exists():
    pytest.skip(f"needs real data: set OPO_DATA_DIR to a directory with {name}")
  return [json.loads(line) for line in path.open()]


def test_every_gsm8k_reference_solution_scores_one():
  rows = rows_of("gsm8k/test.jsonl")
  solutions = [row["answer"] for row in rows]
  references = [s.partition("####")[2].replace(",", "").strip() for s in solutions]
  shifted = [*references[1:], references[0]]
  assert [math_reward(*pair) for pair in zip(solutions, references, strict=True)] == (
    [1.0] * 1319
  )
  same = [float(a) == float(b) for a, b in zip(references, shifted, strict=True)]
  assert [math_reward(*p) for p in zip(solutions, shifted, strict=True)] == same
  # Neither its sentences alone nor the question earn anything.
  for row, reference in zip(rows, references, strict=True):
    assert not math_reward(row["answer"].partition("\n####")[0], reference)
    assert not math_reward(row["question"], reference)


def test_math500_solutions_score_one_and_hostile_answers_stop_nothing():
  rows = rows_of("math500/test.jsonl")
  respelled = [
    rf"\boxed{{\displaystyle {r['answer']} }}".replace(r"\frac", r"\dfrac")
    for r in rows
  ]
  hostile = [
    r"\boxed{9**9**9}",
    r"\boxed{9^{9^{9}}}",
    r"\boxed{100000000!}",
    r"\boxed{" + r"\frac{1}{" * 50 + "2" + "}" * 51,
    "\\boxed{" * 1000 + "}" * 1000,
    "\x00\\boxed{\x00}",
  ]
  references = [r["answer"] for r in rows]
  with RewardPool(math_reward, workers=2, timeout_s=30.0) as pool:
    assert pool.score([r["solution"] for r in rows], references) == [1.0] * 500
    scores = pool.score(hostile + respelled, ["5"] * len(hostile) + references)
    assert not any(scores[: len(hostile)])
    assert sum(score == 1.0 for score in scores[len(hostile) :]) == 500
  assert not any(math_reward(r["problem"], r["answer"]) for r in rows)


@pytest.mark.slow
def test_math_solutions_score_one_and_repeated_problems_nothing():
  """Of 4,497 solutions five box two values of which the reference kept the last."""
  rows = rows_of("math/test_minus_math500.jsonl")
  with RewardPool(math_reward, workers=2, timeout_s=30.0) as pool:
    references = [row["answer"] for row in rows]
    assert sum(pool.score([row["solution"] for row in rows], references)) == 4492
    rows = [*rows_of("math500/test.jsonl"), *rows, *rows_of("math/train.jsonl")]
    problems, references = zip(
      *((r["problem"], r["answer"]) for r in rows), strict=True
    )
    assert sum(pool.score(problems, references)) == 0
    shifted = [*references[1:], references[0]]
    boxes = [in_box(reference) for reference in references]
    scores = pool.score(boxes, shifted)
  pairs = zip(references, shifted, scores, strict=True)
  right = [(one, other) for one, other, score in pairs if score]
  assert len(right) == 108
  assert {pair for pair in right if pair[0] != pair[1]} == {
    ("5", "x=5"),
    ("-1", "x = -1"),
    ("8", "K=8"),
    ("120", r"120^\circ"),
    (r"120^\circ", "120"),
    (r"\frac{3}{4}", r"\frac34"),
    (r"25\%", "25"),
    (r"21\text{ dogs}", "21"),
    (r"18 \text{ degrees}", "18"),
  }
