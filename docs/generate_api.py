"""Generates docs/api.md, the page of public names, from the code: ``python docs/generate_api.py``.

The page is Markdown and no more, so that it reads the same in an editor, on GitHub and on the site. It shows source,
not objects: signatures, defaults and comments are as they were written, and equal for every machine.
"""

from __future__ import annotations

import ast
import collections
import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import distillbench

PAGE = Path(__file__).resolve().parent / "api.md"
ROOT = Path(distillbench.__file__).resolve().parent
HEAD = """# Public names

What a plugin may import: the names of `distillbench` itself and of the packages below. Everything else is private.
[The contract](contract.md) says what they promise. A class shows its own members, not those that it inherits.
`docs/generate_api.py` makes this page.
"""
SPECIAL = ("__init__", "__call__", "__len__", "__getitem__")
OPTIONS = ("option", "added_option")  # functions that make a setting
WIDTH = 100  # of a signature
LONGEST_CONSTANT = 6  # lines that are shown as they are
ROLE = re.compile(r":\w+:`~?([^`]+)`")
CODE = re.compile(r"(`[^`\n]+`)")
SPECIAL_TEXT = re.compile(r"(\*|<(?=\w)|(?<!\w)_|_(?!\w)|\](?=\())")  # characters that Markdown would interpret


def page() -> str:
    """The content of docs/api.md."""
    packages = [_Package("distillbench"), *(_Package(f"distillbench.{name}") for name in distillbench.PUBLIC_PACKAGES)]
    count = collections.Counter(name for package in packages for name in package.names)
    for package in packages:
        package.headings = {n: f"{package.name}.{n}" if count[n] > 1 else n for n in package.names}
    return "\n".join([HEAD, _contents(packages), *(package.section() for package in packages)])


def _contents(packages: list[_Package]) -> str:
    rows = [f"| [{p.name}](#{_slug(p.name)}) | {p.summary().replace('|', chr(92) + '|')} |" for p in packages]
    return "\n".join(["| package | |", "|---|---|", *rows, ""])


class _Package:
    """A public package, or a public module: the names in its ``__all__`` and the modules that define them."""

    def __init__(self, name: str) -> None:
        self.name = name
        loaded = importlib.import_module(name)
        homes = getattr(loaded, "_HOMES", dict.fromkeys(loaded.__all__, name))
        self.sources = {home: _Source(home) for home in sorted(set(homes.values()))}
        self.home = {n: self.sources[homes[n]] for n in loaded.__all__}
        of_home = {home: {n for n in loaded.__all__ if homes[n] == home} for home in self.sources}
        self.names = [n for home, source in self.sources.items() for n in source.ordered(of_home[home])]
        self.docstring = (loaded.__doc__ or "").split("\n\n")[0]
        self.headings: dict[str, str] = {}

    def summary(self) -> str:
        """The first paragraph of the docstring, on one line."""
        return _text(self.docstring).replace("\n", " ")

    def section(self) -> str:
        contents = ",\n".join(f"[{name}](#{_slug(self.headings[name])})" for name in self.names) + ".\n"
        entries = [self.home[name].entry(name, self.headings[name]) for name in self.names]
        return "\n".join([f"## {self.name}\n", _text(self.docstring) + "\n", contents, *entries])


class _Source:
    """The source of a module."""

    def __init__(self, module: str) -> None:
        path = ROOT.joinpath(*module.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        source = file.read_text()
        self.lines = source.splitlines()
        self.tree = ast.parse(source)

    def ordered(self, public: set[str]) -> list[str]:
        """The public names defined here: classes, functions, constants, each in the order of the file."""
        return [n for kind in (ast.ClassDef, ast.FunctionDef, ast.stmt) for n in self._of(kind, public)]

    def _of(self, kind: type[ast.stmt], public: set[str]) -> list[str]:
        """The public names that statements of this kind define, in the order of the file."""
        found = [(name, node) for node in self.tree.body for name in _defined(node) if name in public]
        last = kind is ast.stmt
        return list(dict.fromkeys(n for n, node in found if (_is_constant(node) if last else isinstance(node, kind))))

    def entry(self, name: str, heading: str) -> str:
        node = next(n for n in self.tree.body if name in _defined(n))
        text = ""
        if isinstance(node, ast.ClassDef):
            code = "\n".join(self.klass(node))
        elif isinstance(node, ast.FunctionDef):
            code = "\n".join(_function(node, docstring=False))
        else:
            code, text = self.constant(node, name)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            text = _text(ast.get_docstring(node) or "")
        return f"### `{heading}`\n\n```python\n{code}\n```\n" + (f"\n{text}\n" if text else "")

    def klass(self, node: ast.ClassDef) -> Iterator[str]:
        """A class without what its functions do."""
        yield from (f"@{ast.unparse(d)}" for d in node.decorator_list)
        bases = ", ".join([*map(ast.unparse, node.bases), *map(ast.unparse, node.keywords)])
        members = [self.member(child) for child in node.body]
        shown = [lines for lines in members if lines]
        yield (f"class {node.name}({bases}):" if bases else f"class {node.name}:") + ("" if shown else " ...")
        for before, lines in zip([None, *shown], shown, strict=False):
            if before is not None and (_is_block(before) or _is_block(lines)):
                yield ""
            yield from ("    " + line if line else "" for line in lines)

    def member(self, node: ast.stmt) -> list[str]:
        """A member of a class; nothing for a private one."""
        if isinstance(node, ast.FunctionDef) and (node.name in SPECIAL or not node.name.startswith("_")):
            setter = any(ast.unparse(d).endswith(".setter") for d in node.decorator_list)
            return [] if setter else _function(node, docstring=True)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            return list(self.klass(node))
        names = [name for name in _defined(node) if not name.startswith("_")]
        return self.attribute(node) if names and _is_constant(node) else []

    def attribute(self, node: ast.stmt) -> list[str]:
        value = getattr(node, "value", None)
        if isinstance(node, ast.AnnAssign) and isinstance(value, ast.Call) and ast.unparse(value.func) in OPTIONS:
            default, told = value.args
            words = f"  # {ast.literal_eval(told)}" if isinstance(told, ast.Constant) else ""
            name, kind = ast.unparse(node.target), ast.unparse(node.annotation)
            return [f"{name}: {kind} = {_quoted(ast.unparse(default))}{words}"]
        return self.raw(node)

    def raw(self, node: ast.stmt) -> list[str]:
        """The source text, with its comments."""
        text = textwrap.dedent("\n".join(self.lines[node.lineno - 1 : node.end_lineno]))
        return re.sub(r"\s*# (fmt|noqa|type):.*", "", text).splitlines()

    def constant(self, node: ast.stmt, name: str) -> tuple[str, str]:
        """The assignment and the comment above it; of a long one the type, and of a long table the keys."""
        first = node.lineno - 1
        while self.lines[first - 1].startswith("# ") and not self.lines[first - 1].startswith("# ---"):
            first -= 1
        above = self.lines[first : node.lineno - 1]
        told = _text("\n".join(line.removeprefix("# ") for line in above))
        value = getattr(node, "value", None)
        if (node.end_lineno or 0) - node.lineno < LONGEST_CONSTANT:
            return "\n".join(self.raw(node)), told
        kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else type(value).__name__.lower()
        keys = [key for key in value.keys if key is not None] if isinstance(value, ast.Dict) else []
        names = ", ".join(f"`{ast.unparse(key).strip(chr(39))}`" for key in keys)
        return f"{name}: {kind}", "\n\n".join(filter(None, [told, f"Keys: {names}." if names else ""]))


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t]) if isinstance(n, ast.Name)]


