"""Data sources: loads problems by the name of a data set, or from a user's file.

A name of `SOURCES` is read from `$OPO_DATA_DIR` if that variable is set, else
downloaded from its public origin; `jsonl:PATH`, `parquet:PATH` and `hf:OWNER/NAME` are
a user's own data. All are prepared once (`data.builders`) and then read row by row. A
mixture, "gsm8k:1 math:2", has several names with weights.
"""

import dataclasses
import difflib
import functools
import hashlib
import io
import json
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from opo_jax.data import arithmetic, builders, decontaminate, preferences
from opo_jax.data.prompts import Problem
from opo_jax.data.stream import MixtureStream, ProblemStream
from opo_jax.rewards.answers import boxed

__all__ = ["SOURCES", "MixtureStream", "ProblemStream", "load", "parse_mixture"]

# Generated, without a file.
EMBEDDED = {"arithmetic": arithmetic.load, "preferences": preferences.load}

_GITHUB = "https://raw.githubusercontent.com"
_HUB = "https://huggingface.co/datasets"
_GSM8K = f"{_GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
_HARNESS = (
  f"{_GITHUB}/ZubinGou/math-evaluation-harness/db77bc6bb2a17c90ed2d63e88ebd8c40a82858c5"
)
_QWEN = f"{_GITHUB}/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465"
_RLLM = f"{_GITHUB}/rllm-org/rllm/cb1890e2bdfbd028141a290cc70b32e8fc5b50a1"
_NEMO = f"{_GITHUB}/NVIDIA/NeMo-Skills/0b012df8a09cd4730d31b16e90a0d8f13d145fb8"


