"""Python processes that tests start: forks of a server that has the imports behind it, or true ones where that would be
another thing. `run` and `start` are `subprocess.run` and `Popen` of a Python; `run_ranks` is `torch.distributed.run`.
"""
import atexit
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from places import ROOT, TESTS

# what the C library, Python, torch and others read once, when they begin
READ_EARLY = ("PYTHON", "LD_", "MALLOC_", "GLIBC_", "OMP_", "KMP_", "GOMP_", "OPENBLAS_", "MKL_", "ONEDNN_", "DNNL_",
              "ATEN_", "TORCH_", "PYTORCH_", "CUDA_", "TIMM_", "HF_", "MPL")

# among them, what libraries set when they are imported (OpenCV, scikit-learn), or what is read later
SET_LATE = ("PYTHON", "PYTHON_EXEC", "PYTHONPATH", "LD_LIBRARY_PATH", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING")


def read_early(env: dict) -> dict:
    return {name: value for name, value in env.items() if name.startswith(READ_EARLY) and name not in SET_LATE}


@dataclass(frozen=True)
class Server:
    "Forks a process of whoever asks at its door."
    door: str
    env: dict         # that it was started with

    def can_be(self, env: dict) -> bool:
        "Whether a new process of this environment would be as a fork is."
        paths = {path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path}
        own = {str(ROOT), str(TESTS), *self.env.get("PYTHONPATH", "").split(os.pathsep)}
        return read_early(env) == read_early(self.env) and paths <= own


def start_server(*more: str, waits=True) -> Server:
    "One that ends with this process. `more`: modules that it imports beside its own list; without `waits`, meanwhile."
    folder = Path(tempfile.mkdtemp(prefix="cion-forks-"))
    found = Server(str(folder / "door"), os.environ | dict(OMP_NUM_THREADS="1", CION_NB_FORKS=str(folder / "door")))
    (folder / "env.json").write_text(json.dumps(found.env))
    process = subprocess.Popen([sys.executable, str(TESTS / "fork_server.py"), found.door, *more], env=found.env,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if waits and process.stdout.readline() != "ready\n": raise RuntimeError("the server of forks did not start")
    atexit.register(stop_server, process, folder)
    return found


def stop_server(process, folder: Path) -> None:
    process.stdin.close()
    process.wait(10)
    process.stdout.close()
    shutil.rmtree(folder, ignore_errors=True)


@cache
def server() -> Server:
    "The one that $CION_NB_FORKS names, where somebody has started one; else an own one."
    door = Path(os.environ.get("CION_NB_FORKS", "none/none"))
    file = door.with_name("env.json")
    return Server(str(door), json.loads(file.read_text())) if file.exists() else start_server()


def connect(door: str, patience=180) -> socket.socket:
    "A server that begins opens its door when it has imported all."
    link, until = socket.socket(socket.AF_UNIX), time.monotonic() + patience
    while True:
        try: link.connect(door)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > until: raise
            time.sleep(.05)
        else: return link


def ask(door: str, files: tuple, **request) -> socket.socket:
    "Asks a server for a process with these open files; the link tells its number, then how it ended."
    link, text = connect(door), json.dumps(request).encode()
    socket.send_fds(link, [b"%8d" % len(text)], files)
    link.sendall(text)
    return link


class Fork:
    "One process, with what the tests use of `subprocess.Popen`."
    def __init__(self, server: Server, args: list, env: dict, cwd, start_new_session: bool, stdout, stderr):
        self.returncode, self.stdout, self.stderr, self.rest = None, None, None, b""
        out, self.stdout = self.end_of(stdout)
        if stderr == subprocess.STDOUT: err = os.dup(out)
        else: err, self.stderr = self.end_of(stderr)
        nothing = os.open(os.devnull, os.O_RDONLY)
        self.link = ask(server.door, (nothing, out, err), args=[str(arg) for arg in args], env=env, cwd=str(cwd),
                        start_new_session=start_new_session)
        for file in (nothing, out, err): os.close(file)
        self.pid = self.told(None)

    def end_of(self, wanted):
        "(file of the child, what is read here)."
        if wanted is None: return os.dup(2), None
        if wanted != subprocess.PIPE: return os.dup(wanted.fileno()), None
        read, write = os.pipe()
        return write, open(read, encoding="utf-8")

    def told(self, timeout) -> int | None:
        "The next number that the server tells of this process; None where it tells nothing in time."
        until = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self.rest:
            left = None if until is None else max(0, until - time.monotonic())
            if not select.select([self.link], [], [], left)[0]: return None
            if not (more := self.link.recv(64)): raise RuntimeError("the server of forks has lost a process")
            self.rest += more
        line, self.rest = self.rest.split(b"\n", 1)
        return int(line)

    def poll(self):
        if self.returncode is None: self.returncode = self.told(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None: self.returncode = self.told(timeout)
        if self.returncode is None: raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self): self.send_signal(signal.SIGKILL)

    def terminate(self): self.send_signal(signal.SIGTERM)

    def communicate(self, timeout=None):
        "Both texts, when it has ended."
        streams, texts = (self.stdout, self.stderr), [None, None]
        def read(i): texts[i] = streams[i].read()
        readers = [threading.Thread(target=read, args=(i,), daemon=True) for i in (0, 1) if streams[i]]
        for reader in readers: reader.start()
        self.wait(timeout)
        for reader in readers: reader.join(timeout)
        return tuple(texts)


def start(args, env=None, cwd=None, start_new_session=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
    "`python ARGS` (a file, `-m MODULE` or `-c CODE`, and what follows it), started."
    env = dict(os.environ) if env is None else dict(env)
    if sys.platform == "linux" and server().can_be(env):
        return Fork(server(), args, env, cwd or os.getcwd(), start_new_session, stdout, stderr)
    return subprocess.Popen([sys.executable, *map(str, args)], env=env, cwd=cwd, stdin=subprocess.DEVNULL,
                            stdout=stdout, stderr=stderr, text=True, start_new_session=start_new_session)


@cache
def executable() -> str:
    "A program that does what `sys.executable` does, for scripts that are told which Python to use."
    if sys.platform != "linux": return sys.executable
    file = Path(server().door).parent / f"python-{os.getpid()}"
    stands = f"{sys.executable} -S {TESTS}/fork_python.py"
    file.write_text(f"#!/bin/sh\nCION_NB_FORKS={server().door} exec {stands} \"$@\"\n")
    file.chmod(0o755)
    return str(file)


def finish(processes: list, timeout: float) -> None:
    "Waits for all; where one fails, the others have five seconds more, as after a launcher's signal."
    until = time.monotonic() + timeout
    while any(p.poll() is None for p in processes):
        if any(p.poll() for p in processes): until = min(until, time.monotonic() + 5)
        if time.monotonic() > until: break
        time.sleep(.01)
    for p in processes: p.kill()
    for p in processes: p.wait()


def run(args, env=None, cwd=None, timeout=240, start_new_session=False, ranks=()):
    "`python ARGS`, ended: code and texts. `ranks`: one process for each of these environments, their texts joined."
    env = dict(os.environ) if env is None else dict(env)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        began = time.monotonic()
        processes = [start(args, env | rank, cwd, start_new_session, out, err) for rank in ranks or [{}]]
        finish(processes, timeout)
        if time.monotonic() - began > timeout: raise subprocess.TimeoutExpired(args, timeout)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    codes = [p.returncode for p in processes]
    code = codes[0] if len(codes) == 1 else int(any(codes))
    return subprocess.CompletedProcess(args, code, *texts)


def run_ranks(n: int, args, env=None, timeout=240):
    "`python -m torch.distributed.run --nproc_per_node N ARGS`: code 0 where every process ends with 0, else 1."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return run(args, env, timeout=timeout, ranks=[common | dict(RANK=str(r), LOCAL_RANK=str(r)) for r in range(n)])
