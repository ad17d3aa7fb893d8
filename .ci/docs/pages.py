"""Notebooks and Markdown files as pages of the site: copies in a folder that Sphinx reads. Sources stay as they are.

A page's name is its path in the repository, so links from page to page hold as they are written; README.md is the
front page, and nbs/index.ipynb, which it is made from, is that page too.
"""
import ast
import configparser
import copy
import json
import os
import posixpath
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

FRONT = {"README.md": "index.md", "nbs/index.ipynb": "index.md"}
TEXTS = {"CONTRIBUTING.md": "Contributing", "CHANGELOG.md": "Changelog"}
LAST = {"reproduce": "Reproduce", "tour": "Tour", "bench": "Benches"}     # folders without a number, in this order
PICTURES = (".jpg", ".jpeg", ".png", ".svg", ".gif")
# A span or a block of code, in which nothing is a link; or the target of a link or a picture.
LINK = re.compile(r"(?P<code>```.*?```|`[^`\n]+`)|"
                  r"(?P<picture>!?)(?P<text>\[(?:[^\[\]`\n]|`[^`\n]*`)*\])\((?P<to>[^)\s]+)\)", re.DOTALL)


@dataclass
class Chapter:
    folder: str                                         # of nbs/
    title: str
    meaning: str = ""                                   # one line
    pages: dict = field(default_factory=dict)           # path in the repository -> what it is about


@dataclass
class Site:
    "What is known about all pages before the first is written."
    root: Path                                          # the checkout
    chapters: list
    code: str                                           # address of the code's host: https://github.com/owner/name
    branch: str
    settings: dict                                      # settings.ini
    broken: list = field(default_factory=list)          # links that lead nowhere, in words
    pictures: set = field(default_factory=set)          # paths that pages show

    def pages(self) -> dict:
        "Path in the repository -> path of the page that it becomes."
        notebooks = [path for chapter in self.chapters for path in chapter.pages]
        return FRONT | {path: path for path in [*TEXTS, *notebooks]}

    def at_host(self, path: str) -> str:
        "Where the code's host shows a file or a folder."
        kind = "tree" if (self.root / path).is_dir() else "blob"
        return f"{self.code}/{kind}/{self.branch}/{path}"


