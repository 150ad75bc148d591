"""Answers are judged by stated rules; the real reference solutions are right."""

import json
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opo_jax.rewards import math_equal, math_reward, numeric
from opo_jax.rewards.pool import RewardPool

ROOT = pathlib.Path(__file__).resolve().parent.parent


# --- Equality ---


@pytest.mark.parametrize(
  ("prediction", "reference"),
  [
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    (r"10\,000", "10000"),
    ("$18", "18"),
    (r"\$18", "18"),
    ("18.00", "18"),
    ("18 dollars", "18"),
    (r"18\text{ cm}", "18"),
    (r"90^\circ", "90"),
    ("864", r"864 \mbox{ inches}^2"),
    ("34", r"34\text{ sq. units}"),
    (r"13\sqrt{12^2}", r"156\sqrt{1}\text{ feet}"),
    ("50%", "50"),
    (r"50\%", "0.5"),
    ("0.5", "50%"),
    ("-$5", "-5"),
    ("\u22125", "-5"),
    ("1e3", "1000"),
    ("$$7$$", "7"),
    (r"\(7\).", "7"),
    ("**42**", "42"),
    ("x\x00", "x"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\frac{1}{3}", "0.333333"),
    ("0.333333", r"\frac13"),
    (r"\dfrac{2}{4}", "1/2"),
    ("1 1/2", r"\frac{3}{2}"),
    (r"1\frac12", "1.5"),
    ("x = 5", "5"),
    ("x = 3 + 2 = 5", "5"),
    ("Total cost = $7", "7"),
    ("2^{10}", "1024"),
    (r"1.5 \times 10^3", "1500"),
    (r"\sqrt{16}", "4"),
    (r"\frac{\sqrt{4}}{4}", "0.5"),
    ("(x+1)^2", "x^2 + 2x + 1"),
    ("2*pi", r"2\pi"),
    ("sqrt(2)/2", r"\frac{\sqrt2}{2}"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("x=1 or x=2", "x=1,x=2"),
    (r"3 \pm 2", "5, 1"),
    (r"\left(1,2\right)", "(1, 2)"),
    (r"x \in [1,2)", "[1,2)"),
    (
      r"\begin{pmatrix}1\\2\end{pmatrix}",
      r"\begin{pmatrix} \frac22 \\ \sqrt{4} \end{pmatrix}",
    ),
    ("evelyn", r"\text{Evelyn}"),
    ("C", r"\text{(C)}"),
  ],
)
def test_equal_answers_are_equal(prediction, reference):
  assert math_equal(prediction, reference)


@pytest.mark.parametrize(
  ("prediction", "reference"),
  [
    ("3 or 4", "3"),
    ("3 or 4", "4"),
    (r"3 \text{ or } 4", "3"),
    ("3 and 4", "3"),
    ("3, 4", "3"),
    (r"\{3, 4\}", "3"),
    (r"3 \pm 1", "4"),
    ("3", "3, 4"),
    ("not 5", "5"),
    ("x = 3 + 4", "7"),
    ("3 4", "7"),
    ("3 million", "3"),
    ("x > 3", "3"),
    ("x <= 3", "3"),
    (r"\frac{1}{0}", "5"),
    ("0.0000001", "0"),
    ("0.33", "1/3"),
    ("y = 5", "x = 5"),
    ("What is 3 + 4?", "7"),
    (r"\text{cat}", r"\text{act}"),
    ("nylevE", "Evelyn"),
    ("x", "y"),
    ("", "5"),
    ("$", "5"),
    ("\x00", "5"),
    ("}{", "5"),
    (r"\frac{", "5"),
    ("\\" * 99, "5"),
    ("9**9**9", "5"),
    ("5" * 1_000_000, "5"),
  ],
)
def test_different_and_evasive_answers_are_not_equal(prediction, reference):
  assert not math_equal(prediction, reference)


@pytest.mark.parametrize(
  ("arithmetic", "value"),
  [
    ("3 + 4", "7"),
    ("3+4", "7"),
    (r"2\cdot 3", "6"),
    ("2(3)", "6"),
    ("14/2", "7"),
    (r"\frac{14}{2}", "7"),
    ("x^2 - x^2", "0"),
  ],
)
def test_arithmetic_left_undone_equals_its_value_and_earns_nothing(arithmetic, value):
  assert math_equal(arithmetic, value)
  for response in (
    arithmetic,
    f"${arithmetic}$",
    rf"\boxed{{{arithmetic}}}",
    f"#### {arithmetic}",
    f"The answer is {arithmetic}.",
    f"What is {arithmetic}?",
    f"Compute {arithmetic}.",
  ):
    assert math_reward(response, value) == 0.0
  assert math_equal(rf"\boxed{{{arithmetic}}}", value)
  for prediction in (rf"So \boxed{{{arithmetic}}}", f"Compute {arithmetic}."):
    assert not math_equal(prediction, value)
  assert not math_equal(rf"\boxed{{{arithmetic}}} or \boxed{{1}}", value)


@pytest.mark.parametrize("reference", ["", " \n"])
def test_empty_reference_is_an_error_and_not_a_wrong_answer(reference):
  with pytest.raises(ValueError, match="reference is empty"):
    math_equal("5", reference)
  with pytest.raises(ValueError, match="reference is empty"):
    math_reward("5", reference)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_every_way_of_writing_an_integer_is_that_integer_only(n):
  for text in (f"{n}", f"{n:,}", f"${n}$", f"{n}.0", rf"\boxed{{{n}}}", f"{n} apples"):
    assert math_equal(text, str(n))
    assert not math_equal(text, str(n + 1))


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="0145689 +-=.,$^%_{}()\\abfrcoxed#\n\x00é", max_size=40))
def test_no_short_text_raises_or_earns_anything(text):
  # Its digits are in none of the texts, and arithmetic left undone is no answer.
  assert math_reward(text, "73") == 0.0


