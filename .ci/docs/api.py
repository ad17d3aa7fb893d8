"""Pages of modules: every public function and class with its signature as written, its parameters with their comments
(room `core.doors`), what it returns, and its docstring.
"""
import ast
import importlib
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path

from pages import relative, Site, tree, write

from cion_nb.core.doors import meanings

LONGEST = 12             # lines of a constant that are shown
CODE = re.compile(r"(`[^`\n]+`)")


@dataclass
class Parameter:
    name: str            # with its stars
    type: str = ""       # as written
    default: str = ""    # as written; empty: none
    meaning: str = ""


@dataclass
class Entry:
    "What a page says about one public name."
    name: str
    kind: str                                       # function, class, data, method, classmethod, staticmethod, property
    signature: str = ""                             # (a: int, b=2) -> str
    doc: str = ""
    parameters: list = field(default_factory=list)
    returns: str = ""
    returned: str = ""                              # what comes back, in words
    source: str = ""                                # of a constant
    members: list = field(default_factory=list)     # of a class
    line: int = 0


def entries_of(module) -> list[Entry]:
    "The public names of a module, in the order of its source."
    text = inspect.getsource(module)
    nodes = ast.parse(text).body
    public = set(module.__all__)
    found, classes = [], {}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            owner = patched_class(node)
            if owner: add_member(classes, found, owner, node, module, text)
            elif node.name in public: found.append(function(node, getattr(module, node.name), text))
        elif isinstance(node, ast.ClassDef) and node.name in public:
            classes[node.name] = one_class(node, getattr(module, node.name), text)
            found.append(classes[node.name])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found += constants(node, public, text)
    return found


def patched_class(node) -> str | None:
    "The class that fastcore's `@patch` puts a function on."
    names = [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]
    if "patch" not in names: return None
    return ast.unparse(node.args.args[0].annotation)


def add_member(classes, found, owner, node, module, text):
    if is_private(node.name): return
    entry = function(node, member_of(getattr(module, owner), node.name), text, kind_of(node))
    if owner in classes: classes[owner].members.append(entry)
    else:                                                           # a class of another room
        entry.name = f"{owner}.{entry.name}"
        found.append(entry)


def member_of(owner, name):
    "A function as it was written into a class."
    thing = inspect.getattr_static(owner, name)
    if isinstance(thing, property): return thing.fget
    return getattr(thing, "__func__", thing)


def is_private(name: str) -> bool: return name.startswith("_") and name != "__call__"


def kind_of(node) -> str:
    "What a function of a class is."
    for decorator in node.decorator_list:
        said = ast.unparse(decorator)
        if said in ("classmethod", "staticmethod"): return said
        if said.rpartition(".")[2] in ("property", "cached_property") or "as_prop=True" in said: return "property"
        if "cls_method=True" in said: return "classmethod"
    return "method"


# ---- functions

def function(node, thing, text: str, kind: str = "function") -> Entry:
    parameters = parameters_of(node, text, skip_first=kind in ("method", "classmethod", "property"))
    told = meanings(thing)
    for parameter in parameters: parameter.meaning = told.get(parameter.name.lstrip("*"), "")
    returns = written(node.returns, text)
    arguments = joined(parameters, node.args)
    return Entry(node.name, kind, f"({arguments})" + (f" -> {returns}" if returns else ""), doc_of(node), parameters,
                 returns, told.get("return", ""), line=node.lineno)


def written(node, text: str) -> str:
    "An expression as the source has it."
    if node is None: return ""
    return " ".join(ast.get_source_segment(text, node).split())


