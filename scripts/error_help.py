"""Every message that ends a job, with what is wrong and what to do: the page docs/errors.md, made from the code.

    python -m scripts.error_help write

The one idea: the messages are read off the places that raise them, so the page cannot say anything else. What a message
puts in at run time stands in angle brackets; what is fixed, such as a list of choices, is filled in.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import fire

from scripts import preflight
from scripts.errors import report_input_errors
from scripts.files import replacing

__all__ = ["Message", "errors_page", "messages", "preflight_messages", "write"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
SECTIONS = {
    "Command line and configs": ("arguments", "errors", "files", "output_folder", "distributed"),
    "Finding the scans": ("cohort", "cohort_forms", "demo", "datasets"),
    "Weights and networks": ("networks", "lpips", "foreign_weights", "exported", "export", "slabs"),
    "Preparing a scan": ("transforms", "model_box", "source_grid"),
    "Training": ("samplers", "handlers", "checkpoints"),
    "Evaluating": ("comparison", "baselines"),
    "Latents: encoding, and reading them again": (
        "latents", "latent_writer", "latent_dataset", "latent_scaling", "latent_inputs", "latent_exchange",
        "original_latents",
    ),
    "Decoding and sampling": ("decoded_writer", "priors", "sampling", "prior_figures"),
}  # fmt: skip
NOT_FOR_USERS = ("command_help", "error_help", "preflight")  # the last has a table of its own
NAMES = {
    "strerror": "reason",
    "error": "reason",
    "detail": "reason",
    "__name__": "type",
    "parent": "folder",
    "n": "number",
}
# Functions whose result is called what their argument is called.
TRANSPARENT = ("_by", "_short", "ascii", "iter", "join", "list", "map", "next", "sorted", "str", "tuple")
HEAD = """# Errors

What stops a job, why, and what to do. A mistake that you can mend ends in one line that begins with `error:`, and in
exit code 2. The line says what is wrong and then what to do; below, the two stand apart. Ctrl-C and a scheduler's
SIGTERM end in one line that begins with `interrupted:`, and in exit code 130 or 143. Anything else ends with a
traceback: please report it with the whole text.

`<...>` stands for what the line names: your file, your value, a number. Search the page for the words around it. The
page is made from the code by `python -m scripts.error_help write`.

"""
CRITERIA_HEAD = """## The pre-flight check

