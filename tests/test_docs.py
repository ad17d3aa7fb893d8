"""`make docs`: what a page shows of its notebook, what a module's page says, and the site as it is built."""
import importlib.util
import json
import re
import subprocess
import sys
import types

import pytest
from places import ROOT

FOLDER = ROOT / ".ci" / "docs"
SPHINX = [name for name in ("sphinx", "myst_nb", "furo", "latex2mathml") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def docs():
    "The modules of `.ci/docs`."
    sys.path.insert(0, str(FOLDER))
    try: yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in ("pages", "api", "links")})
    finally: sys.path.remove(str(FOLDER))


@pytest.fixture
def site(docs): return docs.pages.read_site(ROOT)


# ---- notebooks

def code(text, *outputs): return dict(cell_type="code", id="a", metadata={}, source=text, outputs=list(outputs))


def markdown(text): return dict(cell_type="markdown", id="b", metadata={}, source=text)


def page(docs, site, *cells):
    return docs.pages.page_of(dict(cells=list(cells), metadata={}), "nbs/0_core/00_files.ipynb", site)["cells"]


def test_hidden_cells_are_left_out(docs, site):
    kept = page(docs, site, markdown("# a"), code("#| hide\n1 / 0"), code("2"), code("#| default_exp core.files"))
    assert [c["source"] for c in kept if c["cell_type"] == "code"] == ["2"]


def test_directives_are_not_shown(docs, site):
    cell, = page(docs, site, code("#| export\nimport json\n#| notest\nx = 1"))
    assert cell["source"] == "import json\nx = 1"


def test_a_cell_without_echo_shows_its_output_only(docs, site):
    output = dict(output_type="stream", name="stdout", text="1")
    cell, = page(docs, site, code("#| echo: false\nprint(1)", output))
    assert cell["metadata"]["tags"] == ["remove-input"] and cell["outputs"] == [output]


@pytest.mark.parametrize("text, is_folded", [("import json\nfrom pathlib import Path", True), ("x = 1", False),
                                             ("import json\nx = 1", False), ("!ls", False), ("# words", False)])
def test_cells_of_imports_are_folded(docs, site, text, is_folded):
    cell, = page(docs, site, code(text))
    assert (cell["metadata"].get("tags") == ["hide-input"]) == is_folded and cell["source"] == text


def test_a_page_leads_to_its_module(docs, site):
    found = page(docs, site, markdown("# files"), code("#| default_exp core.files"), markdown("text"))
    assert "(../../api/core/files.md)" in found[1]["source"] and found[2]["source"] == "text"


def test_sources_stay_as_they_are(docs, site):
    notebook = dict(cells=[code("#| export\n1"), markdown("[index](../index.ipynb)")], metadata={})
    before = json.dumps(notebook)
    docs.pages.page_of(notebook, "nbs/0_core/00_files.ipynb", site)
    assert json.dumps(notebook) == before


# ---- links

@pytest.mark.parametrize("to, leads", [
    ("01_settings.ipynb", "01_settings.ipynb"),
    ("../tour/settings.ipynb#a", "../tour/settings.ipynb#a"),
    ("../index.ipynb", "../../index.md"),
    ("../../README.md", "../../index.md"),
    ("../../CHANGELOG.md", "../../CHANGELOG.md"),
    ("../tour/", "../tour/index.md"),
    ("../../settings.ini", "https://github.com/cion-nb/cion_nb/blob/main/settings.ini"),
    ("../../slurm", "https://github.com/cion-nb/cion_nb/tree/main/slurm"),
    ("https://example.org/a.ipynb", "https://example.org/a.ipynb"),
    ("#here", "#here"),
    ("#The-paper's-table", "#the-papers-table"),
    ("../tour/settings.ipynb#Two-sizes,-%C3%BC", "../tour/settings.ipynb#two-sizes-ü")])
def test_links_lead_to_pages_or_to_the_code(docs, site, to, leads):
    assert docs.pages.linked(f"see [`a` b]({to}).", "nbs/0_core/00_files.ipynb", site) == f"see [`a` b]({leads})."
    assert not site.broken


def test_a_link_that_leads_nowhere_is_told(docs, site):
    docs.pages.linked("[a](nothing.ipynb)", "nbs/0_core/00_files.ipynb", site)
    assert site.broken == ["nbs/0_core/00_files.ipynb links to nothing.ipynb, which is not there"]


def test_code_holds_no_link(docs, site):
    text = "`a[i](b.x)` and\n```python\nx[0](y.z)\n```"
    assert docs.pages.linked(text, "README.md", site) == text and not site.broken


def test_pictures_come_along(docs, site):
    text = "![](reports/readme/output_1_0.jpg)"
    assert docs.pages.linked(text, "README.md", site) == text and site.pictures == {"reports/readme/output_1_0.jpg"}


def test_chapters_stand_in_their_order(site):
    folders = [chapter.folder for chapter in site.chapters]
    assert folders[0] == "0_core" and folders[-4:] == ["9_companion", "reproduce", "tour", "bench"]
    assert all(about for c in site.chapters[:-3] for about in c.pages.values()), "README says what rooms are about"
    assert {p.parent.name for p in (ROOT / "nbs").glob("*/*.ipynb")} == set(folders)


# ---- modules

def entries(docs, tmp_path, text):
    "Of a module with this source."
    path = tmp_path / "example.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["example"] = module
    try:
        spec.loader.exec_module(module)
        return docs.api.entries_of(module)
    finally: del sys.modules["example"]