# --- The final answer ---


@pytest.mark.parametrize(
  ("response", "reference", "reward"),
  [
    (r"so \boxed{3}, no: \boxed{4}", "4", 1.0),
    (r"so \boxed{3}, no: \boxed{4}", "3", 0.0),
    (r"\boxed{3}. The answer is 4", "3", 1.0),
    (r"\boxed{3} or rather \boxed{4", "3", 0.0),
    (r"\boxed{3}. Final Answer: The final answer is $4$.", "4", 1.0),
    (r"\boxed{3}. Final Answer: The final answer is $4$.", "3", 0.0),
    (r"\boxed{3}, and this is the final answer.", "3", 1.0),
    (r"\boxed{3} or the final answer is 4", "4", 0.0),
    (r"\boxed{3}. Final answer: 3 or 4", "4", 0.0),
    (r"\boxed{3}. Thus it is 5 or the final answer is 4", "4", 0.0),
    (r"\boxed{3}. The final answer is positive, because 2 are.", "3", 1.0),
    (r"\boxed{3}. The final answer is odd, as a number is.", "3", 1.0),
    (r"\boxed{\boxed{3}. Final answer: 4}", "3", 0.0),
    ("no boxed", "3", 0.0),
    (r"Put it into \boxed{}. The answer is 5.", "5", 1.0),
    (r"\boxed{\{1,2\}}", r"\{1,2\}", 1.0),
    (r"\boxed 7", "7", 1.0),
    ("The answer is: boxed {7}. It was in a list of 8.", "7", 1.0),
    ("\boxed{7}", "7", 1.0),
    ("Seven is boxed, and 8 {of them} more", "7", 0.0),
    (r"\boxed{3} or \boxed{4}", "4", 0.0),
    (r"\boxed{3} or \boxed{4}", "3", 0.0),
    (r"the roots are $\boxed{3}$ and $\boxed{4}$", "4, 3", 1.0),
    (r"\boxed{3}, \boxed{4}", "3,4", 1.0),
    (r"\boxed{1}\boxed{2}", "1,2", 1.0),
    (r"\boxed{15\frac{39}{40}}, or $\boxed{\frac{639}{40}}$", r"\frac{639}{40}", 1.0),
    ("\\boxed{3}\n\\boxed{4}", "4", 1.0),
    (r"\boxed{3} is wrong and so \boxed{4}", "4", 1.0),
    ("Answer: The area of the field is 12.", "12", 1.0),
    ("The area is 11.\nTherefore, the area is 12.", "12", 1.0),
    (r"Thus $x \le 2$ is our answer.", r"x \leq 2", 1.0),
    ("Therefore, either it is 3 or it is 4.", "4", 0.0),
    ("The answer is 3 or it is 4.", "4", 0.0),
    (r"So $3$ or maybe $4$", "3", 0.0),
    (r"So $3$ or 4", "3", 0.0),
    (r"Therefore, what is $\frac{1}{2}$?", "0.5", 0.0),
    (r"Express $0.5$ as a fraction.", r"\frac{1}{2}", 0.0),
    (r"Compute $\sqrt{16}$.", "4", 0.0),
    ("The answer is not 5.", "5", 0.0),
    ("48 / 2 = <<48/2=24>>24\n#### 1,234", "1234", 1.0),
    ("#### 3\n#### 4", "4", 1.0),
    ("#### Step 1\nThe answer is 5", "5", 1.0),
    ("The answer is 5\n#### Check\nIt fits.", "5", 1.0),
    ("The answer is 42.", "42", 1.0),
    ("The answer is 3.5. I am sure.", "3.5", 1.0),
    ("The answer is 4, I said the answer is 5.", "4", 0.0),
    (r"The final answer is $\frac{1}{2}$. I hope it is correct.", "0.5", 1.0),
    ("**Final Answer**: $42", "42", 1.0),
    ("**Answer:** 42", "42", 1.0),
    ("Answer:\n$$\n42\n$$\nDone.", "42", 1.0),
    ("The answer to the question is 18 dollars per day.", "18", 1.0),
    ("The answer is 3 or 4.", "3", 0.0),
    ("The answer is 3 or 4.", "4", 0.0),
    ("The answer is either 3 or 4", "3", 0.0),
    ("First I add.\nx = 42", "42", 1.0),
    ("42", "42", 1.0),
    ("So 3 + 4 = 7", "7", 0.0),
    ("Tom has 3 apples and gets 4 more. How many has Tom?", "4", 0.0),
    ("What is 3 + 4?", "7", 0.0),
    ("3 + 4", "7", 0.0),
    ("", "5", 0.0),
    ("\x00" * 10, "5", 0.0),
  ],
)
def test_the_final_answer_counts_and_nothing_else(response, reference, reward):
  assert math_reward(response, reference) == reward


