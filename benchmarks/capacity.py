"""The capacity model of docs/capacity.md: time and memory by stage, predicted beside measured.

Sizes are those of `benchmarks.work`: n examples, T positions, layers (out, columns), k vectors.
The formulas are functions here, so that what is written, checked and extrapolated is one thing.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks import floor
from benchmarks.common import MIB, fresh_process
from benchmarks.report import seconds, table
from benchmarks.stages import PROBLEMS
from benchmarks.work import (
    Layer,
    datainf_transform,
    dual_fit,
    dual_solve,
    eigenvalues,
    kronecker_factors,
    layers_of,
    rotate,
)

GIB = 2**30
# fimkit's: bytes of inputs and gradients kept between the passes, and of temporaries at a time.
CACHE, CHUNK = 2**30, 64 * 2**20
# Width of the eigendecomposition from which the time of others is taken, as its cube.
EIGH_WIDTH = 768


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    ``products`` and ``wide`` are operations in products of the statistics' dtype and of float64;
    ``passes`` those of the model's passes; ``cube`` times m³ are the seconds of an
    eigendecomposition, ``side`` of which run side by side; ``network`` is bytes to and from every
    device.
    """

    products: float
    wide: float
    passes: float
    cube: float
    side: int = 1
    network: float = float("inf")


class Setting(NamedTuple):
    """What is fitted: layers with how often they occur, examples, positions, vectors."""

    layers: tuple[tuple[Layer, int], ...]
    n: int
    k: int
    batch: int
    item: int = 4
    attention: float = 0.0

    def sum(self, function):
        """Add up a function of a layer over all layers."""
        return sum(count * function(layer) for layer, count in self.layers)


# -- time ----------------------------------------------------------------------------------------


def pass_flops(setting):
    """Forward, and backward to the outputs of layers: 2 + 2 operations per weight and position."""
    return setting.n * (
        4 * setting.sum(lambda layer: layer.positions * layer.size) + setting.attention
    )


def cached_bytes(setting):
    """Inputs and output gradients of all layers, which the second pass takes if they fit."""
    each = setting.sum(lambda layer: layer.positions * (layer.out + layer.columns))
    return setting.n * each * setting.item


def passes(setting):
    """Passes over the data: what does not fit the cache is computed twice."""
    return 1 + max(0.0, 1 - CACHE / cached_bytes(setting))


def ekfac_seconds(setting, rates, devices=1):
    """Seconds by stage of EK-FAC, work divided evenly among devices."""
    each = devices * rates.products
    cubes = setting.sum(lambda layer: layer.out**3 + layer.columns**3)
    exchanged = 2 * (devices - 1) / devices * (factor_bytes(setting) + eigenvalue_bytes(setting))
    return {
        "pass": passes(setting) * pass_flops(setting) / (devices * rates.passes),
        "factors": setting.sum(lambda layer: kronecker_factors(layer, setting.n)) / each,
        "exchange": exchanged / rates.network,
        "eigh": rates.cube * cubes / (devices * rates.side),
        "eigenvalues": setting.sum(lambda layer: eigenvalues(layer, setting.n)) / each,
        "use": setting.k * setting.sum(lambda layer: 2 * rotate(layer)) / each,
    }


def rows_seconds(method, setting, rates):
    """Seconds of fit and use of DataInf and of the dual, whose arithmetic alone is float64."""
    layers = [layer for layer, count in setting.layers for _ in range(count)]
    fit = pass_flops(setting) / rates.passes
    if method == "datainf":
        work, rate = datainf_transform(layers, setting.n, setting.k, "float32"), rates.products
    else:
        fit += sum(dual_fit(layers, setting.n, "float64").flops.values()) / rates.wide
        work, rate = dual_solve(layers, setting.n, setting.k, "float64"), rates.wide
    return {"pass": fit, "use": sum(work.flops.values()) / rate}


# -- memory --------------------------------------------------------------------------------------


def factor_bytes(setting):
    """A and S, whose eigenvectors take their place."""
    return setting.item * setting.sum(lambda layer: layer.out**2 + layer.columns**2)


def eigenvalue_bytes(setting):
    """Λ."""
    return setting.item * setting.sum(lambda layer: layer.size)


def eigh_bytes(setting, side):
    """Two squares of float64 for each of the largest matrices, side by side.

    One at a time is on a device, and takes four: the eigenvectors do not take the matrix's place.
    """
    sizes = sorted(m for layer, count in setting.layers for m in [*layer[:2]] * count)
    copies = 2 if side > 1 else 4
    return sum(copies * 8 * m**2 for m in sizes[-side:])


