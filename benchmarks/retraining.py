"""Do influence scores tell the truth? Scores against models that were trained again without data.

Leave one out: softmax regression with an L2 penalty on scikit-learn's digits, a convex problem. Of
1,000 training digits, 200 are left out in turn and the model is trained to its minimum again, by
Newton's method in float64. Printed is the correlation of scores with the change in a test digit's
loss over the digits left out (Pearson's), averaged over 100 test digits.

Linear datamodeling score (Park et al., "TRAK: attributing model behavior at scale", ICML 2023,
section 4): a 64-32-10 tanh network is trained on each of 50 random halves of 1,000 digits, from
``--retrainings`` initial values each, whose predictions are averaged. Printed is the rank
correlation (Spearman's) over the halves of the scores summed over a half with what its networks say
of a test digit, averaged over 100 test digits: for the loss, and for the margin of the true
class. Everything is done twice, with other splits, halves and initial values.

Intervals hold 95% of 2,000 bootstrap means over the test digits. They do not cover the choice of
data and network.

λ is fixed beforehand, never chosen by the result:

- auto: the library's own heuristic. fimkit and kronfluence have the same one, a tenth of the mean
  of the Fisher's diagonal for each layer (for `Explicit` and fimkit's `Diagonal`, which are not
  divided, for the whole model), each of its own Fisher. dattri has none.
- shared: one number for every method of every library and all layers, a tenth of the mean of the
  empirical Fisher's diagonal over all parameters.
- CV: the best of fimkit's method by `RegularizationCV`, 5-fold cross-validation of the gradients'
  likelihood, of 25 values from 1e-4 to 1e4 times the mean of the empirical Fisher's diagonal. Other
  libraries are given that of fimkit's method of the same name, and of the exact Fisher where theirs
  is sampled, or the Hessian.
- penalty: for the convex problem, the penalty itself, which is the Hessian's own λ.

Scores are of one network, the one trained on all 1,000 digits, for every method. Peers are given
the same model, data and, but for auto, λ, and are named as they are. Everybody computes in float64.
TRAK is without λ, as published: log-odds gradients on 512 Gaussian directions.

Run from the repository root, with the libraries installed that are to be compared::

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.retraining
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.datasets import load_digits
from sklearn.model_selection import KFold
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from benchmarks.common import installed, machine
from fimkit import (
    EKFAC,
    KFAC,
    DataInf,
    Diagonal,
    Explicit,
    ModelData,
    RegularizationCV,
    influence,
)

TRAIN, QUERIES, LEFT_OUT, HALVES = 1000, 100, 200, 50
FEATURES, HIDDEN, CLASSES = 64, 32, 10
PENALTY = 1e-3
STEPS, RATE = 200, 0.01
DIRECTIONS = 512
GRID = np.logspace(-4, 4, 25)

METHODS = {
    "Explicit": (Explicit, {}),
    "Explicit, exact Fisher": (Explicit, {"fisher": "exact"}),
    "EKFAC": (EKFAC, {}),
    "EKFAC, exact Fisher": (EKFAC, {"fisher": "exact"}),
    "KFAC": (KFAC, {}),
    "KFAC, exact Fisher": (KFAC, {"fisher": "exact"}),
    "DataInf": (DataInf, {}),
    "Diagonal": (Diagonal, {}),
    "Diagonal, exact Fisher": (Diagonal, {"fisher": "exact"}),
}


@dataclass
class Problem:
    """A trained model with the digits it was trained on and those it is asked about, float64."""

    model: nn.Module
    train: tuple[torch.Tensor, torch.Tensor]
    queries: tuple[torch.Tensor, torch.Tensor]

    def data(self):
        """Return the training and the query digits as fimkit takes them."""
        return ModelData(self.model, self.train), ModelData(self.model, self.queries)


def split_digits(seed):
    """Return inputs and labels of the training and of the query digits."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))[: TRAIN + QUERIES]
    x, y = torch.tensor(images[order] / 16), torch.tensor(labels[order])
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


