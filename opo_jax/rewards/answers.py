r"""Which answer of a response is its final one: boxes and marks.

Repetitions in the patterns are bounded wherever a search could start again inside of
them: no text of a megabyte takes quadratic time.
"""

import re
from typing import NamedTuple

_BRACE = re.compile(
  r"\\(?:boxed|fbox)\s{0,4}(?:(?P<open>\{)|(?P<bare>[^\s{}$\\]+))|(?P<brace>[{}])|\\."
)
_FILLED = re.compile(r"\S")
_MARK = re.compile(
  r"""
  (?<!\#) \#{4} (?!\#) (?= [^\n]{0,200}? [\d\\] ) :? (?P<hashes> [^\n]* )
  | <answer> (?P<tagged> [^<]{1,500} ) </answer>
  | \banswer\b (?: \ to\b [^.:\n]{0,80}? )?
    \*{0,2} \s{0,4} (?: \bis\b | \bare\b | [:=] ) \s{0,4} :? \*{0,2} \s{0,20}
    (?= (?P<phrase> \$\$ .{1,500}? \$\$ | \\\[ .{1,500}? \\\] | [^\n]{1,1000} ) )
  """,
  re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.;?!](?=\s|$)|</answer>")
_OR = "(?:or|maybe|perhaps|possibly)"
_HEDGE = (
  rf"(?:{_OR}|alternatively|otherwise|else|either|if(?:\snot)?|also"
  r"|(?:could|might|may)\s(?:also\s)?(?:be|equal))"
)
_FILLER = (
  r"(?:any|the|my|your|this|that|it|is|be|use|think|believe|say|sure|equal|to"
  r"|following|final|correct|right|answer)"
)
# "This is not my final", "the wrong", before an answer; of a mark also "or maybe the".
_DENIED = re.compile(
  r"(?:\b(?:not|never|nor|neither|cannot|ignore|wrong|incorrect|invalid|false|fake"
  r"|previous|old|rejected|tentative|non-final)|n['\u2019]t|\\neq?)"
  rf"\W+(?:(?:{_FILLER}|an?)\W+){{0,6}}$",
  re.IGNORECASE,
)
_HEDGED = re.compile(rf"\b{_HEDGE}\W+(?:{_FILLER}\W+){{0,6}}$", re.IGNORECASE)
_SIGNED = re.compile(r"(?:^|[\s$=(])[-\u2212]$|\d$")  # -\boxed{4}, 3\boxed{4}
_LATEX = re.compile(r"\\(?:text|mbox|q?quad)|[A-Za-z]_\w|[\\{}$()[\]=]")
_ONLY_HEDGES = re.compile(
  rf"\W*(?:{_HEDGE}|and)\b\W*(?:(?:{_HEDGE}|{_FILLER}|and)\b\W*)*", re.IGNORECASE
)
_VALUE = r"(?:-?\d[\d.,/]{0,20}(?<![,.])|[A-Z]\b)"
_WORDS = r"(?: \w{1,20} [$)}*]{0,3} [ =]? ){1,3}"
_END = r"(?=[$)*}]{0,3}(?:[.,;!?](?:\s|$)|[ \t]*(?:\n|$)))"
# "?", " is wrong", ", 5.", " and $5$", ". Or maybe $4$", " or five." behind an answer.
_CONTINUED = re.compile(
  rf"""
  (?: [$)*\}}\s] | \\[)\]] ){{0,8}}
  (?: \?
  | (?:is|was)\s(?:wrong|incorrect|not)\b
  | [ \t]* (?: [,;/|&] | ,?\s?and\b ) [ \t]{{0,3}} (?: \$[^$=\n]{{1,40}}\$
    | [$(*]{{0,3}} {_VALUE} ) {_END}
  | [.!] [ \t]{{1,4}} [$(*]{{0,3}} {_VALUE} {_END}
  | [.,;:!(\s]{{0,8}} (?:\\text\s?\{{\s?)? (?:it\s|the\sanswer\s)? \b{_HEDGE}\b
    (?: [\s,:$({{}}*\\]{{1,4}} (?:{_HEDGE}|{_FILLER}|text)\b ){{0,8}}
    [\s,:$({{}}*\\]{{1,4}} [-<\d\\]
  | (?: [,(\s]{{0,4}} \b{_OR}\b [\s,($*]{{1,4}} {_WORDS} | [.;!]\s {_OR}\s \w{{1,20}} )
    (?= [.;!?](?:\s|$) | \n | $ )
  )
  """,
  re.VERBOSE | re.IGNORECASE,
)


class _Span(NamedTuple):
  """An answer, and where its box or mark starts and ends."""

  answer: str
  start: int
  end: int


