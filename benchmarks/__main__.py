"""fimkit beside other libraries and beside what the machine allows, in one run.

For every case and library: seconds of wall clock and of CPU, medians over repeats in which the
libraries take turns; the highest resident set of a process of its own, whole and above what it is
with model, data and libraries in memory; relative errors against the same in float64 by plain
products; and the floor, the least work of the method (counted products at the measured rate of
their dtype, eigendecompositions and the model's passes as measured) with the fraction reached.
Then growth curves with fitted exponents, and the capacity model's predictions beside measurements.

    python -m benchmarks                          everything
    python -m benchmarks --quick                  the same at small sizes, in about a minute
    python -m benchmarks --case 'ekfac-*' --library fimkit kronfluence --parts cases
    python -m benchmarks --list                   all cases, curves, and further scripts

Run it with nothing else running, from the repository root, with the extras ``benchmarks`` and
``plots`` installed; a library that is not is skipped with a note.
"""

import argparse
import ast
import fnmatch
import importlib
import sys
import time
from pathlib import Path

import torch

from benchmarks import capacity, report
from benchmarks.cases import CASES
from benchmarks.common import machine, version
from benchmarks.peers import PACKAGES, package_of
from benchmarks.run import Failed, run_case, run_curve

PARTS = ("cases", "growth", "capacity")


def scripts():
    """Yield the module and the first line of every script beside the harness."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text())) or ""
        if f"python -m benchmarks.{path.stem}" in about:
            yield f"benchmarks.{path.stem}", about.splitlines()[0]


def listing():
    """Return what ``--list`` prints."""
    lines = ["Cases:"]
    for case in CASES.values():
        asked = " (only if named)" if case.on_request else ""
        lines.append(f"  {case.name:24}{case.about}{asked}")
        if case.compared:
            lines.append(f"  {'':24}{'; '.join(case.libraries)}")
        lines += [f"  {'':24}growth of {c.stage} in {c.axis}" for c in case.curves]
    lines.append("Scripts of their own, python -m NAME:")
    lines += [f"  {name:34}{about}" for name, about in scripts()]
    return "\n".join(lines)


def chosen(names, patterns):
    """Return the names that a pattern matches, or all without patterns."""
    return [n for n in names if not patterns or any(fnmatch.fnmatch(n, p) for p in patterns)]


def chosen_cases(patterns):
    """Return the cases wanted; one that is only on request must be named in full."""
    return [
        case
        for case in map(CASES.get, chosen(CASES, patterns))
        if not case.on_request or case.name in (patterns or ())
    ]


def chosen_libraries(case, patterns, missing):
    """Return the libraries of a case that are wanted, present and able."""
    return [
        name
        for name in case.libraries
        if (not patterns or any(fnmatch.fnmatch(name.partition(",")[0], p) for p in patterns))
        and package_of(name) not in missing
        and name not in case.left_out
    ]


def absent(packages):
    """Return the packages that cannot be imported, and why."""
    missing = {}
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            missing[package] = str(error)
    return missing


def parser():
    arguments = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = arguments.add_argument
    add("--list", action="store_true", help="name everything there is, and stop")
    add("--case", nargs="+", metavar="PATTERN", help="cases, by names or shell patterns")
    add("--library", dest="libraries", nargs="+", metavar="PATTERN", help="libraries, likewise")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--repeats", type=int, help="counted runs of each (default: 5, with --quick 2)")
    add("--quick", action="store_true", help="small sizes")
    add("--limit", type=float, default=150.0, help="seconds a library may take (default: 150)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, default=Path("fimkit-output/benchmarks"), help="folder to write to")
    return arguments


def main(argv=None):
    """Run what the command line asks for."""
    args = parser().parse_args(argv)
    if args.list:
        print(listing())
        return
    cases = chosen_cases(args.case)
    if not cases:
        sys.exit(f"no case matches {' '.join(args.case)}; there are {', '.join(CASES)}")
    repeats = args.repeats or (2 if args.quick else 5)
    torch.set_num_threads(args.threads)
    missing = absent(PACKAGES)
    lines = [machine(), *(f"{p} {version(p)}" for p in PACKAGES if p not in missing)]
    results = {
        "machine": "\n".join(lines),
        "absent": [f"skipped {package}: {why}" for package, why in missing.items()],
        "repeats": repeats,
        "limit": args.limit,
        "quick": args.quick,
    }
    print("\n".join([results["machine"], *results["absent"]]))
    start = time.perf_counter()

    def heading(text):
        print(f"[{time.perf_counter() - start:4.0f} s] {text}", flush=True)

    if "cases" in args.parts:
        results["cases"] = []
        for case in cases:
            libraries = chosen_libraries(case, args.libraries, missing)
            if not (case.compared and libraries):
                continue
            heading(case.name)
            found = run_case(
                case,
                libraries,
                sizes=case.sizes_of(quick=args.quick),
                repeats=repeats,
                threads=args.threads,
                limit=args.limit,
            )
            results["cases"].append({**found, "left_out": case.left_out})
            print(report.case_section(results["cases"][-1]), flush=True)
            report.write(results, args.out)
    if "growth" in args.parts:
        results["growth"] = []
        for case in cases:
            for index, curve in enumerate(case.curves):
                heading(f"{case.name}: {curve.stage} in {curve.axis}")
                try:
                    found = run_curve(case, index, quick=args.quick, threads=args.threads)
                except Failed as error:
                    print(f"  no curve: {error}")
                    continue
                results["growth"].append(found)
    if "capacity" in args.parts:
        heading("capacity model")
        results["capacity"] = capacity.report(quick=args.quick, threads=args.threads)
        print(results["capacity"]["text"])
    for path in report.write(results, args.out):
        print(path)
    heading("done")


if __name__ == "__main__":
    main()
