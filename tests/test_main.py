"""The main job: what it prints and draws, that the numbers mean what they say, and its errors."""

import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fimkit import Explicit
from fimkit.__main__ import main
from fimkit._demo.digits import accuracy, flipped_digits, train_network
from fimkit._demo.evaluation import METHODS, Detection, baselines, correlations, evaluate
from fimkit._demo.explanation import explain
from fimkit._demo.reference import Reference
from fimkit._demo.report import explanation_lines
from fimkit._demo.retraining import foretold, leave_out

# Another seed than the default, so that the job is not only good at that one.
SEED = 3

# Lines of the output that may differ from run to run.
VARYING = re.compile(r"^  (fit|transform|peak memory) .*$|^(No picture|Picture): .*$", re.MULTILINE)


@pytest.fixture(scope="module")
def trained():
    digits = flipped_digits(SEED)
    return SimpleNamespace(digits=digits, model=train_network(digits, SEED))


@pytest.fixture(scope="module")
def result(trained):
    return evaluate("explicit", trained.model, trained.digits)


def dense_gradients(model, images, labels):
    """Per-example gradients, ``(n, p)``, by one backward each."""
    parameters = list(model.parameters())
    rows = []
    for image, label in zip(images, labels, strict=True):
        loss = cross_entropy(model(image[None]), label[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


# -- the data ------------------------------------------------------------------------------------


def test_a_tenth_of_the_training_labels_is_flipped_to_another_digit():
    digits = flipped_digits(0)
    assert digits.flipped.sum() == round(0.1 * len(digits.train_labels))
    assert digits.train_labels.min() == 0
    assert digits.train_labels.max() == 9
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    assert digits.train_images.shape[1:] == digits.test_images.shape[1:] == (64,)


def test_the_seed_decides_the_data():
    first, again, other = flipped_digits(1), flipped_digits(1), flipped_digits(2)
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.train_labels, again.train_labels)
    assert not torch.equal(first.test_images, other.test_images)


def test_the_network_learns_the_digits_and_not_the_flipped_labels(trained):
    digits = trained.digits
    assert accuracy(trained.model, digits.test_images, digits.test_labels) > 0.9
    assert accuracy(trained.model, digits.train_images, digits.true_labels) > 0.9
    assert not trained.model.training
    assert all(parameter.grad is None for parameter in trained.model.parameters())


# -- the independent check -----------------------------------------------------------------------


def test_reference_residual_is_that_of_the_dense_fisher():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    images, labels = torch.randn(130, 5), torch.arange(130) % 3
    reference = Reference(model, images, labels)

    rows = dense_gradients(model.double(), images.double(), labels)
    fisher = rows.T @ rows / len(rows)
    torch.testing.assert_close(reference.norms(), rows.norm(dim=1))

    damping = 0.01
    damped = fisher + damping * torch.eye(len(fisher), dtype=torch.float64)
    vectors = rows[:3]
    solutions = torch.linalg.solve(damped, vectors.T).T
    assert reference.residuals(solutions, vectors, damping).max() < 1e-12

    wrong = solutions + torch.randn(3, len(fisher), dtype=torch.float64)
    expected = (wrong @ damped - vectors).norm(dim=1) / vectors.norm(dim=1)
    torch.testing.assert_close(reference.residuals(wrong, vectors, damping), expected)


# -- what a method makes of it -------------------------------------------------------------------


def test_every_method_solves_with_the_automatic_regularization(trained, result):
    digits = trained.digits
    explicit = Explicit().fit(trained.model, [(digits.train_images, digits.train_labels)])
    assert result.damping == pytest.approx(explicit.regularization_, rel=1e-5)
    assert set(METHODS) >= {result.method}


def test_explicit_solves_to_the_precision_of_a_float32_model(result):
    assert 0 < result.residual < 1e-4


def test_scores_are_of_test_digits_by_training_digits(trained, result):
    digits = trained.digits
    assert result.scores.shape == (len(digits.test_labels), len(digits.train_labels))
    assert np.isfinite(result.scores).all()


def test_flipped_labels_are_found(trained, result):
    others = baselines(trained.model, trained.digits, SEED)
    assert set(others) == {"gradient norm", "loss", "random"}
    chance = others["random"]
    assert chance.auc == pytest.approx(0.5, abs=0.1)
    assert chance.precision == pytest.approx(0.1, abs=0.1)

    own = result.detections["self-influence"]
    assert own.auc > 0.95
    assert own.auc > chance.auc + 0.3
    assert own.precision > 0.8
    harm = result.detections["harm to all test losses"]
    assert harm.auc > chance.auc + 0.1


def test_detection_is_the_area_under_the_curve_and_the_share_among_the_highest():
    flipped = np.array([True, False, True, False, False])
    assert Detection.of(np.array([5.0, 1.0, 4.0, 2.0, 3.0]), flipped) == Detection(1.0, 1.0)
    assert Detection.of(np.array([5.0, 1.0, 2.5, 2.0, 3.0]), flipped) == Detection(5 / 6, 0.5)
    assert Detection.of(np.array([1.0, 4.0, 2.0, 4.0, 5.0]), flipped) == Detection(0.0, 0.0)


def test_correlations_are_means_over_test_digits():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 30))
    others = scores + rng.normal(size=(4, 30)) * [[0.1], [1], [3], [10]]
    others[0, :5] = others[0, 0]  # ties
    pairs = list(zip(scores, others, strict=True))
    pearson = np.mean([scipy.stats.pearsonr(*pair)[0] for pair in pairs])
    spearman = np.mean([scipy.stats.spearmanr(*pair)[0] for pair in pairs])
    assert correlations(scores, others) == pytest.approx((pearson, spearman))
    assert correlations(scores, 2 * scores + 1) == pytest.approx((1, 1))


