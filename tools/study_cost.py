"""What the rows of a study cost, and what plain training of the same cost gives."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
EQUAL_COST = """\
Time counts the runs that a row starts from, except where the row says that they are shared. "Over
plain training" is the difference to the AP on the straight line between the plain rows that take
less and more time, of the same seed; for a row that takes longer than all of them (>), to the
longest's. A row is on the frontier if none that takes as long or less has more AP.
"""


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its interval; infinite for one value."""
    mean, number = statistics.fmean(values), len(values)
    if number == 1:
        return mean, math.inf
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, number - 1)
    return mean, quantile * statistics.stdev(values) / math.sqrt(number)


def with_interval(mean: float, half_width: float, form: str = ".1f") -> str:
    return f"{mean:{form}}" + (f" ± {half_width:.1f}" if math.isfinite(half_width) else "")


def with_ap(runs: list[dict]) -> list[dict]:
    return [run for run in runs if run["AP"] is not None]


def shared_names(study: dict, rows: dict, row: str) -> set[str]:
    """The names of the runs whose cost does not count for a row."""
    return {run["name"] for other in study["rows"][row].get("shared", ()) for run in rows[other]}


def ancestry(result: dict, results: dict[str, dict], shared: set[str] = frozenset()) -> dict:
    """A run and those that it starts from, and so on, by name; without those that are shared."""
    runs = {result["name"]: result}
    for name in result["starts from"].values():
        if name not in shared:
            runs.update(ancestry(results[name], results, shared))
    return runs


def total(
    result: dict, results: dict[str, dict], key: str, shared: set[str] = frozenset()
) -> float:
    """The iterations or minutes of a run and of those that it starts from."""
    return sum(run[key] for run in ancestry(result, results, shared).values())


@dataclass
class Cost:
    """A row against plain training of the same cost."""

    row: str
    is_plain: bool
    minutes: float
    mean: float
    half_width: float
    gains: list[float]  # of each seed over plain training of the same cost; none for plain rows
    is_longer: bool  # than the longest plain row, whose AP then stands for plain training
    is_on_frontier: bool = False  # no row that costs at most as much has a higher mean

    @property
    def pays(self) -> bool:
        mean, half_width = mean_and_interval(self.gains) if self.gains else (0, 0)
        return mean > half_width


def equal_cost(study: dict, rows: dict, results: dict[str, dict]) -> list[Cost]:
    """The costs of a detector's rows, the cheapest first.

    Plain training for as long as a row is taken to have the AP on the straight line between the
    plain rows that are shorter and longer, of the same seed.

    Args:
        rows: row -> the results of its seeds.
    """
    measured = {row: with_ap(runs) for row, runs in rows.items() if with_ap(runs)}
    minutes = {
        row: statistics.fmean(
            total(run, results, "minutes", shared_names(study, rows, row)) for run in runs
        )
        for row, runs in measured.items()
    }
    plain = sorted((row for row in study["plain"] if row in measured), key=minutes.get)
    longest = max((minutes[row] for row in plain), default=0)
    costs = []
    for row, runs in measured.items():
        gains = []
        for run in runs if row not in plain else ():
            same_seed = [[x for x in measured[p] if x["seed"] == run["seed"]] for p in plain]
            points = [(minutes[p], found[0]["AP"]) for p, found in zip(plain, same_seed) if found]
            if points:
                gains.append(run["AP"] - np.interp(minutes[row], *zip(*points)))
        mean, half_width = mean_and_interval([run["AP"] for run in runs])
        is_longer = minutes[row] > longest
        costs.append(Cost(row, row in plain, minutes[row], mean, half_width, gains, is_longer))
    costs.sort(key=lambda cost: (cost.minutes, -cost.mean))
    best = -math.inf
    for cost in costs:
        cost.is_on_frontier = cost.mean > best
        best = max(best, cost.mean)
    return costs


def cost_section(study: dict, rows: dict, results: dict[str, dict]) -> str:
    """A table of a detector's rows by cost, and from which cost on the others pay."""
    costs = equal_cost(study, rows, results)
    titles = {row: content["title"] for row, content in study["rows"].items()}
    plain = [cost for cost in costs if cost.is_plain]
    if not plain:
        return "No plain row is finished."
    shortest = plain[0]
    lines = [
        f"| row | minutes | times {titles[shortest.row]} | AP | over plain training | frontier |",
        "|---|---|---|---|---|---|",
    ]
    for cost in costs:
        gain = with_interval(*mean_and_interval(cost.gains), "+.1f") if cost.gains else ""
        columns = (
            titles[cost.row],
            f"{cost.minutes:.1f}",
            f"{cost.minutes / shortest.minutes:.1f}",
            with_interval(cost.mean, cost.half_width),
            gain + (" (>)" if gain and cost.is_longer else ""),
            "yes" if cost.is_on_frontier else "",
        )
        lines.append("| " + " | ".join(columns) + " |")
    paying = [cost for cost in costs if cost.pays]
    if paying:
        names = ", ".join(titles[cost.row] for cost in paying)
        sentence = (
            f"Above plain training of the same cost, by the interval: {names}; from "
            f"{paying[0].minutes / shortest.minutes:.1f} times the cost of "
            f"{titles[shortest.row]} on."
        )
    else:
        sentence = "No row is shown to be above plain training of the same cost."
    return "\n".join([*lines, "", sentence])
