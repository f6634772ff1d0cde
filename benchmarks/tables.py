"""The tables of docs/performance.md, one of each benchmark's reports, and the words above them."""

from collections.abc import Callable, Iterable
from typing import Any

Report = dict[str, Any]

MODELS = """
A step is forward pass, backward pass and optimizer. Each model stands below its floor, a plain ViT of the same tokens,
dropout and optimizer, and above its direct formulation: the published equations with nothing spared. They take turns;
the fastest turn of each counts, as in timeit, because whatever else the machine does can only add. `ratio` is to the
floor. GB (2^30 bytes) is the peak: parameters, optimizer state, and what the step or the evaluation takes on top.
`peak %` is the share of the machine's matrix product, measured in the same run, that the model's own operations use.
"""
PSM = """
TransFG's part selection by the product of all attention matrices, and by its CLS row: the multiplication alone, then
together with the forming of the matrices (`full` and `outwards`). N is the number of tokens.
"""
ENGINE = """
A training step by common.engine, beside a bare PyTorch loop; the fastest turn of each counts.
"""
DATA = """
Images/s that one core decodes and transforms. `floor` is torchvision's ImageFolder with the same transform, `time` is
ours beside it; `first` and `kept` are epochs with `--cache-resized`: one that fills the folder, and a later one, whose
`gain` is over ours. COCO: the start with train2017's annotations, whose memory is in MB of 2^20 bytes.
"""
INFERENCE = """
One image at a time, and in batches; the images are at hand. `--predict` reads JPEG files.
"""
SCALING = """
Each process trains on the same number of images. Input and collectives are shares of the step: what other work does not
hide.
"""


def table(head: str, rows: Iterable[str]) -> str:
    """Markdown; cells are parted by ` | `."""
    rule = "|---" * (head.count(" | ") + 1)
    return "\n".join([f"| {head} |", f"{rule}|", *(f"| {row} |" for row in rows)]) + "\n"


def models(report: Report) -> str:
    rows = []
    for group in report["groups"]:
        floor = group["floor"]
        rows.append(f"plain ViT, {group['size']} px, batch {group['batch_size']} | {_costs(floor, floor)}")
        for model in group["models"]:
            rows.append(f"{model['name']} | {_costs(model['ours'], floor)}")
            if model["direct"] is not None:
                rows.append(f"- direct formulation of {model['name']} | {_costs(model['direct'], floor)}")
    heads = (f"{kind} s | ratio | images/s | GB | ratio | peak %" for kind in ("train", "eval"))
    return table(f"model | {' | '.join(heads)}", rows)


def _costs(figures: Report, floor: Report) -> str:
    cells = []
    for kind in ("train", "eval"):
        found, base = figures[kind], floor[kind]
        cells.append(f"{found['seconds']:.3f} | {found['seconds'] / base['seconds']:.3f} | {found['images_per_s']:.2f}")
        known = found["bytes"] is not None and base["bytes"] is not None
        cells.append(f"{found['bytes'] / 2**30:.2f} | {found['bytes'] / base['bytes']:.3f}" if known else "- | -")
        cells.append(f"{found['peak_share']:.0%}")
    return " | ".join(cells)


def psm(report: Report) -> str:
    rows = []
    for tokens, cost in report["tokens"].items():
        alone = f"{cost['product']:.4f} | {cost['row']:.4f} | {cost['product'] / cost['row']:.0f}"
        formed = f"{cost['full']:.4f} | {cost['outwards']:.4f} | {cost['full'] / cost['outwards']:.1f}"
        rows.append(f"{tokens} | {cost['form']:.4f} | {alone} | {formed} | {cost['same']:.0%}")
    return table("N | form s | product s | row s | ratio | full s | outwards s | ratio | same parts", rows)


def engine(report: Report) -> str:
    recipe = report["about"]["recipe"]
    rows = [
        f"{what} | {found['bare']:.4f} | {found['engine']:.4f} | {found['overhead']:.1%}"
        for what, found in (("step s", report["seconds"]), ("of the processors", report["cpu_seconds"]))
    ]
    setting = f"{recipe['model']}, {recipe['img_size']} px, batch {recipe['batch_size']}"
    return table(f"{setting} | bare | engine | overhead", rows)


def data(report: Report) -> str:
    rows = []
    for line in report["lines"]:
        floor, ours, first, kept = (line["seconds"][way] for way in ("floor", "ours", "first", "kept"))
        cells = f"{1 / floor:.1f} | {1 / ours:.1f} | {ours / floor:.3f} | {1 / first:.1f} | {1 / kept:.1f}"
        rows.append(f"{line['name']} | {line['size'][0]} x {line['size'][1]} | {cells} | {ours / kept:.2f}")
    text = table("transform | pixels | floor | ours | time | first | kept | gain", rows) if rows else ""
    started = [
        f"{what} | {found['seconds']:.1f} | {_megabytes(found['bytes'])} | {found['images']:,}"
        for what, found in report["coco"].items()
    ]
    return "\n".join(filter(None, (text, table("COCO | s | MB | images", started) if started else "")))


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f}"


def inference(report: Report) -> str:
    plain = {line["size"]: line["images_per_s"] for line in report["lines"] if line["name"] == "plain ViT"}
    rows = [
        f"{line['name']}, {line['size']} px, batch {line['batch_size']} | {line['p50_ms']:.1f} | {line['p95_ms']:.1f}"
        f" | {line['images_per_s']:.2f} | {line['images_per_s'] / plain[line['size']]:.3f}"
        for line in report["lines"]
    ]
    asked = [
        f"plain ViT, {one['size']} px, batch {one['batch_size']} | {one['predict']:.2f} | {one['bare']:.2f}"
        f" | {one['predict'] / one['bare']:.0%}"
        for one in report["predictions"]
    ]
    answers = table("model | one image: p50 ms | p95 ms | batch: images/s | beside plain ViT", rows)
    return f"{answers}\n{table('`--predict` | images/s from files | model alone | share', asked)}"


def scaling(report: Report) -> str:
    lines, recipe = report["lines"], report["about"]["recipe"]
    alone = lines[0]["images_per_s"] / lines[0]["processes"]
    rows = [
        f"{line['processes']} | {line['seconds']['whole']:.3f} | {line['images_per_s']:.2f}"
        f" | {line['images_per_s'] / line['processes'] / alone:.0%} | {line['input']:.1%} | {line['collectives']:.1%}"
        for line in lines
    ]
    setting = f"{recipe['model']}, {recipe['img_size']} px, {recipe['batch_size']} images a process"
    return table(f"processes ({setting}) | step s | images/s | of linear | input | collectives", rows)


# Of each benchmark: the heading, the words below it, and the table of a report. In the order of the page.
SECTIONS: dict[str, tuple[str, str, Callable[[Report], str]]] = {
    "models": ("Models", MODELS, models),
    "psm": ("Part selection", PSM, psm),
    "engine": ("Training loop", ENGINE, engine),
    "data": ("Input", DATA, data),
    "inference": ("Inference", INFERENCE, inference),
    "scaling": ("Several processes", SCALING, scaling),
}


def sections(reports: Iterable[Report], level: str) -> str:
    """The tables of all `reports`, each below the command that it comes from; headings of this `level`."""
    parts = []
    for benchmark, (title, text, show) in SECTIONS.items():
        parts.append(f"{level} {title}\n{text}")
        found = [report for report in reports if report["benchmark"] == benchmark]
        for report in found:
            about = report["about"]
            parts.append(f"`{about['command']}` ({about['device']}, {about['precision']})\n\n{show(report)}")
        if not found:
            parts.append("Not measured.\n")
    return "\n".join(parts)
