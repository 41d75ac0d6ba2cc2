"""Names of other libraries' objects that the package's sources touch, read from the syntax trees alone."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "passk_guard"
TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent.name != "private_api"  # the table itself
}
# Which argument of a call is the name of an attribute.
READERS = {"getattr": 1, "hasattr": 1, "setattr": 1, "delattr": 1, "MethodPatch": 1, "attrgetter": 0, "methodcaller": 0}
# Variables that hold another library's object wherever they stand, by folder or file: there our own names do not count.
HOLDERS = {"": ("trainer", "_trainer", "accelerator", "_accelerator")}
HOLDERS["engines/deepspeed"] = (*HOLDERS[""], "engine", "_engine", "optimizer", "_optimizer", "wrapped")


def own_names() -> set[str]:
    """What the package defines: functions, classes, fields, attributes of `self`, options of its command line."""
    return {name for tree in TREES.values() for node in ast.walk(tree) for name in _defined(node)}


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _last(node.value) == "self":
        yield node.attr
    elif isinstance(node, ast.Call) and _last(node.func) == "add_argument":
        yield from (str(a.value).lstrip("-").replace("-", "_") for a in node.args if isinstance(a, ast.Constant))
    if isinstance(node, (ast.ClassDef, ast.Module)):
        for statement in node.body:
            if isinstance(statement, (ast.Assign, ast.AnnAssign)):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def private_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Underscored names that are read of anything but the package's own objects, or that stand in a string."""
    in_texts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("passk_guard")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_texts:
            found = node.value.split(".")
        elif isinstance(node, ast.Attribute):
            holder = node.value.id if isinstance(node.value, ast.Name) else ""
            mine = (holder in ("self", "cls", "super") and node.attr in own) or holder in ours
            found = [] if mine else [node.attr]
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("passk_guard"):
            found = [alias.name for alias in node.names] + str(node.module).split(".")
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        else:
            continue
        yield from (name for name in found if re.fullmatch(r"_(?!_)\w*[A-Za-z]\w*", name))


def plain_names(file: str, tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Names without an underscore of objects that may be another library's: as attributes, and as strings.

    A string counts where it is the name in a call of `READERS`, and wherever it stands in a function that reads
    attributes by names in variables.
    """
    holders = HOLDERS[max((prefix for prefix in HOLDERS if file.startswith(prefix)), key=len)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found, holder = [node.attr], _last(node.value)
        elif isinstance(node, ast.Call) and (name := _name_argument(node)) is not None and _is_name(name):
            found, holder = [name.value], _last(node.args[0])
        elif isinstance(node, (ast.FunctionDef, ast.Lambda)) and _reads_by_variable(node, tree):
            found, holder = list(_lowercase_strings(node)), holders[0]
        else:
            continue
        yield from (n for n in found if not n.startswith("_") and (holder in holders or n not in own))


def _last(node: ast.AST) -> str:
    """Of `a.b.c` the c."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _name_argument(call: ast.Call) -> ast.expr | None:
    place = READERS.get(_last(call.func))
    return call.args[place] if place is not None and len(call.args) > place else None


def _is_name(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier()


def _reads_by_variable(function: ast.AST, tree: ast.AST) -> bool:
    """Whether it reads an attribute whose name is in a variable, itself or by a function of the same file."""
    readers = _functions_by_variable(tree)
    return any(
        _by_variable(node) or (isinstance(node, ast.Call) and _last(node.func) in readers)
        for node in ast.walk(function)
    )


@cache
def _functions_by_variable(tree: ast.AST) -> frozenset[str]:
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return frozenset(function.name for function in functions if any(map(_by_variable, ast.walk(function))))


def _by_variable(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = _name_argument(node)
    return name is not None and not _is_name(name) and not _last(name).isupper()


def _lowercase_strings(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[a-z]\w+", node.value):
            yield node.value
