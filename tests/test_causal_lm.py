"""``loss="causal_lm"``: labels are the tokens themselves, each predicted from those before it."""

import warnings

import pytest
import torch

from fimkit import EKFAC, DataInf, Explicit, IFVPUsageError, load
from tests import dense, reference
from tests.cases import LanguageModel, T, split

N, V = 9, 7
KINDS = ("empirical", "mc", "exact", "predicted")


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageModel(logits=True).double()


def batch(n=N, length=T):
    ids = torch.randint(1, V, (n, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, -1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1::3, :2] = -100  # a prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def of_sequence(model, example):
    """Minus the log-probability of one sequence, token after token."""
    logits = reference.outputs(model, example)
    total = 0 * logits.sum()
    for t, label in enumerate(example["labels"][0].tolist()):
        if t and label != -100:
            total = total - logits[0, t - 1].log_softmax(0)[label]
    return total


def shifted(of_shifted):
    """Return an example loss by the logits of all positions but the last."""

    def loss(model, example):
        logits = reference.outputs(model, example)[0, :-1]
        return of_shifted(logits, example["labels"][0, 1:])

    return loss


@pytest.mark.parametrize("sizes", [(N,), (1,), (4,)], ids=str)
def test_is_the_sum_over_next_tokens(sizes):
    expected = reference.fisher(reference.gradients(model(), of_sequence, batch(), N))
    found = Explicit(loss="causal_lm").fit(model(), split(batch(), N, *sizes)).fisher_.to_dense()
    assert dense.distance(found, expected) <= 1e-12


def test_as_many_positions_as_classes():
    """Nothing is guessed by shapes: labels and logits may have any."""
    net = model()
    net.positions = torch.nn.Parameter(torch.randn(V + 1, 4, dtype=torch.float64))
    for length in (V, V + 1):
        net.positions.data = torch.randn(length, 4, dtype=torch.float64)
        data = batch(3, length)
        expected = reference.fisher(reference.gradients(net, of_sequence, data, 3))
        found = Explicit(loss="causal_lm").fit(net, [data]).fisher_.to_dense()
        assert dense.distance(found, expected) <= 1e-12


def test_exact_and_predicted():
    def every_class(logits, labels):
        kept = logits[labels != -100].log_softmax(-1)
        return -kept.flatten(), kept.detach().exp().flatten()

    net, data = model(), batch()
    parameters = list(net.parameters())
    total = 0
    for i in range(N):
        values, weights = shifted(every_class)(net, reference.take(data, [i]))
        for value, weight in zip(values, weights, strict=True):
            grads = torch.autograd.grad(value, parameters, retain_graph=True)
            row = torch.cat([g.flatten() for g in grads])
            total = total + weight * torch.outer(row, row) / N
    found = Explicit(loss="causal_lm", fisher="exact").fit(net, split(data, N, 4)).fisher_
    assert dense.distance(found.to_dense(), total) <= 1e-12

    def best(logits, labels):
        kept = logits[labels != -100].log_softmax(-1)
        return -kept.amax(-1).sum()

    expected = reference.fisher(reference.gradients(net, shifted(best), data, N))
    found = Explicit(loss="causal_lm", fisher="predicted").fit(net, split(data, N, 4)).fisher_
    assert dense.distance(found.to_dense(), expected) <= 1e-12


def test_sampled_labels_are_of_the_next_token():
    """Their mean is the exact Fisher, and they depend on no batch."""
    net, data = model(), batch()
    exact = Explicit(loss="causal_lm", fisher="exact").fit(net, [data]).fisher_.to_dense()
    fitted = [
        Explicit(loss="causal_lm", fisher="mc", n_mc_samples=k, random_state=0)
        .fit(net, split(data, N, size))
        .fisher_.to_dense()
        for k, size in ((300, N), (300, 4))
    ]
    assert dense.distance(fitted[1], fitted[0]) <= 1e-12
    assert dense.distance(fitted[0], exact) <= 0.3


@pytest.mark.parametrize("method", [DataInf, EKFAC])
@pytest.mark.parametrize("fisher", KINDS)
def test_every_method_takes_every_kind(method, fisher):
    estimator = method(loss="causal_lm", fisher=fisher, random_state=0)
    net = model()
    one, other = (estimator.fit(net, split(batch(), N, size)).fisher_ for size in (N, 4))
    v = torch.randn(2, one.size, dtype=torch.float64)
    assert dense.distance(other.solve(v, 0.1), one.solve(v, 0.1)) <= 1e-9


def test_is_kept_in_files(tmp_path):
    Explicit(loss="causal_lm").fit(model(), [batch()]).save(tmp_path / "file")
    assert load(tmp_path / "file").loss == "causal_lm"


def test_errors_name_the_remedy():
    def refused(data, message, net=None):
        with pytest.raises(IFVPUsageError, match=message):
            Explicit(loss="causal_lm").fit(net or model(), [data])

    data = batch()
    inputs = {key: data[key] for key in ("input_ids", "attention_mask")}
    refused(inputs, r"without 'labels'; add the token ids as labels.*masked_fill")
    refused({**inputs, "labels": torch.zeros(N).long()}, r"labels that are token ids.*\(B, T\)")
    refused(
        {**inputs, "labels": data["labels"][:, 1:]}, r"got logits of 4 positions of 9.*\(9, 3\)"
    )
    refused({**inputs, "labels": data["labels"].double()}, "integer class targets")
    pooled = torch.nn.Sequential(torch.nn.Embedding(V, 3), torch.nn.Flatten())
    refused((data["input_ids"], data["labels"]), r"logits of every position.*\(9, 12\)", pooled)


# -- labels that are likely not what is meant ------------------------------------------------------


def heard(estimator, net, data):
    """Return what a fit warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator.fit(net, data)
    return [str(warning.message) for warning in caught]


class ClassesSecond(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = LanguageModel()

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids, attention_mask).movedim(-1, 1)


def as_tuple(data):
    return data["input_ids"], data["labels"]


@pytest.mark.parametrize("method", [Explicit, EKFAC])
@pytest.mark.parametrize("pack", [dict, as_tuple])
def test_unshifted_labels_are_doubted(method, pack):
    """Once, however many batches and passes there are."""
    data = [pack(part) for part in split(batch(), N, 4)]
    module = torch.nn.CrossEntropyLoss(reduction="sum")
    for loss, net in (("cross_entropy", model()), (module, ClassesSecond().double())):
        (warning,) = heard(method(1.0, loss=loss), net, data)
        assert "labels are the batch's own tokens" in warning
        assert "use loss='causal_lm'" in warning
    assert not heard(method(1.0, loss="causal_lm"), model(), data)


def test_labels_that_are_not_doubted():
    """Labels of one's own, and those of masked tokens of which a few were left as they were."""
    ids = batch()["input_ids"]
    own = ids.clone()
    own[-1, -1] = (own[-1, -1] + 1) % V
    few = torch.full_like(ids, -100)
    few[:, 1] = ids[:, 1]
    few[:2] = -100
    for labels in (own, few):
        assert not heard(Explicit(), model(), [(ids, labels)])
    network = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)).double()
    assert not heard(Explicit(), network, [(torch.randn(9, 5).double(), torch.arange(9) % 3)])


def test_padding_that_counts_is_doubted():
    data = batch()
    spoiled = {**data, "labels": data["input_ids"]}
    (warning,) = heard(Explicit(loss="causal_lm"), model(), split(spoiled, N, 4))
    assert "batch 0" in warning
    assert "masked_fill(attention_mask == 0, -100)" in warning
    assert not heard(Explicit(loss="causal_lm"), model(), split(data, N, 4))
    first = {**data, "attention_mask": torch.ones_like(data["attention_mask"])}
    first["attention_mask"][:, 0] = 0  # which nothing predicts
    first["labels"] = data["input_ids"]
    assert not heard(Explicit(loss="causal_lm"), model(), [first])


@pytest.mark.parametrize("padded", [True, False])
def test_an_attention_mask_for_labels(padded):
    data = batch()
    mask = data["attention_mask"] if padded else torch.ones_like(data["attention_mask"])
    with pytest.raises(IFVPUsageError, match=r"only 0 and 1.*an attention mask.*labels.*-100"):
        Explicit(loss="causal_lm").fit(model(), [(data["input_ids"], mask)])
    ids = data["input_ids"] % 2
    assert Explicit(loss="causal_lm").fit(model(), [(ids, ids)]).n_samples_seen_ == N