def batch_bytes(setting):
    """One batch's inputs and gradients, and its forward pass's own."""
    each = setting.sum(lambda layer: layer.positions * (layer.out + layer.columns))
    return 2 * min(setting.batch, setting.n) * each * setting.item


def ekfac_bytes(setting, rates):
    """The most that is in use at once, above the model and one batch of data."""
    kept = factor_bytes(setting) + min(CACHE, cached_bytes(setting))
    results = setting.k * setting.sum(lambda layer: layer.size) * setting.item
    return max(
        kept + batch_bytes(setting),
        kept + eigh_bytes(setting, rates.side),
        kept + eigenvalue_bytes(setting) + min(CHUNK, batch_bytes(setting)),
        factor_bytes(setting) + eigenvalue_bytes(setting) + results + min(CHUNK, 3 * results),
    )


def row_bytes(setting):
    """Per-example gradients, as factors or dense, whichever is less."""
    return (
        setting.n
        * setting.item
        * setting.sum(lambda layer: min(layer.size, layer.positions * (layer.out + layer.columns)))
    )


def rows_bytes(method, setting):
    """The same of DataInf and of the dual: gradients, results, chunks, and n × n matrices."""
    results = setting.k * setting.sum(lambda layer: layer.size) * setting.item
    square = 8 * setting.n**2 if method == "dual" else 0
    rows = row_bytes(setting)
    return rows + results + 3 * min(CHUNK, 2 * (rows + results)) + 2 * square


# -- beside measurements -------------------------------------------------------------------------

CHECKS = (
    ("ekfac", "mlp", {"n": 2048, "k": 16, "width": 256}),
    ("ekfac", "mlp", {"n": 2048, "k": 16, "width": 512}),
    ("ekfac", "mlp", {"n": 2048, "k": 16, "width": 1024}),
    ("ekfac", "mlp", {"n": 8192, "k": 16, "width": 512}),
    ("ekfac", "transformer", {"n": 128, "k": 16, "width": 128, "positions": 64}),
    ("ekfac", "transformer", {"n": 128, "k": 16, "width": 256, "positions": 64}),
    ("ekfac", "transformer", {"n": 128, "k": 16, "width": 256, "positions": 256}),
    ("datainf", "mlp", {"n": 2048, "k": 32, "width": 256}),
    ("datainf", "mlp", {"n": 2048, "k": 32, "width": 512}),
    ("dual", "mlp", {"n": 1024, "k": 32, "width": 256}),
    ("dual", "mlp", {"n": 2048, "k": 32, "width": 512}),
)
QUICK = (
    ("ekfac", "mlp", {"n": 256, "k": 4, "width": 64}),
    ("datainf", "mlp", {"n": 128, "k": 4, "width": 32}),
    ("dual", "mlp", {"n": 128, "k": 4, "width": 32}),
)


def setting_of(problem):
    """Return the setting of a problem."""
    layers = layers_of(problem).values()
    t = max(layer.positions for layer in layers)
    blocks = sum(layer.positions == t > 1 for layer in layers) // 6
    width = min((layer.out for layer in layers if layer.positions == t > 1), default=0)
    return Setting(
        tuple((layer, 1) for layer in layers),
        len(problem.x),
        len(problem.vectors),
        problem.batch_size,
        attention=8 * blocks * t**2 * width,
    )


def machine_rates():
    """Measure this machine, but for its passes, which depend on the model."""
    return Rates(
        products=floor.product_rate("float32"),
        wide=floor.product_rate("float64"),
        passes=0.0,
        cube=floor.eigh_seconds(EIGH_WIDTH) * torch.get_num_threads() / EIGH_WIDTH**3,
        side=torch.get_num_threads(),
    )


def check(checks, threads):
    """Measure every size in a process of its own; return rows of predicted beside measured."""
    base, rows = machine_rates(), []
    for method, model, sizes in checks:
        spec = {"method": method, "model": model, "sizes": sizes, "threads": threads}
        measured = fresh_process("benchmarks.stages", json.dumps(spec))
        setting = setting_of(PROBLEMS[model](**sizes))
        rates = Rates(**{**vars(base), "passes": pass_flops(setting) / measured["one pass"]})
        if method == "ekfac":
            times, memory = ekfac_seconds(setting, rates), ekfac_bytes(setting, rates)
        else:
            times, memory = rows_seconds(method, setting, rates), rows_bytes(method, setting)
        rows.append(
            {
                "name": " ".join([method, model, *(f"{k}={v}" for k, v in sizes.items())]),
                "predicted": {stage: times[stage] for stage in measured["seconds"]},
                "measured": measured["seconds"],
                "bytes": [memory, measured["bytes"]],
            }
        )
    return rows


# -- extrapolation -------------------------------------------------------------------------------


