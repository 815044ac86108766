"""fimkit and its peers behind one interface, each used as its documentation says.

Every adapter takes a `Problem` and returns a `Contender`; all are given the same model, batches,
vectors and damping, in the same dtype, and treat bias and weight jointly.

fimkit       ``fit(model, loader)``, then ``transform(vectors)`` or ``influence.pairwise_scores``.
curvlinops   ``EKFACLinearOperator(..., separate_weight_and_bias=False)``, told the number of
             examples and spared its check for determinism (two products), then
             ``KFACInverseLinearOperator(..., use_exact_damping=True) @ V``. It takes models with
             one output per example.
nngeometry   ``FIM(...)`` of the log-probability of the true label, whose gradients are those of the
             empirical Fisher: with ``PMatEKFAC``, ``update_diag`` and one ``solve`` per vector;
             with ``PMatDense``, ``solve`` of all vectors as one ``PFMapDense``, its batched route.
             Its Linear takes one position per example only.
kronfluence  ``Analyzer.fit_all_factors`` with ``use_empirical_fisher=True``, which writes every
             factor to a folder. It multiplies no given vectors, so these go through what it does to
             query gradients: ``prepare`` and ``precondition_gradient`` of its EKFAC strategy.
             Scores are ``compute_pairwise_scores``.
dattri       ``IFAttributorDataInf``: ``cache``, and ``transform_test_rep``, a ``vmap`` over k
             training examples at a time, each making k products of p numbers.
             ``IFAttributorEKFAC``: ``cache`` and ``attribute``.
"""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from functools import partial

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.contender import Contender
from benchmarks.problems import flatten

PACKAGES = ("fimkit", "curvlinops", "nngeometry", "kronfluence", "dattri")


def package_of(library):
    """Return the package that a library's row stands for, or None for what is done by hand."""
    package = library.partition(",")[0]
    return package if package in PACKAGES else None


def ifvps_only(fitted, ifvps):
    """Return what is compared where that is the products alone."""
    return {"product": ifvps}


def stacked_traces(problem, traces):
    """Return traces by layer in the order of the layers."""
    return torch.stack([torch.as_tensor(traces[name]).double() for name in problem.layers])


# -- fimkit --------------------------------------------------------------------------------------


def fimkit_ekfac(problem, **options):
    from fimkit import EKFAC

    def fit():
        estimator = EKFAC(problem.damping, fisher=problem.fisher, **options)
        return estimator.fit(problem.model, problem.loader)

    def results(estimator, ifvps):
        traces = {name: v.sum() for name, v in estimator.eigenvalues_.items()}
        return {"product": ifvps, "trace": stacked_traces(problem, traces)}

    return Contender(
        {"fit": fit, "apply": lambda estimator: estimator.transform(problem.vectors)}, results
    )


def fimkit_datainf(problem):
    from fimkit import DataInf

    return Contender(
        {
            "fit": lambda: DataInf(problem.damping).fit(problem.model, problem.loader),
            "transform": lambda estimator: estimator.transform(problem.vectors),
        },
        ifvps_only,
    )


def fimkit_explicit(problem, solver):
    from fimkit import Explicit

    def fit():
        return Explicit(problem.damping, solver=solver).fit(problem.model, problem.loader)

    return Contender(
        {"fit": fit, "solve": lambda estimator: estimator.transform(problem.vectors)}, ifvps_only
    )


def fimkit_influence(problem):
    from fimkit import EKFAC, ModelData, influence

    train, queries = (
        ModelData(problem.model, data, batch_size=problem.batch_size)
        for data in (problem.data, TensorDataset(*problem.queries))
    )

    def scores(estimator):
        return influence.pairwise_scores(estimator, train, queries)

    return Contender(
        {"fit": lambda: EKFAC(problem.damping).fit(train), "scores": scores},
        lambda estimator, found: {"scores": torch.from_numpy(found)},
    )


# -- curvlinops ----------------------------------------------------------------------------------


def curvlinops_ekfac(problem):
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator

    def fit():
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
        _ = operator.trace  # nothing is computed before it is asked for
        return operator

    def apply(operator):
        inverse = KFACInverseLinearOperator(
            operator, damping=problem.damping, use_exact_damping=True
        )
        return (inverse @ problem.vectors.T).T

    def results(operator, ifvps):
        traces = {name: v.sum() for name, v in operator._corrected_eigenvalues.items()}
        return {"product": ifvps, "trace": stacked_traces(problem, traces)}

    return Contender({"fit": fit, "apply": apply}, results)


# -- nngeometry ----------------------------------------------------------------------------------


def _nngeometry_fisher(problem, representation, **options):
    from nngeometry import FIM

    def log_probability(x, y):
        return -cross_entropy(problem.model(x), y, reduction="none")[:, None]

    # "regression" takes the function's outputs as they are: F = mean of their gradients' outer
    # products, whatever the outputs mean.
    return FIM(
        problem.model,
        problem.loader,
        representation,
        variant="regression",
        function=log_probability,
        **options,
    )


def nngeometry_ekfac(problem):
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatEKFAC, PVector

    layers = LayerCollection.from_model(problem.model)

    def fit():
        fisher = _nngeometry_fisher(problem, PMatEKFAC, layer_collection=layers)
        fisher.update_diag(problem.loader)
        return fisher

    def apply(fisher):
        solved = [
            fisher.solve(PVector(layers, vector_repr=vector), regul=problem.damping).to_torch()
            for vector in problem.vectors
        ]
        return torch.stack(solved)

    def results(fisher, ifvps):
        traces = [v.sum().double() for v in fisher.data[1].values()]
        return {"product": ifvps, "trace": torch.stack(traces)}

    return Contender({"fit": fit, "apply": apply}, results)