# -- leave one out ---------------------------------------------------------------------------------


def regress(x, y, n, start=None):
    """Minimise (1/n) sum of losses + penalty/2 ||W||² over (10, in) weights, by Newton's method."""
    weights = x.new_zeros(CLASSES, x.shape[1]) if start is None else start.clone()
    targets = one_hot(y, CLASSES).to(x)
    for _ in range(50):
        p = (x @ weights.T).softmax(1)
        gradient = (p - targets).T @ x / n + PENALTY * weights
        if gradient.abs().max() < 1e-12:
            return weights
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        left = (curvature.flatten(1).T[:, :, None] * x).unflatten(0, (CLASSES, CLASSES))
        hessian = (left.mT @ x / n).permute(0, 2, 1, 3).reshape(weights.numel(), -1)
        hessian.diagonal().add_(PENALTY)
        step = torch.cholesky_solve(gradient.view(-1, 1), torch.linalg.cholesky(hessian))
        weights = weights - step.view_as(weights)
    raise RuntimeError("Newton's method did not converge")


def leave_one_out(seed):
    """Return the problem, which digits were left out, and how much each loss rose, (q, m)."""
    (x, y), (query_x, query_y) = split_digits(seed)
    bordered, query = (torch.cat([a, torch.ones_like(a[:, :1])], 1) for a in (x, query_x))
    full = regress(bordered, y, TRAIN)

    def losses(weights):
        return cross_entropy(query @ weights.T, query_y, reduction="none")

    chosen = np.random.default_rng(seed + 1).permutation(TRAIN)[:LEFT_OUT]
    rises = []
    for i in chosen:
        kept = torch.arange(TRAIN) != int(i)
        rises.append(losses(regress(bordered[kept], y[kept], TRAIN, full)) - losses(full))
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES)).double()  # kronfluence wants a container
    with torch.no_grad():
        model[0].weight.copy_(full[:, :-1])
        model[0].bias.copy_(full[:, -1])
    problem = Problem(model, (x, y), (query_x, query_y))
    return problem, chosen, torch.stack(rises, 1).numpy()


# -- linear datamodeling score ---------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))


def train_networks(x, y, subsets, seed):
    """Train one network on each of (m, k) subsets, all at once; return their parameters."""
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    widths = FEATURES, FEATURES, HIDDEN, HIDDEN
    for parameter, fan_in in zip(network().parameters(), widths, strict=True):
        bound = fan_in**-0.5  # as PyTorch draws them
        values = torch.rand((len(subsets), *parameter.shape), generator=generator)
        parameters.append(((2 * values - 1) * bound).requires_grad_())
    optimizer = torch.optim.Adam(parameters, RATE)
    inputs, labels = x[subsets], y[subsets].flatten()
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = predict(parameters, inputs).flatten(0, 1)
        loss = cross_entropy(logits, labels, reduction="sum") / subsets.shape[1]
        penalty = sum(parameter.square().sum() for parameter in parameters)
        (loss + PENALTY / 2 * penalty).backward()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def predict(parameters, inputs):
    """Return the (m, n, 10) logits of m networks for (m, n, 64) inputs."""
    first, first_bias, second, second_bias = parameters
    hidden = torch.baddbmm(first_bias[:, None], inputs, first.mT).tanh()
    return torch.baddbmm(second_bias[:, None], hidden, second.mT)


def measure(logits, labels):
    """Return the loss and the margin of the labels, (m, n) each."""
    places = labels.expand(len(logits), -1)[..., None]
    own = logits.gather(2, places)[..., 0]
    others = logits.scatter(2, places, -torch.inf)
    found = {"loss": logits.logsumexp(-1) - own, "margin": own - others.amax(-1)}
    return {name: values.double() for name, values in found.items()}


