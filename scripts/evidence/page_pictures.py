"""The pictures of docs/evidence.md from docs/evidence/results.json, as far as their numbers are there.

Narrow enough that their words can be read on a telephone. Colours are Okabe and Ito's, which colour-blind readers tell
apart, and every line has a marker of its own.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from families import LONG, METHODS, ONE, PARTS, THREE
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

Results = Mapping[str, Any]
STYLES = {  # colour and marker: methods in colours, stock LoRAs in greys
    "base": ("black", "x"),
    "lora-r16": ("0.25", "o"),
    "lora-per-task": ("0.25", "P"),
    "lora-like-molora-parameters": ("0.5", "s"),
    "lora-like-molora-active": ("0.5", "v"),
    "lora-like-medmoelora-parameters": ("0.5", "^"),
    "lora-like-at_moe-active": ("0.5", "d"),
    "lora-like-at_moe-passes": ("0.5", "D"),
    "moelora": ("#0072B2", "o"),
    "molora": ("#D55E00", "s"),
    "medmoelora": ("#009E73", "^"),
    "at_moe": ("#CC79A7", "D"),
    "moelora-gate-per-layer": ("#56B4E9", "v"),
}
WIDTH = 5.2  # inches


def of_scores(found: Results) -> Figure | None:
    """Mean scores with intervals."""
    panels: dict[str, dict[str, Any]] = {}
    for protocol, systems in found["scores"].items():
        for name, each in systems.items():
            if is_shown(name, each):
                part = THREE if name in LONG else {"instruction": ONE}.get(protocol, protocol)
                panels.setdefault(part, {})[name] = each["targets"]["mean"]
    return intervals(found, panels, "mean score on test")


def of_differences(found: Results) -> Figure | None:
    """Differences to the LoRA with a method's parameters."""
    panels = {
        part: {
            each["name"]: each["difference"]
            for each in found["families"][f"{part}: mean"]
            if each["difference"] is not None
        }
        for part in PARTS
    }
    return intervals(found, panels, "mean score minus that of the matched LoRA", zero=True)


def intervals(
    found: Results, panels: Mapping[str, Mapping[str, Any]], label: str, *, zero: bool = False
) -> Figure | None:
    """A panel for each part that has systems, a line for each of them."""
    panels = {part: systems for part, systems in panels.items() if systems}
    if not panels:
        return None
    sizes = [len(systems) for systems in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(WIDTH, 1.0 + sum(0.7 + 0.3 * size for size in sizes)), squeeze=False, sharex=True,
        height_ratios=[size + 1 for size in sizes], layout="constrained",
    )  # fmt: skip
    for axis, (part, systems) in zip(axes[:, 0], panels.items(), strict=True):
        for row, (name, each) in enumerate(systems.items()):
            colour, marker = style(name)
            axis.plot([each["low"], each["high"]], [row, row], color=colour, linewidth=1.5)
            axis.plot(each["value"], row, marker, color=colour, markersize=6)
        if zero:
            axis.axvline(0, color="grey", linewidth=0.8, linestyle="--")
        axis.set_yticks(range(len(systems)), [wrapped(found["labels"][name]) for name in systems])
        axis.set_ylim(len(systems) - 0.5, -0.5)
        axis.set_title(part, fontsize="medium", loc="left")
        axis.grid(axis="x", color="0.9")
    axes[-1, 0].set_xlabel(label)
    return figure


def of_rates(found: Results) -> Figure | None:
    """Scores on dev by learning rate: stock LoRAs above, methods below."""
    searches = [each for each in found["searches"] if any(rate["score"] is not None for rate in each["rates"])]
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for each in searches:
        kind = "methods" if each["system"] in METHODS else "stock LoRA"
        panels.setdefault(f"{each['protocol']}: {kind}", []).append(each)
    if not panels:
        return None
    figure, axes = stacked(panels, 4.4, "mean score on dev", "learning rate")
    for axis, of_panel in zip(axes, panels.values(), strict=True):
        for each in of_panel:
            there = [(rate["rate"], rate["score"]) for rate in each["rates"] if rate["score"] is not None]
            (colour, marker), label = STYLES[each["system"]], found["labels"][each["system"]]
            axis.plot(*zip(*there, strict=True), "-", marker=marker, color=colour, label=label)
        log_axis(axis, {rate["rate"] for each in searches for rate in each["rates"]})
        legend(axis)
    return figure


def of_parameters(found: Results) -> Figure | None:
    """Mean scores over the parameters that were trained, in all stages."""
    panels = {
        protocol: {n: e for n, e in systems.items() if n not in ("base", *LONG) and is_shown(n, e)}
        for protocol, systems in found["scores"].items()
    }
    panels = {protocol: systems for protocol, systems in panels.items() if systems}
    if not panels:
        return None
    figure, axes = stacked(panels, 4.0, "mean score on test", "trained parameters, millions, all stages")
    for axis, systems in zip(axes, panels.values(), strict=True):
        for name, each in systems.items():
            (colour, marker), mean = STYLES[name], each["targets"]["mean"]
            apart = 1.03 if name in METHODS else 1 / 1.03  # or a method would lie on its LoRA
            size = each["all_stages"]["trainable"] / 1e6 * apart
            axis.plot([size, size], [mean["low"], mean["high"]], color=colour, linewidth=1.2)
            axis.plot(size, mean["value"], marker, color=colour, label=found["labels"][name])
        axis.grid(color="0.9")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    legend_of_all(figure)
    return figure