class Decoder(NamedTuple):
    """A decoder-only transformer's Linears; embedding and head take no part in the fit."""

    name: str
    blocks: int
    width: int
    hidden: int
    keys: int
    other: float

    def layers(self, t):
        """Return its layers with how often they occur, without biases."""
        d, h, kv, b = self.width, self.hidden, self.keys, self.blocks
        return (
            (Layer(d, d, t), 2 * b),
            (Layer(kv, d, t), 2 * b),
            (Layer(h, d, t), 2 * b),
            (Layer(d, h, t), b),
        )


DECODERS = (
    Decoder("1B", 16, 2048, 8192, 512, 0.26e9),
    Decoder("8B", 32, 4096, 14336, 1024, 1.05e9),
)
# One of eight H100-class GPUs, as assumed in docs/capacity.md; none of it is measured.
GPU = Rates(products=45e12, wide=45e12, passes=400e12, cube=6e-12, side=1, network=300e9)
DEVICES, EXAMPLES, POSITIONS, RANK = 8, 10_000, 512, 8


def lora(decoder, rank, t):
    """Return the adapters of queries and values: (rank, width) and (width or keys, rank)."""
    d, kv, b = decoder.width, decoder.keys, decoder.blocks
    return ((Layer(rank, d, t), 2 * b), (Layer(d, rank, t), b), (Layer(kv, rank, t), b))


def extrapolate():
    """Return rows of time and memory of EK-FAC, and memory of DataInf on adapters."""
    rows = []
    for decoder in DECODERS:
        setting = Setting(
            decoder.layers(POSITIONS),
            EXAMPLES,
            100,
            8,
            attention=8 * decoder.blocks * POSITIONS**2 * decoder.width,
        )
        weights = setting.sum(lambda layer: layer.size) + decoder.other
        adapters = setting._replace(layers=lora(decoder, RANK, POSITIONS))
        statistics = factor_bytes(setting) + eigenvalue_bytes(setting)
        rows.append(
            {
                "name": decoder.name,
                "seconds": ekfac_seconds(setting, GPU, DEVICES),
                "model": 2 * weights,
                "statistics": statistics,
                "eigh": eigh_bytes(setting, 1),
                "replicated": 2 * weights + statistics + eigh_bytes(setting, 1) + CACHE,
                "divided": (2 * weights + statistics) / DEVICES + eigh_bytes(setting, 1) + CACHE,
                "adapters": adapters.sum(lambda layer: layer.size),
                "rows": row_bytes(adapters),
                "vectors": 4 * setting.sum(lambda layer: layer.size),
            }
        )
    return rows


# -- text ----------------------------------------------------------------------------------------


def extrapolation_text(rows):
    """Return the extrapolated numbers as Markdown."""
    stages = ["pass", "factors", "exchange", "eigh", "eigenvalues", "use"]
    times = [
        [row["name"], *(seconds(row["seconds"][s]) for s in stages), seconds(whole)]
        for row in rows
        for whole in [sum(row["seconds"].values())]
    ]
    sizes = ["model", "statistics", "eigh", "replicated", "divided", "vectors", "rows"]
    header = ["GiB", "model", "A, S, Λ", "eigh", "each, replicated", "each, divided"]
    header += ["one vector", f"LoRA {RANK} rows"]
    memory = [[row["name"], *(f"{row[s] / GIB:.1f}" for s in sizes)] for row in rows]
    return "\n\n".join(
        [
            table(["seconds", *stages, "all"], times),
            table(header, memory),
        ]
    )


def check_text(rows):
    """Return predicted beside measured as Markdown."""
    stages = ["pass", "factors", "eigh", "eigenvalues", "use"]
    lines = []
    for row in rows:
        cells = [
            f"{seconds(row['predicted'][s])} / {seconds(row['measured'][s])}"
            if s in row["measured"]
            else ""
            for s in stages
        ]
        memory = " / ".join(f"{b / MIB:.0f}" for b in row["bytes"])
        lines.append([row["name"], *cells, memory])
    return table(["predicted / measured, s", *stages, "MiB"], lines)


def report(*, quick, threads):
    """Check the model on this machine and extrapolate it; return both with their text."""
    rows, far = check(QUICK if quick else CHECKS, threads), extrapolate()
    text = "\n\n".join(
        [
            "## Capacity model",
            "The formulas and assumptions are in docs/capacity.md. Here, predicted from rates of "
            "this machine / measured:",
            check_text(rows),
            f"Extrapolated to {DEVICES} GPUs, n = {EXAMPLES:,}, T = {POSITIONS}, k = 100:",
            extrapolation_text(far),
        ]
    )
    return {"checked": rows, "extrapolated": far, "text": text}
