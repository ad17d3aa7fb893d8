"""All tests: nbdev's checks, every notebook's cells, pytest, a papermill run. Last line: `N passed, N failed, N skipped`.

Two jobs run side by side with one torch thread each: two jobs of two threads would fight for the cores.
"""
import os, re, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | dict(OMP_NUM_THREADS="1", CION_NB_PROGRESS="0", PYTHONUTF8="1", MPLBACKEND="Agg", TQDM_DISABLE="1",
                        CION_NB_RUNS=os.environ.get("CION_NB_RUNS", str(ROOT / "runs" / "test")))
NOTEBOOK_SECONDS, PYTEST_SECONDS = 300, 1800
LATE = (("test_backbones", "test_features"), ("test_engine", "test_slurm"))   # the files of two more pytest runs, which follow the notebooks side by side


def call(args, seconds, **env):
    "Exit code and output of a command; 124 when it ran out of time."
    try:
        p = subprocess.run([sys.executable, *args], cwd=ROOT, env=ENV | env, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
        return p.returncode, p.stdout + p.stderr
    except subprocess.TimeoutExpired as e:
        return 124, "".join(t.decode() if isinstance(t, bytes) else t or "" for t in (e.stdout, e.stderr)) + f"\nstopped after {seconds} s"


def generated():
    "Content of everything nbdev writes."
    files = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("cion_nb/*.py")]
    return {f.relative_to(ROOT): f.read_bytes() for f in files if ".ipynb_checkpoints" not in f.parts}


def nbdev_changes_nothing():
    before = generated()
    code, out = call(["-c", "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"], 120)
    changed = sorted(str(f) for f, content in generated().items() if before.get(f) != content)
    return code or bool(changed), out + "".join(f"\n{f} changes under nbdev_export/nbdev_clean: edit the notebook, run `make notebooks`, commit both" for f in changed)


def notebook(path):
    return call(["-c", f"from nbdev.test import nbdev_test; nbdev_test(path={str(path)!r}, n_workers=0, do_print=True)"], NOTEBOOK_SECONDS)


def papermill():
    out = ROOT / "runs" / "test" / "figure4.out.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    return call(["-m", "papermill", "nbs/reproduce/figure4.ipynb", str(out), "-k", "python3", "--no-progress-bar", "-p", "profile", "smoke"], NOTEBOOK_SECONDS)


def main():
    began, jobs = time.time(), {"nbdev_export + nbdev_clean change nothing": nbdev_changes_nothing}
    passed = failed = skipped = 0

    def done(name, code, out, seconds):
        nonlocal passed, failed
        passed, failed = passed + (not code), failed + bool(code)
        print(f"{'FAILED' if code else 'passed'}  {name}  ({seconds:.0f} s)", flush=True)
        if code: print("    " + out[-6000:].replace("\n", "\n    "), flush=True)

    def timed(job, *args):
        t = time.time(); return *job(*args), time.time() - t

    for name, job in jobs.items(): done(name, *timed(job))
    books = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    files = sorted(ROOT.glob("tests/test_*.py"))
    with ThreadPoolExecutor(2) as pool:
        def pytest(chosen): return pool.submit(timed, call, ["-m", "pytest", "-rfEs", "--durations=15", "-p", "no:cacheprovider", *map(str, chosen)], PYTEST_SECONDS)
        parts = [pytest(f for f in files if not any(f.stem in names for names in LATE))]
        runs = {pool.submit(timed, notebook, b): str(b.relative_to(ROOT)) for b in books}
        parts += [pytest(f for f in files if f.stem in names) for names in LATE]
        for f, name in runs.items(): done(name, *f.result())
        parts = [f.result() for f in parts]
    done("papermill nbs/reproduce/figure4.ipynb", *timed(papermill))
    for code, out, seconds in parts:
        print(out[-20000:])
        counts = {k: int(n) for n, k in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", out.strip().splitlines()[-1] if out.strip() else "")}
        passed += counts.get("passed", 0); skipped += counts.get("skipped", 0)
        failed += counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
        if code and not (counts.get("failed") or counts.get("error") or counts.get("errors")): failed += 1; print(f"pytest ended with exit code {code}")
    print(f"{time.time() - began:.0f} s in all")
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