def test_a_function_says_its_parameters(docs, tmp_path):
    found, = entries(docs, tmp_path, '''
__all__ = ["f"]
SIZE = 3
def f(
    x,                  # (N, D) features; a `|` b
    *rows: int,
    size: int = SIZE,   # pixels
) -> list[int]:         # one a row
    "What it gives."
def _g(): pass
def h(): pass
''')
    assert found.signature == "(x, *rows: int, size: int = SIZE) -> list[int]"
    assert [(p.name, p.type, p.default, p.meaning) for p in found.parameters] == [
        ("x", "", "", "(N, D) features; a `|` b"), ("*rows", "int", "", ""), ("size", "int", "SIZE", "pixels")]
    assert (found.returns, found.returned, found.doc) == ("list[int]", "one a row", "What it gives.")
    assert r"| `x` |  |  | (N, D) features; a `\|` b |" in docs.api.shown(found)


def test_a_class_says_its_fields_and_methods(docs, tmp_path):
    found, = entries(docs, tmp_path, '''
from dataclasses import dataclass
from fastcore.basics import patch
__all__ = ["A"]
@dataclass
class A:
    "Something."
    x: int         # metres
    y: float = 2.
    @property
    def double(self) -> int: return 2 * self.x
    def _hidden(self): pass
@patch
def far(self: A, by: int = 1): "Farther."     # of the name
@patch(cls_method=True)
def load(cls: A, path): "From a file."
''')
    assert found.signature == "(x, y=2.)" and [p.meaning for p in found.parameters] == ["metres", ""]
    assert [(m.name, m.kind, m.signature) for m in found.members] == [
        ("double", "property", "() -> int"), ("far", "method", "(by: int = 1)"), ("load", "classmethod", "(path)")]


def test_settings_say_their_meaning(docs):
    module = importlib.import_module("cion_nb.identities.denoise")
    found = next(e for e in docs.api.entries_of(module) if e.name == "DenoiseSettings")
    k1 = next(p for p in found.parameters if p.name == "k1")
    assert (k1.type, k1.default) == ("int", "10") and k1.meaning.startswith("reciprocal links")


def test_every_public_name_of_a_module_is_there(docs):
    for room in ("identities.denoise", "identities.pairs", "core.settings"):
        module = importlib.import_module(f"cion_nb.{room}")
        assert {e.name for e in docs.api.entries_of(module)} >= set(module.__all__), room


# ---- the checker

@pytest.mark.parametrize("body, word", [
    ('<a href="b.html">b</a>', None), ('<a href="b.html#here">b</a>', None),
    ('<a href="https://example.org">b</a>', None), ('<a href="c.html">c</a>', "no file"),
    ('<a href="b.html#there">b</a>', "no anchor"), ('<img src="x.png">', "no file"),
    ('<script src="https://example.org/x.js"></script>', "another host")])
def test_faults_of_a_site_are_found(docs, tmp_path, body, word):
    words = "<article>" + "word " * 20
    (tmp_path / "a.html").write_text(f"{words}{body}</article>")
    (tmp_path / "b.html").write_text(f'{words}<p id="here"></p></article>')
    found = docs.links.complaints(tmp_path)
    assert len(found) == (word is not None) and all(word in what for what in found)


def test_an_empty_page_is_found(docs, tmp_path):
    (tmp_path / "a.html").write_text("<nav>" + "word " * 40 + "</nav><article><h1>a</h1></article>")
    assert docs.links.complaints(tmp_path) == ["a.html says nothing"]


# ---- the site

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The site; it is not put in the place of the one in _site/."
    if SPHINX: pytest.skip(f"{', '.join(SPHINX)} not installed: `make docs` installs them")
    out = tmp_path_factory.mktemp("docs")
    command = ["-c", "import sys; sys.path.insert(0, '.ci')\nfrom pathlib import Path\nimport docs\n"
                     "print(docs.build(Path(sys.argv[1])))", str(out)]
    p = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert p.returncode == 0, p.stdout + p.stderr       # warnings, dead links and empty pages among them
    return out / "site"


@pytest.mark.slow("builds the site")
def test_the_site_is_whole(built):
    for path in (ROOT / "nbs").glob("*/*.ipynb"):
        name = path.relative_to(ROOT)
        assert (built / name).read_bytes() == path.read_bytes(), f"{name} is offered as it is stored"
        html = (built / name.with_suffix(".html")).read_text(encoding="utf-8")
        assert f"edit/main/{name.as_posix()}" in html and f'href="{path.name}" download' in html
        assert "#| export" not in re.sub(r"<[^>]+>", "", html) or path.stem == "maintaining"
    for path in (ROOT / "cion_nb").glob("*/[a-z]*.py"):
        html = (built / "api" / path.relative_to(ROOT / "cion_nb").with_suffix(".html")).read_text(encoding="utf-8")
        module = importlib.import_module(f"cion_nb.{path.parent.name}.{path.stem}")
        missing = [name for name in module.__all__ if f'id="{module.__name__}.{name}"' not in html]
        assert not missing, f"{path.name}: {missing}"
    for name in ("index", "CONTRIBUTING", "CHANGELOG", "search"): assert (built / f"{name}.html").is_file()
    doors = (built / "api" / "index.html").read_text(encoding="utf-8")
    assert 'href="identities/denoise.html#cion_nb.identities.denoise.denoise"' in doors
