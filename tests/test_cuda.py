"""The same numbers on a GPU, and everything where it belongs."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fimkit import DataInf, Explicit, IFVPUsageError, ModelData
from fimkit.influence import pairwise_scores
from tests import reference
from tests.cases import BY_NAME, N
from tests.state import unchanged
from tests.test_explicit import to_float32

pytestmark = pytest.mark.cuda

NAMES = [
    "mlp",
    "cnn",
    "tied language model",
    "self-attention, time first",
    "LSTM, batch first",
    "merged windows, example fastest",
    "weight-normed layers",
]


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_equals_the_definition(name, solver, device):
    """In float64, with batches that come from the CPU.

    cuDNN's LSTM has no backward pass in evaluation mode: another has to be taken.
    """
    case = BY_NAME[name]
    rows = case.gradients
    least = 1e-6 * reference.largest_eigenvalue(rows)
    model = case.model().to(device)
    with unchanged(model):
        fitted = Explicit(least, loss=case.loss, solver=solver).fit(model, case.batches(5))
    assert fitted.device_ == device
    assert fitted.fisher_.device == device
    found = fitted.transform(rows.to(device))
    assert found.device == device
    expected = reference.ifvp(rows, rows, least)
    assert reference.error(found.cpu(), expected) <= 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_float32(name, device):
    """At torch's own settings, by which convolutions are rounded to TF32."""
    case = BY_NAME[name]
    model = case.model().float().to(device)
    batches = [to_float32(batch) for batch in case.batches(5)]
    fitted = Explicit(loss=case.loss, solver="dual").fit(model, batches)
    rows = case.gradients
    found = fitted.transform(rows.float().to(device)).cpu()
    expected = reference.ifvp(rows, rows.float(), reference.automatic(rows))
    assert reference.error(found, expected) <= (0.1 if name == "cnn" else 1e-3)


def test_vectors_stay_where_they_are(device):
    """Vectors of either side, of numpy, and one per parameter on different sides."""
    case = BY_NAME["mlp"]
    model = case.model().to(device)
    fitted = Explicit(1e-3).fit(model, case.batches(5))
    rows = case.gradients
    expected = reference.ifvp(rows, rows, 1e-3)
    on_cpu = fitted.transform(rows)
    assert on_cpu.device.type == "cpu"
    assert reference.error(on_cpu, expected) <= 1e-9
    assert reference.error(fitted.transform(rows.numpy()), expected) <= 1e-9
    pieces = rows.split([p.numel() for p in model.parameters()], 1)
    mixed = [
        piece.view(N, *shape).to(device if i % 2 else "cpu")
        for i, (piece, shape) in enumerate(
            zip(pieces, fitted.parameter_shapes_.values(), strict=True)
        )
    ]
    found = fitted.transform(mixed)
    assert [piece.device for piece in found] == [piece.device for piece in mixed]
    joined = torch.cat([piece.cpu().flatten(1) for piece in found], 1)
    assert reference.error(joined, expected) <= 1e-9


def test_statistics_on_another_device(device):
    """Of a model on the GPU, rows may be kept on the CPU."""
    case = BY_NAME["mlp"]
    model = case.model().to(device)
    fitted = Explicit(1e-3, device="cpu").fit(model, case.batches(5))
    assert fitted.device_ == torch.device("cpu")
    assert next(model.parameters()).device == device
    rows = case.gradients
    assert reference.error(fitted.transform(rows), reference.ifvp(rows, rows, 1e-3)) <= 1e-9


def test_random_state_of_the_device(device):
    case = BY_NAME["mlp"]
    loader = DataLoader(TensorDataset(*case.batch()), 5, shuffle=True)
    before = torch.cuda.get_rng_state(device)
    Explicit().fit(case.model().to(device), loader)
    assert torch.equal(torch.cuda.get_rng_state(device), before)


def test_influence(device):
    case = BY_NAME["cnn"]
    data = ModelData(case.model().to(device), case.batch(), batch_size=5)
    scores = pairwise_scores(Explicit(1e-2).fit(data), data, data[:3])
    assert isinstance(scores, np.ndarray)
    rows = case.gradients
    expected = rows[:3] @ reference.ifvp(rows, rows, 1e-2).T
    assert reference.error(scores, expected) <= 1e-9


def test_numbers_that_are_not_finite(device):
    case = BY_NAME["mlp"]
    x, y = case.batch()
    x[7, 0] = torch.nan
    with pytest.raises(ValueError, match="batch 1: NaN"):
        Explicit().fit(case.model().to(device), [(x[:6], y[:6]), (x[6:], y[6:])])


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("storage", ["memory", "folder"])
def test_datainf_equals_that_of_the_cpu(fisher, storage, device, tmp_path):
    """Rows in a folder are met on the CPU; vectors come and go as they are."""
    case = BY_NAME["mlp"]
    expected = DataInf(fisher=fisher).fit(case.model(), case.batches(5))
    model = case.model().to(device)
    estimator = DataInf(fisher=fisher, storage=storage if storage == "memory" else tmp_path)
    fitted = estimator.fit(model, case.batches(5))
    home = device if storage == "memory" else torch.device("cpu")
    assert fitted.device_ == fitted.fisher_.device == home
    vectors = case.gradients
    for method in ("transform", "inverse_transform"):
        found = getattr(fitted, method)(vectors.to(device))
        assert found.device == device
        assert reference.error(found.cpu(), getattr(expected, method)(vectors)) <= 1e-9
    own, cpu = (ModelData(m, case.batch(), batch_size=5) for m in (model, case.model()))
    assert fitted.score(own) == pytest.approx(expected.score(cpu), rel=1e-9)
    assert np.allclose(fitted.mahalanobis(own), expected.mahalanobis(cpu), rtol=1e-9)
    scores = pairwise_scores(fitted, own, own)
    assert np.allclose(scores, pairwise_scores(expected, cpu, cpu), rtol=1e-8)


def test_rows_in_a_folder_of_a_gpu_are_refused(device, tmp_path):
    case = BY_NAME["mlp"]
    with pytest.raises(IFVPUsageError, match=r"device is cuda:.*, but rows in a folder"):
        DataInf(storage=tmp_path, device=device).fit(case.model(), case.batches(5))
    assert list(tmp_path.iterdir()) == []