def final_answer(response: str) -> str | None:
  r"""Returns the final answer of a response as it is written, None if it has none.

  Of the text behind the last `</think>`:

    1. The last `\boxed{…}` that is not empty. Boxes in a row, with a comma, "and" or a
       hedge between them, are one answer: a list.
    2. Without a box the last mark: `#### N` to the end of the line,
       `<answer>N</answer>`, "answer is N" or "answer: N" to the end of the sentence.

  None where there is neither, where the text ends inside of an open box, and where the
  answer is denied ("not `\boxed{4}`", "wrong answer: 4"; the mark before it counts
  instead), has a sign or a digit right before its box, or goes on: "?", "is wrong",
  another value (", 5"), or an alternative ("Or maybe 4").

  >>> final_answer(r"First \boxed{3}. No: \boxed{4} or \boxed{5}.")
  '4, 5'
  >>> final_answer("The answer is 3. Or 4."), final_answer("It is 3.")
  (None, None)
  """
  text = response.rpartition("</think>")[2].rstrip()
  boxes, is_open = _boxes(text)
  if is_open:
    return None
  span = _joined(text, boxes) if boxes else _last_mark(text)
  if span is None or _CONTINUED.match(text, span.end):
    return None
  if boxes:
    before = text[max(0, span.start - 60) : span.start]
    if _SIGNED.search(before) or _DENIED.search(before.rpartition("\n")[2]):
      return None
  return span.answer.strip("* \t\n") or None  # "**Answer: 4**"


def boxed(text: str) -> str | None:
  """Rule 1 of `final_answer` alone: None if there is no box or the last one is open."""
  boxes, is_open = _boxes(text)
  return _joined(text, boxes).answer if boxes and not is_open else None


def _boxes(text: str) -> tuple[list[_Span], bool]:
  """Returns the outermost boxes that hold something, and whether the text ends in one.

  One pass over the braces; `stack` holds the open ones.
  """
  spans, stack = [], []  # A span: (start, end, start and end of the content).
  starts = [at for at in map(text.find, (r"\boxed", r"\fbox")) if at >= 0]
  for match in _BRACE.finditer(text, min(starts, default=len(text))):
    if match["open"] or match["brace"] == "{":
      stack.append(match)
    elif match["bare"]:
      spans.append((match.start(), match.end(), *match.span("bare")))
    elif match["brace"] == "}" and stack:
      opening = stack.pop()
      if opening["open"] and _FILLED.search(text, opening.end(), match.start()):
        while spans and spans[-1][0] > opening.start():
          spans.pop()
        spans.append((opening.start(), match.end(), opening.end(), match.start()))
  last = spans[-1][1] if spans else 0
  is_open = any(opening["open"] and opening.start() >= last for opening in stack)
  return [_Span(text[a:b], start, end) for start, end, a, b in spans], is_open


def _joined(text: str, boxes: list[_Span]) -> _Span:
  """Joins the last box with those before it that belong to the same list."""
  first = len(boxes) - 1
  while first and _is_list_link(text[boxes[first - 1].end : boxes[first].start]):
    first -= 1
  answer = ", ".join(box.answer for box in boxes[first:])
  return _Span(answer, boxes[first].start, boxes[-1].end)


def _is_list_link(between: str) -> bool:
  r"""Whether the text between two boxes makes a list of them.

  No words but "and" and "or" (`\boxed{3}, \boxed{4}`), only hedges (". Maybe"), or a
  clause that ends with "and" or holds a hedge (`\boxed{3}` cats and `\boxed{4}` dogs).
  """
  if len(between) > 60:
    return False
  plain = _LATEX.sub(" ", between)
  if not re.search("[A-Za-z]", plain):
    return "\n" not in between or bool(plain.strip())
  if _ONLY_HEDGES.fullmatch(plain):
    return True
  if re.search(r"[.:!?\n]", between):
    return False
  return bool(re.search(rf"\band\s*$|\b{_HEDGE}\b", plain, re.IGNORECASE))


def _last_mark(text: str) -> _Span | None:
  """Returns the last marked answer that no denial or hedge precedes."""
  for mark in reversed(list(_MARK.finditer(text))):
    before = text[max(0, mark.start() - 60) : mark.start()].rpartition("\n")[2]
    if _DENIED.search(before) or _HEDGED.search(before):
      continue
    if mark["phrase"] is None:
      return _Span(mark["hashes"] or mark["tagged"], mark.start(), mark.end())
    phrase = _SENTENCE_END.split(mark["phrase"], maxsplit=1)[0]
    start = mark.start("phrase")
    return _Span(phrase, start, start + len(phrase))
  return None