def parameters_of(node, text: str, skip_first: bool) -> list[Parameter]:
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + list(a.defaults)
    found = [one_parameter(arg, default, text) for arg, default in zip(plain, defaults, strict=True)]
    if skip_first: found = found[1:]
    if a.vararg: found.append(one_parameter(a.vararg, None, text, "*"))
    found += [one_parameter(arg, default, text) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    if a.kwarg: found.append(one_parameter(a.kwarg, None, text, "**"))
    return found


def one_parameter(arg, default, text, stars="") -> Parameter:
    return Parameter(stars + arg.arg, written(arg.annotation, text), written(default, text))


def joined(parameters: list[Parameter], args) -> str:
    "Parameters with the bare `/` and `*` between them."
    parts = []
    first_keyword = args.kwonlyargs[0].arg if args.kwonlyargs and not args.vararg else None
    last_positional = args.posonlyargs[-1].arg if args.posonlyargs else None
    for p in parameters:
        if p.name == first_keyword: parts.append("*")
        default = f" = {p.default}" if p.type else f"={p.default}"
        parts.append(p.name + (f": {p.type}" if p.type else "") + (default if p.default else ""))
        if p.name == last_positional: parts.append("/")
    return ", ".join(parts)


def doc_of(node) -> str: return ast.get_docstring(node) or ""


# ---- classes and constants

def one_class(node, thing, text: str) -> Entry:
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    made = next((n for n in methods if n.name == "__init__"), None)
    entry = Entry(node.name, "class", doc=doc_of(node), line=node.lineno)
    if made is not None:
        built = function(made, thing.__init__, text, "method")
        entry.signature, entry.parameters = built.signature.partition(" -> ")[0], built.parameters
        if built.doc: entry.doc = f"{entry.doc}\n\n{built.doc}".strip()
    elif is_dataclass(node) or hasattr(thing, "model_fields"): fill_fields(entry, node, thing, text)
    for n in methods:
        if not is_private(n.name): entry.members.append(function(n, member_of(thing, n.name), text, kind_of(n)))
    return entry


def is_dataclass(node) -> bool: return any("dataclass" in ast.unparse(d) for d in node.decorator_list)


def fill_fields(entry: Entry, node, thing, text: str):
    "Fields of a dataclass, or settings of a class of pydantic, which say their meaning themselves."
    settings, told = getattr(thing, "model_fields", {}), meanings(thing) if is_dataclass(node) else {}
    for n in node.body:
        if not isinstance(n, ast.AnnAssign) or "ClassVar" in ast.unparse(n.annotation): continue
        if is_private(n.target.id): continue
        name, default = n.target.id, written(n.value, text)
        if name in settings:
            values = n.value.args if isinstance(n.value, ast.Call) and ast.unparse(n.value.func) == "setting" else []
            default = written(values[0], text) if values else repr(settings[name].default)
        meaning = settings[name].description if name in settings else told.get(name)
        entry.parameters.append(Parameter(name, written(n.annotation, text), default, meaning or ""))
    if is_dataclass(node):
        arguments = [p.name + (f"={p.default}" if p.default else "") for p in entry.parameters]
        entry.signature = f"({', '.join(arguments)})"


def constants(node, public: set, text: str) -> list[Entry]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    named = [n for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]   # none of `BANKS["B"] = …`
    names = [n.id for n in named if isinstance(n, ast.Name) and n.id in public]
    lines = text.splitlines()[node.lineno - 1:node.end_lineno]
    if len(lines) > LONGEST: lines = [*lines[:LONGEST], "# …"]
    return [Entry(name, "data", source="\n".join(lines), line=node.lineno) for name in names]


# ---- Markdown

def cell(text: str, is_code: bool = False) -> str:
    text = " ".join(text.split()).replace("|", r"\|")
    if not text: return ""
    if not is_code: return plain(text)
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}"


def plain(text: str) -> str:
    "Words of a comment or a docstring as Markdown: what would be markup outside `code` stands for itself."
    def one(part): return part if CODE.fullmatch(part) else re.sub(r"([*_\[\]<>${}#~\\])(?!\|)", r"\\\1", part)
    return "".join(map(one, CODE.split(text)))


