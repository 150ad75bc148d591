"""Every config field is read, by a module that assembles a run."""

import ast
import dataclasses
import functools
import inspect
import pathlib
import re
import textwrap
from collections import defaultdict

from opo_jax.config import Config

PACKAGE = pathlib.Path(__file__).parents[1] / "opo_jax"


class Reads:
  """The config fields that modules read, found in their source.

  A read is an attribute of an expression that can hold that section: `config.rollout`,
  a name or an attribute that was bound to it, or a parameter, whose section is told by
  its annotation or by any call. An attribute of the same name of anything else counts
  for nothing. What this does not follow, such as a section in a list, shows as a field
  that nobody reads: annotate the parameter.

  Args:
    trees: module -> its source.
    config: the class with the sections.
  """

  def __init__(self, trees: dict[str, ast.Module], config: type = Config):
    fields = dataclasses.fields(config)
    self.sections = {f.name: f.type for f in fields if dataclasses.is_dataclass(f.type)}
    self.plain = {f.name for f in fields} - self.sections.keys()
    # (function or class, name) -> what the name can hold: sections, or "config".
    self.bound = defaultdict(set)
    self.functions = defaultdict(list)  # name -> (scope, names of its parameters)
    self.found = set()  # (section, attribute)
    for module, tree in trees.items():
      self._find_functions(tree, (module,))
    aliases = {module: self._config_names(tree) for module, tree in trees.items()}
    size = -1
    while size < (size := sum(map(len, self.bound.values()))):  # until no call adds any
      for module, tree in trees.items():
        self.aliases = aliases[module]
        self._visit(tree, (module,))

  def unread(self) -> set[str]:
    fields = {f"{s}.{f.name}" for s in self.sections for f in self._fields(s)}
    read = {f"{section}.{name}" for section, name in self.found}
    for section, name in self.found:  # a property reads what it is made of
      member = getattr(self.sections.get(section), name, None)
      if isinstance(member, property):
        source = inspect.getsource(member.fget)
        read |= {f"{section}.{each}" for each in re.findall(r"self\.(\w+)", source)}
    return (fields | self.plain) - {name.removeprefix("config.") for name in read}

  def _fields(self, section):
    return dataclasses.fields(self.sections[section])

  def _find_functions(self, node, scope):
    for child in ast.iter_child_nodes(node):
      named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
      inner = (*scope, child.name) if named else scope
      if isinstance(child, ast.FunctionDef):
        names = [a.arg for a in (*child.args.posonlyargs, *child.args.args)]
        is_method = names[:1] in (["self"], ["cls"])
        # A class is called by its own name.
        name = scope[-1] if child.name == "__init__" else child.name
        keywords = [a.arg for a in child.args.kwonlyargs]
        self.functions[name].append((inner, names[is_method:], keywords))
      self._find_functions(child, inner)

  def _config_names(self, tree):
    """What a module calls the config's classes: {"EvalConfig": "eval", …}."""
    names = {cls.__name__: section for section, cls in self.sections.items()}
    names["Config"] = "config"
    aliases = {}
    for node in ast.walk(tree):
      if not isinstance(node, ast.ImportFrom):
        continue
      for alias in node.names:
        called = alias.asname or alias.name
        if node.module == "opo_jax.config" and alias.name in names:
          aliases[called] = names[alias.name]
        if node.module == "opo_jax" and alias.name == "config":
          aliases |= {f"{called}.{name}": section for name, section in names.items()}
    return aliases

  def _visit(self, node, scope):
    for child in ast.iter_child_nodes(node):
      inner = scope
      match child:
        case ast.ClassDef():
          inner = (*scope, child.name)
        case ast.FunctionDef():
          inner = (*scope, child.name)
          for argument in ast.walk(child.args):
            if isinstance(argument, ast.arg):
              self.bound[inner, argument.arg] |= self._annotated(argument.annotation)
        case ast.Assign():
          for target in child.targets:
            self._bind(scope, target, child.value)
        case ast.AnnAssign():
          held = self._annotated(child.annotation) | self._holds(child.value, scope)
          name = getattr(child.target, "id", getattr(child.target, "attr", None))
          self.bound[scope, name] |= held
          self.bound["attribute", name] |= held  # perhaps the field of a dataclass
        case ast.NamedExpr():
          self._bind(scope, child.target, child.value)
        case ast.For(iter=ast.Tuple() | ast.List()):
          for element in child.iter.elts:
            self._bind(scope, child.target, element)
        case ast.Call():
          self._call(child, scope)
        case ast.Attribute():
          held = self._holds(child.value, scope)
          self.found |= {(section, child.attr) for section in held}
      self._visit(child, inner)

  def _annotated(self, annotation):
    if annotation is None:
      return set()
    names = re.findall(r"[\w.]+", ast.unparse(annotation))
    return {self.aliases[name] for name in names if name in self.aliases}

  def _bind(self, scope, target, value):
    match target:
      case ast.Tuple() | ast.List():
        for part, each in zip(target.elts, getattr(value, "elts", ()), strict=False):
          self._bind(scope, part, each)
      case ast.Name():
        self.bound[scope, target.id] |= self._holds(value, scope)
      case ast.Attribute():  # self.config = config
        self.bound["attribute", target.attr] |= self._holds(value, scope)

  def _call(self, call, scope):
    function, arguments = call.func, call.args
    if _name(function) == "getattr":  # getattr(reward, f"{name}_weight")
      pattern = _pattern(arguments[1])
      for section in self._holds(arguments[0], scope) & self.sections.keys():
        names = [field.name for field in self._fields(section)]
        self.found |= {(section, name) for name in names if re.fullmatch(pattern, name)}
    if _name(function) == "partial":
      function, *arguments = arguments
    for inner, names, keywords in self.functions[_name(function)]:
      for name, value in zip(names, arguments, strict=False):
        self.bound[inner, name] |= self._holds(value, scope)
      for keyword in call.keywords:
        if keyword.arg in (*names, *keywords):
          self.bound[inner, keyword.arg] |= self._holds(keyword.value, scope)

  def _holds(self, node, scope):
    """The sections, or the whole config, that an expression can hold."""
    match node:
      case ast.Name():
        scopes = [scope[:end] for end in range(len(scope), 0, -1)]  # from the innermost
        held = (self.bound[scope, node.id] for scope in scopes)
        return next(filter(None, held), set())
      case ast.Attribute():
        is_section = "config" in self._holds(node.value, scope)
        section = {node.attr} & self.sections.keys() if is_section else set()
        return section | self.bound["attribute", node.attr]
      case ast.IfExp():
        return self._holds(node.body, scope) | self._holds(node.orelse, scope)
      case ast.BoolOp():
        return set().union(*(self._holds(value, scope) for value in node.values))
      case ast.NamedExpr():
        return self._holds(node.value, scope)
      case ast.Call(func=ast.Attribute(attr="replace"), args=[first, *_]):
        return self._holds(first, scope)
    return set()


