"""--help: a script's docstring and its flags, read from its text, without importing what it imports."""
import ast
import os
import re
import shutil
import signal
import sys
import textwrap
from pathlib import Path


def show_help(script: str):
    """--help out of a script's text, its docstring and its Args, as wide as the terminal; then exit code 0."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` is no error
    text, width = ast.parse(Path(script).read_text(encoding="utf-8")), min(120, shutil.get_terminal_size().columns)
    body = next(part.body for part in text.body if isinstance(part, ast.ClassDef) and part.name == "Args")
    module = Path(script).parent == Path(__file__).parent  # one of this folder
    name = f"-m flow.{Path(script).stem}" if module else os.path.relpath(script)
    print(f"usage: python {name} [--FLAG VALUE ...]\n")
    for part in ast.get_docstring(text).split("\n\n"):
        print(part if part.startswith(" ") else textwrap.fill(" ".join(part.split()), width), end="\n\n")
    for field, said in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign):
            default, said = field.value and literal(field.value), " ".join(said.value.value.split())
            if "(default" not in said and default is not None and default is not False:
                said += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
            print("  " + flag_and_value(field.target.id, ast.unparse(field.annotation)))
            print(textwrap.fill(said, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    sys.exit(0)


def literal(node: ast.expr):
    """A default's value, or its text where that is no constant."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def flag_and_value(name: str, kind: str) -> str:
    """How a field of Args is given on the command line."""
    flag, many = "--" + name.replace("_", "-"), re.fullmatch(r"tuple\[(.+)\]", kind)
    if "Positional" in kind:
        return f"{name.upper()} ..."
    if kind.startswith("bool"):
        return f"{flag}, --no-{flag[2:]}"
    if many:
        return f"{flag} {many[1].replace(',', '').upper()}"
    words = [word.strip() for word in kind.removesuffix(" | None").split("|")]
    return f"{flag} {' | '.join(word[9:-2] if word.startswith('Literal') else word.upper() for word in words)}"


def script_that_runs() -> str | None:
    """The file of the script that is run, if it is one that parses its Args by flow.cli."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file if file and "parse(Args, __doc__)" in Path(file).read_text("utf-8") else None