@pytest.mark.parametrize(
  ("response", "reference"),
  [
    ("It must be 42", "42"),
    ("She had 9 eggs, sold 4, so 5 remain.", "5"),
    ("They need 12 buses. I hope this is right.", "12"),
    ("The price comes to $1,250.75", "1250.75"),
    ("It costs 3 + 4 = 7 dollars", "7"),
    ("The number is not 8 but it is 9,5€.", "9.5"),
    ("Total: **96**. It took 3 steps.", "96"),
    ("3 + 4 = **7**", "7"),
    ("The roots are 3 and -4.", "-4, 3"),
    ("Here is the point: $(2, 5)$", "(2,5)"),
    (r"The inverse is $ \begin{pmatrix}1&0\\0&2\end{pmatrix} $.", "matrix"),
    ("The increase is 45% because 5 of them grew.", "45%"),
    (r"In lowest terms it is \frac{3}{7} of the cake", "3/7"),
    ("The chance of that is 2/9. <|im_end|>", "2/9"),
    ("I would choose (D) here", "D"),
    ("所以一共有 5 + 6 = 11 只鸟。", "11"),
    ("Il reste donc 79 g de cire.", "79"),
    ("Answer: Tom left 6 hours ago.", "6"),
    ("The answer is 3. Wait, the answer is 4.", "4"),
    ("So it takes 2+1=<<2+1=3>>3 bolts of fiber", "3"),
    ("A: 26", "26"),
    ("**Final answer:**\n\nAnswer: 42\n\n---", "42"),
    (r"<think>It is \boxed{3}.</think> The answer is 4.", "4"),
    ("<think>Hm.</think><answer>9</answer>", "9"),
    (r"$\boxed{1} \text{ for } a \text{ and } \boxed{2}$", "1,2"),
    (r"$y_1 = \boxed{x}$ and $y_2 = \boxed{2x}$", "2x, x"),
    (r"so \boxed{3}. Alternatively, we could add 1 and 2.", "3"),
    (r"$J$ is $\boxed{120}$ (or else $J$ would have more).", "120"),
    (r"so it is $-\frac32 - \frac12 - \boxed{2}$", "2"),
    ("So it goes 18000/900=20 days for 2 cars.", "20"),
    ("Henry rode 60 miles - 35 miles = 25 miles in 2 trips.", "25"),
    ("Add both parts: $1,250.50 + $20 = $1,270.50 for 5 days", "1270.5"),
    ("Therefore, 24 - 7 = 17 students ride in 3 cars.", "17"),
    ("If each of 3 has 4, then there are 3 x 4 = 12 cats in 5 rooms.", "12"),
    ("The hypotenuse squared is 9 + 16 = 25, so it is 5.", "5"),
    ("There are 3 * 4 = 12 cells, of which 5 are red, leaving 7", "7"),
    ("It is not 1 + 2 = 3, it is 1 + 3 = 4", "4"),
  ],
)
def test_what_a_sentence_states_is_an_answer(response, reference):
  if reference == "matrix":
    reference = r"\begin{pmatrix}1&0\\0&2\end{pmatrix}"
  assert math_reward(response, reference) == 1.0


