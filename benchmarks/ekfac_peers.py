"""EK-FAC of fimkit and of its peers behind one interface, and the models they are compared on.

A contender is a function of a `Problem`. It does what needs no measuring (copies and wrappers of
the model) and returns a function without arguments, which builds EK-FAC from the data, multiplies
one vector by the damped inverse, and returns both: (per-layer numbers, inverse times vector).
Vectors are flat, in the order of ``model.parameters()``.

All are used as their documentation says, with the same model, loader and vector, bias and weight
jointly:

fimkit       ``EKFAC(regularization=lambda).fit(model, loader).transform(v)``.
curvlinops   ``EKFACLinearOperator(..., separate_weight_and_bias=False)``, told the number of
             examples and spared its check for determinism (two products), then
             ``KFACInverseLinearOperator(..., use_exact_damping=True) @ v``.
nngeometry   ``FIM(..., PMatEKFAC)`` of the log-probability of the true label, ``update_diag``,
             ``solve``. Its Linear takes one position per example only.
kronfluence  ``Analyzer.fit_all_factors`` with ``use_empirical_fisher=True``, which writes every
             factor to a folder. It multiplies no given vectors, so v goes through what it does to
             query gradients: ``prepare`` and ``precondition_gradient`` of its EKFAC strategy.
"""

import copy
import logging
import tempfile
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Problem:
    """A model, its data, a vector to multiply and the damping."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    batch_size: int
    vector: torch.Tensor = None
    damping: float = None
    fisher: str = "empirical"

    def __post_init__(self):
        self.model.eval()
        if self.vector is None:
            self.choose_vector()

    @property
    def loader(self):
        """The batches, in the same order every time."""
        return DataLoader(TensorDataset(self.x, self.y), batch_size=self.batch_size)

    @property
    def layers(self):
        """The layers with parameters, by name; they hold every parameter of the model."""
        modules = self.model.named_modules()
        return {name: m for name, m in modules if isinstance(m, nn.Linear | nn.Conv2d)}

    def choose_vector(self, samples=16):
        """Take the first example's gradient as v, and 0.1 trace(F) / p of a few as lambda."""
        rows = []
        for x, y in zip(self.x[:samples].split(1), self.y[:samples].split(1), strict=True):
            loss = cross_entropy(self.model(x), y)
            gradients = torch.autograd.grad(loss, list(self.model.parameters()))
            rows.append(torch.cat([g.flatten() for g in gradients]))
        self.vector = rows[0]
        self.damping = 0.1 * torch.stack(rows).square().mean().item()

    def matrices(self, vector):
        """Return a flat vector as one (out, in + 1) matrix per layer."""
        sizes = [p.numel() for p in self.model.parameters()]
        pieces = iter(vector.split(sizes))
        return {
            name: torch.cat([next(pieces).view(len(layer.bias), -1), next(pieces)[:, None]], 1)
            for name, layer in self.layers.items()
        }


class Result(NamedTuple):
    """The trace of EK-FAC per layer, the inverse times the vector, and the library's own object."""

    traces: dict[str, float]
    ifvp: torch.Tensor
    native: object


