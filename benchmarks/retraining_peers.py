"""Scores of other libraries for `benchmarks.retraining`, each used as its documentation says.

All return (queries, training digits), positive where training on the digit lowers the query's loss
or raises its margin; where a library's sign is the opposite, it is turned. All compute in float64,
as fimkit does here: kronfluence by its arguments, dattri by torch's default.
"""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from functools import partial

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def margin(logits, labels):
    """Return the labels' logits less the highest other, one per line of logits."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


@contextlib.contextmanager
def default_float64():
    """Let tensors be made in float64 whose makers do not say in what."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def dattri(problem, measurement, kind, damping):
    from dattri.algorithm.influence_function import (
        IFAttributorDataInf,
        IFAttributorEKFAC,
        IFAttributorExplicit,
    )
    from dattri.task import AttributionTask

    model = copy.deepcopy(problem.model)

    def logits_of(parameters, x):
        return functional_call(model, parameters, x)

    def loss(parameters, batch):
        x, y = batch
        return cross_entropy(logits_of(parameters, x.reshape(-1, x.shape[-1])), y.flatten())

    def of_queries(parameters, batch):
        x, y = batch
        logits = logits_of(parameters, x.reshape(-1, x.shape[-1]))
        return -margin(logits, y.flatten()).mean()

    def log_odds(parameters, batch):
        log_probability = -loss(parameters, batch)
        return log_probability - torch.log(1 - torch.exp(log_probability))

    # IFAttributorEKFAC takes its Fisher of the target function, too; there is no other way to ask.
    target = {"loss": loss, "margin": of_queries}[measurement]
    size = len(problem.train[0])
    train = DataLoader(TensorDataset(*problem.train), batch_size=size)
    queries = DataLoader(TensorDataset(*problem.queries), batch_size=size)

    def task(function):
        return AttributionTask(function, model, [model.state_dict()], target_func=target)

    with default_float64(), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        if kind == "TRAK":
            # As its documentation has it: of the log-odds, which rise where the target falls.
            scores = -dattri_trak(task(log_odds), loss, train, queries, damping)
        else:
            attributor = {
                "Explicit": partial(IFAttributorExplicit, regularization=damping),
                "EKFAC": partial(IFAttributorEKFAC, damping=damping),
                "DataInf": partial(IFAttributorDataInf, regularization=damping),
            }[kind](task(loss))
            attributor.cache(train)
            scores = attributor.attribute(train, queries)
    return scores.detach().T.double().numpy()


def dattri_trak(task, loss, train, queries, damping):
    from dattri.algorithm.trak import TRAKAttributor

    def probability(parameters, batch):
        return torch.exp(-loss(parameters, batch))

    directions = min(512, sum(p.numel() for p in task.get_model().parameters()))
    projection = {"proj_dim": directions, "device": "cpu"}
    attributor = TRAKAttributor(task, probability, projection, regularization=damping)
    attributor.cache(train)
    return attributor.attribute(queries)


def kronfluence(problem, measurement, kind, fisher, damping):
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about GradScaler
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits, labels = model(batch[0]), batch[1]
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.softmax(1), 1)[:, 0]
            return cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            if measurement == "loss":
                return self.compute_train_loss(batch, model)
            return -margin(model(batch[0]), batch[1]).sum()

    torch.manual_seed(0)
    model = prepare_model(copy.deepcopy(problem.model), Classification())
    train, queries = TensorDataset(*problem.train), TensorDataset(*problem.queries)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "retraining",
            model,
            Classification(),
            cpu=True,
            disable_tqdm=True,
            log_level=logging.ERROR,
            output_dir=folder,
        )
        analyzer.fit_all_factors(
            "factors",
            train,
            per_device_batch_size=len(train),
            factor_args=FactorArguments(
                strategy=kind.lower(),
                use_empirical_fisher=fisher == "empirical",
                activation_covariance_dtype=torch.float64,
                gradient_covariance_dtype=torch.float64,
                per_sample_gradient_dtype=torch.float64,
                lambda_dtype=torch.float64,
            ),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            queries,
            train,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=len(train),
            score_args=ScoreArguments(
                damping_factor=damping,
                per_sample_gradient_dtype=torch.float64,
                precondition_dtype=torch.float64,
                score_dtype=torch.float64,
            ),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].double().numpy()
