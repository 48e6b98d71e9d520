"""Lines of code of the kernel and of the whole.

    uv run tools/count.py

A line of code is not blank, and no comment or docstring. The kernel is what `launch.py` reaches by
imports, those inside functions included.
"""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "jaxlm"


def name_of(path: Path) -> str:
    """The module's name inside the package, as in `device.model`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def code_lines(text: str) -> int:
    """Lines that are not blank, comment or docstring."""
    docs = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for number in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return sum(bool(line) and line[0] != "#" and number not in docs for number, line in lines)


def imported(tree: ast.Module) -> set[str]:
    """The full names of what is imported anywhere in the module, in functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_modules(tree: ast.Module, modules: Iterable[str]) -> set[str]:
    """Those of `modules` that a module imports."""
    found = set()
    for full in imported(tree):
        parts = full.split(".")
        if parts[0] == "jaxlm":
            inside = ".".join(parts[1:]), ".".join(parts[1:-1])
            found |= {next((name for name in inside if name in modules), "__init__")}
    return found


def closure(start: str, modules: Mapping[str, ast.Module]) -> set[str]:
    """A module, what it imports, what that imports, and so on."""
    found, ahead = set(), {start}
    while ahead:
        found |= ahead
        ahead = {m for name in ahead for m in imported_modules(modules[name], modules)} - found
    return found


def main() -> None:
    """Prints the table."""
    texts = {name_of(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    sizes = {name: code_lines(text) for name, text in texts.items()}
    kernel = closure("launch", {name: ast.parse(text) for name, text in texts.items()})
    for name in sorted(sizes, key=lambda name: (name not in kernel, -sizes[name])):
        print(f"{'kernel' if name in kernel else '':8}{sizes[name]:5}  {name}")
    print(f"kernel: {sum(map(sizes.__getitem__, kernel))} lines in {len(kernel)} files")
    print(f"everything: {sum(sizes.values())} lines in {len(sizes)} files")


if __name__ == "__main__":
    main()
