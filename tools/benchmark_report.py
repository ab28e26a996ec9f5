"""The results of a benchmark: rows with ratios and goals, as tables and as json."""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import detectron2
import torch

from benchmark_measure import is_cuda

# Of COCO's train2017, those that have boxes, which Detectron2 trains on.
COCO_IMAGES = 117_266
# A key of a row: its title in tables, and how it is written.
COLUMNS = {
    "seconds": ("s", "{:.4f}"),
    "ratio": ("ratio to {}", "{:.3f}"),
    "goal": ("goal", "{:.2f}"),
    "memory_mib": ("peak memory, MiB", "{:.0f}"),
    "memory_ratio": ("ratio", "{:.3f}"),
    "memory_goal": ("goal", "{:.2f}"),
    "epoch_seconds": ("epoch of COCO, s", "{:.0f}"),
}


def make_rows(
    names: Sequence[str],
    seconds: dict[str, list[float]],
    baseline: Sequence[float],
    goals: dict[str, float],
) -> list[dict]:
    """A row for each of the names, with the median of its times and of their ratios to the baseline
    of the same round.

    Args:
        seconds: {name: one for each round}. A name that is missing ran out of memory.
        baseline: one for each round; empty: it ran out of memory.
        goals: {name: the largest ratio that is wanted}.
    """
    rows = []
    for name in names:
        row = {"name": name, "seconds": None, "ratio": None, "goal": goals.get(name)}
        if name in seconds:
            row["seconds"] = statistics.median(seconds[name])
            if baseline:
                row["ratio"] = statistics.median(a / b for a, b in zip(seconds[name], baseline))
        rows.append(row)
    return rows


def add_memory(rows: list[dict], peaks: dict[str, float], baseline: str, goals: dict) -> None:
    """Adds the peak memory to rows, with its ratio to that of the row `baseline`, if it has one."""
    for row in rows:
        row["memory_mib"] = peaks.get(row["name"])
        row["memory_goal"] = goals.get(row["name"])
        row["memory_ratio"] = None
        if row["name"] in peaks and baseline in peaks:
            row["memory_ratio"] = peaks[row["name"]] / peaks[baseline]


def add_epochs(rows: list[dict], images: int) -> None:
    """Adds the time of an epoch of COCO on this device to rows of training iterations of so many
    images, extrapolated; reading the images is not in it."""
    for row in rows:
        if row["seconds"] is not None:
            row["epoch_seconds"] = row["seconds"] * COCO_IMAGES / images


class Report:
    """The tables of one run. They are printed as they come, and written to `args.output` as .md and
    .json if there is such a folder."""

    def __init__(self, name: str, args):
        self.name = name
        self.output = args.output
        self.content = {
            "benchmark": name,
            **environment(args.device),
            "settings": {key: value for key, value in vars(args).items() if key != "output"},
            "tables": [],
        }
        self.markdown = [f"# {self.title()}\n"]
        print(self.title(), flush=True)

    def title(self) -> str:
        content, args = self.content, self.content["settings"]
        height, width = args["size"]
        return (
            f"{self.name}: {args['images']} image(s) of {height} x {width}, {args['num_classes']} "
            f"classes, {args['boxes']} boxes of {args['present']} classes, "
            f"{args['amp'] or 'float32'}, {content['device']}, PyTorch {content['torch']}, "
            f"CUDA {content['cuda']}, {args['rounds']} rounds"
        )

    def add(self, title: str, compared: str, rows: list[dict]) -> None:
        """Adds a table.

        Args:
            title: of the first column.
            compared: what the ratios are to.
        """
        self.content["tables"].append({"title": title, "compared": compared, "rows": rows})
        self.add_text(format_table(title, compared, rows))

    def add_text(self, text: str) -> None:
        self.markdown.append(text)
        print("\n" + text, flush=True)
        self.write()

    def write(self) -> None:
        """Also what is there of an unfinished run."""
        if self.output is None:
            return
        folder = Path(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        stem = file_stem(self.name, self.content)
        (folder / f"{stem}.md").write_text("\n".join(self.markdown))
        if self.content["tables"]:
            (folder / f"{stem}.json").write_text(json.dumps(self.content, indent=1) + "\n")


def file_stem(name: str, content: dict) -> str:
    """Of benchmark, device, precision and batch."""
    args = content["settings"]
    parts = (name, content["device"], args["amp"] or "float32", f"{args['images']}-images")
    return re.sub(r"[^\w.]+", "-", "-".join(parts))


def environment(device: str) -> dict:
    """The device and the versions, and what decides about the speed of float32 on a GPU."""
    on_gpu = is_cuda(device)
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "detectron2": detectron2.__version__,
        "python": platform.python_version(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def format_table(title: str, compared: str, rows: list[dict]) -> str:
    """Markdown, with the columns that a row has a value for."""
    columns = {
        key: column
        for key, column in COLUMNS.items()
        if any(row.get(key) is not None for row in rows)
    }
    header = [title, *(head.format(compared) for head, _ in columns.values())]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        values = [row["name"]]
        for key, (_, form) in columns.items():
            value = row.get(key)
            values.append("-" if value is None else form.format(value))
        if row["seconds"] is None:
            values[1:2] = ["out of memory"]
        lines.append(values)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
