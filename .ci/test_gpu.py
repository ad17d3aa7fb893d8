"""`make test-gpu`: what a GPU's owner runs first.

Every CUDA path against its CPU twin, ten minutes at most, and a report to paste; measures go to
reports/bench/gpu_<card>.json.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Tests of other files that wait for a GPU.
ELSEWHERE = ("tests/identities/test_parts.py::test_cuda_gives_the_same_labels",
             "tests/identities/test_pairs.py::test_a_gpu_finds_the_same_pairs",
             "tests/training/test_distill.py::test_fused_on_cuda",
             "tests/training/test_engine.py::test_two_gpus")
SECONDS = 600


def card():
    "Name, memory, driver, versions: the head of the report."
    import torch
    p = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try: driver = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired): driver = "unknown"
    return dict(card=p.name, memory_GB=round(p.total_memory / 1e9, 1), cards=torch.cuda.device_count(), driver=driver,
                torch=torch.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())


def main():
    import torch
    tests = ["tests/test_gpu.py", *ELSEWHERE]
    if not torch.cuda.is_available():
        print(f"no CUDA device: nothing was run; with one, these would be: {', '.join(tests)}")
        return 0
    about, began = card(), time.time()
    card_name = re.sub(r"[^a-z0-9]+", "_", about["card"].lower()).strip("_")
    file = ROOT / "reports" / "bench" / f"gpu_{card_name}.json"
    notes = Path(tempfile.mkdtemp()) / "notes.json"
    notes.write_text("{}")
    env = os.environ | dict(CION_NB_PROGRESS="0", MPLBACKEND="Agg", CION_NB_GPU_NOTES=str(notes))
    command = [sys.executable, "-m", "pytest", "-rA", "--tb=short", "-p", "no:cacheprovider", *tests]
    try:
        p = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS)
        code, out = p.returncode, p.stdout
    except subprocess.TimeoutExpired as e: code, out = 124, f"{(e.stdout or b'').decode()}\nstopped after {SECONDS} s"
    rows = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (.*)$", out, re.M)
    written = file.with_name(f".{file.name}")
    file.parent.mkdir(parents=True, exist_ok=True)
    found = about | dict(measured=json.loads(notes.read_text()), tests={name: how for how, name in rows})
    written.write_text(json.dumps(found, indent=1) + "\n")
    written.replace(file)
    if code: print(out[-6000:])
    print(" | ".join(f"{k} {v}" for k, v in about.items()))
    for how, name in rows: print(f"{how.lower():8} {name}")
    print(f"{time.time() - began:.0f} s; measures: {file.relative_to(ROOT)}")
    print(f"{sum(h == 'PASSED' for h, _ in rows)} passed, {sum(h in ('FAILED', 'ERROR') for h, _ in rows)} failed")
    return code


if __name__ == "__main__": sys.exit(main())
