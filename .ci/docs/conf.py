"""Sphinx's configuration; `.ci/docs.py` copies it beside the pages, with what it knows in pages.json."""
import json
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain

HERE = Path(__file__).resolve().parent
KNOWN = json.loads((HERE / "pages.json").read_text(encoding="utf-8"))

project = KNOWN["project"]
author = KNOWN["author"]
project_copyright = KNOWN["copyright"]
version = release = KNOWN["version"]
language = "en"
smartquotes = False                             # words as they were written
html_title = f"{project} {version}"

extensions = ["myst_nb"]
exclude_patterns = ["_*"]
nb_execution_mode = "off"                       # results as they are stored
nb_merge_streams = True
nb_output_stderr = "show"
nb_code_prompt_show = "imports"
nb_code_prompt_hide = "imports"
nb_ipywidgets_js = {}                           # no file of another host
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_dmath_double_inline = True                  # a formula of its own line amid a paragraph
myst_heading_anchors = 4
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88       # longer ones: a line a parameter
python_display_short_literal_types = True

html_theme = "furo"
html_theme_options = dict(top_of_page_buttons=["view", "edit"], sidebar_hide_name=False)
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_copy_source = False                        # the files themselves are offered
html_show_sourcelink = False
html_math_renderer = "mathml"


def formula(latex: str, display: str) -> str: return convert(latex, display=display)


def inline(self, node):
    self.body.append(formula(node.astext(), "inline"))
    raise SkipNode


def block(self, node):
    self.body.append(f'<div class="math">{formula(node.astext(), "block")}</div>')
    raise SkipNode


class Domain(PythonDomain):
    "A type's name that two modules have leads nowhere, rather than to either."
    def find_obj(self, *args, **kwargs):
        found = super().find_obj(*args, **kwargs)
        return found if len(found) == 1 else []


def sources(app, pagename, templatename, context, doctree):
    "Where a page is edited, and which file it offers."
    known = KNOWN["pages"].get(pagename, {})
    if path := known.get("edit"): context["edit_at"] = f"{KNOWN['code']}/edit/{KNOWN['branch']}/{path}"
    if path := known.get("download"): context["download"] = context["pathto"](path, resource=True)


def setup(app: Sphinx):
    app.add_domain(Domain, override=True)
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("html-page-context", sources)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
