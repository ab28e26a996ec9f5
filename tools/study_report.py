"""The report of a study: what its runs show, in numbers, words and a picture.

All that it says is computed from the results. An interval is Student's, of 95 %, over the seeds; a
difference between two rows is paired: of the runs with the same seed.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from study_cost import (
    CONFIDENCE,
    EQUAL_COST,
    cost_section,
    mean_and_interval,
    shared_names,
    total,
    with_ap,
    with_interval,
)

CLAIM = 1.0  # AP; a smaller difference in the paper is no claim
STEEP = 0.5  # of the steepest slope; a baseline that stops below it is past its steepest part
PANEL_INCHES, DPI = (4.0, 3.2), 80


def write_report(
    study: dict, plan: dict, results: dict[str, dict], folder: Path, data: str
) -> Path:
    """Writes report.md and report.png.

    Args:
        study: the content of its file.
        plan: detector -> row -> its runs, one for each seed. Rows may be left out.
        results: by the names of runs; some may be missing.
        folder: of the report, below that of the study.
        data: the name of the data set, and what is to be said of it.

    Returns:
        the path of report.md
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        detector: {
            row: [results[run.name] for run in runs if run.name in results]
            for row, runs in rows.items()
        }
        for detector, rows in plan.items()
    }
    comparisons = compare(study, tables, results)
    tables = {detector: rows for detector, rows in tables.items() if any(rows.values())}
    draw(study, tables, results, folder / "report.png")
    cost_sections = [
        f"### {study['detectors'][detector]}\n\n{cost_section(study, rows, results)}\n"
        for detector, rows in (tables.items() if "plain" in study else ())
    ]
    parts = [
        f"# {study['title']}\n",
        study["question"].strip() + "\n",
        setting(study, plan, results, folder.parent.name, data),
        "## What the runs show\n",
        *summary(comparisons, has_paper(study)),
        comparison_table(comparisons),
        "Iterations and time: of the row with the runs that it starts from, relative to those of "
        f"the other row. {times_sentence(tables)}\n",
        *(["## At equal cost\n", EQUAL_COST, *cost_sections] if cost_sections else ()),
        "## All rows\n",
        *(
            f"### {study['detectors'][detector]}\n\n{row_table(study, detector, rows, results)}\n"
            for detector, rows in tables.items()
        ),
        "## Where the baselines stop\n",
        "The last gain has the decay of the learning rate in it.\n",
        *stopping_points(study, tables),
        "![AP of the rows, against iterations and time, and learning curves](report.png)\n",
        "From left to right: AP, with a dot for each seed and the interval; AP against the "
        "iterations, and against the time, of a row with the runs that it starts from; AP during "
        "training, mean over the seeds.\n",
    ]
    report = folder / "report.md"
    report.write_text("\n".join(parts))
    return report


@dataclass
class Comparison:
    """A row of a detector against another one: the paired difference in AP over the seeds."""

    detector: str
    row: str
    other: str
    seeds: int
    mean: float
    half_width: float
    claimed: float | None  # the difference in the paper
    iterations: float  # of the row and of what it starts from, relative to the other row's
    minutes: float  # the same

    @property
    def verdict(self) -> str:
        """What the difference says, and of a claim of the paper, what that says about it."""
        is_decided = abs(self.mean) > self.half_width
        if self.seeds == 0:
            return "not measured"
        if self.is_claim:
            if not is_decided:
                return "undecided"
            same_sign = (self.mean > 0) == (self.claimed > 0)
            return "reproduced" if same_sign else "contradicted"
        if self.seeds == 1:
            return "one seed"
        if not is_decided:
            return "no difference shown"
        return "better" if self.mean > 0 else "worse"

    @property
    def is_claim(self) -> bool:
        # Rounded, since 38.7 - 37.7 is a little less than 1.
        return self.claimed is not None and round(abs(self.claimed), 6) >= CLAIM

    def __str__(self):
        if self.seeds == 0:
            return f"{self.detector}, {self.row} against {self.other}."
        direction = "above" if self.mean >= 0 else "below"
        what = f"{self.detector}, {self.row}: {abs(self.mean):.1f} AP {direction} {self.other}"
        if self.seeds == 1:
            return f"{what} in one seed."
        low, high = self.mean - self.half_width, self.mean + self.half_width
        decided = "" if abs(self.mean) > self.half_width else ", which includes 0"
        return f"{what}, interval {low:+.1f} to {high:+.1f}{decided}."


def has_paper(study: dict) -> bool:
    return any(row.get("paper") for row in study["rows"].values())


def paper_ap(study: dict, row: str, detector: str) -> float | None:
    paper = study["rows"][row].get("paper")
    return paper.get(detector) if isinstance(paper, dict) else paper


