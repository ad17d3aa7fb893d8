"""Reports of pages that nobody computed, for the tests of the page that is made of them."""
from PIL import Image

from cion_nb.companion.report import write_report
from cion_nb.companion.reproduce import TITLES
from cion_nb.core.runs import Run
from cion_nb.core.settings import recipe


def entry(name, **more):
    known = dict(name=name, title=TITLES[name], html=f"{name}.html", seconds=61.5, error=None, failed=[], parameters={})
    return known | more


def trained(method, seed):
    "A run that is done, without its work."
    run = Run(recipe("finetune", "smoke", seed=seed, weights=recipe("pretrain", "smoke", method=method, seed=seed)))
    with run.computing(): run.finish(dict(mAP=.3 + .01 * seed, rank1=.4))
    return run


def fill(folder):
    "Reports of four pages: one whole, one that failed, one in part, one without runs; and their entries."
    rows = [dict(method=method, seed=seed, data="embedded world A", mAP=.1 * i + .01 * seed, rank1=.5 - .1 * i,
                 run=trained(method, seed).name, commit="0123456789ab", cpu="a processor", epochs=[dict(epoch=0)])
            for i, method in enumerate(("lup", "dino", "cion"), 1) for seed in range(3)]
    rows[-1] |= dict(run="finetune-bnneck-tiny-deleted")
    write_report("table4", "tiny", rows, ["cion above lup, mAP: agrees (+20.0 ± 1.0 points, 3 seeds)",
                                          "cion above dino, mAP: not resolved (+0.2 ± 1.0 points, 3 seeds)"],
                 ["LUP-style is MoCo-v2 <without> colour jitter."], figures=["table4.png", "lost.png"])
    Image.new("RGB", (1500, 600), "white").save(folder / "table4.png", dpi=(160, 160))
    write_report("figure4", "tiny", rows[:1], ["cion above lup, silhouette: contradicts (-3.0 ± 1.0 points, 3 seeds)"])
    write_report("order", "tiny", [rows[0] | dict(run=None)], ["mean gain: +3.1 points"])
    write_report("road", "tiny", [{f"measure {k}": k + .125 for k in range(40)} | dict(level="before")])
    return [entry("table4"), entry("figure4", error="DeadKernelError: Kernel <died>", parameters=dict(seeds=5)),
            entry("order", failed=["truth, seed 0: the loss is nan"]), entry("road")]
