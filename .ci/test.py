"""All tests: nbdev's checks, every notebook's cells, pytest, the pages that have a profile through papermill.

Last line: `N passed, N failed, N skipped`. Two jobs run side by side with one torch thread each: two jobs of two
threads would fight for the cores. A third runs the tests that mostly wait. Long jobs start first, so that no core waits
at the end; how long each takes is known from `.ci/seconds.json` (a new measure is left in runs/test/seconds.json: copy
it there when they have drifted).

FAST=1 (`make test FAST=1`) leaves out what is marked slow, and every notebook that is no quick library page: an answer
in three minutes. What was left out is said.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import as_completed, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "runs" / "test"
os.environ |= dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", CION_NB_PROGRESS="0", PYTHONUTF8="1",
                   MPLBACKEND="Agg", TQDM_DISABLE="1",
                   CION_NB_RUNS=os.environ.get("CION_NB_RUNS", str(OUT)), JUPYTER_PATH=str(OUT / "jupyter"))
sys.path.insert(0, str(ROOT / "tests"))
import forked  # noqa: E402

FAST = os.environ.get("FAST", "0") not in ("", "0")
PAGE_LIMIT, PART_LIMIT = 300, 1800            # seconds after which a job is stopped
PART = 300                                    # seconds of tests in one pytest process
BATCH = 60                                    # seconds of notebooks in one process
QUICK = 4                                     # seconds of a library notebook that FAST=1 still runs
UNKNOWN = 10                                  # seconds of what was never measured
WAITING = "tests/test_slurm.py"               # its daemons and jobs wait for one another


# ---- what there is, and how long it takes

def measured() -> dict:
    "File -> seconds; of a test file: [what is quick, what is marked slow]."
    return json.loads((ROOT / ".ci" / "seconds.json").read_text(encoding="utf-8"))


def found(pattern: str, what: str) -> list[Path]:
    files = sorted(p for p in ROOT.glob(pattern) if ".ipynb_checkpoints" not in p.parts)
    if not files: sys.exit(f"no {what} found: the layout has changed, and this script has not")
    return files


def name_of(path: Path) -> str: return path.relative_to(ROOT).as_posix()


def parts_of(seconds: dict, n: int) -> list[list]:
    "Test files in `n` parts of similar length: the longest file first, each into the part that has least."
    parts, lengths = [[] for _ in range(n)], [0.0] * n
    for file in sorted(seconds, key=seconds.get, reverse=True):
        least = lengths.index(min(lengths))
        parts[least].append(file)
        lengths[least] += seconds[file]
    return [sorted(part) for part in parts if part]


# ---- jobs

@dataclass
class Result:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    output: str = ""                              # shown where something failed
    notes: list = field(default_factory=list)     # shown in any case
    tests: dict = field(default_factory=dict)     # id -> seconds, and why it is slow


Told = tuple[str, Result, float]                  # name, what came out, seconds


def call(args: list, limit: int, **env) -> tuple[int, str]:
    "Exit code and output of a Python; 124 when it ran out of time."
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = forked.start(args, os.environ | env, ROOT, True, said, said)
        try: code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = 124
        said.seek(0)
        return code, said.read() + (f"\nstopped after {limit} s" if code == 124 else "")


def call_apart(args: list, limit: int) -> tuple[int, str]:
    "The same of a new Python, while the server of forks begins."
    p = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=limit)
    return p.returncode, p.stdout + p.stderr


def one(code: int, output: str) -> Result: return Result(passed=int(not code), failed=int(bool(code)), output=output)


def generated() -> dict:
    "Content of everything nbdev writes."
    files = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("cion_nb/**/*.py")]
    return {name_of(f): f.read_bytes() for f in files if ".ipynb_checkpoints" not in f.parts}


def nbdev_changes_nothing() -> Result:
    before = generated()
    code, out = call_apart(["-c", "from nbdev.doclinks import nbdev_export; nbdev_export()\n"
                                  "from nbdev.clean import nbdev_clean; nbdev_clean()"], 120)
    changed = sorted(name for name, content in generated().items() if before.get(name) != content)
    remedy = "edit the notebook, run `make notebooks`, commit both"
    for name in changed: out += f"\n{name} changes under nbdev_export/nbdev_clean: {remedy}"
    return one(code or bool(changed), out)


def starts_forks() -> dict:
    "Environment of a job whose own processes are forks, too."
    return dict(CION_NB_FORK_PYTHON=forked.executable())


def notebooks(paths: list[Path], number: int) -> list[Told]:
    "The cells of notebooks without a profile, one after the other."
    file = OUT / f"notebooks-{number}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    code, out = call([".ci/notebooks.py", str(file), *map(str, paths)], PART_LIMIT, **starts_forks())
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    told = [(name_of(Path(row["path"])), one(row["failed"], row["output"]), row["seconds"]) for row in rows]
    lost = [path for path in paths if str(path) not in {row["path"] for row in rows}]
    return told + [(name_of(path), one(1, f"not run, exit code {code}\n{out}"), 0.) for path in lost]


def start_forks() -> str:
    """Every job is a fork of a server that holds the imports of all, and so are the kernels of papermill: each took
    eight seconds for its own. The name of the kernel.
    """
    if sys.platform != "linux": return "python3"
    if not FAST: os.environ["CION_NB_SCENES"] = "1"
    os.environ["CION_NB_FORKS"] = forked.start_server("pytest", "nbdev.test", "papermill.cli", "ipykernel.kernelapp",
                                                      "matplotlib.pyplot", "IPython.display", waits=False).door
    start = [sys.executable, "-S", str(ROOT / "tests/fork_python.py"), "-m", "ipykernel_launcher", "-f",
             "{connection_file}"]
    spec = OUT / "jupyter" / "kernels" / "forked" / "kernel.json"
    spec.parent.mkdir(parents=True, exist_ok=True)
    spec.write_text(json.dumps(dict(argv=start, display_name="forked", language="python")))
    return "forked"


def page(path: Path, kernel: str, **env) -> list[Told]:
    "A page that has a profile, as `reproduce` runs it, but at profile smoke."
    began = time.time()
    out = OUT / "pages" / path.name
    out.parent.mkdir(parents=True, exist_ok=True)
    command = ["-m", "papermill", str(path), str(out), "-k", kernel, "--no-progress-bar", "-p", "profile", "smoke"]
    return [(name_of(path), one(*call(command, PAGE_LIMIT, **starts_forks(), **env)), time.time() - began)]


def tour(paths: list[Path], kernel: str) -> list[Told]:
    """Pages of nbs/tour in their order: each takes the runs of those before. The folder of runs is their own: a run
    that another job is computing is an error to them."""
    return [row for path in paths for row in page(path, kernel, CION_NB_RUNS=str(OUT / "tour"))]


def is_tour(path: Path) -> bool:
    "Whether it is a page of nbs/tour with a cell tagged `parameters`."
    return path.parent.name == "tour" and '"parameters"' in path.read_text(encoding="utf-8")


def pytest(files: list[Path], number: int) -> list[Told]:
    "One part of the tests."
    began = time.time()
    times = OUT / f"pytest-{number}.json"
    times.parent.mkdir(parents=True, exist_ok=True)
    times.unlink(missing_ok=True)
    chosen = ["-m", "not slow"] if FAST else []
    code, out = call(["-m", "pytest", "-rfEs", "-p", "no:cacheprovider", *chosen, *map(str, files)], PART_LIMIT,
                     CION_NB_TEST_TIMES=str(times))
    lines = out.strip().splitlines()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ [a-z]+.* in [\d.]+s", line)), "")
    counts = {word.rstrip("s"): int(n) for n, word in re.findall(r"(\d+) ([a-z]+)\b", summary)}
    wrong = counts.get("failed", 0) + counts.get("error", 0)
    nothing = code == 5 and FAST                                      # all that these files hold is marked slow
    notes = [line for line in lines if line.startswith("SKIPPED")]
    if not nothing and (not summary or code and not wrong):
        wrong, out = 1, out + f"\npytest ended with exit code {code}"
    tests = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
    result = Result(counts.get("passed", 0), wrong, counts.get("skipped", 0), out if wrong else "", notes, tests)
    return [(f"pytest, part {number}", result, time.time() - began)]


# ---- the plan

def plan(seconds: dict, kernel: str) -> tuple[list, list]:
    "Jobs (expected seconds, function, arguments), long pytest parts first; what FAST leaves out (name, seconds)."
    books, toured, jobs, left = {}, {}, [], []
    for path in found("nbs/**/*.ipynb", "notebook"):
        takes = seconds.get(name_of(path), UNKNOWN)
        is_library = re.match(r"\d_", path.parent.name)
        if FAST and (not is_library or takes >= QUICK): left.append((name_of(path), takes))
        elif path.parent.name == "reproduce": jobs.append((takes, page, (path, kernel)))
        elif is_tour(path): toured[path] = takes
        else: books[path] = takes
    if toured: jobs.append((sum(toured.values()), tour, (list(toured), kernel)))
    files = found("tests/**/test_*.py", "test file")
    quick_and_slow = {f: seconds.get(name_of(f), [UNKNOWN, 0]) for f in files}
    tests = {f: both[0] if FAST else sum(both) for f, both in quick_and_slow.items()}
    for function, takes, length in ((pytest, tests, PART), (notebooks, books, BATCH)):
        n = 4 if FAST else max(2, round(sum(takes.values()) / length))
        for number, part in enumerate(parts_of({f: s for f, s in takes.items() if name_of(f) != WAITING}, n), 1):
            jobs.append((sum(takes[f] for f in part), function, (part, number)))
    jobs.sort(key=lambda job: (job[1] is not pytest, -job[0]))
    return jobs, left


def waiting_jobs(seconds: dict) -> list:
    "What runs beside all others."
    quick, slow = seconds.get(WAITING, [UNKNOWN, 0])
    return [(quick if FAST else quick + slow, pytest, ([ROOT / WAITING], 0))]


def tell(name: str, result: Result, seconds: float) -> None:
    counts = f", {result.passed} tests" if name.startswith("pytest") else ""
    print(f"{'FAILED' if result.failed else 'passed'}  {name}  ({seconds:.0f} s{counts})", flush=True)
    if result.failed: print("    " + result.output[-8000:].replace("\n", "\n    "), flush=True)


def tell_slow(tests: dict) -> None:
    "The slowest tests, and what the marked ones take, by their reason."
    print("slowest tests:")
    for name, (seconds, _) in sorted(tests.items(), key=lambda x: -x[1][0])[:20]: print(f"  {seconds:6.1f} s  {name}")
    reasons = {}
    for seconds, why in tests.values():
        if why: reasons.setdefault(why, []).append(seconds)
    if reasons: print("marked slow, by reason:")
    for why, times in sorted(reasons.items(), key=lambda x: -sum(x[1])):
        print(f"  {sum(times):6.0f} s  {why}: {len(times)} tests")


def tell_left_out(seconds: dict, left: list) -> None:
    "What FAST=1 did not run, and how long it takes."
    def listed(rows):
        return ", ".join(f"{Path(name).stem} ({s:.0f} s)" for name, s in sorted(rows, key=lambda row: -row[1]))
    slow = [(name, s[1]) for name, s in seconds.items() if isinstance(s, list) and s[1]]
    for what, rows in (("tests marked slow, by file", slow), ("notebooks", left)):
        print(f"left out by FAST=1: {what}, {sum(s for _, s in rows):.0f} s: {listed(rows)}")


def write_seconds(tests: dict, notebooks: dict) -> None:
    "The measure of this run, in the form of .ci/seconds.json."
    rows = {name: round(s, 1) for name, s in notebooks.items()}
    for name, (seconds, why) in tests.items():
        row = rows.setdefault(name.split("::")[0], [0.0, 0.0])
        row[bool(why)] = round(row[bool(why)] + seconds, 2)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    (OUT / "seconds.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def main() -> int:
    began, seconds = time.time(), measured()
    jobs, left = plan(seconds, start_forks())
    told = [("nbdev_export + nbdev_clean change nothing", nbdev_changes_nothing(), time.time() - began)]
    tell(*told[0])
    linting = time.time()
    told.append(("make lint", one(*call_apart([".ci/lint.py"], 120)), time.time() - linting))
    tell(*told[1])
    with ThreadPoolExecutor(2) as pool, ThreadPoolExecutor(1) as beside:
        begun = [there.submit(function, *arguments) for there, those in ((beside, waiting_jobs(seconds)), (pool, jobs))
                 for _, function, arguments in those]
        for job in as_completed(begun):
            for row in job.result():
                told.append(row)
                tell(*row)
    results = [result for _, result, _ in told]
    tests = {name: row for result in results for name, row in result.tests.items()}
    for note in sorted({note for result in results for note in result.notes}): print(note)
    tell_slow(tests)
    if FAST: tell_left_out(seconds, left)
    else: write_seconds(tests, {name: s for name, _, s in told if name.startswith("nbs/")})
    for name, result, _ in told:
        if result.failed: print(f"FAILED  {name}")
    print(f"{time.time() - began:.0f} s in all")
    passed, failed, skipped = (sum(getattr(r, word) for r in results) for word in ("passed", "failed", "skipped"))
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