def compare(study: dict, tables: dict, results: dict[str, dict]) -> list[Comparison]:
    """The comparisons of all rows with those that they are to be compared with."""
    comparisons = []
    for detector, rows in tables.items():
        for row, table in rows.items():
            for other in study["rows"][row].get("against", ()):
                runs = {run["seed"]: run for run in with_ap(table)}
                others = {run["seed"]: run for run in with_ap(rows[other])}
                seeds = sorted(runs.keys() & others.keys())
                papers = [paper_ap(study, name, detector) for name in (row, other)]
                mean, half_width, ratios = math.nan, math.nan, [math.nan, math.nan]
                if seeds:
                    mean, half_width = mean_and_interval(
                        [runs[seed]["AP"] - others[seed]["AP"] for seed in seeds]
                    )
                    shared = [shared_names(study, rows, name) for name in (row, other)]
                    ratios = [
                        sum(total(runs[seed], results, key, shared[0]) for seed in seeds)
                        / sum(total(others[seed], results, key, shared[1]) for seed in seeds)
                        for key in ("iterations", "minutes")
                    ]
                comparisons.append(
                    Comparison(
                        study["detectors"][detector],
                        study["rows"][row]["title"],
                        study["rows"][other]["title"],
                        len(seeds),
                        mean,
                        half_width,
                        None if None in papers else papers[0] - papers[1],
                        *ratios,
                    )
                )
    return comparisons


def setting(study: dict, plan: dict, results: dict[str, dict], name: str, data: str) -> str:
    runs = [run for rows in plan.values() for row in rows.values() for run in row]
    seeds = sorted({run.seed for run in runs})
    names = {run.name for run in runs}
    paper = (
        " The paper's numbers are of COCO, larger backbones and full schedules."
        if has_paper(study)
        else ""
    )
    return (
        f"Data set: {data}. Seeds: {', '.join(map(str, seeds))}. Finished runs: "
        f"{len(names & results.keys())} of {len(names)}. The configs and overrides of the rows are "
        f"in `{name}.yaml`.{paper}\n\n"
        f"Intervals are Student's, of {CONFIDENCE:.0%}, over the seeds: not over images, and not "
        "corrected for the number of comparisons. Differences are paired by seed.\n"
    )


def summary(comparisons: list[Comparison], with_claims: bool) -> list[str]:
    """Sentences on the claims of the paper, if there is one, and on the other comparisons."""
    claims = [c for c in comparisons if c.is_claim]
    by_verdict = {
        verdict: [c for c in claims if c.verdict == verdict]
        for verdict in ("reproduced", "contradicted", "undecided", "not measured")
    }
    counts = ", ".join(f"{len(cases)} {verdict}" for verdict, cases in by_verdict.items())
    sentences = []
    if with_claims:
        sentences.append(
            f"Orderings that the paper claims by {CLAIM:g} AP or more: {len(claims)}; {counts}.\n"
        )
    for verdict, cases in by_verdict.items():
        sentences += [f"* **{verdict}**: {c}" for c in cases]
    others = [c for c in comparisons if not c.is_claim and c.seeds]
    if others:
        if with_claims:
            sentences.append("\nComparisons without such a claim:\n")
        sentences += [f"* {c}" for c in others]
    return [*sentences, ""]


def times_sentence(tables: dict) -> str:
    runs = [run for rows in tables.values() for table in rows.values() for run in table]
    if all(run.get("timed alone") for run in runs):
        return "Times were measured of one run at a time."
    return "Times are those of the machine under whatever load it had."