@pytest.mark.parametrize(
  "response",
  [
    "3 or 4",
    "3, 4",
    "3 and 4",
    "3 | 4",
    "3 to 4",
    "{3, 4}",
    "x = 3, x = 4",
    "Thus x = 3 and x = 4",
    "The answer is 3. Or 4.",
    "The answer is 3.\nOr maybe 4.",
    "The answer is 3. Alternatively, it is 4.",
    "The answer is 3, or the answer is 4.",
    "Maybe the answer is 3, perhaps the answer is 4.",
    "The answer is 3? The answer is 4?",
    "The answer is 3 for A and 4 for B.",
    "The answer is one of 3, 4.",
    "It is 3 for cats and 4 for dogs.",
    "It is 3 if x is odd, else 4.",
    "It may be 3 or it may be 4.",
    "It is 3 but also 4.",
    "It is 3, although some say 4.",
    "It lies between 3 and 4.",
    "Both 3 and 4 work.",
    "It is **3** for A and **4** for B.",
    "#### 3 or 4",
    "<answer>3, 4</answer>",
    r"\boxed{3} or 4",
    r"\boxed{3} or the final answer is 4",
    r"$\boxed{3}$ (or maybe $4$)",
    "\\boxed{3}\nor 4",
    r"\boxed{3} and \boxed{4}",
    r"\boxed{3 \text{ or } 4}",
    r"\boxed{3 \text{ cats, } 4 \text{ dogs}}",
    r"\boxed{3 \quad 4}",
    "It is neither 3 nor 4.",
    "It is not 3, and not 4.",
    "It isn't 3. It isn't 4.",
    "It can't be 3. It cannot be 4.",
    "3 is wrong, 4 is not the answer",
    r"**3\neq 4**",
    r"**3\lor 4**",
    r"The answer is **3\cup 4**",
    r"\boxed{**3\cdot 4**}",
    r"\boxed{**3\lor 4**}",
    r"\boxed{3}, or perhaps \boxed{4}",
    r"\boxed{3}, maybe \boxed{4}",
    r"$\boxed{3}$ or possibly $\boxed{4}$",
    r"\boxed{3} (alternatively \boxed{4})",
    r"Either \boxed{3} or else \boxed{4}",
    r"If even, \boxed{3}; if odd, \boxed{4}",
    r"\boxed{3} / \boxed{4}",
    r"\boxed{3}; \boxed{4}",
    r"\boxed{3} | \boxed{4}",
    r"\boxed{3}? \boxed{4}?",
    r"\boxed{3} + \boxed{4}",
    r"It is not \boxed{4}.",
    r"It cannot be $\boxed{3}$.",
    r"-\boxed{3}",
    r"\boxed{3}. Or \boxed{4}.",
    r"\boxed{3}. Otherwise, it is \boxed{4}.",
    r"\boxed{3}\text{ or }4",
    "The answer is 3. Or four.",
    r"\boxed{4} or five",
    r"\boxed{4} or $x=5$",
    r"\boxed{4}, 5",
    r"\boxed{4} and 5",
    r"$\boxed{4}$, $5$",
    "#### 3\nor 4",
    "<answer>3</answer> or 4",
    "<answer>3</answer>\nor 4",
    "<answer>3</answer>, 4",
    "<answer>3</answer> or <answer>4</answer>",
    "<answer>3</answer>, maybe <answer>4</answer>",
    "Answer: 3; 4; 5",
    "The answer is 4; 5; 6; 7",
    "Answer: 3. 4. 5.",
    "Answer: 3! 4",
    "The answer is 3. Otherwise 4.",
    "The answer is 3. If not, 4.",
    "The answer is 3. Could be 4.",
    "The answer is 3. It could also be 4.",
    "Answer: **3** 4",
    "Answer: 4 **3**",
    "**3** 4 5 6",
    "It is **3, 4**",
    "**Answer: 3, 4**",
    "It is **3 oder 4**.",
    "It is **3 cats and 4 dogs**.",
    "Answer: 4, 3</answer>",
    r"\boxed{3\text{ perhaps}}",
    r"\boxed{4\text{ maybe}}",
    r"\boxed{3\text{ four five}}",
    "It is 1+2 = 3 or 1+3 = 4.",
    "1+2 = 3 if odd, 1+3 = 4 if even",
    "If odd, 1+2 = 3; if even, 1+3 = 4",
    "If odd, 1+2 = 3. Else 1+3 = 4",
    "1+3=4 (or 3)",
    "Maybe 1+3 = 4",
    "It is not 1+3 = 4",
    "1+2 = 3 is wrong",
    "1+2 = 3 does not hold.",
    "If x is odd, 1+2 = 3, when even 4.",
    "It is 4 when even. If it is odd, 1+2 = 3.",
    "1+2 = 3 if not 4",
    "5-2 = 3 cats and 4 dogs",
    "In case of rain 1+2 = 3, in case of sun 4",
  ],
)
def test_hedging_earns_nothing(response):
  for judge in (math_reward, math_equal):
    assert not judge(response, "3")
    assert not judge(response, "4")