def test_explanations_are_the_extreme_scores_and_mark_flipped_labels(trained, result):
    digits = trained.digits
    explanations = explain(trained.model, digits, result.scores)
    assert explanations[0].predicted != explanations[0].label
    assert explanations[-1].predicted == explanations[-1].label
    for explanation in explanations:
        scores = result.scores[explanation.index]
        k = len(explanation.helpful)
        assert [d.score for d in explanation.helpful] == sorted(scores, reverse=True)[:k]
        assert [d.score for d in explanation.harmful] == sorted(scores)[:k]
        assert explanation.helpful[-1].score > 0 > explanation.harmful[-1].score
        for digit in (*explanation.helpful, *explanation.harmful):
            assert digit.flipped == digits.flipped[digit.index]
            assert digit.score == scores[digit.index]
            assert digit.label == digits.train_labels[digit.index]
    lines = explanation_lines(explanations)
    flipped = [d for e in explanations for d in (*e.helpful, *e.harmful) if d.flipped]
    assert flipped
    assert "\n".join(lines).count("flipped from") == len(flipped)
    for digit in flipped:
        marked = f"#{digit.index:<6}{digit.label}, flipped from {digit.true_label} "
        assert any(marked in line for line in lines)


# -- digits left out in truth --------------------------------------------------------------------


@pytest.fixture(scope="module")
def left_out(trained):
    return leave_out(trained.digits, SEED)


def minimum(images, labels, kept, start):
    """Return the penalised softmax regression of the examples that are kept, by SciPy."""
    x, y = images.double().numpy(), labels.numpy()
    x = np.hstack([x, np.ones((len(x), 1))])
    n = len(x)
    x, y = x[kept], y[kept]

    def loss_and_gradient(flat):
        weights = flat.reshape(10, -1)
        logits = x @ weights.T
        log_p = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
        errors = np.exp(log_p)
        errors[range(len(y)), y] -= 1
        loss = -log_p[range(len(y)), y].sum() / n + 5e-4 * flat @ flat
        return loss, (errors.T @ x / n + 1e-3 * weights).ravel()

    options = {"maxiter": 5000, "maxfun": 10000, "ftol": 0, "gtol": 1e-9}
    found = scipy.optimize.minimize(
        loss_and_gradient, start.flatten().numpy(), jac=True, method="L-BFGS-B", options=options
    )
    return torch.from_numpy(found.x.reshape(10, -1))


def test_rises_are_those_of_a_training_without_the_digit(trained, left_out):
    digits = trained.digits
    n = len(digits.train_labels)
    assert left_out.rises.shape == (len(digits.test_labels), 100)
    assert len(set(left_out.indices)) == 100
    assert digits.flipped[left_out.indices].any()

    def losses(weights):
        logits = digits.test_images.double() @ weights[:, :-1].T + weights[:, -1]
        return cross_entropy(logits, digits.test_labels, reduction="none").numpy()

    model, given = left_out.model, (digits.train_images, digits.train_labels)
    claimed = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    full = minimum(*given, np.ones(n, bool), claimed)
    torch.testing.assert_close(claimed, full, rtol=0, atol=1e-6)
    for column in (0, int(np.argmax(digits.flipped[left_out.indices]))):
        without = minimum(*given, np.arange(n) != left_out.indices[column], full)
        rise = losses(without) - losses(full)
        assert np.abs(left_out.rises[:, column] - rise).max() < 1e-3 * np.abs(rise).max()