def comparison_table(comparisons: list[Comparison]) -> str:
    lines = [
        "| detector | row | against | seeds | difference in AP | paper | verdict | iterations | "
        "time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in (c for c in comparisons if c.seeds):
        claimed = "" if c.claimed is None else f"{c.claimed:+.1f}"
        lines.append(
            f"| {c.detector} | {c.row} | {c.other} | {c.seeds} | "
            f"{with_interval(c.mean, c.half_width, '+.1f')} | {claimed} | {c.verdict} | "
            f"{c.iterations:.2f}x | {c.minutes:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def row_table(study: dict, detector: str, rows: dict, results: dict[str, dict]) -> str:
    lines = [
        "| row | seeds | iterations | in total | s / iteration | minutes in total | AP | AP50 | "
        "AP75 | paper's AP |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, runs in rows.items():
        if not runs:
            continue
        shared = shared_names(study, rows, row)
        columns = [study["rows"][row]["title"], len(runs), runs[0]["iterations"]]
        columns.append(total(runs[0], results, "iterations", shared))
        columns.append(f"{statistics.fmean(run['seconds per iteration'] for run in runs):.2f}")
        minutes = statistics.fmean(total(run, results, "minutes", shared) for run in runs)
        columns.append(f"{minutes:.1f}")
        evaluated = with_ap(runs)
        for key in ("AP", "AP50", "AP75"):
            values = [run[key] for run in evaluated]
            columns.append(with_interval(*mean_and_interval(values)) if values else "")
        columns.append(paper_ap(study, row, detector) or "")
        lines.append("| " + " | ".join(map(str, columns)) + " |")
    return "\n".join(lines)


def mean_curve(runs: list[dict]) -> list[tuple[int, float]]:
    """The mean AP over the seeds at the iterations at which all were evaluated, from (0, 0)."""
    curves = [dict(run["learning curve"]) for run in runs]
    iterations = sorted(set.intersection(*map(set, curves)))
    return [(0, 0.0), *((i, statistics.fmean(curve[i] for curve in curves)) for i in iterations)]


def stopping_points(study: dict, tables: dict) -> list[str]:
    """Sentences on where the plain rows are on their learning curves when they stop: a method can
    look good by nothing but a faster start."""
    sentences = []
    for detector, rows in tables.items():
        for row, runs in rows.items():
            if "baseline" not in study["rows"][row]["config"] or not with_ap(runs):
                continue
            curve = mean_curve(with_ap(runs))
            text = (
                f"* {study['detectors'][detector]}, {study['rows'][row]['title']}: stops at "
                f"{curve[-1][1]:.1f} AP after {curve[-1][0]} iterations, "
            )
            slopes = [
                (100 * (ap1 - ap0) / (i1 - i0), i0, i1)
                for (i0, ap0), (i1, ap1) in zip(curve, curve[1:])
            ]
            if len(slopes) == 1:
                sentences.append(text + "its only evaluation.")
                continue
            steepest, last = max(slopes), slopes[-1]
            past = "past" if last[0] < STEEP * steepest[0] else "still near"
            gains = (
                f"{steepest[0]:+.1f} AP from iteration {steepest[1]} to {steepest[2]}, its "
                "steepest part"
            )
            if last == steepest:
                gains += " and its last."
            else:
                gains += f", and {last[0]:+.1f} AP from {last[1]} to {last[2]}, its last."
            sentences.append(f"{text}{past} its steepest part. Gain for 100 iterations: {gains}")
    return [*sentences, ""]


def draw(study: dict, tables: dict, results: dict[str, dict], path: Path) -> None:
    """A row of panels for each detector: AP, AP against iterations and time, learning curves."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [
        row for row in study["rows"] if any(with_ap(rows.get(row, ())) for rows in tables.values())
    ]
    colormap = matplotlib.colormaps["tab10" if len(shown) <= 10 else "turbo"]
    colors = {
        row: colormap(i if len(shown) <= 10 else i / len(shown)) for i, row in enumerate(shown)
    }
    height = max(PANEL_INCHES[1], 0.28 * len(shown) + 0.8)
    figure = Figure((4 * PANEL_INCHES[0], height * len(tables)), layout="constrained")
    for axes, (detector, rows) in zip(
        figure.subplots(len(tables), 4, squeeze=False), tables.items()
    ):
        for index, row in enumerate(shown):
            runs, color = with_ap(rows.get(row, ())), colors[row]
            if not runs:
                continue
            aps = [run["AP"] for run in runs]
            mean, half_width = mean_and_interval(aps)
            error = half_width if math.isfinite(half_width) else None
            axes[0].errorbar(mean, index, xerr=error, fmt="s", color=color, capsize=3)
            axes[0].plot(aps, [index] * len(aps), ".", color="black", markersize=4, zorder=3)
            for axis, key in ((axes[1], "iterations"), (axes[2], "minutes")):
                shared = shared_names(study, rows, row)
                cost = statistics.fmean(total(run, results, key, shared) for run in runs)
                axis.errorbar(cost, mean, yerr=error, fmt="s", color=color, capsize=3)
            axes[3].plot(*zip(*mean_curve(runs)), ".-", color=color)
        # Of the runs: an interval of two or three may be many times as wide.
        aps = [run["AP"] for runs in rows.values() for run in with_ap(runs)]
        margin = max(2, 0.25 * (max(aps, default=0) - min(aps, default=0)))
        limits = (min(aps, default=0) - margin, max(aps, default=0) + margin)
        axes[0].set_xlim(limits)
        for axis in axes[1:3]:
            axis.set_ylim(limits)
        axes[0].set_yticks(range(len(shown)), [study["rows"][row]["title"] for row in shown])
        axes[0].invert_yaxis()
        axes[0].set(title=study["detectors"][detector], xlabel="AP")
        axes[1].set(title="against total iterations", xlabel="iterations", ylabel="AP")
        axes[2].set(title="against total time", xlabel="minutes of training", ylabel="AP")
        axes[3].set(title="learning curves", xlabel="iteration", ylabel="AP")
        for axis in axes:
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)