@dataclasses.dataclass(frozen=True)
class File:
  """A file of problems: JSON lines, a JSON list, or Parquet (by its suffix).

  Attributes:
    url: its public origin.
    local: its path below `$OPO_DATA_DIR`, possibly in another format: rows are read by
      their keys.
    sha256: of the content at the origin; None: `builders.download` stores that of the
      first download.
  """

  url: str
  local: str
  sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set: the files of each split, in order.

  Attributes:
    homepage: its description.
    splits: split -> its files.
    row: row -> question and answer; raises KeyError and the like for a malformed row.
    example: a well-formed row, for errors.
    is_clean: whether every row is used. Otherwise rows without an answer and duplicates
      of an earlier question are dropped.
    without: a data set whose test problems are dropped as well.
  """

  homepage: str
  splits: dict[str, tuple[File, ...]]
  row: Callable[[dict[str, Any]], tuple[str, str]]
  example: str = '{"problem": "…", "answer": "18"}'
  is_clean: bool = True
  without: str = ""


def load(
  name: str, split: str, *, prompt_field: str = "", answer_field: str = ""
) -> Sequence[Problem]:
  """Loads the problems of one split, in the order of the original file.

  The first use prepares the data set in TFDS's directory (`$TFDS_DATA_DIR`, else
  `~/tensorflow_datasets`); later uses read it from there without a network. Rows are
  decoded on access.

  Args:
    name: a key of `SOURCES`; or `jsonl:PATH` or `parquet:PATH`, one file for both
      splits; or `hf:OWNER/NAME` or `hf:OWNER/NAME/CONFIG`, a data set of the Hugging
      Face hub with that split.
    split: "train" or "test".
    prompt_field: key of the question in a user's own data; empty: the first of
      `prompt`, `problem`, `question` that exists.
    answer_field: key of the answer; empty: `answer`, `solution` or `final_answer`. An
      answer that ends with `#### N` is N.

  Returns:
    A read-only sequence, indexed by integers, negative integers and slices.

  Raises:
    ValueError: unknown name or split, malformed file, or inaccessible data.

  Example: `load("gsm8k", "test")[0].answer` is "18".
  """
  kind, colon, place = name.partition(":")
  if colon and kind in ("jsonl", "parquet", "hf"):
    row = functools.partial(_own_row, prompt_field, answer_field)
    return _load_own(kind, place, split, row, f"{prompt_field}|{answer_field}")
  if name in EMBEDDED:
    return EMBEDDED[name](split)
  if name not in SOURCES:
    own = ("jsonl:PATH", "parquet:PATH", "hf:OWNER/NAME")
    raise ValueError(_unknown("data source", name, [*SOURCES, *EMBEDDED, *own]))
  source = SOURCES[name]
  if split not in source.splits:
    raise ValueError(_unknown(f"split of {name}", split, list(source.splits)))
  config = "public"
  if os.environ.get("OPO_DATA_DIR"):
    files = [file for files in source.splits.values() for file in files]
    if source.without:
      files += SOURCES[source.without].splits["test"]
    sums = {file.local: hashlib.sha256(_read(file)).hexdigest() for file in files}
    if sums != {file.local: file.sha256 for file in files}:
      # Not the authors' files: their content names the prepared data, so that an edited
      # file never yields old rows.
      config = _config_of(json.dumps(sums, sort_keys=True).encode())
  parsers = {each: functools.partial(_parse, name, each) for each in source.splits}
  builder = builders.prepare(name, config, parsers, homepage=source.homepage)
  return builders.Prepared(builder, split)


def parse_mixture(text: str) -> dict[str, float]:
  """Parses a mixture: `NAME` or `NAME:WEIGHT`, separated by spaces.

  Args:
    text: as in a shell: quote a path with spaces.

  Returns:
    name -> weight, 1 by default.

  Raises:
    ValueError: no name, a repeated name, a weight of 0, or two files of one name, whose
      problems would have equal ids.

  >>> parse_mixture("gsm8k:1 math:2.5 jsonl:own.jsonl")
  {'gsm8k': 1.0, 'math': 2.5, 'jsonl:own.jsonl': 1.0}
  """
  weights: dict[str, float] = {}
  for part in shlex.split(text):
    match = re.fullmatch(r"(.+?):(\d+(?:\.\d*)?|\.\d+)", part)
    name, weight = (match[1], float(match[2])) if match else (part, 1.0)
    if name in weights or weight == 0:
      raise ValueError(
        f"the mixture {text!r} has {name} twice or with weight 0; name each source once"
        ' (--data.train "gsm8k:1 math:2").'
      )
    weights[name] = weight
  files = [name for name in weights if name.startswith(("jsonl:", "parquet:"))]
  stems = [pathlib.PurePath(name).stem for name in files]
  if twice := {stem for stem in stems if stems.count(stem) > 1}:
    raise ValueError(
      f"the mixture {text!r} has two files named {twice.pop()}, whose problems would"
      " have the same ids; rename one."
    )
  if not weights:
    raise ValueError(f"no data source is named; there are: {', '.join(SOURCES)}.")
  return weights


# --- Rows ---


def _gsm8k_row(row: dict[str, Any]) -> tuple[str, str]:
  answer = re.search(r"####([^\n]*)\s*\Z", row["answer"]).group(1)
  return row["question"], answer.replace(",", "").strip()


def _problem_row(row: dict[str, Any]) -> tuple[str, str]:
  """Reads a row of MATH or of the competitions, whose keys differ between origins."""
  question = row["problem"] if "problem" in row else row["question"]
  answer = row["answer"] if "answer" in row else row.get("expected_answer")
  if answer is None and "solution" in row:  # MATH has it in the solution only.
    answer = boxed(row["solution"])
  if answer is None:
    answer = ""
  if isinstance(answer, float) and answer.is_integer():
    answer = int(answer)
  return question, str(answer).strip()


_INSTRUCTION = re.compile(r"\s*(?:Let's think|Please reason) step by step")


def _skywork_row(row: dict[str, Any]) -> tuple[str, str]:
  """Reads a row of Skywork-OR1, without the instruction appended to the question."""
  question = row["prompt"][0]["content"]
  question, *_ = _INSTRUCTION.split(question)
  answer, *_ = json.loads(row["reward_model"]["ground_truth"])
  return question.strip(), str(answer).strip()


def _own_row(prompt: str, answer: str, row: dict[str, Any]) -> tuple[str, str]:
  fields = []
  for wanted, usual in (
    (prompt, ("prompt", "problem", "question")),
    (answer, ("answer", "solution", "final_answer")),
  ):
    names = [wanted] if wanted else usual
    found = [name for name in names if name in row]
    if not found:
      raise KeyError(" or ".join(names))
    fields.append(row[found[0]])
  question, reference = fields
  if isinstance(question, list):  # Turns of a chat: the user's last.
    question = [t["content"] for t in question if t.get("role") == "user"][-1]
  reference = "" if reference is None else str(reference)
  if marked := re.search(r"####([^\n]*)\s*\Z", reference):
    reference = marked[1].replace(",", "")
  return question, reference.strip()


# --- The sources ---

_MATH_TRAIN = File(f"{_RLLM}/rllm/data/train/math/math.json", "math/train.jsonl")
_MATH_REST = File(f"{_HARNESS}/data/math/test.jsonl", "math/test_minus_math500.jsonl")

SOURCES: dict[str, Source] = {
  "gsm8k": Source(
    "https://arxiv.org/abs/2110.14168",
    {
      split: (
        File(
          f"{_GSM8K}/grade_school_math/data/{split}.jsonl",
          f"gsm8k/{split}.jsonl",
          sha256,
        ),
      )
      for split, sha256 in (
        ("train", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        ("test", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
      )
    },
    _gsm8k_row,
    example='{"question": "…", "answer": "… #### 18"}',
  ),
  # The training split of MATH, 7.5k.
  "math": Source(
    "https://arxiv.org/abs/2103.03874",
    {"train": (_MATH_TRAIN,)},
    _problem_row,
    is_clean=False,
    without="math500",
  ),
  # All of MATH except MATH-500: only math500 remains a valid test of MATH.
  "math12k": Source(
    "https://arxiv.org/abs/2305.20050",
    {"train": (_MATH_TRAIN, _MATH_REST)},
    _problem_row,
    is_clean=False,
    without="math500",
  ),
  "math500": Source(
    "https://arxiv.org/abs/2305.20050",
    {
      "test": (
        File(
          f"{_HARNESS}/data/math_oai/test.jsonl",
          "math500/test.jsonl",
          "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
        ),
      )
    },
    _problem_row,
  ),
  "aime24": Source(
    "https://github.com/QwenLM/Qwen2.5-Math",
    {
      "test": (
        File(f"{_QWEN}/evaluation/data/aime24/test.jsonl", "aime/aime2024.jsonl"),
      )
    },
    _problem_row,
  ),
  "aime25": Source(
    "https://github.com/NVIDIA/NeMo-Skills",
    {
      "test": (
        File(f"{_NEMO}/nemo_skills/dataset/aime25/test.txt", "aime/aime2025.jsonl"),
      )
    },
    _problem_row,
  ),
  "amc23": Source(
    "https://github.com/QwenLM/Qwen2.5-Math",
    {"test": (File(f"{_QWEN}/evaluation/data/amc23/test.jsonl", "amc/amc23.jsonl"),)},
    _problem_row,
  ),
  # The earlier years of AIME, as in DeepScaleR.
  "aime_1983_2023": Source(
    "https://github.com/rllm-org/rllm",
    {
      "train": (
        File(f"{_RLLM}/rllm/data/train/math/aime.json", "aime/aime_1983_2023.jsonl"),
      )
    },
    _problem_row,
    is_clean=False,
    without="math500",
  ),
  "skywork_or1_math": Source(
    "https://arxiv.org/abs/2505.22312",
    {
      "train": (
        File(
          f"{_HUB}/Skywork/Skywork-OR1-RL-Data/resolve/main/data/"
          "math-00000-of-00001.parquet",
          "skywork_or1/math.parquet",
        ),
      )
    },
    _skywork_row,
    example='{"prompt": [{"content": "…"}], "reward_model": {"ground_truth": "[…]"}}',
    is_clean=False,
  ),
  "deepscaler": Source(
    "https://huggingface.co/datasets/agentica-org/DeepScaleR-Preview-Dataset",
    {
      "train": (
        File(
          f"{_HUB}/agentica-org/DeepScaleR-Preview-Dataset/resolve/main/deepscaler.json",
          "deepscaler/deepscaler.json",
        ),
      )
    },
    _problem_row,
    is_clean=False,
  ),
}


# --- From files to problems ---


def _read(file: File) -> bytes:
  if not os.environ.get("OPO_DATA_DIR"):
    return builders.download(file.url, sha256=file.sha256, local=file.local)
  path = pathlib.Path(os.environ["OPO_DATA_DIR"]) / file.local
  try:
    return path.read_bytes()
  except OSError as error:
    raise ValueError(
      f"OPO_DATA_DIR is set but {path} cannot be read ({error.strerror}); put the file"
      f" {file.url} there, or unset OPO_DATA_DIR to download it."
    ) from error


def _parse(name: str, split: str) -> list[Problem]:
  """Reads the problems of a source's split from its files."""
  source = SOURCES[name]
  seen = set()
  if source.without:
    tests = _parse(source.without, "test")
    seen = {"".join(decontaminate.words(each.question)) for each in tests}
  problems = []
  for file in source.splits[split]:
    for row, problem in _parsed(_read(file), file.local, source.row, source.example):
      question, answer = problem
      if not source.is_clean:
        key = "".join(decontaminate.words(question))
        if not answer or (key and key in seen):
          continue
        seen.add(key)
      elif not answer:
        raise ValueError(_malformed(file.local, row, source.example, problem))
      number = row if len(source.splits[split]) == 1 else len(problems) + 1
      problems.append(Problem(f"{name}/{split}/{number}", question, answer))
  if not problems:
    raise ValueError(
      f"{file.local} has no rows; put the authors' file ({file.url}) there below"
      " $OPO_DATA_DIR, or unset OPO_DATA_DIR to download it."
    )
  return problems