def read_settings(root: Path) -> dict:
    parser = configparser.ConfigParser()
    parser.read(root / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def read_site(root: Path) -> Site:
    "Chapters in their order, with the words that README's map has for them."
    settings = read_settings(root)
    named = read_map((root / "README.md").read_text(encoding="utf-8"))
    folders = sorted(p.name for p in (root / "nbs").iterdir() if re.match(r"\d+_", p.name))
    chapters = []
    for folder in [*folders, *LAST]:
        title, meaning, about = named.get(folder, (LAST.get(folder) or folder.split("_", 1)[1], "", {}))
        paths = sorted(p.relative_to(root).as_posix() for p in (root / "nbs" / folder).glob("*.ipynb"))
        pages = {path: about.get(path, "") for path in paths}
        chapters.append(Chapter(folder, LAST.get(folder) or title.capitalize(), meaning, pages))
    return Site(root, chapters, settings["git_url"].rstrip("/"), settings["branch"], settings)


def read_map(readme: str) -> dict:
    "Folder of nbs/ -> (title, meaning, {page: about}), from the tables of README's map."
    found = {}
    for table in re.findall(r"(?:^\|.*\n)+", readme, re.M):
        lines = [line.strip().strip("|").split("|", 1) for line in table.splitlines()]
        head, _, *rows = [[part.strip() for part in line] for line in lines]
        pages = {}
        for name, about in rows:
            if one := re.fullmatch(r"\[\w+\]\((nbs/\d+_\w+/\w+\.ipynb)\)", name): pages[one[1]] = about
            if one := re.fullmatch(r"`nbs/(\w+)/`", name): found[one[1]] = (one[1], about.rpartition("): ")[2], {})
        if pages: found[next(iter(pages)).split("/")[1]] = (*head, pages)
    return found


# ---- links

def linked(text: str, source: str, site: Site) -> str:
    """Markdown whose links lead to pages of the site, or to the code's host where there is no page.

    `source` is the path of the file that holds the text; links that lead nowhere are noted in `site.broken`."""
    def one(found):
        if found["code"]: return found[0]
        to = target(found["to"], source, site, bool(found["picture"]))
        inner = found["text"]                                          # a picture may be a link's text
        return f"{found['picture']}{inner}({to})"
    return LINK.sub(one, text)


def target(to: str, source: str, site: Site, is_picture: bool = False) -> str:
    "Where a link of the file `source` leads on the site."
    if re.match(r"[a-z]+:", to): return to
    file, _, anchor = to.partition("#")
    anchor = slug(anchor)
    if not file: return f"#{anchor}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), file))
    pages = site.pages()
    if path in pages: return relative(pages[path], FRONT.get(source, source)) + (anchor and f"#{anchor}")
    if path.startswith("..") or not (site.root / path).exists():
        site.broken.append(f"{source} links to {to}, which is not there")
        return to
    if is_picture and path.endswith(PICTURES):
        site.pictures.add(path)
        return relative(path, FRONT.get(source, source))
    chapter = next((c for c in site.chapters if path == f"nbs/{c.folder}"), None)
    if chapter: return relative(f"nbs/{chapter.folder}/index.md", FRONT.get(source, source))
    return site.at_host(path) + (anchor and f"#{anchor}")


def slug(anchor: str) -> str:
    "Jupyter's anchor of a heading (The-paper's-table) as the site has it (the-papers-table)."
    return re.sub(r"[^\w-]", "", unquote(anchor).lower())


def relative(path: str, page: str) -> str: return posixpath.relpath(path, posixpath.dirname(page) or ".")


# ---- notebooks

def directives(source: str) -> list[str]:
    "What stands behind `#|` in a cell."
    return [line[2:].strip() for line in source.splitlines() if line.startswith("#|")]


def without_directives(source: str) -> str:
    return "\n".join(line for line in source.split("\n") if not line.startswith("#|")).strip("\n")


def page_of(notebook: dict, source: str, site: Site) -> dict:
    """The notebook as the site shows it: without hidden cells and directives, links led to pages.

    `source` is its path in the repository; a cell of nothing but imports is folded."""
    page = copy.deepcopy(notebook)
    page["metadata"]["language_info"] = dict(name="python", pygments_lexer="ipython3")
    cells = [shown(cell, source, site) for cell in page["cells"]]
    page["cells"] = [cell for cell in cells if cell is not None]
    if room := room_of(notebook): add_module(page["cells"], room, source, site)
    return page


def shown(cell: dict, source: str, site: Site) -> dict | None:
    "A cell as the site shows it; None where nothing is to be seen."
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        cell["source"] = linked(text, source, site)
        return cell
    if cell["cell_type"] != "code": return cell
    told = directives(text)
    if any(one.split()[0] == "hide" for one in told if one): return None
    cell["source"] = without_directives(text)
    if any(re.fullmatch(r"echo:\s*false", one) for one in told): tag(cell, "remove-input")
    elif not cell["outputs"] and only_imports(cell["source"]): tag(cell, "hide-input")
    for output in cell["outputs"]:
        if markdown := output.get("data", {}).get("text/markdown"):
            output["data"]["text/markdown"] = linked("".join(markdown), source, site)
    return cell if cell["source"].strip() or cell["outputs"] else None


def only_imports(source: str) -> bool:
    "Whether code has nothing for readers: a cell of imports is folded."
    try: body = ast.parse(source).body
    except SyntaxError: return False                    # a magic, or a shell command
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def tag(cell: dict, name: str): cell["metadata"].setdefault("tags", []).append(name)


def room_of(notebook: dict) -> str | None:
    "core.files, of a notebook that is exported to cion_nb/core/files.py."
    for cell in notebook["cells"]:
        for one in directives("".join(cell["source"])):
            if one.startswith("default_exp "): return one.split()[1]


def add_module(cells: list, room: str, source: str, site: Site):
    "A line behind the page's head that leads to the page of its module."
    api = relative(f"api/{room.replace('.', '/')}.md", source)
    module = f"{site.settings['lib_name']}.{room}"
    line = f"*Exported as [`{module}`]({api}): every function's parameters at a glance.*"
    at = next((i for i, cell in enumerate(cells) if cell["cell_type"] == "markdown"), -1) + 1
    cells.insert(at, dict(cell_type="markdown", id="module", metadata={}, source=line))


def title_of(notebook: dict) -> str:
    for cell in notebook["cells"]:
        if found := re.match(r"# (.+)", "".join(cell["source"])): return found[1]
    raise ValueError("a page needs a first heading: `# …`")


# ---- pages that only lead on

def tree(pages, *options: str) -> str:
    lines = [":hidden:", *options, "", *pages]
    return "\n".join(["```{toctree}", *lines, "```", ""])


def chapter_page(chapter: Chapter, titles: dict) -> str:
    "The contents of a chapter: a table of its pages."
    has_words = any(chapter.pages.values())
    head = "| page | about |\n|---|---|" if has_words else "| page |\n|---|"
    rows = [f"| [{titles[path]}]({posixpath.basename(path)}) |" + (f" {about} |" if has_words else "")
            for path, about in chapter.pages.items()]
    names = [posixpath.basename(path).removesuffix(".ipynb") for path in chapter.pages]
    lead = f"{chapter.meaning[:1].upper()}{chapter.meaning[1:]}.\n\n" if chapter.meaning else ""
    return f"# {chapter.title}\n\n{lead}{head}\n" + "\n".join(rows) + f"\n\n{tree(names)}"


def write(out: Path, page: str, text: str):
    (out / page).parent.mkdir(parents=True, exist_ok=True)
    (out / page).write_text(text, encoding="utf-8")


def write_pages(site: Site, out: Path) -> dict:
    """Every page but those of modules, into `out`.

    Comes back: page without suffix -> the source that is edited, and the file that is offered for download, if any."""
    sources = {}
    for chapter in site.chapters:
        titles = {}
        for path in chapter.pages:
            notebook = json.loads((site.root / path).read_text(encoding="utf-8"))
            titles[path] = title_of(notebook)
            write(out, path, json.dumps(page_of(notebook, path, site), ensure_ascii=False))
            sources[path.removesuffix(".ipynb")] = dict(edit=path, download=path)
        write(out, f"nbs/{chapter.folder}/index.md", chapter_page(chapter, titles))
        sources[f"nbs/{chapter.folder}/index"] = dict(edit="nbs/index.ipynb")
    for path in TEXTS:
        write(out, path, linked((site.root / path).read_text(encoding="utf-8"), path, site))
        sources[path.removesuffix(".md")] = dict(edit=path, download=path)
    front = linked((site.root / "README.md").read_text(encoding="utf-8"), "README.md", site)
    chapters = [f"nbs/{chapter.folder}/index" for chapter in site.chapters]
    texts = [f"{title} <{path.removesuffix('.md')}>" for path, title in TEXTS.items()]
    write(out, "index.md", f"{front}\n{tree([*chapters, 'api/index', *texts])}")
    sources["index"] = dict(edit="nbs/index.ipynb", download="README.md")
    for path in site.pictures:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(site.root / path, out / path)
    return sources


def copy_downloads(site: Site, sources: dict, out: Path):
    "The files that pages offer, as they are in the repository."
    for offered in sources.values():
        if path := offered.get("download"):
            os.makedirs((out / path).parent, exist_ok=True)
            shutil.copyfile(site.root / path, out / path)
