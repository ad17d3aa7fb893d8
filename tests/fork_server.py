"""A Python that has imported what jobs of this package need, and forks a process of each that is asked for: the same
as a new Python, without the seconds of its imports. Started by `forked.py`, never imported.

It has one thread and has computed nothing: a fork has no state that a new process would not have. What libraries
read when they are imported or begin (OMP_NUM_THREADS, MALLOC_PERTURB_, ...) must be the server's own: `forked.py` sees
to it.
"""
import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types
from pathlib import Path

# rooms that jobs need, and what these or torch import where they begin to compute
IMPORTED = ["timm", "accelerate", "torch._dynamo", "torch.distributed", "torch.utils.data", "scipy.sparse.csgraph",
            "pandas", "pyarrow.parquet", "sklearn.cluster", "safetensors.torch", "filelock", "tqdm",
            "cion_nb.models.features", "cion_nb.models.precision", "cion_nb.data.film", "cion_nb.data.check",
            "cion_nb.identities.denoise", "cion_nb.identities.explain", "cion_nb.retrieval.evaluate",
            "cion_nb.training.engine", "cion_nb.training.pretrain", "cion_nb.training.finetune",
            "cion_nb.training.cluster_contrast", "cion_nb.companion.commands", "cion_nb.companion.reproduce"]


def asked_child(listener) -> tuple[dict, list]:
    "Forks for every request, until the tests have ended; returns in the fork, with the request and its open files."
    watchers = []
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        watchers = [pid for pid in watchers if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        if sys.stdin in ready: os._exit(0)
        link, _ = listener.accept()
        watchers.append(os.fork())
        if watchers[-1] == 0: break
        link.close()
    listener.close()
    length, files, _, _ = socket.recv_fds(link, 8, 3)
    request = json.loads(link.makefile("rb").read(int(length)))
    if pid := os.fork(): watch(link, pid, request.get("leaves_with_asker"))
    link.close()
    return request, files


def watch(link, pid: int, leaves_with_asker: bool) -> None:
    "The process between server and job: tells the job's number, and how it ended."
    link.sendall(f"{pid}\n".encode())
    while (ended := os.waitpid(pid, os.WNOHANG if leaves_with_asker else 0)) == (0, 0):
        if select.select([link], [], [], .1)[0]: os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(ended[1])
    try: link.sendall(f"{code}\n".encode())
    except OSError: pass                                  # nobody asks any more
    os._exit(0)


def become(request: dict, files: list) -> None:
    "Environment, folder, files, session and paths of the process that is asked for."
    import numpy as np
    import torch

    from cion_nb.core import files as room
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.executable = os.environ.get("CION_NB_FORK_PYTHON", sys.executable)     # what this process starts
    if request["start_new_session"]: os.setsid()
    for own, file in enumerate(files): os.dup2(file, own)
    for file in files: os.close(file)
    np.random.seed()                                      # from the system, as libraries do when they are imported
    torch.default_generator.seed()
    room._CWD = Path.cwd()
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
                     if path and path not in sys.path]


def execute(args: list) -> None:
    "`python ARGS`, where ARGS begin with a file, `-m MODULE` or `-c CODE`; `-u` before them changes nothing here."
    if args[0] == "-u": args = args[1:]
    if args[0] == "-m":
        sys.argv, sys.path[0] = args[1:], os.getcwd()
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if args[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *args[2:]], ""
        exec(compile(args[1], "<string>", "exec"), main.__dict__)
        return
    sys.argv, sys.path[0], main.__file__ = args, os.path.dirname(os.path.realpath(args[0])), args[0]
    exec(compile(Path(args[0]).read_text(encoding="utf-8"), args[0], "exec"), main.__dict__)


def code_of(args: list) -> int:
    "Executes; the exit code that Python would have, after what it would say."
    try: execute(args)
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int): return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def leave(code: int) -> None:
    "Ends as Python does, but for taking its thousands of modules apart, which lasts most of a second."
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xff)


def build_scenes() -> None:
    "The places of the embedded worlds, of which each process would build its own."
    from cion_nb.data.scenery import cameras, scenery
    for bank in "AB":
        for camera in cameras(bank): scenery(camera)


if __name__ == "__main__":
    for name in [*IMPORTED, *sys.argv[2:]]: importlib.import_module(name)
    if os.environ.get("CION_NB_SCENES"): build_scenes()
    others = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")][1:]
    others = [name for name in others if not name.startswith("jemalloc")]     # Arrow's, which starts anew in a fork
    if others: sys.exit(f"imports have started the threads {others}: a fork would lack them")
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(sys.argv[1])
        door.listen(64)
        print("ready", flush=True)
        asked = asked_child(door)
    become(*asked)
    leave(code_of(asked[0]["args"]))
