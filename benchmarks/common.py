"""What the benchmarks share: who takes part, taking turns, memory of a process, and printing."""

import gc
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch

from fimkit.operators.memory import return_free_memory

MIB = 2**20


def machine():
    """Return the machine and the versions that matter, as text."""
    return (
        f"{platform.machine()}, {os.cpu_count()} CPUs, torch threads {torch.get_num_threads()}\n"
        f"python {platform.python_version()}, torch {torch.__version__}"
    )


def version(package):
    """Return an importable package's version."""
    module = importlib.import_module(package)
    distribution = importlib.metadata.packages_distributions().get(package, [package])[0]
    return getattr(module, "__version__", None) or importlib.metadata.version(distribution)


def installed(packages):
    """Return the packages that can be imported, printing their versions and what is missing."""
    found = []
    for package in packages:
        try:
            number = version(package)
        except ImportError as error:
            print(f"skipped {package}: {error}")
            continue
        print(f"{package} {number}")
        found.append(package)
    return found


def turns(names, repeats):
    """Yield (round, name) in rotating order; round 0 is a warm-up that is not to be counted."""
    names = list(names)
    for round_ in range(repeats + 1):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            yield round_, name


def timed(function, *args):
    """Return the seconds of wall clock and of CPU that a call takes, and its result."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args)
    return time.perf_counter() - wall, time.process_time() - cpu, result


def spread(values):
    """Return the median, minimum and maximum as text."""
    return " ".join(f"{v:7.3f}" for v in (statistics.median(values), min(values), max(values)))


def table(rows, *, spreads=1, width=11):
    """Print rows of cells: a name, then ``spreads`` wide cells, then ones ``width`` wide."""
    for name, *cells in rows:
        widths = [26] * spreads + [width] * (len(cells) - spreads)
        text = "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        print(f"{name:12}{text}".rstrip())


def current_rss():
    """Return the resident set now, in bytes, or the highest where the system does not say."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return highest_rss()


def highest_rss():
    """Return the highest resident set of the process's life, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """The resident set now (``baseline``), and the highest from now on (``peak()``), in bytes.

    ``was_reset`` tells whether the kernel could forget the highest resident set so far; where it
    could not, ``peak()`` is that of the process's life.
    """

    def __init__(self):
        gc.collect()
        return_free_memory()  # else a computation gets it for nothing
        try:
            with open("/proc/self/clear_refs", "w") as clear_refs:
                clear_refs.write("5")
            self.was_reset = True
        except OSError:
            self.was_reset = False
        self.baseline = current_rss()

    def peak(self):
        """Return the highest resident set since, in bytes."""
        if self.was_reset:
            with open("/proc/self/status") as status:
                for line in status:
                    if line.startswith("VmHWM:"):
                        return int(line.split()[1]) * 1024
        return highest_rss()


def fresh_process(module, *arguments):
    """Run ``python -m module *arguments`` and return the JSON on the last line of its output."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
