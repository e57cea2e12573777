"""
Settings of a stage: the lines `name = value  # why` at the top of its file. A recipe,
config/<name>.py, and --name=value on the command line set the same names, from left to right; the
last one wins. Values are parsed, never executed.
"""

import ast
import difflib
import sys
from pathlib import Path


def read_text(path):
    """Return the text of a file in UTF-8, without a byte order mark."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[: e.start].count(b"\n") + 1
        raise AssertionError(f"{path}, line {line}: not UTF-8 ({e.reason}); save it as UTF-8")


def read_settings(path, is_recipe=False):
    """Return {name: (value, comment)} of the assignments of literals at the top level of a Python
    file.

    Settings are lower-case names. In a recipe everything else but a docstring is an error.
    """
    source = read_text(path)
    try:
        body = ast.parse(source).body
    except SyntaxError as e:
        raise AssertionError(f"{path}, line {e.lineno}: {e.msg}")
    settings = {}
    for node in body:
        try:
            name = node.targets[0].id
            value = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert is_docstring or not is_recipe, (
                f"{path}, line {node.lineno}: a recipe holds only lines `name = value  # why`"
            )
            continue
        if name.islower() or is_recipe:
            last_line = source.splitlines()[node.end_lineno - 1]
            settings[name] = (value, last_line.partition("  # ")[2])
    return settings


def cast(name, value, default, where):
    """Return value as the type of default. Text is a literal unless a string is expected."""
    expected = type(default)
    if isinstance(value, str) and expected is not str:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # it stays text, which the check of the type refuses
    if expected is float and type(value) is int:
        value = float(value)
    assert type(value) is expected, (
        f"{name} expects {expected.__name__}, such as {default!r}, not {value!r} ({where})"
    )
    return value


def print_help(description, defaults):
    """Print a stage's docstring and its settings."""
    print(f"{description.strip()}\n\nsettings (change them with --name=value, or in a recipe):")
    for name, (value, comment) in defaults.items():
        option = f"--{name}={value}"
        print(f"  {option:<30} {comment}")


def override(stage, argv=None):
    """Set a stage's settings by recipes and --name=value, and return all of them as a dict.

    stage: the globals() of the stage. argv: the arguments; None takes sys.argv[1:].
    """
    argv = sys.argv[1:] if argv is None else argv
    defaults = read_settings(stage["__file__"])
    if "--help" in argv or "-h" in argv:
        print_help(stage["__doc__"], defaults)
        raise SystemExit(0)
    settings = {name: value for name, (value, _) in defaults.items()}
    for arg in argv:
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            assert equals, f"{arg}: write --name=value"
            changes = {name: text}
            where = "command line"
        else:
            recipes = ", ".join(map(str, sorted(Path("config").glob("[!_]*.py"))))
            assert arg.endswith(".py"), f"{arg}: neither a recipe (*.py) nor --name=value"
            assert Path(arg).is_file(), f"{arg}: no such recipe; there are {recipes}"
            changes = {name: value for name, (value, _) in read_settings(arg, True).items()}
            where = arg
        for name, value in changes.items():
            similar = difflib.get_close_matches(name, settings, 1)
            hint = f"did you mean {similar[0]}?" if similar else "--help lists all"
            assert name in settings, f"unknown setting {name} ({where}); {hint}"
            settings[name] = cast(name, value, defaults[name][0], where)
            print(f"{name} = {settings[name]!r}  ({where})")
    stage.update(settings)
    return settings