def _parsed(
  data: bytes,
  where: str,
  row: Callable[[dict[str, Any]], tuple[str, str]],
  example: str,
) -> Iterator[tuple[int, tuple[str, str]]]:
  """Yields the number of each row, from 1, and its question and answer."""
  for number, raw in _rows(data, where):
    try:
      found = row(json.loads(raw) if isinstance(raw, bytes) else raw)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
      raise ValueError(_malformed(where, number, example, raw)) from error
    if not isinstance(found[0], str) or not found[0].strip():
      raise ValueError(_malformed(where, number, example, raw))
    yield number, found


def _rows(data: bytes, where: str) -> Iterator[tuple[int, Any]]:
  """Yields numbered rows: decoded from a list or Parquet, as bytes from JSON lines."""
  if where.endswith(".parquet"):
    import pyarrow.parquet

    try:
      table = pyarrow.parquet.read_table(io.BytesIO(data))
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these.
      raise ValueError(f"{where} is no Parquet file ({error}).") from error
    yield from enumerate(table.to_pylist(), start=1)
  elif data.lstrip().startswith(b"["):
    try:
      rows = json.loads(data)
    except (ValueError, RecursionError) as error:
      raise ValueError(
        f"{where} begins with [ and is no JSON list ({error}); mend it, or write one"
        " object a line."
      ) from error
    yield from enumerate(rows, start=1)
  else:
    for number, line in enumerate(data.splitlines(), start=1):
      if line.strip():
        yield number, line


