"""All tests: nbdev's checks, every notebook's cells, pytest, the pages of nbs/reproduce through papermill.

Last line: `N passed, N failed, N skipped`. Two jobs run side by side with one torch thread each: two jobs of two
threads would fight for the cores. Long jobs start first, so that no core waits at the end; how long each takes is
known from `.ci/seconds.json` (a new measure is left in runs/test/seconds.json: copy it there when they have drifted).

FAST=1 (`make test FAST=1`) leaves out what is marked slow, and every notebook that is no quick library page: an answer
in three minutes. What was left out is said.
"""
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "runs" / "test"
ENV = os.environ | dict(OMP_NUM_THREADS="1", CION_NB_PROGRESS="0", PYTHONUTF8="1", MPLBACKEND="Agg", TQDM_DISABLE="1",
                        CION_NB_RUNS=os.environ.get("CION_NB_RUNS", str(OUT)))
FAST = os.environ.get("FAST", "0") not in ("", "0")
NOTEBOOK_LIMIT, PYTEST_LIMIT = 300, 1800      # seconds after which a job is stopped
PART = 110                                    # seconds of tests in one pytest process, of which each needs ten to begin
QUICK = 8                                     # seconds of a library notebook that FAST=1 still runs
UNKNOWN = 10                                  # seconds of what was never measured


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


def call(args: list, limit: int, **env) -> tuple[int, str]:
    "Exit code and output of a command; 124 when it ran out of time."
    try:
        p = subprocess.run([sys.executable, *args], cwd=ROOT, env=ENV | env, capture_output=True, text=True,
                           timeout=limit, stdin=subprocess.DEVNULL)
        return p.returncode, p.stdout + p.stderr
    except subprocess.TimeoutExpired as e:
        said = [t.decode() if isinstance(t, bytes) else t or "" for t in (e.stdout, e.stderr)]
        return 124, "".join(said) + f"\nstopped after {limit} s"


def one(code: int, output: str) -> Result: return Result(passed=int(not code), failed=int(bool(code)), output=output)


def generated() -> dict:
    "Content of everything nbdev writes."
    files = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("cion_nb/**/*.py")]
    return {name_of(f): f.read_bytes() for f in files if ".ipynb_checkpoints" not in f.parts}


def nbdev_changes_nothing() -> Result:
    before = generated()
    code, out = call(["-c", "from nbdev.doclinks import nbdev_export; nbdev_export()\n"
                            "from nbdev.clean import nbdev_clean; nbdev_clean()"], 120)
    changed = sorted(name for name, content in generated().items() if before.get(name) != content)
    remedy = "edit the notebook, run `make notebooks`, commit both"
    for name in changed: out += f"\n{name} changes under nbdev_export/nbdev_clean: {remedy}"
    return one(code or bool(changed), out)


def notebook(path: Path) -> Result:
    "The cells of a library, bench or tour notebook."
    code = f"from nbdev.test import nbdev_test; nbdev_test(path={str(path)!r}, n_workers=0, do_print=True)"
    return one(*call(["-c", code], NOTEBOOK_LIMIT))


def page(path: Path) -> Result:
    "A page of nbs/reproduce as `reproduce` runs it, but at profile smoke."
    out = OUT / "pages" / path.name
    out.parent.mkdir(parents=True, exist_ok=True)
    command = ["-m", "papermill", str(path), str(out), "-k", "python3", "--no-progress-bar", "-p", "profile", "smoke"]
    return one(*call(command, NOTEBOOK_LIMIT))


def pytest(files: list[Path], number: int) -> Result:
    "One part of the tests."
    times = OUT / f"pytest-{number}.json"
    times.parent.mkdir(parents=True, exist_ok=True)
    times.unlink(missing_ok=True)
    chosen = ["-m", "not slow"] if FAST else []
    code, out = call(["-m", "pytest", "-rfEs", "-p", "no:cacheprovider", *chosen, *map(str, files)], PYTEST_LIMIT,
                     CION_NB_TEST_TIMES=str(times))
    lines = out.strip().splitlines()
    counts = {word.rstrip("s"): int(n) for n, word in re.findall(r"(\d+) ([a-z]+)\b", lines[-1] if lines else "")}
    wrong = counts.get("failed", 0) + counts.get("error", 0)
    nothing = code == 5 and FAST                                      # all that these files hold is marked slow
    notes = [line for line in lines if line.startswith("SKIPPED")]
    if code and not wrong and not nothing:
        wrong, out = 1, out + f"\npytest ended with exit code {code}"
    return Result(counts.get("passed", 0), wrong, counts.get("skipped", 0), out if wrong else "", notes,
                  json.loads(times.read_text(encoding="utf-8")) if times.exists() else {})


# ---- the plan

def plan(seconds: dict) -> tuple[list, list]:
    "Jobs (name, expected seconds, function, arguments), longest first; what FAST leaves out (name, seconds)."
    jobs, left = [], []
    for path in found("nbs/**/*.ipynb", "notebook"):
        name, is_page = name_of(path), path.parent.name == "reproduce"
        takes = seconds.get(name, UNKNOWN)
        if FAST and (not re.match(r"\d_", path.parent.name) or takes >= QUICK): left.append((name, takes))
        else: jobs.append((name, takes, page if is_page else notebook, (path,)))
    files = found("tests/**/test_*.py", "test file")
    quick, slow = zip(*(seconds.get(name_of(f), [UNKNOWN, 0]) for f in files))
    takes = dict(zip(files, quick if FAST else map(sum, zip(quick, slow))))
    n = 2 if FAST else max(2, round(sum(takes.values()) / PART))
    for number, part in enumerate(parts_of(takes, n), 1):
        jobs.append((f"pytest, part {number}", sum(takes[f] for f in part), pytest, (part, number)))
    jobs.sort(key=lambda job: (job[2] is not pytest, -job[1]))
    return jobs, left


def timed(function, arguments: tuple) -> tuple[Result, float]:
    began = time.time()
    return function(*arguments), time.time() - began


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
    jobs, left = plan(seconds)
    results, notebooks = [timed(nbdev_changes_nothing, ())], {}
    tell("nbdev_export + nbdev_clean change nothing", *results[0])
    with ThreadPoolExecutor(2) as pool:
        running = [(name, function, pool.submit(timed, function, arguments)) for name, _, function, arguments in jobs]
        for name, function, job in sorted(running, key=lambda job: job[1] is pytest):      # the short ones first
            results.append(job.result())
            tell(name, *results[-1])
            if function is not pytest: notebooks[name] = results[-1][1]
    tests = {name: row for result, _ in results for name, row in result.tests.items()}
    for line in sorted({note for result, _ in results for note in result.notes}): print(line)
    tell_slow(tests)
    if FAST: tell_left_out(seconds, left)
    else: write_seconds(tests, notebooks)
    print(f"{time.time() - began:.0f} s in all")
    passed, failed, skipped = (sum(getattr(r, word) for r, _ in results) for word in ("passed", "failed", "skipped"))
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
