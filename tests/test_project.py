"""The two configuration files agree, modules import lightly, every parameter notebook has its one tagged cell, nothing of the workplace leaks."""
import configparser, json, re, subprocess, sys, tomllib
from importlib import metadata
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p.stem for p in (ROOT / "cion_nb").glob("[a-z]*.py"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ROOM = r"\d\d[a-z]?_"  # 07_noise, 07a_levels, 07b_linking, …: the names' order is the dependency order


def cells(path): return json.loads(path.read_text())["cells"]
def source(cell): return "".join(cell["source"])


def test_settings_and_pyproject_agree():
    settings = configparser.ConfigParser(); settings.read(ROOT / "settings.ini"); s = settings["DEFAULT"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert s["lib_name"] == project["name"]
    assert project["requires-python"] == ">=" + s["min_python"]
    assert s["description"] == project["description"]
    assert s["license"] == "apache2" and project["license"] == "Apache-2.0"
    init = (ROOT / "cion_nb" / "__init__.py").read_text()
    assert re.search(r'__version__ = "(.+?)"', init)[1] == s["version"]
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == s["version"]


def test_init_re_exports_nothing():
    lines = [l for l in (ROOT / "cion_nb" / "__init__.py").read_text().splitlines() if l.strip()]
    assert len(lines) == 1 and lines[0].startswith("__version__")


def test_constraints_pin_every_installed_package():
    pins = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    norm = {re.sub(r"[-_.]+", "-", k).lower() for k in pins}
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [*wanted["dependencies"], *(d for extra in ("cpu", "track", "onnx", "dev") for d in wanted["optional-dependencies"][extra])]
    for d in names: assert re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", d)[0]).lower() in norm, f"{d} has no pin in constraints.txt"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_without_heavy_optional_libraries(module):
    heavy = ["torchvision", "faiss", "onnxruntime", "onnx", "cv2", "trackers", "trackeval"]
    code = f"import sys, json, cion_nb.{module}; print(json.dumps([m for m in {heavy + ['cion_nb.backbones']} if m in sys.modules]))"
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert p.returncode == 0, p.stderr
    found = set(json.loads(p.stdout))
    allowed = {"torchvision", "cion_nb.backbones"} if "cion_nb.backbones" in found else set()     # timm, which `backbones` is for, imports torchvision itself
    assert found <= allowed, f"importing cion_nb.{module} pulls in {found - allowed}"


def test_rooms_import_only_rooms_above():
    order = {stem.split("_", 1)[1]: i for i, stem in enumerate(sorted(p.stem for p in NOTEBOOKS if re.match(ROOM, p.name)))}
    for module in MODULES:
        if module.startswith("_"): continue
        used = re.findall(r"from (?:cion_nb)?\.(\w+) import", (ROOT / "cion_nb" / f"{module}.py").read_text())
        below = {u for u in used if u != module and order[u] >= order[module]}
        assert not below, f"{module} imports {below}, which stand below it"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "reproduce"], ids=lambda p: p.stem)
def test_parameter_notebooks(path):
    tagged = [i for i, c in enumerate(cells(path)) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "exactly one cell is tagged `parameters`"
    after = next(c for c in cells(path)[tagged[0] + 1:] if c["cell_type"] == "code")
    assert "check_parameters(globals())" in source(after)
    for c in cells(path): assert not re.search(r"#\|\s*(eval:\s*false|slow|default_exp)", source(c)), "papermill runs every cell"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_outputs_are_small_and_clean(path):
    for c in cells(path):
        if c["cell_type"] != "code": continue
        assert len(json.dumps(c["outputs"])) < 300_000
        assert not any(o["output_type"] == "error" for o in c["outputs"])
    text = path.read_text()
    assert not re.search(r"/work/|/root/|\.\./shared|files\.pythonhosted|pypi\.org", text), "names a machine's paths"


def test_every_exported_module_has_its_notebook():
    rooms = {p.stem.split("_", 1)[1] for p in NOTEBOOKS if re.match(ROOM, p.name)}
    assert rooms == {m for m in MODULES if not m.startswith("_")}


def test_readme_is_made_from_index():
    p = subprocess.run([sys.executable, str(ROOT / ".ci" / "readme.py"), "--check"], capture_output=True, text=True, timeout=120)
    assert p.returncode == 0, "README.md differs from nbs/index.ipynb: run `make readme`"


def test_readme_map_names_every_room():
    readme = (ROOT / "README.md").read_text()
    for p in NOTEBOOKS:
        if p.name != "index.ipynb": assert p.name in readme, f"README's map of the rooms lacks {p.name}"


def test_installed_version():
    assert metadata.version("cion_nb") == (ROOT / "cion_nb" / "__init__.py").read_text().split('"')[1]
