"""Where things lie, whatever folder a test stands in."""
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "settings.ini").exists())
TESTS = ROOT / "tests"
JOBS = TESTS / "jobs"                      # scripts that tests start
ZOO = TESTS / "zoo"                        # entry names, shapes and golden values of released checkpoints
DATA = ROOT.parent / "shared" / "data"     # real images, clips and models, where somebody has put them
PAPER_NUMBERS = ROOT / "reports" / "paper"