def of_information(found: Results) -> Figure | None:
    """Mutual information of expert and task by depth."""
    panels = {
        protocol: {name: each["by_depth"] for name, each in systems.items() if each and name in STYLES}
        for protocol, systems in found["routing"].items()
    }
    panels = {protocol: systems for protocol, systems in panels.items() if systems}
    if not panels:
        return None
    figure, axes = stacked(panels, 3.4, "bits", "block of the model")
    for axis, systems in zip(axes, panels.values(), strict=True):
        for name, by_depth in systems.items():
            (colour, marker), label = STYLES[name], found["labels"][name]
            blocks = [(block, bits) for block, bits in by_depth if block is not None]
            if blocks:
                axis.plot(*zip(*blocks, strict=True), "-", color=colour, marker=marker, markersize=4, label=label)
            for bits in (bits for block, bits in by_depth if block is None):
                axis.axhline(bits, color=colour, linestyle="--", label=f"{label}, one gate for all blocks")
        axis.set_ylim(bottom=0)
    legend_of_all(figure)
    return figure


def of_experts(found: Results) -> Figure | None:
    """Mean weights of experts by task, of each method's gate that tells most about the task."""
    routed = {name: found["routing"]["instruction"].get(name) for name in METHODS}
    there = {name: each["clearest"] for name, each in routed.items() if each}
    if not there:
        return None
    size = (WIDTH, 2.9 * len(there))
    figure, axes = plt.subplots(len(there), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, (name, each) in zip(axes[:, 0], there.items(), strict=True):
        image = axis.imshow(each["weights"], vmin=0, cmap="cividis", aspect="auto")
        figure.colorbar(image, ax=axis)
        axis.set_title(f"{found['labels'][name]}: {each['gate']}", fontsize="small", loc="left")
        axis.set_yticks(range(len(each["tasks"])), each["tasks"], fontsize="small")
        axis.set_xticks(range(len(each["experts"])), each["experts"], fontsize="small")
        if each["experts"] == each["tasks"]:
            axis.tick_params(axis="x", rotation=90)
        axis.set_xlabel("expert")
    return figure


def stacked(panels: Mapping[str, Any], height: float, y: str, x: str) -> tuple[Figure, list[Axes]]:
    """Panels one below the other, with their names."""
    size = (WIDTH, height * len(panels))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, squeeze=False, sharex=True, layout="constrained")
    for axis, title in zip(axes[:, 0], panels, strict=True):
        axis.set_title(title, fontsize="medium", loc="left")
        axis.set_ylabel(y)
        axis.xaxis.set_tick_params(labelbottom=True)
        axis.set_xlabel(x)
    return figure, list(axes[:, 0])


def of_general(found: Results) -> Figure | None:
    """General knowledge beside the base model's: perplexity as a ratio, accuracy as a difference."""
    after = {n: g for n, g in found["general"].items() if g and n != "base" and g["choice"]["mean"]["difference"]}
    if not after:
        return None
    sources = list(next(iter(after.values()))["perplexity"])
    size = (WIDTH, (len(sources) + 1) * (1.1 + 0.34 * len(after)))
    figure, axes = plt.subplots(len(sources) + 1, 1, figsize=size, squeeze=False, layout="constrained")
    titles = [f"perplexity of {source}, base model = 1\n(line: lowest to highest seed)" for source in sources]
    titles += ["accuracy, minus the base model's\n(line: interval)"]
    for axis, title in zip(axes[:, 0], titles, strict=True):
        axis.set_title(title, fontsize="medium", loc="left")
        axis.axvline(float(title != titles[-1]), color="grey", linewidth=0.8, linestyle="--")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_yticks(range(len(after)), [wrapped(found["labels"][name]) for name in after])
        axis.set_ylim(len(after) - 0.5, -0.5)
    for row, (name, each) in enumerate(after.items()):
        colour, marker = STYLES.get(name, ("#E69F00", "."))
        for axis, source in zip(axes[:, 0], sources, strict=False):
            entry = each["perplexity"][source]
            scale = entry["ratio"] / entry["value"]
            axis.plot([entry["lowest"] * scale, entry["highest"] * scale], [row, row], color=colour)
            axis.plot(entry["ratio"], row, marker, color=colour)
        change = each["choice"]["mean"]["difference"]
        axes[-1, 0].plot([change["low"], change["high"]], [row, row], color=colour)
        axes[-1, 0].plot(change["value"], row, marker, color=colour)
    return figure


def is_shown(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether a system is in pictures of the main experiment."""
    return entry["experiment"] in ("main", "longer") and entry["targets"] is not None


def style(name: str) -> tuple[str, str]:
    """Colour and marker of a system, the same after one epoch and after three."""
    return STYLES[name.removesuffix("-longer")]


def wrapped(label: str) -> str:
    """A long label on two lines."""
    first, _, rest = label.partition(", ")
    return f"{first},\n{rest}" if rest and len(label) > 18 else label


def log_axis(axis: Axes, ticks: Iterable[float]) -> None:
    """A logarithmic axis with these ticks alone."""
    axis.set_xscale("log")
    axis.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axis.minorticks_off()


def legend(axis: Axes) -> None:
    """A legend below."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1, frameon=False, fontsize="small")


def legend_of_all(figure: Figure) -> None:
    """One legend below for all panels, each label once."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=1, frameon=False, fontsize="small"
    )


PICTURES: dict[str, Callable[[Results], Figure | None]] = {
    "scores": of_scores,
    "differences": of_differences,
    "rates": of_rates,
    "parameters": of_parameters,
    "information": of_information,
    "experts": of_experts,
    "general": of_general,
}
WORDS = {
    "scores": "Mean scores of all systems with their intervals",
    "differences": "Differences of methods to the LoRA with their parameters",
    "rates": "Scores on dev by learning rate",
    "parameters": "Mean score over trained parameters",
    "information": "Bits that experts tell about tasks, by block",
    "experts": "Mean weights of experts by task, of each method's clearest gate",
    "general": "General knowledge after training beside the base model's",
}
