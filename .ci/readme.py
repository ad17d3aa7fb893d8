"""README.md from nbs/index.ipynb: hidden cells dropped, directives stripped, stored outputs kept.

Pictures go beside it, to reports/readme/.
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]


def shown(cell):
    return not (cell.cell_type == "code" and re.match(r"\s*#\|\s*hide\b", cell.source))


def main():
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in nb.cells if shown(c)]
    alts = iter(re.findall(r'#\| fig-alt: "(.+)"', "\n".join(c.source for c in nb.cells)))        # a picture's words
    for c in nb.cells:
        if "#| echo: false" in c.source: c.metadata["tags"] = ["output_only"]
    for c in nb.cells: c.source = "\n".join(line for line in c.source.split("\n") if not line.startswith("#|"))
    only = dict(enabled=True, remove_input_tags=["output_only"])
    text, extra = MarkdownExporter(config=Config(TagRemovePreprocessor=only)).from_notebook_node(nb)
    folder = ROOT / "reports" / "readme"
    for name, data in extra.get("outputs", {}).items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        text = text.replace(f"({name})", f"(reports/readme/{name})")
    text = re.sub(r"\s*!\[(?:jpeg|png)\]", lambda _: f"\n\n![{next(alts)}]", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    # links are relative to nbs/ in the notebook
    text = re.sub(r"\]\((?!https?:|#|reports/)(\S+?\.ipynb)\)", r"](nbs/\1)", text)
    if "--check" in sys.argv: return int((ROOT / "README.md").read_text() != text)
    (ROOT / "README.md").write_text(text)
    return 0


if __name__ == "__main__": sys.exit(main())
