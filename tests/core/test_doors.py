"""`help` of every door: the comments of its signature, read here by Python's own tokenizer, stand in it; nothing else
of the function changes; `import cion_nb` pays nothing for it."""
import ast
import importlib
import inspect
import io
import json
import pydoc
import re
import subprocess
import sys
import textwrap
import tokenize

import pytest
from IPython.core.interactiveshell import InteractiveShell

import cion_nb
from cion_nb.core.doors import explain_parameters, meanings


def signature_of(thing) -> str:
    "The lines of a function's signature, or of a dataclass's fields."
    text = textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))
    node = ast.parse(text).body[0]
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        return "\n".join(line for n in fields for line in text.splitlines()[n.lineno - 1:n.end_lineno])
    return "\n".join(text.splitlines()[node.lineno - 1:max(node.body[0].lineno - 1, node.lineno)])


def comments_of(thing) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(signature_of(thing) + "\n    pass\n").readline)
    said = [re.sub(r"# *noqa.*", "", t.string.removeprefix("#")) for t in tokens if t.type == tokenize.COMMENT]
    return [" ".join(text.split()) for text in said if text.strip()]


def documented(door):
    "What of a door has comments: itself, or a class's `__init__` or fields, and its methods as `help` shows them."
    if not inspect.isclass(door): return [(door, door)]
    made = door if hasattr(door, "__dataclass_fields__") else door.__init__
    return [(made, door), *((f, f) for name, f in inspect.getmembers(door, inspect.isroutine)
                            if (name == "__call__" or not name.startswith("_")) and is_ours(f))]


def is_ours(function) -> bool: return (function.__module__ or "").startswith("cion_nb.")


def plain(text: str) -> str: return " ".join(re.sub(r"^ *\| ", "", text, flags=re.M).split())


@pytest.mark.parametrize("name", cion_nb.__all__)
def test_help_says_every_comment_of_the_signature(name):
    door = getattr(cion_nb, name)
    shown = plain(pydoc.plain(pydoc.render_doc(door)))
    for source, target in documented(door):
        missing = [c for c in comments_of(source) if c not in plain(inspect.getdoc(target)) or c not in shown]
        assert not missing, f"help(cion_nb.{name}) lacks {missing}"
    for parameter in meanings(door):
        if parameter != "return": assert re.search(rf"^  {parameter} ", inspect.getdoc(door), re.M), parameter


def test_jupyter_shows_it_too():
    inspector = InteractiveShell().inspector
    for door, word in ((cion_nb.evaluate, "(Q, D) array"), (cion_nb.Gallery, "(n, D); any length but 0")):
        assert word in inspector.info(door)["docstring"]


def test_signatures_and_docstrings_stay():
    "Beside functions of a module that was never opened as a door."
    probe = """
import importlib, inspect, json, cion_nb
told = {}
for room, names in cion_nb._DOORS.items():
    module = importlib.import_module(f"cion_nb.{room}")
    for name in names:
        thing = getattr(module, name)
        told[name] = [str(inspect.signature(thing)), inspect.getdoc(thing) or "", thing.__module__, thing.__qualname__]
print(json.dumps(told))"""
    p = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    for name, (signature, doc, module, qualname) in json.loads(p.stdout.splitlines()[-1]).items():
        door = getattr(cion_nb, name)
        assert str(inspect.signature(door)) == signature and inspect.getdoc(door).startswith(doc)
        assert (door.__module__, door.__qualname__) == (module, qualname)
        assert door is getattr(importlib.import_module(module), name)


def test_import_pays_nothing():
    told = "import json, sys; print(json.dumps(sorted(m for m in sys.modules if m.startswith('cion_nb.'))))"
    heavy = ("torch", "numpy", "fastcore", "inspect", "tokenize")
    command = f"import cion_nb, sys; assert not [m for m in {heavy} if m in sys.modules], sys.modules; {told}"
    p = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {command}"],
                       capture_output=True, text=True, timeout=60)
    assert p.returncode == 0, p.stderr
    assert json.loads(p.stdout) == []


def test_an_unknown_door_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_door"): getattr(cion_nb, "no_such_door")


def test_what_has_no_source_or_no_comments_stays_as_it_is():
    def bare(x): "Words."
    made = eval("lambda x: x")
    for thing in (bare, made):
        before = thing.__doc__
        assert explain_parameters(thing).__doc__ == before
    assert meanings(dict) == {}


def test_twice_is_once():
    before = cion_nb.evaluate.__doc__
    assert explain_parameters(cion_nb.evaluate).__doc__ == before and before.count("Parameters:") == 1


def test_a_subclass_leaves_others_alone():
    "Methods of the standard library keep their docstrings."
    class Lines(list):
        def first(self,
            n: int,        # lines
        ): "The first."
    explain_parameters(Lines)
    assert "n  lines" in Lines.first.__doc__ and list.append.__doc__ == [].append.__doc__