def table(parameters: list[Parameter]) -> str:
    "Name, type, default and meaning; columns that nobody fills are left out."
    kinds = dict(type=True, default=True, meaning=False)
    kinds = {kind: code for kind, code in kinds.items() if any(getattr(p, kind) for p in parameters)}
    if not kinds: return ""
    rows = [["name", *kinds], ["---"] * (1 + len(kinds))]
    for p in parameters:
        rows.append([cell(p.name, True), *(cell(getattr(p, kind), code) for kind, code in kinds.items())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def paragraphs(doc: str) -> str:
    "A docstring: its paragraphs, and indented or listed lines as they stand."
    return "\n\n".join(map(paragraph, re.split(r"\n\s*\n", doc.strip())))


def paragraph(text: str) -> str:
    if re.search(r"^(\s{2,}|[-*] |>>>)", text, re.M): return f"```text\n{text}\n```"
    return re.sub(r"(?<=\.)\n(?=[A-Z`])", r"\\\n", plain(text))        # a sentence that began a line still does


def shown(entry: Entry, depth: int = 0) -> str:
    "The entry as a directive of Sphinx, which search and index know."
    inner = [paragraphs(entry.doc)] if entry.doc else []
    if told := table(entry.parameters): inner.append(told)
    if entry.kind != "property" and (entry.returns not in ("", "None") or entry.returned):
        kind = f" {cell(entry.returns, True)}" if entry.returns else ""
        inner.append(f"**Returns**{kind}" + (f": {plain(entry.returned)}" if entry.returned else ""))
    if entry.source: inner.append(f"```python\n{entry.source}\n```")
    inner += [shown(member, depth + 1) for member in entry.members]
    kind, option = entry.kind, ""
    signature = "" if kind in ("data", "property") else entry.signature
    if kind in ("classmethod", "staticmethod"): kind, option = "method", f":{entry.kind}:\n"
    if kind == "method" and "." in entry.name and not depth: kind = "function"
    if kind == "property" and entry.returns: option = f":type: {entry.returns}\n"
    fence = ":" * (8 - depth)
    body = "\n\n".join(inner)
    return f"{fence}{{py:{kind}}} {entry.name}{signature}\n{option}\n{body}\n{fence}"


def module_page(module, notebook: str, page: str, doors: list[str], site: Site) -> str:
    entries = entries_of(module)
    name = module.__name__
    room = name.partition(".")[2]
    head = f"# {room}\n\n{plain(inspect.getdoc(module) or '')}\n\nThe page that explains it: " \
           f"[{Path(notebook).stem}]({relative(notebook, page)}). Import it as `{name}`."
    if doors:
        calls = ", ".join(f"{{py:obj}}`cion.{door} <{name}.{door}>`" for door in doors)
        head += f" Doors, after `import {site.settings['lib_name']} as cion`: {calls}."
    parts = [("Functions", "function"), ("Classes", "class"), ("Constants", "data")]
    groups = [(title, [e for e in entries if (e.kind if e.kind in ("class", "data") else "function") == kind])
              for title, kind in parts]
    body = "\n\n".join(f"## {title}\n\n" + "\n\n".join(map(shown, group)) for title, group in groups if group)
    return f"{head}\n\n```{{py:module}} {name}\n```\n\n{body}\n"


def write_api(site: Site, rooms: dict, out: Path) -> dict:
    """A page a module, one a folder, and one above them.

    `rooms`: core.files -> path of its notebook. Comes back as `write_pages` has it."""
    package = importlib.import_module(site.settings["lib_name"])
    sources, folders = {}, {}
    for room, notebook in rooms.items():
        page = f"api/{room.replace('.', '/')}.md"
        module = importlib.import_module(f"{package.__name__}.{room}")
        write(out, page, module_page(module, notebook, page, package._DOORS.get(room, []), site))
        file = Path(module.__file__).relative_to(site.root).as_posix()
        sources[page.removesuffix(".md")] = dict(edit=notebook, download=file)
        folders.setdefault(room.split(".")[0], {})[room] = first_line(module)
    for folder, modules in folders.items():
        rows = "\n".join(f"| [{room}]({room.split('.')[1]}.md) | {cell(about)} |" for room, about in modules.items())
        names = [f"{room.split('.')[1]} <{room.split('.')[1]}>" for room in modules]
        text = f"# API: {folder}\n\n| module | about |\n|---|---|\n{rows}\n\n{tree(names)}"
        write(out, f"api/{folder}/index.md", text)
    write(out, "api/index.md", f"# API\n\n{api_lead(package)}\n\n{api_doors(package)}\n\n"
          + tree([f"{folder} <{folder}/index>" for folder in folders]))
    return sources


def first_line(module) -> str: return (inspect.getdoc(module) or "").split("\n")[0]


def api_lead(package) -> str:
    name = package.__name__
    return (f"Every module of `{name}`, made from its docstrings and the comments of its parameters. What most people "
            f"need is a door of the package: `import {name} as cion`, then `cion.denoise(…)`.")


def api_doors(package) -> str:
    rows = []
    for room, doors in package._DOORS.items():
        page, name = room.replace(".", "/"), f"{package.__name__}.{room}"
        calls = ", ".join(f"{{py:obj}}`{door} <{name}.{door}>`" for door in doors)
        rows.append(f"| [{room}]({page}.md) | {calls} |")
    return "| module | doors |\n|---|---|\n" + "\n".join(rows)