def _name(function):
  return getattr(function, "attr", getattr(function, "id", None))


def _pattern(node):
  """The names that an expression can give, as a regular expression."""
  match node:
    case ast.Constant():
      return re.escape(str(node.value))
    case ast.JoinedStr():
      return "".join(map(_pattern, node.values))
    case ast.FormattedValue():
      return r"\w+"
  return "(?!)"  # none


@functools.cache
def package() -> dict[str, ast.Module]:
  """The modules that import the config; all others take plain values."""
  sources = {str(path): path.read_text() for path in PACKAGE.rglob("*.py")}
  known = r"from opo_jax import (.*, )?config\b|from opo_jax\.config import"
  return {name: ast.parse(s) for name, s in sources.items() if re.search(known, s)}


def test_every_config_field_is_read():
  assert not Reads(package()).unread()


def test_a_field_that_nobody_reads_is_found():
  """Though fields of that name of other sections, or of anything else, are read."""
  added = {"rollout": "path", "optimizer": "steps", "reward": "seed", "mesh": "shape"}
  fields = []
  for field in dataclasses.fields(Config):
    cls = field.type
    if field.name in added:
      new = [(added[field.name], int, 0)]
      cls = dataclasses.make_dataclass(cls.__name__, new, bases=(cls,), frozen=True)
    fields.append((field.name, cls))
  wider = dataclasses.make_dataclass("Config", fields)
  unread = {f"{section}.{name}" for section, name in added.items()}
  assert Reads(package(), wider).unread() == unread


def test_a_section_is_followed_to_where_it_is_read():
  source = """
    from opo_jax import config as config_lib
    from opo_jax.config import Config
    from opo_jax.config import Eval as EvalConfig

    class Run:
      def __init__(self, config: Config, mesh):
        self.config, self.mesh = config, mesh
        self.reward = config.reward
        mesh.data

      def told(self):
        size = self.config.model
        return size.width, self.reward.workers

      def inner(self, rollout: "EvalConfig | None"):
        return rollout.top_p

    def call(run):
      Run(other, run.config.mesh)
      optimizer, seed = run.config.optimizer, run.config.seed
      by_call(3, settings=run.config.sft)
      partial(by_partial, run.config.record)
      return lambda: (optimizer.b1, model.width, getattr(run.reward, f"{x}_weight"))

    def by_call(number, *, settings):
      return (settings or number).steps

    def by_partial(record, row):
      return record.samples, row.print_every

    def by_module(checkpoint: config_lib.Checkpoint):
      return checkpoint.keep
  """
  read = Reads({}).unread() - Reads({"": ast.parse(textwrap.dedent(source))}).unread()
  assert read == {
    "checkpoint.keep", "eval.top_p", "mesh.data", "model.width", "optimizer.b1",
    "record.samples", "reward.format_weight", "reward.overlong_weight",
    "reward.repetition_weight", "reward.workers", "seed", "sft.steps",
  }  # fmt: skip
