"""Every error that the package raises, read from its source: `python -m tests.errors` writes docs/errors.md."""

import ast
import keyword
import re
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import lightning_qlora
from lightning_qlora.checks import OTHER_ARGUMENTS

PACKAGE = Path(lightning_qlora.__file__).parent
PAGE = PACKAGE.parent / "docs" / "errors.md"
INTRODUCTION = """# Errors

Every error that the package raises, by the part of the package that raises it. The parts in braces are filled in.
`CheckpointMismatchError` is a `RuntimeError`. `python -m tests.errors` writes this page, and `tests/test_errors.py`
checks that it is complete.

The command line prints an error in one line. An error of another type is a bug: please report it.
"""


def text_of(node, constants=None):
    """The text of a message, with the constants of its file filled in and its other expressions in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value, constants) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, constants) + text_of(node.right, constants)
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body, constants)} / {text_of(node.orelse, constants)}"
    text = _short(node.value if isinstance(node, ast.FormattedValue) else node)
    value = getattr(constants, text, None) if text.strip("_").isupper() else None
    if isinstance(value, tuple):
        return ", ".join(value)
    return "{" + text + "}" if value is None else str(value)


def _short(node):
    """The expression, or one name of it that says what it is: of `", ".join(names)` names, of `a or b` a."""
    if isinstance(node, ast.BoolOp):
        return _short(node.values[0])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        return _short(node.args[0])
    expression = ast.unparse(node).replace("self.", "")
    names = re.findall(r"[a-z_]{2,}", re.sub(r"'[^']*'", "", expression))
    names = [name for name in names if not keyword.iskeyword(name)]
    return names[-1] if len(expression) > 24 and names else expression


def errors_of(path):
    """Type and message of every `raise` of a new error in a file, in its order."""
    errors = []
    constants = None
    if path.is_relative_to(PACKAGE):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        constants = import_module(".".join(parts).removesuffix(".__init__"))
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
            continue
        kind = ast.unparse(node.exc.func)
        message = " ".join(text_of(node.exc.args[-1], constants).split())
        if (
            not kind.startswith(("type(", "_"))
            and kind != "SystemExit"
            and re.search(r"[a-z]{3}", re.sub(r"{.*?}", "", message))
        ):
            errors.append((node.lineno, kind, message))
    return [(kind, message) for _, kind, message in sorted(errors)]


def page():
    """The content of docs/errors.md."""
    parts = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        parts[path.relative_to(PACKAGE).parts[0].removesuffix(".py")] += errors_of(path)
    lines = [INTRODUCTION]
    for name, errors in parts.items():
        if errors:
            rows = [
                f"| {kind} | {message.replace('|', chr(92) + '|').replace('<', '&lt;')} |" for kind, message in errors
            ]
            lines += [f"## {name}\n\n| error | message |\n| --- | --- |", *rows, ""]
    answers = [f"| `{name}` | {answer} |" for name, answer in OTHER_ARGUMENTS.items()]
    lines += ["## Arguments of other libraries\n\n| argument | what to do here |\n| --- | --- |", *answers, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