@pytest.mark.parametrize(
  ("response", "values"),
  [
    (r"**3\approx 4**", "3 4"),
    (r"The answer is **3\approx 4**", "3 4"),
    (r"\boxed{**3\approx 4**}", "3 4"),
    (r"The answer is $3$ \approx $4$", "3 4"),
    ("The answer is 3, then the answer is 4", "3 4"),
  ],
)
def test_no_response_is_paid_for_two_values(response, values):
  assert sum(math_reward(response, value) for value in values.split()) <= 1.0


@pytest.mark.parametrize(
  ("response", "values"),
  [
    (r"\boxed{A} or B", "A B"),
    (r"\boxed{A} or (B)", "A B"),
    (r"\boxed{x} or $y$", "x y"),
    (r"\boxed{\text{Monday}} or Tuesday", "Monday Tuesday"),
    ("A. B. C. D.", "A B C D"),
    ("A: B, C, D", "A B C D"),
    ("A. 3 B. 4", "A B 3 4"),
    ("A) 3 B) 4", "A B 3 4"),
    ("A. maybe B", "A B"),
    ("a) 3 b) 4", "A B 3 4"),
    ("Answer: A; B; C; D", "A B C D"),
    (r"\boxed{A. B. C. D}", "A B C D"),
    (r"\boxed{A: B: C: D}", "A B C D"),
    (r"\boxed{A. 3; B. 4}", "A B 3 4"),
    ("3 4", "34 3 4 7"),
    (r"\boxed{3 4}", "34 3 4 7"),
    (r"\boxed{3\quad 4}", "34 3 4 7"),
    ("The answer is 1 2 3.", "123 1 2 3 6"),
    ("#### 1 2 3", "123 1 2 3 6"),
  ],
)
def test_choices_listed_and_numbers_side_by_side_earn_nothing(response, values):
  assert not any(math_reward(response, value) for value in values.split())


@pytest.mark.parametrize(
  ("expression", "value"),
  [
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
    (r"|-4|", "4"),
    ("5!", "120"),
    (r"n = \log_2 8", "n = 3"),
    (r"\log_2 8", r"3\text{ cm}"),
    (r"(\log_2 8, 1)", "(3, 1)"),
  ],
)
def test_a_function_left_undone_earns_nothing(expression, value):
  assert math_reward(rf"\boxed{{{expression}}}", value) == 0.0
  assert math_reward(rf"\boxed{{{value}}}", value) == 1.0


