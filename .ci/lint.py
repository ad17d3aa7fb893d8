"""`make lint`: notebooks and tests by ruff, and what ruff cannot tell: two statements on a line that are no guard and
no one-line definition. Last line: `N findings`."""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUARDS = (ast.Return, ast.Raise, ast.Continue, ast.Break, ast.Pass)


def sources(path: Path):
    "(where, text) of a Python file, or of each code cell of a notebook."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield path.relative_to(ROOT), text
        return
    for i, cell in enumerate(json.loads(text)["cells"]):
        if cell["cell_type"] == "code": yield f"{path.relative_to(ROOT)}, cell {i}", "".join(cell["source"])


def crowded(text: str):
    "Lines with two statements: parted by `;`, or after a colon where neither a guard nor a definition stands."
    try: tree = ast.parse(text)
    except SyntaxError: return                                      # a magic, or a shell command
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if not isinstance(block, list) or not block: continue
            for a, b in zip(block, block[1:]):
                if a.end_lineno == b.lineno: yield b.lineno, "two statements on a line"
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef, ast.Lambda)): continue
            first, line = block[0], head_line(node, name)
            if line == first.lineno and not (len(block) == 1 and (
                    isinstance(first, GUARDS) or first.end_lineno == first.lineno and simple(node, first))):
                yield first.lineno, "a statement after a colon that is no guard"


def head_line(node, name) -> int:
    if name == "body": return getattr(node, "lineno", 0)
    return -1


def simple(node, first) -> bool:
    "A loop, a context or an attempt around one short statement reads as one."
    return isinstance(node, (ast.For, ast.With, ast.While, ast.Try, ast.ExceptHandler, ast.If)) and not isinstance(
        first, (ast.If, ast.For, ast.With, ast.While, ast.Try))


def main():
    files = sorted([*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("tests/**/*.py"), *ROOT.glob(".ci/**/*.py")])
    files = [f for f in files if ".ipynb_checkpoints" not in f.parts]
    if not files: sys.exit("nothing to lint: the layout has changed, and this script has not")
    found = [f"{where}, line {line}: {what}" for f in files for where, text in sources(f)
             for line, what in crowded(text)]
    p = subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", "--output-format", "concise",
                        *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    found += [line for line in p.stdout.splitlines() if line.strip()]
    if p.returncode not in (0, 1): sys.exit(p.stderr)
    print(*found, sep="\n")
    print(f"{len(found)} findings")
    return int(bool(found))


if __name__ == "__main__": sys.exit(main())
