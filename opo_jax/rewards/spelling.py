"""One spelling for an answer: what does not change it is taken off.

No value is computed here: that is the work of `rewards.math_verifier`.
"""

import fractions
import functools
import re

from opo_jax.rewards.answers import boxed

_DELIMITERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")]
_DELIMITERS += [("**", "**"), ("__", "__"), ("_", "_")]
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
# Letters are units only where they are set as text: 5s is a product.
_UNIT_COMMAND = re.compile(
  r"(?<=[\d}])(?:\s|\\[,;: ]|~)*\\(?:text|mathrm|rm)\s*"
  r"\{\s*(?:[shJNWVAKLFT]|Hz|Pa|min)\s*\}"
)
# Signs that people type, as LaTeX has them.
_SIGNS = {
  "\u2212": "-",
  "\u2013": "-",
  "\u00d7": r"\times ",
  "\u00b7": r"\cdot ",
  "\u00f7": "/",
  "\u2044": "/",
  "\u00b1": r"\pm ",
  "\u221e": r"\infty ",
  "\u2264": r"\le ",
  "\u2265": r"\ge ",
  "\u222a": r"\cup ",
  "\u2229": r"\cap ",
  "\u2208": r"\in ",
  "\u2205": r"\emptyset ",
  "\u211d": r"\mathbb{R}",
  "\u03c0": r"\pi ",
  "\u03b8": r"\theta ",
  "\u2248": r"\approx ",
  "\u2260": r"\ne ",
  "\u00b2": "^2",
  "\u00b3": "^3",
  "\u00bd": r"\frac12",
  "\u00bc": r"\frac14",
  "\u00be": r"\frac34",
  "\u6216": " or ",
  "\u3001": ", ",
}
_SIGNS |= {chr(code + 0xFEE0): chr(code) for code in range(33, 127)}  # full width
_SIGNS = str.maketrans(_SIGNS)
_GREEK = "alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|tau|phi|omega"
_FUNCTIONS = "(?:arc)?(?:sin|cos|tan)|(?:sin|cos|tan)h|cot|csc|ln|log"
_SPELLINGS = [
  (re.compile(r"(?<![\\A-Za-z])([dtc]?frac|sqrt)(?=\s*[{\[])"), r"\\\1"),
  (re.compile(r"(?<=\d)(or|and)(?=[A-Za-z(])"), r" \1 "),
  (re.compile(r"^(?:minus|negative) (?=\d)"), "-"),
  (re.compile(r"\bFraction\((-?\d+), ?(\d+)\)"), r"\1/\2"),
  (re.compile(r"^\(?(-?[\d.]+ ?[-+] ?[\d.]*)j\)?$"), r"\1i"),
  (re.compile(r"(?<=[*^+/-])\[([^\[\],;]*)\]"), r"(\1)"),
  (re.compile(rf"(?<![\\A-Za-z])({_GREEK})(?=\s?[-+*/^)_=]|$)"), r"\\\1 "),
  (re.compile(r"^(?:USD|EUR|GBP|INR|CNY|RMB|Rs\.?) ?(?=\d)"), ""),
  (re.compile(r"^m? ?\\angle ?(?=[A-Z].*=)"), ""),
  (re.compile(r"\\vec ?(?:\{ ?([A-Za-z]) ?\}|([a-z])(?![a-z]))"), r"\1\2"),
  (re.compile(r"\\langle(?![a-z])"), "("),
  (re.compile(r"\\rangle(?![a-z])"), ")"),
  (
    re.compile(  # x > 3 of {x | x > 3}
      r"^\\?\{ ?[a-z] ?(?:\\in ?\\mathbb ?\{R\} ?)?(?:\\mid(?![a-z])|\||:)"
      r"(.*(?:[<>]|\\[gl]e ).*[^\\])\\?\}$"
    ),
    r"\1",
  ),
  (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
  (re.compile(r"\\colon(?![A-Za-z])"), ":"),
  (re.compile(r"\ball real numbers\b", re.IGNORECASE), r"\\mathbb{R}"),
  (re.compile(r"\\lt(?![A-Za-z])"), "<"),
  (re.compile(r"\\(?:land(?![a-z])|wedge(?![a-z])|&)(?=.*=)"), " and "),
  (re.compile(r"\\([gl])eq(?:q|slant)?(?![A-Za-z])"), r"\\\1e "),
  (re.compile(r"^[fgh] ?\( ?[a-z] ?\) ?="), "y ="),
  (re.compile(r"\\gt(?![A-Za-z])"), ">"),
  (re.compile(r"[!/]=|=/=|\\neq(?![A-Za-z])|\\not\s*="), r"\\ne "),
  (re.compile(r"\u221a\s*(\d+|[A-Za-z])"), r"\\sqrt{\1}"),
  (re.compile(r"\u221b\s*(\d+|[A-Za-z])"), r"\\sqrt[3]{\1}"),
  (re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?=\s*[(\\^_]| [a-z]\b| \d)"), r"\\\1"),
  (re.compile(r"(?<![\\A-Za-z])(?:inf(?:inity)?|oo)(?![A-Za-z])"), r"\\infty "),
  (re.compile(r"(?<![A-Za-z])\\?exp ?\(([^()]*)\)"), r"e^{\1}"),
  (re.compile(r"\^\s*\(([^()]*)\)"), r"^{\1}"),
  (re.compile(r"(?:\u221a|(?<![\\A-Za-z])sqrt)\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
  (re.compile(r"\{\s*([^{}\\]+?)\s*\\over\s*([^{}\\]+?)\s*\}"), r"\\frac{\1}{\2}"),
]
_LEAD = re.compile(
  r"^(?:(?:the |my )?(?:final )?answer(?: (?:is|are)\b:?| ?:)|\\approx(?![a-z])|~)\s*",
  re.IGNORECASE,
)


_SPACE = re.compile(
  r"\\(?:m?left|m?right|displaystyle|(?:neg)?(?:thin|med|thick)space|enspace)(?![a-z])"
)
# Of 1$000 and 3\\hfill 400 no one number.
_BETWEEN = re.compile(r"\\hfill?(?![a-z])|(?<=\d)(?:\$ \$|\\?[$€£¥])(?=\d)")
_MIXED = re.compile(r"(\d+(?: \d{3})*?) (\d+) ?/ ?(\d+)")


def _mixed(match: re.Match) -> str:
  r"""One number of the two of `1 000 4/9`: `1000\frac{4}{9}`."""
  return rf"{match[1].replace(' ', '')}\frac{{{match[2]}}}{{{match[3]}}}"


_POINTED = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{3}){2,}(?![\d.])")  # 1.000.000
_ZEROS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=\d) ?({'|'.join(_ZEROS)})\b", re.IGNORECASE)


NUMBER_WORDS = re.split(
  " ", "zero one two three four five six seven eight nine ten eleven twelve"
)
NUMBER_WORDS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
NUMBER_WORDS["half"] = r"\frac12"
WORD = re.compile(
  r"(?<![\\A-Za-z])(?!(?:sqrt|sin|cos|tan|cot|sec|csc|log|exp|max|min|det)(?![a-z]))"
  r"[A-Za-z]{3,}"
)
_ENVIRONMENT = re.compile(
  r"\\(?:begin|end|operatorname\*?|mathbb|mathcal)\s*\{\w+\*?\}"
)


_PLAIN = re.compile(r" ?(-?\d+(?:\.\d+)?)")


@functools.lru_cache(maxsize=4096)
def tidy(text: str) -> str:
  """Takes off what does not change an answer: box, delimiters, currency, spacing."""
  if number := _PLAIN.fullmatch(text):
    return number[1]  # Most answers of GSM8K, in a third of the time.
  if inside := boxed(text):
    return tidy(inside)
  if not text.isascii():
    text = text.translate(_SIGNS)
  text = _UNIT_COMMAND.sub("", text)
  if "..." in text or r"\ldots" in text:
    text = _GOES_ON.sub(_repeating, text)
  text = re.sub(r"[\s\x00]+", " ", _TEXT_COMMAND.sub(r" \1 ", text))
  bare = None
  while bare != text:
    bare = text
    text = text.strip(" `").rstrip(".,;:")
    text = re.sub(r"(?<!\\)\\$", "", text)  # what `\ ` leaves
    if text.endswith("}") and text.count("}") > text.count("{"):
      text = text[:-1]
    for opening, closing in _DELIMITERS:
      if text.startswith(opening) and text[len(opening) :].endswith(closing):
        text = text[len(opening) : -len(closing)]
  text = re.sub(r"(?<=\d),\\!\s*(?=\d{3}(?!\d))", ",", text)
  text = _SPACE.sub(" ", _BETWEEN.sub(", ", text))
  text = re.sub(r"(?<!\d)\\?[$€£¥]|\\?[$€£¥](?!\d)|(?<!\\)\\[()\[\]!]", "", text)
  for pattern, spelling in _SPELLINGS:
    text = pattern.sub(spelling, text)
  text = _REPEATING.sub(_repeating, text)
  text = text.replace("**", "^").replace("{,}", ",").replace(r"\%", "%")
  text = re.sub(r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", "", text)
  text = re.sub(r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-z]))|~", " ", text)
  text = _MIXED.sub(_mixed, text)
  text = _POINTED.sub(lambda match: match[0].replace(".", ""), text)
  text = _SCALE.sub(lambda match: f"e{_ZEROS[match[1].casefold()]}", text)
  text = re.sub(r"(?<![\\A-Za-z])(?:pi|PI)(?![A-Za-z])", r"\\pi", text).strip()
  if "," not in text:
    text = text.replace(";", ", ")
  text = _LEAD.sub("", text, count=1)
  return NUMBER_WORDS.get(text.casefold(), text)


# C, (C), "Option C", "(C) 12" and "C: 12"; not "(C) or (D)".
CHOICE = re.compile(
  r"(?:(?:option|choice)\s*)?(?:([A-E])|\(\s*([A-E])\s*\))"
  r"(?:(?:(?<=\))\s|\s*[).:](?!\d))(?!.*(?:\bor\b|\([A-E]\)|(?-i:\s[A-E]\b)|\s[a-e][).]))(?P<content>.*))?",
  re.IGNORECASE,
)


# "C Cecile" as a reference is C; "A dog" is a dog.
LABELLED = re.compile(r"([B-E]) [A-Z][a-z]+")
_VERDICTS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_GROUPS = re.compile(r"-? ?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_SPACES = re.compile(r"(?<!\d) +| +(?!\d)")  # That of "3 4" is no nothing.


def canonical(text: str) -> str:
  """Gives a form in which the same words, or the same symbols, are the same string."""
  if _PLAIN.fullmatch(text):
    return text
  if verdict := _VERDICTS.get(text.casefold()):
    return verdict
  if choice := CHOICE.fullmatch(text):
    return (choice[1] or choice[2]).upper()
  if re.fullmatch(r"\(\s*[A-Za-z]\s*\)", text):
    text = text.strip("() ")
  if WORD.search(text):
    return " ".join(text.casefold().split())
  text = " ".join(text.split())
  if clock := _CLOCK.fullmatch(text):
    return _on_24_hours(clock)
  if _GROUPS.fullmatch(text):
    return text.replace(" ", "")
  return _SPACES.sub("", text)


_CLOCK = re.compile(
  r"([01]?\d|2[0-3])\s?:\s?([0-5]\d)(?::([0-5]\d))?(?: ?([ap])\.? ?m\.?)?",
  re.IGNORECASE,
)


def _on_24_hours(clock: re.Match) -> str:
  """The time of day as 20:34, of "8:34 PM" and of 20:34:00; ratios stay, as 3:4."""
  hour, half = int(clock[1]), (clock[4] or "").casefold()
  if half and 1 <= hour <= 12:
    hour = hour % 12 + 12 * (half == "p")
  seconds = f":{clock[3]}" if clock[3] not in (None, "00") else ""
  return f"{hour}:{clock[2]}{seconds}"


# 0.333...
_GOES_ON = re.compile(
  r"(?<![\d,])(\d{0,9})\.(\d{0,3}?)(\d{1,3}?)\3{2,9}(?![\d{]|\.\.\.\d)(?:\.\.\.|\s?\\ldots)"
)
_REPEATING = re.compile(r"(\d{0,9})\.(\d{0,9})\\overline\s*\{\s*(\d{1,9})\s*\}")


def _repeating(match: re.Match) -> str:
  r"""The fraction of a repeating decimal: `0.\overline{3}` is `\frac{1}{3}`."""
  whole, fixed, digits = match[1] or "0", match[2], match[3]
  start = fractions.Fraction(int(whole + fixed), 10 ** len(fixed))
  cycle = fractions.Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(fixed))
  total = start + cycle
  is_whole = total.denominator == 1
  return (
    str(total) if is_whole else rf"\frac{{{total.numerator}}}{{{total.denominator}}}"
  )


def has_words(text: str) -> bool:
  return bool(WORD.search(_ENVIRONMENT.sub("", text)))