def retrain_on_halves(seed, retrainings):
    """Return the problem, the (50, n/2) halves, and what their networks say: (q, 50) each."""
    train, queries = split_digits(seed)
    x, y, query_x = train[0].float(), train[1], queries[0].float()
    rng = np.random.default_rng(seed + 1)
    halves = np.stack([rng.permutation(TRAIN)[: TRAIN // 2] for _ in range(HALVES)])
    model = network()
    base = train_networks(x, y, torch.arange(TRAIN)[None], seed)
    for parameter, values in zip(model.parameters(), base, strict=True):
        parameter.data = values[0]
    said = {"loss": 0, "margin": 0}
    for i in range(retrainings):
        trained = train_networks(x, y, torch.from_numpy(halves), 1000 * (seed + 1) + i)
        found = measure(predict(trained, query_x.expand(HALVES, -1, -1)), queries[1])
        for name, values in found.items():
            said[name] = said[name] + values.T.numpy() / retrainings
    return Problem(model.double(), train, queries), halves, said


# -- scores ----------------------------------------------------------------------------------------


def cross_validated(estimator, train):
    """Return the λ that gives held-out gradients the highest mean likelihood."""
    folds = KFold(5, shuffle=True, random_state=0)
    search = RegularizationCV(estimator, 10 * auto_of_all(train) * GRID, cv=folds)
    return search.fit(train).regularization_


def auto_of_all(train):
    """Return a tenth of the mean of the Fisher's diagonal over all parameters."""
    return float(0.1 * Diagonal().fit(train).fisher_.diagonal().double().mean())


def gradients(problem, data, measurement="loss"):
    """Return plain per-example gradients, (n, p)."""
    rows = Diagonal().fit(problem.data()[0]).gradients(data, measurement=measurement)
    return torch.cat([part for batch in rows for part in batch.dense_parts(torch.float64)])


def gradient_product(problem, measurement):
    train, queries = problem.data()
    return (gradients(problem, queries, measurement) @ gradients(problem, train).T).numpy()


def trak(problem, measurement):
    """TRAK of one model: (Q φ) of training digits, by the features φ of both."""
    train, queries = problem.data()
    size = train.shape[1]
    directions = min(DIRECTIONS, size)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(size, directions, generator=generator, dtype=torch.float64)
    projection /= directions**0.5
    # gradients() are of what training lowers: the loss, or minus a measurement.
    features = -gradients(problem, train, "log_odds") @ projection
    of_queries = -gradients(problem, queries, measurement) @ projection
    x, y = problem.train
    with torch.no_grad():
        p = problem.model(x).softmax(1).gather(1, y[:, None])[:, 0]
    solved = torch.linalg.solve(features.T @ features, features.T)
    return (of_queries @ solved * (1 - p)).numpy()


def all_scores(problem, measurements, peers, penalty=None):
    """Yield name, column and (q, n) scores of every method, λ and measurement."""
    train, queries = problem.data()
    given = {"shared": auto_of_all(train)}
    if penalty is not None:
        given["penalty"] = penalty
    chosen = {}
    for name, (method, options) in METHODS.items():
        fitted = method(**options).fit(train)
        chosen[name] = {"CV": cross_validated(method(**options), train), **given}
        for which, value in {"auto": "auto", **chosen[name]}.items():
            fitted.set_params(regularization=value)
            for measurement in measurements:
                scores = influence.pairwise_scores(fitted, train, queries, measurement=measurement)
                yield name, (measurement, which), scores
    for name, function in (("gradient product", gradient_product), ("TRAK-style", trak)):
        for measurement in measurements:
            yield name, (measurement, ""), function(problem, measurement)
    for measurement in measurements:
        if "kronfluence" in peers:
            yield from kronfluence_scores(problem, measurement, chosen)
        if "dattri" in peers:
            yield from dattri_scores(problem, measurement, chosen)


def kronfluence_scores(problem, measurement, chosen):
    """Yield as `all_scores` does; for λ None it takes its own heuristic."""
    from benchmarks.retraining_peers import kronfluence

    for kind in ("EKFAC", "KFAC", "Diagonal"):
        for fisher, like in (("sampled", f"{kind}, exact Fisher"), ("empirical", kind)):
            for which, value in {"auto": None, **chosen[like]}.items():
                scores = kronfluence(problem, measurement, kind, fisher, value)
                yield f"kronfluence {kind}, {fisher}", (measurement, which), scores


def dattri_scores(problem, measurement, chosen):
    """Yield as `all_scores` does; its Explicit is of the exact Hessian."""
    from benchmarks.retraining_peers import dattri

    for kind, like in (
        ("Explicit", "Explicit, exact Fisher"),
        ("EKFAC", "EKFAC"),
        ("DataInf", "DataInf"),
    ):
        for which, value in chosen[like].items():
            scores = dattri(problem, measurement, kind, value)
            yield f"dattri {kind}", (measurement, which), scores
    yield "dattri TRAK", (measurement, ""), dattri(problem, measurement, "TRAK", 0.0)


# -- correlations ----------------------------------------------------------------------------------


def correlations(found, true):
    """Return Pearson's correlation of each row of two (q, m) matrices."""
    a, b = (values - values.mean(1, keepdims=True) for values in (found, true))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms > 0, norms, 1)


def rank_correlations(found, true):
    """Return Spearman's."""
    return correlations(rankdata(found, axis=1), rankdata(true, axis=1))


def interval(values):
    """Return the mean over queries and its 95% bootstrap interval, as text."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():6.3f} [{low:6.3f},{high:6.3f}]"


def show(title, measurement, columns, found):
    """Print a line per method; a method without λ has one number."""
    print(f"\n{title}\n")
    print(f"{'':32}" + "".join(f"{'λ: ' + which:>24}" for which in columns))
    for name, cells in found.items():
        given = {which: values for (asked, which), values in cells.items() if asked == measurement}
        if "" in given:
            given = {columns[0]: given[""]}
        texts = [interval(np.concatenate(given[c])) if c in given else "" for c in columns]
        print(f"{name:32}" + "".join(f"{text:>24}" for text in texts).rstrip(), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--retrainings", type=int, default=5, help="per half (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(machine())
    peers = installed(["dattri", "kronfluence"])

    begun = time.perf_counter()
    found = {}
    problem, chosen, rises = leave_one_out(arguments.seed)
    print(f"retrained {LEFT_OUT} times in {time.perf_counter() - begun:.0f} s", flush=True)
    for name, column, scores in all_scores(problem, ["loss"], peers, PENALTY):
        found.setdefault(name, {})[column] = [correlations(scores[:, chosen], rises)]
    title = "Leave one out, softmax regression: correlation with the change in loss"
    show(title, "loss", ("auto", "shared", "CV", "penalty"), found)

    found = {}
    for seed in (arguments.seed, arguments.seed + 1):
        begun = time.perf_counter()
        problem, halves, said = retrain_on_halves(seed, arguments.retrainings)
        with torch.no_grad():
            right = problem.model(problem.queries[0]).argmax(1) == problem.queries[1]
        print(
            f"\nseed {seed}: {HALVES} halves, {arguments.retrainings} networks each, in "
            f"{time.perf_counter() - begun:.0f} s; accuracy {right.double().mean():.3f}",
            flush=True,
        )
        for name, column, scores in all_scores(problem, ["loss", "margin"], peers):
            sign = -1 if column[0] == "loss" else 1
            predicted = np.stack([scores[:, half].sum(1) for half in halves], 1)
            values = rank_correlations(predicted, sign * said[column[0]])
            found.setdefault(name, {}).setdefault(column, []).append(values)
    for measurement in ("loss", "margin"):
        title = f"Linear datamodeling score, 64-32-10 network, of the {measurement}"
        show(title, measurement, ("auto", "shared", "CV"), found)


if __name__ == "__main__":
    main()