@pytest.mark.parametrize(
  ("answer", "reference"),
  [
    (r"\sqrt{2}", r"\sqrt2"),
    ("2^{10}", "1024"),
    (r"\log 2", r"\log 2"),
    (r"2\ln 2", r"\ln 4"),
    (r"\tan^{-1} 2", r"\arctan 2"),
    (r"\ln 2", "0.693147"),
    (r"\frac{1+i}{2}", r"\frac12 + \frac{i}{2}"),
    ("12 345", "12345"),
    (r"\frac 1 2", "0.5"),
    (r"3\text{ cats}", "3"),
    (r"x + 3", "3 + x"),
  ],
)
def test_what_is_done_stays_right(answer, reference):
  assert math_reward(rf"\boxed{{{answer}}}", reference) == 1.0


@pytest.mark.parametrize(
  ("response", "reference"),
  [
    ("### Answer\n42", "42"),
    ("**Answer**\n\n**42**", "42"),
    ("Answer\n$$5$$", "5"),
    ("Let n = 5\nn = 5", "5"),
    ("Find the sum:\n2+3=5\nSo the sum is 5", "5"),
    ("First, find the cost\n2*2=4\n4+1=5", "5"),
    ("Subtract 3 from 8\n= 5", "5"),
  ],
)
def test_a_task_above_the_last_line_is_not_the_last_line(response, reference):
  assert math_reward(response, reference) == 1.0


@pytest.mark.parametrize(
  ("question", "reference"),
  [
    ("Simplify\n\\[\\frac{6x}{3}\\]", "2x"),
    ("Completely factor the expression: $$x^2 - 4$$", "(x-2)(x+2)"),
    ("Rewrite $\\sqrt[3]{27}$ as an integer.", "3"),
    ("For positive numbers $x$, find\n\\[x + x\\]", "2x"),
    ("Express 0.25 as a fraction.", "1/4"),
    ("Which is prime?\n\n(a) 4\n\n(b) 6\n\n(c) 7", "C"),
    ("Tom has 3 apples and 2 pears. How many pears has he?", "2"),
    ("Please compute 6.", "6"),
    ("Thus we ask what 3 + 4 is", "7"),
    ("He adds 3 + 4 apples", "4"),
    (r"The area is 8\sqrt{3} \text { square inches}", "3"),
    ("She needed 12 cups of flour to make 16 muffins.", "16"),
    ("It takes 8*12 = <<8*12=96>>96 cows for 8 stalls.", "8"),
    ("So there are 3 + 4 = 9 cats and 5 dogs.", "9"),
    ("Solve x + 3 = 9 for 2 cats", "9"),
    ("Given that 3 + 4 = 7, compute 5 + 6.", "7"),
    ("Evaluate 3 + 4 = 7", "7"),
    ("Find digits with 12 + 13 = 25.", "25"),
    ("3 + 4 = 7 thousand", "7"),
    ("3 + 4 = 7 minus 1", "7"),
    ("The answer is 12 because 3 + 4 = 7 and 7 + 5 makes 12.", "7"),
    (r"\boxed{[48]+[2]}", "50"),
  ],
)
def test_a_repeated_question_earns_nothing(question, reference):
  assert math_reward(question, reference) == 0.0
  assert not math_equal(question, reference)


def test_a_reference_may_be_a_whole_solution():
  assert math_equal("72", "48 / 2 = 24, and 48 + 24 = 72.\n#### 72")
  assert not math_equal("24", "48 / 2 = 24, and 48 + 24 = 72.\n#### 72")
  long = "We add and add. " * 60 + "So the answer is $14{,}916$. I hope it helps."
  assert math_reward(r"\boxed{14916}", long) == 1.0