Each line of its table is a file, the criterion that it fails, and the text below. With `--checks skip` the job goes on
with the good scans. [cohort.md](cohort.md#pre-flight-check) says what each criterion asks for.

| criterion | what it says | what to do |
|---|---|---|
"""
TRACEBACK_HEAD = """## With a traceback

A value of a config that is out of its range. The last line of the text says which; the exit code is 1.

| what it says | raised in |
|---|---|
"""


@dataclass(frozen=True)
class Message:
    """A message as a template.

    Attributes:
        module: name of the module of scripts/ that raises it.
        scope: class and function around it, outermost first.
        text: with `<...>` for what is put in.
    """

    module: str
    scope: tuple[str, ...]
    text: str

    @property
    def parts(self) -> tuple[str, str]:
        """What is wrong, and what to do: the text behind the first semicolon, sentence or colon."""
        for pattern in (r"((?:[^;(]|\([^)]*\))*); (.*)", r"(.*?[.?]) (.*)", r"(.*): (.*)"):
            if found := re.fullmatch(pattern, self.text, re.S):
                return found[1].rstrip("."), found[2]
        return self.text.rstrip("."), ""


def messages(kind: str = "InputError") -> list[Message]:
    """Every message of one kind of error in scripts/, in the order of the code.

    Args:
        kind: name of the class.

    Returns:
        One message for each wording that the code can give; those that hold nothing but what is put in are left out.
    """
    found = []
    for path in sorted((ROOT / "scripts").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for scope, call in _calls(tree, kind):
            reader = _Reader(path.stem, scope[-1] if scope else tree)
            names = tuple(node.name for node in scope)
            found += [Message(path.stem, names, text) for text in reader.texts(call.args[0])]
    return [message for message in dict.fromkeys(found) if re.search(r"\w", re.sub("<[^>]*>", "", message.text))]


def preflight_messages() -> list[tuple[str, Message]]:
    """Criterion and message of everything that the pre-flight check can say of a file, in its order."""
    functions = [
        node
        for node in ast.parse(Path(preflight.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    ]
    named = preflight.HEADER_CRITERIA | preflight.DATA_CRITERIA
    criteria = {function.__name__: name for name, function in named.items()}
    criteria |= {called: name for function in functions for name, called in _asked(function)}
    found: list[tuple[str, Message]] = []
    for function in functions:
        reader = _Reader("preflight", function)
        for node in ast.walk(function):
            answer = node.value if isinstance(node, ast.Return) else None
            criterion = criteria.get(function.name, "")
            if isinstance(answer, ast.Tuple) and isinstance(answer.elts[0], ast.Constant):
                criterion, answer = str(answer.elts[0].value), answer.elts[1]
            texts = reader.texts(answer) if criterion and answer is not None else []
            found += [(criterion, Message("preflight", (function.name,), t)) for t in texts if t and t[0] != "<"]
    order = ["label", "unique", "exists", "opens", *named]
    return sorted(found, key=lambda item: order.index(item[0]))


def _asked(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """Criterion and function of `if reason := f(...): return "criterion", reason` and `return "criterion", f(...)`."""
    for node in ast.walk(function):
        call: ast.expr | None = None
        answer: ast.AST | None = node
        if isinstance(node, ast.If) and isinstance(node.test, ast.NamedExpr):
            call, answer = node.test.value, node.body[0]
        pair = answer.value if isinstance(answer, ast.Return) else None
        if isinstance(pair, ast.Tuple) and isinstance(pair.elts[0], ast.Constant):
            call = call or pair.elts[1]
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                yield str(pair.elts[0].value), call.func.id


def errors_page() -> str:
    """The page."""
    page = HEAD
    everything = [message for message in messages() if message.module not in NOT_FOR_USERS]
    placed = {module for modules in SECTIONS.values() for module in modules}
    others = {"Other": tuple(sorted({message.module for message in everything} - placed))}
    check = [message for message in messages() if message.module == "preflight"]
    for title, modules in {**SECTIONS, **others}.items():
        chosen = [message for module in modules for message in everything if message.module == module]
        chosen = list({message.text: message for message in chosen}.values())
        if chosen:
            page += f"## {title}\n\n{_table(chosen)}\n"
        if title == "Finding the scans":
            rows = [f"| `{name}` | {_cells(message)} |\n" for name, message in preflight_messages()]
            page += CRITERIA_HEAD + "".join(rows) + f"\nBefore and after the table:\n\n{_table(check)}\n"
    lines = [f"| {_code(m.text)} | `{'.'.join(('scripts', m.module, *m.scope))}` |\n" for m in _values_of_configs()]
    return (page + TRACEBACK_HEAD + "".join(lines) if lines else page).rstrip("\n") + "\n"


def write() -> None:
    """Write docs/errors.md."""
    with replacing(PAGE) as temporary:
        temporary.write_text(errors_page(), encoding="utf-8")


def _values_of_configs() -> list[Message]:
    """Each `ValueError` of a class that a config builds or of a function that it calls."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("*.json")]
    named = {word for text in texts for value in _strings(json.loads(text)) for word in re.findall(r"\w+", value)}
    at_start = ((), ("__init__",))
    return [m for m in messages("ValueError") if m.scope and m.scope[0] in named and m.scope[1:] in at_start]


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, dict | list):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _strings(item)
    elif isinstance(content, str):
        yield content


def _table(chosen: list[Message]) -> str:
    rows = "".join(f"| {_cells(message)} |\n" for message in chosen)
    return f"| what it says | what to do |\n|---|---|\n{rows}"


def _cells(message: Message) -> str:
    wrong, remedy = message.parts
    return f"{_code(wrong)} | {_plain(remedy)}"


def _code(text: str) -> str:
    return f"`{_one_line(text)}`"


