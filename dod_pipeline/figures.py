"""What a report draws: the numbers of an experiment's checkpoints -> the figures for which there are rows.

FIDs of different counts are never drawn together, and a line over guidance joins rows that differ in guidance alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from dod_pipeline import plots
from dod_pipeline.canvas import Estimate

Row = dict[str, Any]
SHORT_NAMES = {"floor": "held-out", "codec": "codec"}  # of the floors
STAGES = ("stage1", "stage2", "stage3")


class Evaluated(NamedTuple):
    """An evaluated checkpoint: its scores by row, the sampling of its stages, and its sweep's table (may be empty)."""

    step: int
    scores: dict[str, Row]
    sampling: dict[str, Row]
    sweep: dict[str, Row]

    @property
    def num_samples(self) -> int:
        """Images of which its stages' scores are."""
        found: int = self.scores["stage2"]["num_samples"]
        return found

    @property
    def floors(self) -> dict[str, Row]:
        """The floors of equal count, by the name that figures give them."""
        rows = {short: self.scores[name] for name, short in SHORT_NAMES.items()}
        return {name: row for name, row in rows.items() if row["num_samples"] == self.num_samples and "fid" in row}

    def variants(self, kind: str) -> dict[str, Row]:
        """The rows of its sweep that are of that kind: of a stage, only those of equal count."""
        rows = {name: row for name, row in self.sweep.items() if row["kind"] == kind}
        return {name: row for name, row in rows.items() if kind not in STAGES or row["num_samples"] == self.num_samples}


def titled(kind: str) -> str:
    """`stage1` as a reader sees it."""
    return kind.replace("stage", "stage ")


def estimate(x: float, row: Mapping[str, Any], metric: str = "fid") -> Estimate:
    """A row's metric at x, with its standard error where the row has one."""
    return x, row[metric], row.get(f"{metric}_error")


def floor_fids(one: Evaluated) -> dict[str, float]:
    """FID of the floors."""
    return {name: row["fid"] for name, row in one.floors.items()}


def over_steps(found: Sequence[Evaluated]) -> Figure:
    """FID of every checkpoint's stages, of the newest one's count."""
    series: dict[str, list[Estimate]] = {}
    for one in found:
        if one.num_samples == found[-1].num_samples:
            for name in STAGES[:2]:
                series.setdefault(titled(name), []).append(estimate(one.step, one.scores[name]))
    return plots.over_steps(series, floor_fids(found[-1]), metric="fid")


def plane(found: Sequence[Evaluated]) -> Figure:
    """Precision and recall of every checkpoint's stages, of the newest one's count."""
    series: dict[str, list[tuple[float, float, float]]] = {}
    for one in found:
        if one.num_samples == found[-1].num_samples:
            for name in STAGES[:2]:
                row = one.scores[name]
                series.setdefault(titled(name), []).append((one.step, row["precision"], row["recall"]))
    floors = {name: (row["precision"], row["recall"]) for name, row in found[-1].floors.items()}
    return plots.precision_recall(series, floors)


def over_gflops(one: Evaluated) -> Figure | None:
    """FID against cost: the experiment's two stages joined, and the sweep's variants; None where no cost is known."""
    if "gflops_paper" not in one.scores["stage1"]:
        return None
    path = {titled(name): estimate(one.scores[name]["gflops_paper"], one.scores[name]) for name in STAGES[:2]}
    series: dict[str, list[Estimate]] = {}
    for kind in STAGES:
        for row in one.variants(kind).values():
            name = f"{titled(kind)}, {'guided' if row['guidance'] != 1 else 'unguided'}"
            series.setdefault(name, []).append(estimate(row["gflops_paper"], row))
    return plots.over_gflops(path, series)


def way(name: str) -> str:
    """How a row of a sweep was sampled, guidance aside: `stage2 guidance=1.5 euler steps=10` -> `euler steps=10`."""
    return " ".join(word for word in name.split()[1:] if not word.startswith("guidance="))


def sampled(sampling: Mapping[str, Any]) -> frozenset[str]:
    """The words of `way` for an experiment's own stage."""
    found = {sampling["solver"]}
    if sampling["solver"] == "euler":
        found.add(f"steps={sampling['num_steps']}")
    if sampling["guidance"] != 1:
        found.add(f"null={sampling['null_branch']}")
        low, high = sampling["guidance_interval"]
        found |= {f"t={low:g}-{high:g}"} - {"t=0-1"}
    return frozenset(found)


def lines(rows: Sequence[tuple[frozenset[str], float, Row]]) -> dict[str, dict[float, Row]]:
    """Rows (words, guidance, scores) -> those that differ in guidance alone, at two scales or more.

    Each line is named by what is its own, the first by nothing where it is alone. A row without guidance has no words
    for it, and belongs to every line that has its others.
    """
    found: dict[frozenset[str], dict[float, Row]] = {}
    for shared in dict.fromkeys(words for words, guidance, _ in rows if guidance != 1):
        line = {g: row for words, g, row in rows if words == shared or (g == 1 and words < shared)}
        if len(line) > 1:
            found[shared] = line
    common = frozenset.intersection(*found) if found else frozenset()
    return {" ".join(sorted(shared - common)): line for shared, line in found.items()}


def over_guidance(one: Evaluated) -> Figure | None:
    """FID of the stages and rFID of the reconstruction over the guidance scale; None where there are no two scales."""
    series: dict[str, list[Estimate]] = {}
    for kind, metric in (("stage1", "fid"), ("stage2", "fid"), ("stage3", "fid"), ("reconstruction", "rfid")):
        own = one.sampling.get(kind)
        rows = [(sampled(own), own["guidance"], one.scores[kind])] if own else []
        rows += [(frozenset(way(name).split()), row["guidance"], row) for name, row in one.variants(kind).items()]
        title = "rFID" if kind == "reconstruction" else titled(kind)
        for name, line in lines(rows).items():
            points = [estimate(guidance, row, metric) for guidance, row in line.items()]
            series[f"{title}, {name}" if name else title] = points
    return plots.over_guidance(series) if series else None


def stage_bars(one: Evaluated) -> Figure:
    """FID of the two stages, and of the sweep's stage 3 that is sampled as stage 2 but for the nearest guidance."""
    rows = {titled(name): one.scores[name] for name in STAGES[:2]}
    own, words = one.sampling["stage2"]["guidance"], sampled(one.sampling["stage2"])
    alike = [row for name, row in one.variants("stage3").items() if words == set(way(name).split())]
    third = min(alike, key=lambda row: abs(row["guidance"] - own), default=None)
    if third is not None:
        rows["stage 3" if third["guidance"] == own else f"stage 3, guidance {third['guidance']:g}"] = third
    return plots.stage_bars({name: estimate(0, row)[1:] for name, row in rows.items()}, floor_fids(one))