def test_values_are_compared_only_where_they_are_sure():
  equal = [("(x+1)^2", "x^2+2x+1"), (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}2")]
  equal += [
    ("2a(b-c)", "2ab-2ac"),
    (r"e^{i\pi}", "-1"),
    ("3!", "6"),
    ("2\\cdot-x", "-2x"),
  ]
  different = [("x", "y"), ("2x", "x^2"), (r"\sqrt2", "1.41421"), ("ab", "a+b")]
  # A mixed number or a product, x^1 times 0 or x^10, 1/(2x) or x/2, a function or a
  # product, no value, too close to call, no expression.
  unsure = [(r"1\frac{1}{2}", "1.5"), ("x^10", "0"), ("1/2x", "x"), ("f(x)", "fx")]
  unsure += [("1/0", "1"), ("1+10^{-8}", "1"), ("sin x", "x"), (r"\sin x", "x")]
  unsure += [("((x)", "x"), ("", "x"), ("x=1", "1"), ("2^{9999}", "1"), ("[1]", "1")]
  unsure += [(r"\sqrt[3]{-8}", "-2"), ("abc", "cba")]
  assert [numeric.compare(*pair) for pair in equal] == [True] * len(equal)
  assert [numeric.compare(*pair) for pair in different] == [False] * len(different)
  assert [numeric.compare(*pair) for pair in unsure] == [None] * len(unsure)


@pytest.mark.parametrize(
  "piece",
  [
    "#",
    "#### ",
    "\n####",
    "answer is \\[\n",
    "answer to ",
    "answer ",
    "answer is $$\n",
    "\\boxed{",
    "\\boxed{3} ",
    "\\fbox  ",
    "{",
    "\\",
    "1",
    " ",
    "*",
    "\x00",
    "So ",
    "So $",
    "Therefore, $",
    "is ",
    "$",
    " or ",
    "\\boxed{3}$, $",
    "(",
    "<<",
    "<|",
    "1 and ",
    "$1$ ",
    "= **1** ",
    "1+1=",
    "certainty: 1",
    "\\begin{align}=",
    "wrong answer: 3 ",
    "</s>",
    "if 3 x 3 = 9 and ",
  ],
)
def test_a_megabyte_of_anything_is_judged_in_seconds(piece):
  for text in (piece * (1_000_000 // len(piece)), "answer is" + piece * 300_000):
    start = time.process_time()
    math_reward(text, "5")
    assert time.process_time() - start < 4.0


def test_verification_works_off_the_main_thread_and_logs_nothing(caplog):
  results = []

  def work():
    results.append(math_reward(r"\boxed{\frac{\sqrt{4}}{2} x}", "x + 0"))
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


def test_every_gsm8k_reference_solution_scores_one():
  path = pathlib.Path(os.environ.get("OPO_DATA_DIR", "")) / "gsm8k" / "test.jsonl"
  if not os.environ.get("OPO_DATA_DIR") or not path.exists():
    pytest.skip("needs the real GSM8K: set OPO_DATA_DIR to a directory with gsm8k/")
  solutions = [json.loads(line)["answer"] for line in path.open()]
  references = [s.partition("####")[2].replace(",", "").strip() for s in solutions]
  shifted = [*references[1:], references[0]]
  with RewardPool(math_reward, workers=2, timeout_s=5.0) as pool:
    assert pool.score(solutions, references) == [1.0] * 1319
    same = sum(float(a) == float(b) for a, b in zip(references, shifted, strict=True))
    assert sum(pool.score(solutions, shifted)) == same
    # Without the mark, from its last sentence: nine in ten, and no other number.
    sentences = [solution.partition("\n####")[0] for solution in solutions]
    assert sum(pool.score(sentences, references)) >= 1180
    for score, answer, other in zip(
      pool.score(sentences, shifted), references, shifted, strict=True
    ):
      assert not score or float(answer) == float(other)
    assert pool.last_errors == []


def test_math500_solutions_score_one_and_hostile_answers_stop_nothing():
  path = pathlib.Path(os.environ.get("OPO_DATA_DIR", "")) / "math500" / "test.jsonl"
  if not os.environ.get("OPO_DATA_DIR") or not path.exists():
    pytest.skip(
      "needs the real MATH-500: set OPO_DATA_DIR to a directory with math500/"
    )
  rows = [json.loads(line) for line in path.open()]
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
  with RewardPool(math_reward, workers=2, timeout_s=3.0) as pool:
    references = [r["answer"] for r in rows]
    assert pool.score([r["solution"] for r in rows], references) == [1.0] * 500
    scores = pool.score(hostile + respelled, ["5"] * len(hostile) + references)
    assert all(not score for score in scores[: len(hostile)])
    assert sum(score == 1.0 for score in scores[len(hostile) :]) == 500
