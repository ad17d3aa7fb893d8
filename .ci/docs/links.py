"""What is wrong with a built site: links that lead nowhere, pages without words, files that come from elsewhere."""
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FEWEST = 40          # letters of a page that says something
LEADS = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src", "source": "src"}
LOADED = {"img", "script", "iframe", "source"}


class Reader(HTMLParser):
    "Anchors, links and words of a page."
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.anchors, self.links, self.words, self._depth = set(), [], [], 0

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.anchors |= {known[k] for k in ("id", "name") if known.get(k)}
        if tag == "article": self._depth += 1
        if (to := known.get(LEADS.get(tag))) is not None: self.links.append((tag, known.get("rel") or "", to))

    def handle_endtag(self, tag):
        if tag == "article": self._depth -= 1

    def handle_data(self, data):
        if self._depth: self.words.append(data)


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


def complaints(site: Path) -> list[str]:
    "One line a fault; empty: none."
    pages = {page: read(page) for page in sorted(site.rglob("*.html"))}
    if not pages: return [f"{site} holds no page"]
    found = []
    for page, reader in pages.items():
        name = page.relative_to(site).as_posix()
        if len(re.sub(r"\s", "", "".join(reader.words))) < FEWEST: found.append(f"{name} says nothing")
        for tag, rel, to in reader.links:
            if wrong := fault(tag, rel, to, page, pages): found.append(f"{name}: {wrong}")
    return found


def fault(tag: str, rel: str, to: str, page: Path, pages: dict) -> str | None:
    "What is wrong with a link, in words."
    parts = urlsplit(to)
    if parts.scheme in ("http", "https") or to.startswith("//"):
        is_needed = tag in LOADED or tag == "link" and "stylesheet" in rel
        return f"needs {to} of another host" if is_needed else None
    if parts.scheme: return None                                       # data:, mailto:
    file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if file.is_dir(): file /= "index.html"
    if not file.is_file(): return f"{to} leads to no file"
    known = pages.get(file)
    if parts.fragment and known and unquote(parts.fragment) not in known.anchors | {"", "top"}:
        return f"{to} leads to no anchor"