def _malformed(where: str, number: int, example: str, raw: Any) -> str:
  start = raw[:80].decode(errors="replace") if isinstance(raw, bytes) else str(raw)[:80]
  return f"{where} line {number} is not a row of it; expected {example}, got {start!r}."


def _config_of(content: bytes) -> str:
  """A name for prepared data, derived from its content."""
  return "local_" + hashlib.sha256(content).hexdigest()[:16]


# --- A user's own data ---


def _load_own(kind, place, split, row, fields) -> Sequence[Problem]:
  if not place:
    own = "jsonl:PATH, parquet:PATH or hf:OWNER/NAME"
    raise ValueError(f"{kind}: names no data; write {own}.")
  listed = f"{place} {split} {fields}"
  if kind == "hf":
    # The data of the first use is kept: later uses need no network.
    config = builders.noted("opo_hub.json", listed)
    if config and (builder := builders.find("own", config)):
      return builders.Prepared(builder, "rows")
    paths = _hub_files(place, split)
  else:
    paths = [pathlib.Path(place).expanduser()]
  stem = f"{place.replace('/', '_')}/{split}" if kind == "hf" else paths[0].stem
  try:
    contents = [path.read_bytes() for path in paths]
  except OSError as error:
    raise ValueError(
      f"{kind}:{place} cannot be read ({error.strerror}); give the path of a file of"
      f" {'JSON lines' if kind == 'jsonl' else 'Parquet'} (--data.train {kind}:PATH)."
    ) from error

  def parse() -> list[Problem]:
    problems = []
    for path, content in zip(paths, contents, strict=True):
      where = str(path)
      if kind != "jsonl" and path.suffix != ".parquet":
        where += ".parquet"  # the suffix decides the format
      for number, (question, answer) in _parsed(content, where, row, _OWN_EXAMPLE):
        if not answer:
          raise ValueError(_malformed(where, number, _OWN_EXAMPLE, question))
        problems.append(Problem(f"{stem}/{len(problems) + 1}", question, answer))
    if not problems:
      raise ValueError(f"{kind}:{place} has no rows.")
    return problems

  sums = [hashlib.sha256(content).hexdigest() for content in contents]
  config = _config_of("|".join([stem, fields, *sums]).encode())
  builder = builders.prepare("own", config, {"rows": parse})
  if kind == "hf":
    builders.note("opo_hub.json", listed, config)
  return builders.Prepared(builder, "rows")


