"""Writing what was measured: JSON as it is, tables in Markdown, growth curves as pictures."""

import json
import math
import statistics

from benchmarks.common import MIB

PARTS = ("products", "eigh", "pass")


def write(results, folder):
    """Write ``results.json``, ``results.md`` and the pictures; return the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text = folder / "results.json", folder / "results.md"
    data.write_text(json.dumps(results, indent=1))
    text.write_text(markdown(results))
    return [data, text, *draw(results.get("growth", []), folder)]


def markdown(results):
    """Return everything as Markdown."""
    parts = ["# Benchmarks", "```text\n" + results["machine"] + "\n```"]
    parts += [f"- {note}" for note in results.get("absent", [])]
    parts += [case_section(case) for case in results.get("cases", [])]
    if results.get("growth"):
        parts.append(growth_section(results["growth"]))
    if results.get("capacity"):
        parts.append(results["capacity"]["text"])
    return "\n\n".join(parts) + "\n"


def table(header, rows):
    """Return a Markdown table, its first column aligned to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)


def medians(row):
    """Return a library's median seconds of wall clock and of CPU by stage, and in all."""
    clocks = []
    for clock in ("wall", "cpu"):
        runs = [run[clock] for run in row["runs"]]
        stages = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
        clocks.append({**stages, "all": statistics.median(sum(run.values()) for run in runs)})
    return clocks


def floor_of(case):
    """Return the floor's seconds by stage, and in all."""
    stages = {stage: sum(parts.values()) for stage, parts in case["floor"].items()}
    return {**stages, "all": sum(stages.values())}


def case_section(case):
    """Return one case's table, with its floor and what is to be said of its rows."""
    stages = list(case["floor"])
    shown = [*stages, "all"] if len(stages) > 1 else stages
    floor = floor_of(case)
    measured = {name: medians(row) for name, row in case["rows"].items() if row["runs"]}
    ours = measured.get("fimkit")
    names = sorted({name for row in case["rows"].values() for name in row.get("errors", {})})
    header = ["", *(f"{stage}, s" for stage in shown), "CPU, s", "/ fimkit", "of the floor"]
    header += ["runs", "peak MiB", "above base", *(f"error of {name}" for name in names)]
    rows, notes = [], []
    for name, row in case["rows"].items():
        if row["note"]:
            notes.append(f"{name}: {row['note']}.")
        if "ended" in row:
            cells = [row["ended"]] if row["ended"].startswith(">") else ["failed"]
            if cells == ["failed"]:
                notes.append(f"{name} {row['ended']}")
            blank = [""] * (len(header) - 2 - len(shown) + 1)
            rows.append([name, *[""] * (len(shown) - 1), *cells, *blank])
            continue
        wall, cpu = measured[name]
        memory, last = row["memory"], shown[-1]
        cells = [name, *(seconds(wall[stage]) for stage in shown), seconds(cpu["all"])]
        cells.append(f"{wall['all'] / ours[0]['all']:.2f}" if ours else "")
        cells.append(f"{100 * floor[last] / wall['all']:.0f}%")
        cells.append(f"{len(row['runs'])}" + (", cold" if row.get("slow") else ""))
        cells += [f"{memory['peak'] / MIB:.0f}"]
        cells += [f"{(memory['peak'] - memory['baseline']) / MIB:.0f}"]
        cells += [f"{row['errors'][n]:.1e}" if n in row.get("errors", {}) else "" for n in names]
        rows.append(cells)
    rows.append(["floor", *(seconds(floor[stage]) for stage in shown)])
    rows[-1] += [""] * (len(header) - len(rows[-1]))
    if ours:
        reached = [f"{100 * floor[s] / ours[0][s]:.0f}%" if floor[s] else "" for s in shown]
        rows.append(["fimkit: of the floor", *reached])
        rows[-1] += [""] * (len(header) - len(rows[-1]))
    head = f"## {case['case']}: {case['about']}"
    size = f"p = {case['p']:,}, n = {case['n']:,}, k = {case['k']}, λ = {case['damping']:.3g}"
    lines = [head, size, table(header, rows), floor_sentence(case)]
    lines += [f"- {name} left out: {why}." for name, why in case.get("left_out", {}).items()]
    lines += [f"- {note}" for note in notes]
    return "\n\n".join(lines)


def floor_sentence(case):
    """Return what the floor is made of."""
    stages = []
    for stage, parts in case["floor"].items():
        work = case["work"][stage]
        operations = ", ".join(f"{n / 1e9:.3g} GF {d}" for d, n in work["flops"].items())
        pieces = [f"{part} {seconds(parts[part])}" for part in PARTS if parts[part]]
        stages.append(f"{stage}: {' + '.join(pieces)} ({operations or 'no products'})")
    return "Floor, seconds: " + "; ".join(stages) + "."


def seconds(value):
    """Return seconds with three digits that count."""
    return f"{value:.3g}" if value < 1 else f"{value:.2f}"


def exponent(values, times):
    """Return the least-squares slope of log times over log values."""
    x, y = [math.log(v) for v in values], [math.log(t) for t in times]
    mean = sum(x) / len(x)
    covariance = sum((a - mean) * b for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean) ** 2 for a in x)


def growth_section(curves):
    """Return every curve's numbers, and its exponent beside the floor's."""
    lines = ["## Growth", "Median seconds of fimkit's, and the exponent b of t ~ axis^b."]
    for curve in curves:
        rows = [
            [f"{value:,}", seconds(time), seconds(floor)]
            for value, time, floor in zip(
                curve["values"], curve["seconds"], curve["floor"], strict=True
            )
        ]
        b = [exponent(curve["values"], curve[of]) for of in ("seconds", "floor")]
        rows.append(["exponent", *(f"{value:.2f}" for value in b)])
        last = [exponent(curve["values"][-2:], curve[of][-2:]) for of in ("seconds", "floor")]
        rows.append(["between the last two", *(f"{value:.2f}" for value in last)])
        lines.append(f"### {curve['case']}, {curve['stage']}, in {curve['axis']}")
        lines.append(table([curve["axis"], "fimkit, s", "floor, s"], rows))
        lines.append(f"Expected: {curve['why']}.")
    return "\n\n".join(lines)


def draw(curves, folder):
    """Draw the curves, where matplotlib is there; return the paths written."""
    if not curves:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no pictures: {error}")
        return []
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, curve in zip(grid, curves, strict=False):
        for of, label in (("seconds", "fimkit"), ("floor", "floor")):
            b = exponent(curve["values"], curve[of])
            axes.loglog(
                curve["values"], curve[of], "o-", label=f"{label} ~ {curve['axis']}^{b:.2f}"
            )
        axes.set(xlabel=curve["axis"], ylabel="seconds", title=f"{curve['case']}: {curve['stage']}")
        axes.legend()
        axes.grid(alpha=0.3)
    for axes in list(grid)[len(curves) :]:
        axes.remove()
    path = folder / "growth.png"
    figure.savefig(path, dpi=120)
    return [path]