class Block(nn.Module):
    """A transformer encoder's block of Linears; its LayerNorms have no parameters."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))

    def forward(self, x):
        """Return the block's outputs for (n, positions, width) inputs."""
        normed = self.norms[0](x)
        q, k, v = (
            layer(normed).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class MeanPool(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        """Return (n, width) means of (n, positions, width)."""
        return x.mean(1)


def mlp(n=4096):
    """784-1024-1024-10."""
    model = nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    return Problem(model, torch.randn(n, 784), torch.randint(10, (n,)), 256)


def transformer(n=256, width=256, positions=64):
    """4 encoder blocks on vectors, mean pooling, a linear classifier."""
    blocks = [Block(width, 4) for _ in range(4)]
    model = nn.Sequential(*blocks, MeanPool(), nn.Linear(width, 10))
    return Problem(model, torch.randn(n, positions, width), torch.randint(10, (n,)), 32)


def cnn(n=1024):
    """3x32x32 images, three 3x3 convolutions with pooling, a linear classifier."""
    sizes = ((3, 32), (32, 64), (64, 64))
    layers = [(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for i, o in sizes]
    model = nn.Sequential(*sum(layers, ()), nn.Flatten(), nn.Linear(1024, 10))
    return Problem(model, torch.randn(n, 3, 32, 32), torch.randint(10, (n,)), 128)


CASES = {"mlp": mlp, "transformer": transformer, "cnn": cnn}


def make_case(name, seed=0):
    """Return the case's problem, the same for the same seed."""
    torch.manual_seed(seed)
    return CASES[name]()


def fimkit(problem, **options):
    from fimkit import EKFAC

    def run():
        estimator = EKFAC(regularization=problem.damping, fisher=problem.fisher, **options)
        ifvp = estimator.fit(problem.model, problem.loader).transform(problem.vector)
        traces = {name: v.sum().item() for name, v in estimator.eigenvalues_.items()}
        return Result(traces, ifvp, estimator)

    return run


def curvlinops(problem):
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator

    def run():
        operator = EKFACLinearOperator(
            problem.model,
            nn.CrossEntropyLoss(),
            list(problem.model.parameters()),
            problem.loader,
            check_deterministic=False,
            fisher_type={"empirical": "empirical", "exact": "type-2"}[problem.fisher],
            num_per_example_loss_terms=1,
            separate_weight_and_bias=False,
            num_data=len(problem.x),
        )
        inverse = KFACInverseLinearOperator(
            operator, damping=problem.damping, use_exact_damping=True
        )
        ifvp = inverse @ problem.vector
        traces = {name: v.sum().item() for name, v in operator._corrected_eigenvalues.items()}
        return Result(traces, ifvp, operator)

    return run


def nngeometry(problem):
    from nngeometry import FIM
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatEKFAC, PVector

    def log_probability(x, y):
        return -cross_entropy(problem.model(x), y, reduction="none")[:, None]

    def run():
        layers = LayerCollection.from_model(problem.model)
        # "regression" takes the function's outputs as they are: F = mean of their gradients'
        # outer products, whatever the outputs mean.
        fisher = FIM(
            problem.model,
            problem.loader,
            PMatEKFAC,
            variant="regression",
            function=log_probability,
            layer_collection=layers,
        )
        fisher.update_diag(problem.loader)
        vector = PVector(layers, vector_repr=problem.vector)
        ifvp = fisher.solve(vector, regul=problem.damping).to_torch()
        traces = {name: v.sum().item() for name, v in fisher.data[1].items()}
        return Result(traces, ifvp, fisher)

    return run


def kronfluence(problem):
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about GradScaler
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.factor.config import FactorConfig
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    dtype = problem.vector.dtype
    arguments = FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=True,
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )
    score_arguments = ScoreArguments(damping_factor=problem.damping, precondition_dtype=dtype)
    model = prepare_model(copy.deepcopy(problem.model), Classification())

    def run():
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "ekfac",
                model,
                Classification(),
                cpu=True,
                disable_tqdm=True,
                log_level=logging.ERROR,
                output_dir=folder,
            )
            analyzer.fit_all_factors(
                "ekfac",
                TensorDataset(problem.x, problem.y),
                per_device_batch_size=problem.batch_size,
                factor_args=arguments,
            )
            factors = analyzer.load_all_factors("ekfac")
            factors.update(analyzer.load_covariance_matrices("ekfac"))
        strategy = FactorConfig.CONFIGS["ekfac"]
        pieces, traces = [], {}
        for name, matrix in problem.matrices(problem.vector).items():
            storage = {factor: tensors[name] for factor, tensors in factors.items()}
            count = storage["num_lambda_processed"].item()
            traces[name] = storage["lambda_matrix"].sum().item() / count
            storage["lambda_matrix"] = storage["lambda_matrix"].clone()  # prepare inverts in place
            strategy.prepare(storage, score_arguments, torch.device("cpu"))
            product = strategy.precondition_gradient(matrix[None], storage)[0]
            pieces += [product[:, :-1].flatten(), product[:, -1]]
        return Result(traces, torch.cat(pieces), factors)

    return run


CONTENDERS = {
    "fimkit": fimkit,
    "curvlinops": curvlinops,
    "nngeometry": nngeometry,
    "kronfluence": kronfluence,
}