_OWN_EXAMPLE = (
  '{"prompt": "…", "answer": "…"} (--data.prompt-field and --data.answer-field name'
  " other keys)"
)


def _hub_files(place: str, split: str) -> list[pathlib.Path]:
  """The Parquet files of a hub data set's split, which the hub converts itself."""
  owner, _, rest = place.partition("/")
  name, _, config = rest.partition("/")
  names = _of_hub("list_repo_files", place, f"{owner}/{name}")
  found = sorted(
    each
    for each in names
    if each.endswith(".parquet") and each.split("/")[-2:-1] == [split]
  )
  configs = sorted({each.split("/")[0] for each in found})
  if not config and len(configs) == 1:
    (config,) = configs
  found = [each for each in found if each.split("/")[0] == config]
  if not found:
    raise ValueError(
      f"hf:{place} has no split {split!r} there; its configs with that split are"
      f" {configs or 'none'} (hf:OWNER/NAME/CONFIG)."
    )
  return [
    pathlib.Path(_of_hub("hf_hub_download", place, f"{owner}/{name}", each))
    for each in found
  ]


def _of_hub(function: str, place: str, *arguments: str) -> Any:
  """Calls a function of `huggingface_hub`; converts its errors to ValueError."""
  import huggingface_hub

  try:
    return getattr(huggingface_hub, function)(
      *arguments, repo_type="dataset", revision="refs/convert/parquet"
    )
  # Without a network, the errors of its HTTP library are raised: no OSErrors, and of a
  # library that depends on the version.
  except Exception as error:
    raise ValueError(
      f"cannot download hf:{place} ({error}); connect to the network, or get its"
      " Parquet file by other means and use parquet:PATH."
    ) from error


def _unknown(kind: str, name: str, existing: list[str]) -> str:
  near = difflib.get_close_matches(str(name), existing, n=3)
  hint = f"did you mean {' or '.join(near)}? " if near else ""
  return f"unknown {kind} {name!r}; {hint}There are: {', '.join(existing)}."