def _is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign | ast.AnnAssign)


def _is_block(lines: list[str]) -> bool:
    """Whether a member has a blank line before and after it."""
    return lines[0].startswith(("def ", "@", "class "))


def _function(node: ast.FunctionDef, docstring: bool) -> list[str]:
    """The signature, and below it the docstring, or the attributes that a constructor sets."""
    head = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    head += _signature(node.name, _arguments(node.args), returns)
    told = ast.get_docstring(node) if docstring else None
    body = textwrap.wrap(_attributes(node), WIDTH, initial_indent="# ", subsequent_indent="#     ")
    if told:
        lines = ROLE.sub(r"``\1``", told).splitlines()
        body = ['"""' + lines[0], *lines[1:]]
        body = [*body[:-1], body[-1] + '"""'] if len(lines) == 1 else [*body, '"""']
    if not body:
        return [*head[:-1], head[-1] + " ..."]
    return [*head, *("    " + line if line else "" for line in body), *([] if told else ["    ..."])]


def _attributes(node: ast.FunctionDef) -> str:
    """A sentence that lists the public attributes that a constructor sets."""
    if node.name != "__init__":
        return ""
    stored = [a for a in ast.walk(node) if isinstance(a, ast.Attribute) and isinstance(a.ctx, ast.Store)]
    mine = [a for a in stored if isinstance(a.value, ast.Name) and a.value.id == "self"]
    inside = sorted(mine, key=lambda a: (a.lineno, a.col_offset))
    names = list(dict.fromkeys(a.attr for a in inside if not a.attr.startswith("_")))
    return f"attributes: {', '.join(names)}" if names else ""


def _arguments(args: ast.arguments) -> list[str]:
    """Each argument with its type and default, as one text."""
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    found = [_argument(a, d) for a, d in zip(plain, defaults, strict=True)]
    if args.vararg or args.kwonlyargs:
        found.append("*" + (ast.unparse(args.vararg) if args.vararg else ""))
    found += [_argument(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return found + ([f"**{ast.unparse(args.kwarg)}"] if args.kwarg else [])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(argument)
    return f"{ast.unparse(argument)}{' = ' if argument.annotation else '='}{_quoted(ast.unparse(default))}"


def _signature(name: str, arguments: list[str], returns: str) -> list[str]:
    line = f"def {name}({', '.join(arguments)}){returns}:"
    if len(line) <= WIDTH:
        return [line]
    return [f"def {name}(", *(f"    {argument}," for argument in arguments), f"){returns}:"]


def _text(docstring: str) -> str:
    """A docstring as Markdown: its tables, formulas and code are that already, and its roles become code."""
    return "\n\n".join(map(_paragraph, docstring.strip("\n").split("\n\n")))


def _paragraph(text: str) -> str:
    if text.startswith(">>>"):
        return f"```python\n{text}\n```"
    lines = [line if line.startswith(("    ", "|")) else _escaped(line) for line in text.splitlines()]
    return re.sub(r"::$", ":", "\n".join(lines))


def _escaped(line: str) -> str:
    line = re.sub(r"``([^`]+)``", r"`\1`", ROLE.sub(r"`\1`", line))
    return "".join(p if CODE.fullmatch(p) else SPECIAL_TEXT.sub(r"\\\1", p) for p in CODE.split(line))


def _quoted(code: str) -> str:
    """String literals with the quotation marks of the rest of the code."""
    return re.sub(r"'([^'\"\\]*)'", r'"\1"', code)


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page())
