"""`make docs`: the notebooks as they are stored, README, and a page a module, as a static site in _site/.

Built in build/docs and renamed when it is whole. A warning of Sphinx, a link that leads nowhere or a page without words
leaves the old site as it is, and ends with exit code 1.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / ".ci" / "docs"
sys.path[:0] = [str(HERE), str(ROOT)]                     # this checkout's package, wherever it is installed from

from api import write_api  # noqa: E402
from links import complaints  # noqa: E402
from pages import copy_downloads, read_site, room_of, write_pages  # noqa: E402


def rooms(site) -> dict:
    "core.files -> nbs/0_core/00_files.ipynb"
    paths = [path for chapter in site.chapters for path in chapter.pages]
    named = {path: room_of(json.loads((ROOT / path).read_text(encoding="utf-8"))) for path in paths}
    return {room: path for path, room in named.items() if room}


def prepare(out: Path):
    "Everything that Sphinx reads, in `out`; ValueError for links that lead nowhere."
    shutil.rmtree(out, ignore_errors=True)
    site = read_site(ROOT)
    sources = write_pages(site, out) | write_api(site, rooms(site), out)
    if site.broken: raise ValueError("\n".join(site.broken))
    s = site.settings
    known = dict(project=s["lib_name"], author=s["author"], copyright=s["copyright"], version=s["version"],
                 code=site.code, branch=site.branch, pages=sources)
    (out / "pages.json").write_text(json.dumps(known, indent=1), encoding="utf-8")
    shutil.copyfile(HERE / "conf.py", out / "conf.py")
    shutil.copytree(HERE / "templates", out / "_templates")
    (out / "_static").mkdir()
    shutil.copyfile(HERE / "site.css", out / "_static" / "site.css")
    return site, sources


def build(folder: Path) -> Path:
    "The site, in a folder beside its sources; RuntimeError says what is wrong with it."
    try: site, sources = prepare(folder / "source")
    except ValueError as e: raise RuntimeError(str(e)) from None
    out = folder / "site"
    shutil.rmtree(out, ignore_errors=True)
    command = ["-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-d", str(folder / "doctrees"), "-E",
               str(folder / "source"), str(out)]
    p = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    told = (p.stdout + p.stderr).strip()
    if p.returncode or told: raise RuntimeError(f"{told}\nsphinx ended with exit code {p.returncode}")
    copy_downloads(site, sources, out)
    (out / ".buildinfo").unlink(missing_ok=True)
    if found := complaints(out): raise RuntimeError("\n".join([*found, f"{len(found)} faults"]))
    return out


def put(built: Path, site: Path):
    "The new site in the place of the old one."
    old = built.with_name("old")
    shutil.rmtree(old, ignore_errors=True)
    if site.exists(): os.rename(site, old)
    os.rename(built, site)
    shutil.rmtree(old, ignore_errors=True)


def main():
    began = time.time()
    try: put(build(ROOT / "build" / "docs"), ROOT / "_site")
    except RuntimeError as e: sys.exit(str(e))
    files = [p for p in (ROOT / "_site").rglob("*") if p.is_file()]
    pages, size = sum(p.suffix == ".html" for p in files), sum(p.stat().st_size for p in files) / 1e6
    print(f"_site/index.html: {pages} pages, {size:.0f} MB, no warning, {time.time() - began:.0f} s; open it in a "
          f"browser, or: {Path(sys.executable).name} -m http.server -d _site")


if __name__ == "__main__": main()