def nngeometry_explicit(problem):
    from nngeometry.object import PFMapDense, PMatDense

    def solve(fisher):
        rows = PFMapDense(fisher.generator, data=problem.vectors[None])
        return fisher.solve(rows, regul=problem.damping).to_torch()[0]

    return Contender(
        {"fit": lambda: _nngeometry_fisher(problem, PMatDense), "solve": solve}, ifvps_only
    )


# -- kronfluence ---------------------------------------------------------------------------------


def _kronfluence_task():
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    return Classification()


def _kronfluence_analyzer(model, task, folder):
    from kronfluence.analyzer import Analyzer

    return Analyzer(
        "ekfac",
        model,
        task,
        cpu=True,
        disable_tqdm=True,
        log_level=logging.ERROR,
        output_dir=folder,
    )


def _kronfluence_fit(analyzer, problem):
    from kronfluence.arguments import FactorArguments

    dtype = problem.vectors.dtype
    arguments = FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=True,
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )
    analyzer.fit_all_factors(
        "ekfac",
        problem.data,
        per_device_batch_size=problem.batch_size,
        factor_args=arguments,
    )


def kronfluence_ekfac(problem):
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about GradScaler
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.factor.config import FactorConfig

    task = _kronfluence_task()
    model = prepare_model(copy.deepcopy(problem.model), task)
    strategy = FactorConfig.CONFIGS["ekfac"]
    arguments = ScoreArguments(
        damping_factor=problem.damping, precondition_dtype=problem.vectors.dtype
    )

    def fit():
        with tempfile.TemporaryDirectory() as folder:
            analyzer = _kronfluence_analyzer(model, task, folder)
            _kronfluence_fit(analyzer, problem)
            factors = analyzer.load_all_factors("ekfac")
            factors.update(analyzer.load_covariance_matrices("ekfac"))
        return factors

    def apply(factors):
        products = {}
        for name, matrices in problem.matrices(problem.vectors).items():
            storage = {factor: tensors[name] for factor, tensors in factors.items()}
            storage["lambda_matrix"] = storage["lambda_matrix"].clone()  # prepare inverts in place
            strategy.prepare(storage, arguments, torch.device("cpu"))
            products[name] = strategy.precondition_gradient(matrices, storage)
        return flatten(products)

    def results(factors, ifvps):
        traces = {
            name: factors["lambda_matrix"][name].sum()
            / factors["num_lambda_processed"][name].item()
            for name in problem.layers
        }
        return {"product": ifvps, "trace": stacked_traces(problem, traces)}

    return Contender({"fit": fit, "apply": apply}, results)


def kronfluence_influence(problem):
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about GradScaler
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import ScoreArguments

    task = _kronfluence_task()
    model = prepare_model(copy.deepcopy(problem.model), task)
    folder = tempfile.TemporaryDirectory()

    def fit():
        analyzer = _kronfluence_analyzer(model, task, tempfile.mkdtemp(dir=folder.name))
        _kronfluence_fit(analyzer, problem)
        return analyzer

    def scores(analyzer):
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            TensorDataset(*problem.queries),
            problem.data,
            per_device_query_batch_size=len(problem.queries[0]),
            per_device_train_batch_size=problem.batch_size,
            score_args=ScoreArguments(damping_factor=problem.damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]

    # The folder goes with the function that holds it.
    return Contender(
        {"fit": fit, "scores": scores}, lambda analyzer, found, folder=folder: {"scores": found}
    )


# -- dattri --------------------------------------------------------------------------------------


def _dattri_task(problem):
    from dattri.task import AttributionTask

    model = copy.deepcopy(problem.model)

    def loss(parameters, batch):
        x, y = batch
        logits = functional_call(model, parameters, x.reshape(-1, *problem.x.shape[1:]))
        return cross_entropy(logits, y.flatten())

    return AttributionTask(loss, model, [model.state_dict()])


def dattri_datainf(problem):
    from dattri.algorithm import IFAttributorDataInf

    task = _dattri_task(problem)

    def fit():
        attributor = IFAttributorDataInf(task, regularization=problem.damping)
        attributor.cache(problem.loader)
        return attributor

    return Contender(
        {
            "fit": fit,
            "transform": lambda attributor: attributor.transform_test_rep(0, problem.vectors),
        },
        ifvps_only,
    )


def dattri_influence(problem):
    from dattri.algorithm.influence_function import IFAttributorEKFAC

    task = _dattri_task(problem)
    queries = DataLoader(TensorDataset(*problem.queries), batch_size=len(problem.queries[0]))

    def fit():
        attributor = IFAttributorEKFAC(task, damping=problem.damping)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            attributor.cache(problem.loader)
        return attributor

    def scores(attributor):
        with contextlib.redirect_stderr(io.StringIO()):
            return attributor.attribute(problem.loader, queries).T

    return Contender(
        {"fit": fit, "scores": scores}, lambda attributor, found: {"scores": found.detach()}
    )


#: EK-FAC, by library.
EKFAC = {
    "fimkit": fimkit_ekfac,
    "fimkit, lean": partial(fimkit_ekfac, cache_budget=0),
    "curvlinops": curvlinops_ekfac,
    "nngeometry": nngeometry_ekfac,
    "kronfluence": kronfluence_ekfac,
}