def _plain(text: str) -> str:
    return re.sub(r"([<>*])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _calls(tree: ast.AST, kind: str, scope: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], ast.Call]]:
    """Every call of a class by its name, with the classes and functions around it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == kind and node.args:
            yield scope, node
        inner = (*scope, node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else scope
        yield from _calls(node, kind, inner)


class _Reader:
    """Turns expressions of one function into texts.

    Args:
        module: of scripts/, whose constants are filled in.
        function: whose variables are followed to the texts that they are given.
    """

    def __init__(self, module: str, function: ast.AST) -> None:
        self.module: ModuleType = importlib.import_module(f"scripts.{module}")
        self.variables: dict[str, list[ast.expr]] = {}
        parameters = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}  # anybody's text
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = list(zip(target.elts, node.value.elts, strict=False))
                    for name, value in pairs:
                        if isinstance(name, ast.Name) and name.id not in parameters:
                            self.variables.setdefault(name.id, []).append(value)

    def texts(self, expression: ast.expr) -> list[str]:
        """All wordings; of a part that may be empty, the one in which it is not."""
        if isinstance(expression, ast.Constant):
            return [str(expression.value)]
        if isinstance(expression, ast.JoinedStr):
            return self._joined(expression.values)
        if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Add):
            return self._joined([expression.left, expression.right])
        if isinstance(expression, ast.IfExp):
            both = self.texts(expression.body) + self.texts(expression.orelse)
            return [text for text in both if text] or [""]
        if isinstance(expression, ast.FormattedValue):
            return self._formatted(expression)
        if isinstance(expression, ast.Name) and self._is_text(expression):
            values = self.variables.pop(expression.id)  # a variable that is lengthened names itself
            found = [text for value in values for text in self.texts(value)]
            self.variables[expression.id] = values
            return found
        return [f"<{self._name(expression)}>"]

    def _joined(self, parts: list[ast.expr]) -> list[str]:
        return ["".join(chosen) for chosen in product(*(self.texts(part) for part in parts))]

    def _formatted(self, part: ast.FormattedValue) -> list[str]:
        constant = self._constant(part.value)
        if isinstance(constant, int | float | str):
            spec = "".join(self.texts(part.format_spec)) if part.format_spec else ""
            return [format(constant, spec)]
        return self.texts(part.value)

    def _is_text(self, name: ast.Name) -> bool:
        """Whether a variable is given texts that are written out, and nothing else."""
        values = self.variables.get(name.id, [])
        return bool(values) and all(self._is_written(value) for value in values)

    def _is_written(self, value: ast.expr) -> bool:
        if isinstance(value, ast.IfExp):
            return self._is_written(value.body) and self._is_written(value.orelse)
        return isinstance(value, ast.JoinedStr) or isinstance(value, ast.Constant) and isinstance(value.value, str)

    def _constant(self, expression: ast.expr) -> Any:
        """The value of a constant of the module, or of the list of its choices; None for everything else."""
        if isinstance(expression, ast.Name) and expression.id.isupper():
            return getattr(self.module, expression.id, None)
        if isinstance(expression, ast.Call) and ast.unparse(expression.func) in ("', '.join", "' or '.join"):
            choices = self._constant(expression.args[0])
            if isinstance(choices, tuple | list | dict) and all(isinstance(choice, str) for choice in choices):
                return ast.unparse(expression.func)[1:-6].join(choices)
        return None

    def _name(self, expression: ast.expr) -> str:
        """What a value is called, in words."""
        if isinstance(expression, ast.Name | ast.Attribute):
            name = expression.id if isinstance(expression, ast.Name) else expression.attr
            name = "number" if name.startswith("n_") else name
            return NAMES.get(name, name).strip("_").replace("_", " ")
        if isinstance(expression, ast.Subscript):
            key = expression.slice.value if isinstance(expression.slice, ast.Constant) else None
            return key.replace("_", " ") if isinstance(key, str) and key else self._name(expression.value)
        if isinstance(expression, ast.BoolOp):
            return self._name(expression.values[0])
        if isinstance(expression, ast.UnaryOp):
            return "True or False"
        if isinstance(expression, ast.Call):
            return self._name_of_call(expression)
        return {"BinOp": "number", "GeneratorExp": "names"}.get(type(expression).__name__, "value")

    def _name_of_call(self, call: ast.Call) -> str:
        called = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
        if called in ("len", "max"):
            return "number"
        if called in TRANSPARENT:
            return self._name(call.args[-1])
        if called == "round":
            return self._name(call.func.value) if isinstance(call.func, ast.Attribute) else "number"
        return called.removeprefix("get_").strip("_").replace("_", " ")


if __name__ == "__main__":
    report_input_errors()
    fire.Fire({"write": write})
