"""Responses of a policy to a benchmark, and the file that holds them.

Every metric is a function of `Response`s, the lines of `<benchmark>.responses.jsonl`:
it can be recomputed without the policy, and two policies can be paired problem by
problem. `collect` samples what the file lacks; sampling and verification are the
caller's.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Response:
  """One sampled response to one problem: a line of `<benchmark>.responses.jsonl`.

  Attributes:
    id: of the problem.
    sample: 0 to n - 1.
    response: the text, without special tokens.
    reference: the reference answer.
    answer: the final answer, normalised; None where the response has none, or where the
      verifier extracts none.
    reward: above 0.5 is correct; None is unscorable.
    length: tokens, the end token included.
    finished: False where the length limit truncated the response.
    true_score: from a benchmark's own formula, which the reward does not see; else
      None.
  """

  id: str
  sample: int
  response: str
  reference: str
  answer: str | None
  reward: float | None
  length: int
  finished: bool
  true_score: float | None = None


def by_problem(responses: Sequence[Response]) -> dict[str, list[Response]]:
  """Groups responses by problem id.

  >>> row = Response("a", 0, "7", "7", "7", 1.0, 2, True)
  >>> [*by_problem([row, dataclasses.replace(row, id="b")])]
  ['a', 'b']
  """
  problems: dict[str, list[Response]] = {}
  for response in responses:
    problems.setdefault(response.id, []).append(response)
  return problems


def collect(
  respond: Callable[[int, int], Sequence[Response]],
  problems: Sequence[tuple[str, str]],
  path: pathlib.Path,
  *,
  samples: int,
  chunk: int,
) -> list[Response]:
  """Completes a file of responses, a chunk of problems at a time; returns all of them.

  Responses in the file are not sampled again: `collect` resumes after the last complete
  problem, and a longer list of problems only adds the new ones.

  Args:
    respond: (first, last) -> responses to the problems first ... last - 1, `samples`
      consecutive ones to each.
    problems: (id, reference) of every problem.
    path: JSON lines; created if it is missing.
    samples: n.
    chunk: problems between two writes; a kill loses at most so many.

  Raises:
    ValueError: the file holds responses to other problems, or is malformed before its
      last line.

  >>> import tempfile
  >>> def respond(first, last):
  ...   print("problems", first, "to", last)
  ...   return [Response(i, 0, "7", "7", "7", 1.0, 2, True) for i in "abc"[first:last]]
  >>> problems = [("a", "7"), ("b", "7"), ("c", "7")]
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   path = pathlib.Path(directory, "sums.responses.jsonl")
  ...   _ = collect(respond, problems[:2], path, samples=1, chunk=2)
  ...   len(collect(respond, problems, path, samples=1, chunk=2))
  problems 0 to 2
  problems 2 to 3
  3
  """
  lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
  # The last line lacks its newline where a kill cut it, the last problem some samples.
  num_complete = len(lines) // samples
  kept = lines[: num_complete * samples]
  rows = [_parse(line, path, number) for number, line in enumerate(kept, start=1)]
  for (problem, reference), row in zip(problems, rows[::samples], strict=False):
    if (row.id, row.reference) != (problem, reference):
      raise ValueError(
        f"{path} answers {row.id!r} (reference {row.reference!r}) where the benchmark"
        f" now has {problem!r} (reference {reference!r}); move the file away."
      )
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("ab") as file:
    file.truncate(sum(len(line) + 1 for line in kept))
    for first in range(num_complete, len(problems), chunk):
      new = respond(first, min(first + chunk, len(problems)))
      text = "".join(
        json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in new
      )
      # A byte-level tokenizer may leave half a character in a response.
      file.write(text.encode("utf-8", errors="replace"))
      file.flush()
      rows += new
  return rows[: len(problems) * samples]


def read_responses(path: pathlib.Path) -> list[Response]:
  """Reads the complete lines of a file of responses; [] if the file does not exist.

  >>> read_responses(pathlib.Path("no such file"))
  []
  """
  lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
  return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, path: pathlib.Path, number: int) -> Response:
  try:
    return Response(**json.loads(line))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path}, line {number} is no response ({error}).") from error
