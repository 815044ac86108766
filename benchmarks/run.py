"""Running cases: a process for each library, which take turns, under a time limit.

Every library of a case has one process, in which the case's problem is made once. In a first round
each takes all steps while its memory is watched, in a fresh process as it is; in ``repeats`` rounds
more they take turns in rotating order. One whose first run took longer than ``SLOW`` seconds takes
no more of them, and that run counts. One that does not end within the limit is stopped, and the
limit is reported in the place of its time. The floor is measured in the same turns.
"""

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import turns

# Seconds of a first run that make it the only one.
SLOW = 10.0
# Seconds in which a process must have made its problem.
START = 600.0
FLOOR = "floor"


class OverLimit(Exception):
    """A worker did not answer in time."""


class Failed(Exception):
    """A worker ended without an answer."""


class Worker:
    """A process of `benchmarks.worker`."""

    def __init__(self, case, library, sizes, threads, *, quick=False):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - stop closes it
        arguments = (case, library, json.dumps(sizes), str(threads), "quick" if quick else "full")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            # Threads that spin while they wait slow down whatever runs next.
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"},
        )

    def ask(self, limit, **order):
        """Send an order, and return the reply to it; without a limit, however long it takes."""
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self.last_words()) from None
        return self.reply(limit)

    def reply(self, limit):
        """Wait for a line."""
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.stop()
            raise OverLimit
        line = self.process.stdout.readline()
        if not line:
            raise Failed(self.last_words())
        return json.loads(line)

    def last_words(self):
        """Return the last line that the process wrote to its standard error."""
        self.process.wait()
        self.log.seek(0)
        lines = [line for line in self.log.read().splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"ended with {self.process.returncode}"

    def stop(self):
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            stream.close()


def run_case(case, libraries, *, sizes, repeats, threads, limit, say=print):
    """Run one case.

    Parameters
    ----------
    case : Case
    libraries : sequence of str
        Those of the case's that are wanted and can be imported.
    sizes : dict
        Arguments of its problem.
    repeats, threads : int
    limit : float
        Seconds that a library may take for one run.
    say : callable
        Takes lines about what is going on.

    Returns
    -------
    dict
        What `benchmarks.report` writes.
    """
    found = {"case": case.name, "about": case.about, "sizes": sizes, "rows": {}}
    rows = {name: {"runs": [], "note": case.notes.get(name, "")} for name in libraries}
    workers = {name: Worker(case.name, name, sizes, threads) for name in (FLOOR, *libraries)}
    floor = []
    try:
        for name in list(workers):
            try:
                reply = workers[name].reply(START)
            except (OverLimit, Failed) as error:
                if name == FLOOR:
                    raise
                give_up(rows[name], workers.pop(name), error, START)
                continue
            if name == FLOOR:
                found.update(reply)
            else:
                rows[name]["version"] = reply["version"]
        for round_, name in turns(workers, repeats):
            if name not in workers or (name != FLOOR and rows[name].get("slow")):
                continue
            start = time.perf_counter()
            try:
                reply = workers[name].ask(None if name == FLOOR else limit, do="run")
            except (OverLimit, Failed) as error:
                if name == FLOOR:
                    raise
                give_up(rows[name], workers.pop(name), error, limit)
                say(f"  {name}: {rows[name]['ended']}")
                continue
            seconds = time.perf_counter() - start
            if name == FLOOR:
                floor += [reply["parts"]] if round_ else []
                continue
            row = rows[name]
            if not round_:
                row["memory"] = {key: reply.pop(key) for key in ("baseline", "peak")}
                row["slow"] = seconds > SLOW
                say(f"  {name}: {seconds:.2f} s, cold")
            if round_ or row["slow"]:
                row["runs"].append(reply)
        if case.reference is not None and len(workers) > 1:
            compare(workers, rows)
    finally:
        for worker in workers.values():
            worker.stop()
    found["rows"] = rows
    found["floor"] = {
        stage: {part: statistics.median(run[stage][part] for run in floor) for part in parts}
        for stage, parts in (floor[0] if floor else {}).items()
    }
    return found


def give_up(row, worker, error, limit):
    """Write down why a library takes no further part."""
    row["ended"] = f"> {limit:g} s" if isinstance(error, OverLimit) else f"failed: {error}"
    if worker.process.poll() is None:
        worker.stop()


def compare(workers, rows):
    """Add every library's errors against the reference."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "reference.pt")
        workers[FLOOR].ask(None, do="reference", path=path)
        for name, worker in workers.items():
            if name != FLOOR:
                rows[name]["errors"] = worker.ask(None, do="errors", path=path)


def run_curve(case, index, *, quick, threads):
    """Measure one growth curve, in a process of its own."""
    worker = Worker(case.name, "curve", {}, threads, quick=quick)
    try:
        worker.reply(START)
        found = worker.ask(None, do="curve", index=index)
    finally:
        worker.stop()
    wanted = case.curves[index]
    names = {"case": case.name, "stage": wanted.stage, "axis": wanted.axis, "why": wanted.why}
    return {**names, "values": found.pop("axis"), **found}
