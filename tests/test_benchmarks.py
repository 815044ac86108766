"""The benchmarks' harness: what it counts, chooses and writes, and one case from end to end."""

import json
import math
from collections import Counter

import pytest
import torch

from benchmarks import __main__ as harness
from benchmarks import by_hand, capacity, report, work
from benchmarks.cases import CASES
from benchmarks.cases.ekfac import SEQUENCES
from benchmarks.problems import cnn, gradients, mlp, transformer
from benchmarks.run import run_case, run_curve
from benchmarks.work import Layer
from benchmarks.worker import relative_error


def test_operations_are_those_counted_by_hand():
    layer = Layer(out=3, columns=5)
    # A: 10 examples, 5 * 6 / 2 distinct entries of a product and a sum; S likewise of 3.
    assert work.kronecker_factors(layer, 10) == 10 * (2 * 15) + 10 * (2 * 6)
    # Every a times a 5 x 5 basis, every s times a 3 x 3 one, then (3, 10) times (10, 5).
    assert work.eigenvalues(layer, 10) == 10 * (2 * 25 + 2 * 9) + 2 * 3 * 10 * 5
    assert work.project(layer, 10, 7) == 2 * 7 * 15 * 10
    assert work.gram(layer, 10) == 5 * 110 + 3 * 110
    assert work.ekfac_apply([layer, layer], 7, "float32").flops == {
        "float32": 2 * 7 * 2 * (2 * 9 * 5 + 2 * 3 * 25)
    }


def test_the_cheaper_of_two_ways_counts():
    few, many = Layer(30, 50, positions=2), Layer(3, 5, positions=100)
    assert work.eigenvalues(few, 1) == 2 * (2 * 900 + 2 * 2500) + 2 * 30 * 2 * 50
    assert work.eigenvalues(many, 1) == 2 * 3 * 100 * 5 + (2 * 9 * 5 + 2 * 3 * 25)
    assert work.gram(few, 4) == 50 * 8 * 9 + 30 * 8 * 9
    assert work.gram(many, 4) == 4 * 2 * 3 * 100 * 5 + 15 * 4 * 5


def test_work_of_fits_and_solves():
    layers = [Layer(4, 5), Layer(2, 5)]
    fit = work.ekfac_fit(layers, 3, "float32")
    assert fit.eigh == Counter({4: 1, 5: 2, 2: 1})
    assert fit.passes == 1
    assert work.primal_fit(layers, 3, "float64").flops == {"float64": 3 * 30 * 31}
    assert work.primal_solve(layers, 2, "float64").flops == {
        "float64": round(30**3 / 3 + 2 * 900 * 2)
    }
    both = fit + work.products(10, "float64")
    assert both.flops["float64"] == 10
    assert both.passes == 1


def test_layers_are_found_with_their_positions():
    assert list(work.layers_of(mlp(4, 1, (6, 3, 2))).values()) == [Layer(3, 7), Layer(2, 4)]
    sequence = work.layers_of(transformer(2, 1, width=8, positions=5, blocks=1))
    assert sequence["0.up"] == Layer(32, 9, 5)
    assert work.layers_of(cnn(2, 1, channels=(2, 3, 4)))["3"] == Layer(3, 2 * 9 + 1, 16 * 16)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention, vmapped
@pytest.mark.parametrize(
    "problem",
    [
        mlp(12, 3, (6, 5, 4), batch_size=5),
        transformer(6, 3, width=8, positions=3, blocks=1, batch_size=4),
        cnn(4, 3, channels=(2, 3, 3), batch_size=3),
    ],
    ids=["mlp", "transformer", "cnn"],
)
def test_references_are_the_definition(problem):
    problem = problem.double()
    rows = gradients(problem.model, problem.x, problem.y)
    traces = torch.stack([g.square().sum((1, 2)).mean() for g in problem.matrices(rows).values()])
    found = by_hand.ekfac(problem).run()
    torch.testing.assert_close(found["trace"], traces, rtol=1e-10, atol=0)
    damped = rows.T @ rows / len(rows) + problem.damping * torch.eye(problem.size, dtype=rows.dtype)
    exact = torch.linalg.solve(damped, problem.vectors.T).T
    for method in (by_hand.dense, by_hand.gram):
        torch.testing.assert_close(method(problem).run()["product"], exact, rtol=1e-7, atol=1e-9)
    closed, loop = (m(problem).run()["product"] for m in (by_hand.datainf, by_hand.datainf_loop))
    torch.testing.assert_close(closed, loop, rtol=1e-10, atol=1e-12)