def test_scores_are_compared_with_the_rises(trained, left_out):
    """Against dense scores of the regression; a score is positive where the loss rises."""
    digits, model = trained.digits, left_out.model
    rows = dense_gradients(model, digits.train_images.double(), digits.train_labels)
    queries = dense_gradients(model, digits.test_images.double(), digits.test_labels)
    damping = 0.1 * rows.square().mean()
    fisher = rows.T @ rows / len(rows) + damping * torch.eye(650, dtype=torch.float64)
    scores = {
        "explicit": queries @ torch.linalg.solve(fisher, rows.T),
        "gradient product": queries @ rows.T,
    }
    found = foretold(left_out, digits, ["explicit"])
    assert found == {
        name: pytest.approx(correlations(values[:, left_out.indices].numpy(), left_out.rises)[0])
        for name, values in scores.items()
    }
    assert found["explicit"] > 0.7 > 0.4 > found["gradient product"] > 0


# -- the command ---------------------------------------------------------------------------------


def arguments(folder):
    return ["--method", "explicit", "--seed", str(SEED), "--output", str(folder)]


def numbers(output, name):
    """Return the numbers on the line that begins with ``name``."""
    (line,) = (line for line in output.splitlines() if line.strip().startswith(name))
    return [float(word) for word in re.findall(r"\d+\.?\d*(?:e[-+]\d+)?", line)]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """One run of the command into a folder that is not there yet."""
    folder = tmp_path_factory.mktemp("job") / "new" / "folder"
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = main(arguments(folder))
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue(), folder=folder)


@pytest.mark.slow
def test_main_prints_the_tables(job, trained, result):
    assert job.status == 0
    own = result.detections["self-influence"]
    assert numbers(job.out, "self-influence") == pytest.approx([own.auc, own.precision], abs=5e-3)
    assert numbers(job.out, "residual")[0] < 1e-4
    assert numbers(job.out, "parameters p")[:2] == [4, 810]
    assert numbers(job.out, "peak memory")[0] > 1
    digits = trained.digits
    test_accuracy = accuracy(trained.model, digits.test_images, digits.test_labels)
    assert numbers(job.out, "test accuracy") == pytest.approx([test_accuracy], abs=5e-3)
    assert job.out.count("most helpful") == job.out.count("most harmful") == 5
    assert job.out.isascii()
    assert "training" in job.err
    assert "fitting explicit" in job.err


@pytest.mark.slow
def test_main_draws_the_picture(job):
    (path,) = job.folder.iterdir()
    assert str(path) in job.out
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 10_000


@pytest.mark.slow
def test_main_says_the_same_again_and_does_without_matplotlib(job, tmp_path, capsys, monkeypatch):
    for name in {"matplotlib"} | {n for n in sys.modules if n.startswith("matplotlib.")}:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(arguments(tmp_path)) == 0
    output = capsys.readouterr().out
    assert 'pip install "fimkit[plots]"' in output
    assert "matplotlib" in output
    assert not list(tmp_path.iterdir())
    assert VARYING.sub("", output) == VARYING.sub("", job.out)


@pytest.mark.slow
def test_all_methods_side_by_side(trained, result, tmp_path, capsys):
    """The exact method first, and its picture."""
    assert main(["--method", "all", "--seed", str(SEED), "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert next(iter(METHODS)) == "explicit"
    agreement = foretold(leave_out(trained.digits, SEED), trained.digits, list(METHODS))
    product = [agreement["gradient product"]]
    assert numbers(out, "gradient product ") == pytest.approx(product, abs=6e-4)
    assert "training a convex model again" in err
    for method in METHODS:
        other = evaluate(method, trained.model, trained.digits)
        own, harm = other.detections.values()
        pearson, spearman = correlations(other.scores, result.scores)
        found = numbers(out, f"{method} ")[2:]
        expected = [own.auc, harm.auc, pearson, spearman, agreement[method]]
        assert found == pytest.approx(expected, abs=6e-4)
        assert (pearson == pytest.approx(1)) == (method == "explicit")
        assert f"fitting {method}," in err
    for name, detection in baselines(trained.model, trained.digits, SEED).items():
        assert numbers(out, f"{name} ") == pytest.approx([detection.auc], abs=6e-4)
    assert out.isascii()
    (path,) = tmp_path.iterdir()
    assert path.name == "digits-explicit.png"


def test_help_names_the_methods(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (*METHODS, "all", "--seed", "--output"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed", "-1"], "'-1' is not an integer from 0 to 4294967295"),
        (["--seed", "4294967296"], "is not an integer from 0 to"),
        (["--seed", "two"], "'two' is not an integer from 0 to"),
        (["--method", "guess"], "invalid choice: 'guess'"),
    ],
)
def test_arguments_are_checked(argv, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("inside", [(), ("folder",)])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(inside, capsys, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(file.joinpath(*inside))])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "cannot write to the output folder" in errors
    assert str(file) in errors
    assert "training" not in errors
