"""Runs notebooks one after the other, each in a fork of this process, which holds what they all import.

`python .ci/notebooks.py RESULTS NOTEBOOK...` writes a JSON line a notebook to the file RESULTS: its path, whether it
failed, its seconds, and what it said where it failed.
"""
import atexit
import json
import os
import signal
import sys
import tempfile
import time
import traceback

# what the rooms' notebooks have in common; a fork has it at once
import matplotlib.pyplot  # noqa: F401
import numpy  # noqa: F401
import pandas  # noqa: F401
import torch  # noqa: F401
from nbdev.test import nbdev_test

LIMIT = 300      # seconds


def child(path: str, said: int) -> None:
    "The notebook's cells, in a process of their own; does not return."
    os.setsid()                                     # what it starts is ended with it
    os.dup2(said, 1)
    os.dup2(said, 2)
    code = 1
    try:
        nbdev_test(path=path, n_workers=0, do_print=True)
        code = 0
    except SystemExit as e: code = int(bool(e.code))
    except BaseException: traceback.print_exc()
    finally:
        atexit._run_exitfuncs()                     # temporary folders
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    "Exit code; 124 when the time is over."
    end = time.time() + LIMIT
    while time.time() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.05)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return 124


def run(path: str) -> dict:
    began = time.time()
    with tempfile.TemporaryFile() as said:
        process = os.fork()
        if process == 0: child(path, said.fileno())
        code = wait(process)
        said.seek(0)
        output = said.read().decode(errors="replace")
    if code == 124: output += f"\nstopped after {LIMIT} s"
    return dict(path=path, failed=bool(code), seconds=round(time.time() - began, 1), output=output if code else "")


if __name__ == "__main__":
    results, *paths = sys.argv[1:]
    for path in paths:
        with open(results, "a", encoding="utf-8") as file: print(json.dumps(run(path)), file=file)
