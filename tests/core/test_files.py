"Where a progress bar is drawn."
import io
import sys
import types

from cion_nb.core.files import progress


def drawn(monkeypatch, shell) -> tuple[str, str]:
    "What a bar leaves on stdout and stderr."
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setenv("CION_NB_PROGRESS", "0.1")
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert list(progress("abc", desc="letters")) == ["a", "b", "c"]
    return out.getvalue(), err.getvalue()


def test_a_notebook_shows_a_bar_as_no_error(monkeypatch):
    out, err = drawn(monkeypatch, type("ZMQInteractiveShell", (), {})())
    assert "letters: 100%" in out and not err


def test_elsewhere_results_and_bars_stay_apart(monkeypatch):
    for shell in (None, type("TerminalInteractiveShell", (), {})()):
        out, err = drawn(monkeypatch, shell)
        assert "letters: 100%" in err and not out


def test_an_environment_that_wants_no_bar_gets_none(monkeypatch, capsys):
    monkeypatch.setenv("CION_NB_PROGRESS", "0")
    assert list(progress("abc")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
