"""`make test-isa`: what depends on the CPU's kernels, once for each instruction set that oneDNN may be told to use.

Last line: `N passed, N failed`. Nothing is compared between instruction sets: their sums may differ in the last bits.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"default": None, "AVX512_CORE_BF16": "avx512_bf16", "AVX512_CORE": "avx512_f", "AVX2": "avx2"}
TESTS = "tests/models/test_precision.py"
OTHERS = "not decide_together"                # there the CPU's answers are pretended
JOBS = dict(tests=["-m", "pytest", "-p", "no:cacheprovider", TESTS, "-k", OTHERS],
            road=["-m", "cion_nb", "reproduce", "--profile", "smoke", "--only", "table4"])
SECONDS = 280


def able():
    import torch
    return {**getattr(torch.cpu, "get_capabilities", dict)()}


def run(level, args, runs):
    "Exit code, output and seconds of one job under one limit; 124 when it ran out of time."
    env = os.environ | dict(OMP_NUM_THREADS="1", CION_NB_PROGRESS="0", CION_NB_JOBS="1", MPLBACKEND="Agg",
                            TQDM_DISABLE="1", CION_NB_RUNS=str(runs))
    env.pop("ONEDNN_MAX_CPU_ISA", None)
    if level != "default": env["ONEDNN_MAX_CPU_ISA"] = level
    began = time.time()
    try:
        p = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS,
                           stdin=subprocess.DEVNULL)
        code, out = p.returncode, p.stdout + p.stderr
    except subprocess.TimeoutExpired: code, out = 124, f"stopped after {SECONDS} s"
    return code, out, time.time() - began


def not_finite(runs):
    "Runs whose result holds what is not finite (JSON writes null for it)."
    results = {f.parent.name: json.loads(f.read_text()) for f in runs.glob("*/result.json")}
    return [name for name, r in results.items() if "loss" in r and (r["loss"] is None or r.get("mAP", 0.) is None)]


def computed(runs):
    "In what the trainings computed: precision -> how many."
    found = [json.loads(f.read_text()).get("precision") for f in runs.glob("*/result.json")]
    return ", ".join(f"{found.count(p)} in {p.replace('no', 'fp32')}" for p in sorted({p for p in found if p}))


def main():
    began, can, passed, failed, table = time.time(), able(), 0, 0, []
    levels = [level for level, needs in NEEDS.items() if needs is None or can.get(needs)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        folders = {(level, job): Path(folder) / f"{level}-{job}" for level in levels for job in JOBS}
        done = {key: pool.submit(run, key[0], JOBS[key[1]], runs) for key, runs in folders.items()}
        for (level, job), result in done.items():
            code, out, seconds = result.result()
            bad = not_finite(folders[level, job]) if job == "road" else []
            passed, failed = passed + (not code and not bad), failed + bool(code or bad)
            said = (out.strip().splitlines() or [""])[-1][:90]
            if job == "road" and not code: said = computed(folders[level, job])
            if bad: said = f"not finite: {', '.join(bad)}"
            table.append((level, job, "FAILED" if code or bad else "passed", f"{seconds:.0f} s", said))
            if code or bad: print("    " + out[-4000:].replace("\n", "\n    "), flush=True)
    table += [(level, "", "skipped", "", f"this CPU has no {NEEDS[level]}") for level in NEEDS if level not in levels]
    for row in table: print(f"{row[0]:17} {row[1]:6} {row[2]:8} {row[3]:>6}  {row[4]}")
    print(f"{can.get('cpu_name', 'CPU')}: {time.time() - began:.0f} s in all")
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