def test_filters():
    names = [case.name for case in harness.chosen_cases(["ekfac-*", "datainf"])]
    assert "ekfac-mlp" in names
    assert "datainf" in names
    assert "search" not in names
    assert "explicit-dual-large" not in [c.name for c in harness.chosen_cases(None)]
    assert [c.name for c in harness.chosen_cases(["explicit-dual-large"])]
    case = CASES["ekfac-transformer"]
    assert case.left_out == SEQUENCES
    assert harness.chosen_libraries(case, None, {"curvlinops": "absent"}) == [
        "fimkit",
        "fimkit, lean",
        "kronfluence",
        "torch",
    ]
    assert harness.chosen_libraries(case, ["fim*"], {}) == ["fimkit", "fimkit, lean"]


def test_everything_is_listed():
    listing = harness.listing()
    assert all(name in listing for name in CASES)
    for script in ("retraining", "datainf_lora", "ekfac_agreement", "explicit_scale"):
        assert f"benchmarks.{script}" in listing


def test_an_unknown_case_is_named():
    with pytest.raises(SystemExit, match="no case matches nothing"):
        harness.main(["--case", "nothing"])


def test_exponent_and_errors():
    assert report.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    right = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    assert relative_error(right + torch.tensor([[0.0, 0.0], [0.0, 1.0]]), right) == 0.5


def test_table():
    assert report.table(["", "s"], [["fimkit", "1.00"], ["x", "12.00"]]).splitlines() == [
        "|        |     s |",
        "| ------ | ----: |",
        "| fimkit |  1.00 |",
        "| x      | 12.00 |",
    ]


@pytest.mark.slow
def test_one_case_from_end_to_end(tmp_path):
    case = CASES["datainf"]
    sizes = {**case.sizes_of(quick=True), "n": 20}
    wanted = ["fimkit", "torch", "loop"]
    options = {"sizes": sizes, "repeats": 1, "threads": 1, "say": lambda line: None}
    found = run_case(case, wanted, limit=60, **options)
    for row in found["rows"].values():
        assert len(row["runs"]) == 1
        assert row["errors"]["product"] < 1e-4
        assert row["memory"]["peak"] >= row["memory"]["baseline"] > 0
    assert found["floor"]["transform"]["products"] > 0
    over = run_case(case, ["loop"], limit=1e-3, **options)
    assert over["rows"]["loop"]["ended"] == "> 0.001 s"
    curve = {"case": "c", "stage": "fit", "axis": "n", "why": "w", "values": [1, 2]}
    results = {
        "machine": "here",
        "cases": [found, over],
        "growth": [{**curve, "seconds": [1.0, 2.0], "floor": [0.5, 1.0]}],
    }
    paths = report.write(results, tmp_path)
    assert json.loads(paths[0].read_text())["cases"][0]["case"] == "datainf"
    text = paths[1].read_text()
    assert "| fimkit " in text
    assert "> 0.001 s" in text
    assert "| exponent " in text


@pytest.mark.slow
def test_a_curve():
    case = CASES["explicit-primal"]
    found = run_curve(case, 0, quick=True, threads=1)
    assert len(found["values"]) == len(found["seconds"]) == len(found["floor"]) == 2
    assert found["values"][0] == 64 * 10 + 10 + 10 * 10 + 10


def test_capacity_counts():
    setting = capacity.Setting(((Layer(3, 5), 2),), n=10, k=4, batch=5)
    assert capacity.factor_bytes(setting) == 4 * 2 * (9 + 25)
    assert capacity.eigenvalue_bytes(setting) == 4 * 2 * 15
    assert capacity.cached_bytes(setting) == 10 * 2 * 8 * 4
    assert capacity.pass_flops(setting) == 10 * 4 * 2 * 15
    assert capacity.row_bytes(setting) == 10 * 4 * 2 * 8
    rates = capacity.Rates(products=1.0, wide=1.0, passes=1.0, cube=1.0)
    one, eight = (capacity.ekfac_seconds(setting, rates, devices) for devices in (1, 8))
    assert one["eigh"] == 2 * (27 + 125)
    assert all(math.isclose(one[stage], 8 * eight[stage]) for stage in one if one[stage])
    assert {row["name"] for row in capacity.extrapolate()} == {"1B", "8B"}
