"""Every notebook: its place, its one tagged cell where it has parameters, and stored outputs that a reader may see."""
import json
import re

import papermill
import pytest
from places import ROOT

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TOUR = [p for p in NOTEBOOKS if p.parent.name == "tour" and '"parameters"' in p.read_text(encoding="utf-8")]
PAGES = [p for p in NOTEBOOKS if p.parent.name == "reproduce"] + TOUR      # papermill runs them
LARGEST = 300_000        # characters of a cell's outputs
HEAVIEST = 600_000       # bytes of a notebook's file
# What no stored output may say.
WARNING = r"\b\w*Warning\b|Traceback \(most recent call last\)"
MACHINE = r"(?<![\w.:/])/(tmp|home|root|work|usr|opt|mnt|Users)/\w|\.\./shared|files\.pythonhosted|pypi\.org"


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def called(path): return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def complaints(cell):
    "What is wrong with a cell's stored outputs, in words."
    for output in cell.get("outputs", []):
        shown = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
        said = "".join(output.get("text", "")) or json.dumps(shown)
        if output["output_type"] == "error": yield f"an error: {output.get('ename')}"
        if output.get("name") == "stderr": yield f"standard error: {said[:200]}"
        for what, pattern in (("a warning", WARNING), ("a machine's path", MACHINE)):
            if found := re.search(pattern, said): yield f"{what}: {said[max(0, found.start() - 60):found.end() + 80]}"
    size = len(json.dumps(cell.get("outputs", [])))
    if size > LARGEST: yield f"{size:,} characters, {LARGEST:,} are allowed: a smaller picture, or a JPEG"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=called)
def test_notebook_outputs_are_small_and_clean(path):
    found = [f"cell {cell['id']} stores {what}" for cell in cells(path) for what in complaints(cell)]
    assert not found, "\n".join([called(path), *found])
    text = "".join(map(source, cells(path)))
    assert not re.search(r"/work/|/root/|\.\./shared|files\.pythonhosted|pypi\.org", text), "names a machine's paths"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=called)
def test_notebook_files_are_small(path):
    size, metadata = path.stat().st_size, json.loads(path.read_text(encoding="utf-8"))["metadata"]
    widgets = len(json.dumps(metadata.get("widgets", "")))
    assert size <= HEAVIEST, (f"{called(path)} has {size:,} bytes, {HEAVIEST:,} are allowed: smaller pictures, "
                              f"or none of the {widgets:,} characters of its metadata's `widgets`")


@pytest.mark.parametrize("output, word", [
    (dict(output_type="error", ename="ValueError", evalue="", traceback=[]), "an error"),
    (dict(output_type="stream", name="stderr", text=["10 of 20\n"]), "standard error"),
    (dict(output_type="stream", name="stdout", text=["x.py:3: UserWarning: no boxes\n"]), "a warning"),
    (dict(output_type="execute_result", data={"text/plain": ["PosixPath('/tmp/x/features')"]}), "a machine's path"),
    (dict(output_type="display_data", data={"image/png": "x" * LARGEST}), "characters"),
    (dict(output_type="execute_result", data={"text/html": ["https://a.org/tmp/x"], "image/png": "a/tmp/b"}), None)])
def test_bad_outputs_are_found(output, word):
    found = list(complaints(dict(outputs=[output])))
    assert len(found) == (word is not None) and all(word in what for what in found)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_parameter_notebooks(path):
    tagged = [i for i, c in enumerate(cells(path)) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "exactly one cell is tagged `parameters`"
    after = next(c for c in cells(path)[tagged[0] + 1:] if c["cell_type"] == "code")
    assert "check_parameters(globals())" in source(after)
    left_out = r"#\|\s*(eval:\s*false|slow|default_exp)"
    assert not any(re.search(left_out, source(c)) for c in cells(path)), "papermill runs every cell"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if any(
    source(cell).startswith("check_parameters(globals())") for cell in cells(p))], ids=called)
def test_pages_that_check_parameters_have_a_cell_tagged_so(path):
    "Without the tag papermill puts its values first, and the page refuses every run with one."
    tags = [cell["metadata"].get("tags", []) for cell in cells(path)]
    assert sum("parameters" in tag for tag in tags) == 1, f"{called(path)}: tag its cell of parameters"
    lines = next(source(cell) for cell, tag in zip(cells(path), tags) if "parameters" in tag).splitlines()
    known = [line.split(":")[0].split("=")[0].strip() for line in lines if "=" in line.split("#")[0]]
    assert list(papermill.inspect_notebook(str(path))) == known, "papermill reads one = a line, comments included"


def test_readme_map_names_every_room():
    readme = (ROOT / "README.md").read_text()
    for p in NOTEBOOKS:
        if p.name != "index.ipynb": assert p.name in readme, f"README's map of the rooms lacks {p.name}"


def test_tests_that_pages_name_are_there():
    named = {(called(p), file) for p in NOTEBOOKS for file in re.findall(r"\btests/[\w/]+\.py", p.read_text())}
    assert not sorted(n for n in named if not (ROOT / n[1]).is_file())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    text = "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", text)
    dead = [link for link in links if "." in link and not (path.parent / link).exists()]
    assert not dead, dead
