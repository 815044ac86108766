"""Fits of several processes, each with its own shard, against one process with all examples."""

from __future__ import annotations

import pytest
import torch

import fimkit
from fimkit import EKFAC, KFAC, DataInf, Diagonal, Explicit
from tests import ranks


@pytest.fixture(scope="module")
def alone():
    """What one process finds, without a group."""
    torch.set_num_threads(1)
    found = {}
    for name, (kind, make) in ranks.CASES.items():
        model, x, y = ranks.problem(kind)
        step = 1 if kind == "branching" else 4
        estimator = make().fit(model, ranks.batches(x, y, range(ranks.N), step))
        found[name] = ranks.results(estimator, model, x, y)
    return found


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def together(request, tmp_path_factory):
    """What every rank of a group finds, in all cases."""
    return ranks.start(ranks.fit_cases, request.param, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ranks.CASES)
def test_ranks_fit_what_one_process_fits(alone, together, name):
    for rank, found in enumerate(together):
        assert isinstance(found, dict), f"rank {rank}: {found}"
        assert found[name]["coverage"] == alone[name]["coverage"]
        for key, values in found[name].items():
            if key == "coverage":
                continue
            expected = alone[name][key]
            assert values.shape == expected.shape
            distance = float((values - expected).norm() / expected.norm())
            assert distance < 1e-10, f"rank {rank}, {key}: {distance}"


# -- shards and faults -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def found(folder):
    """What two ranks find of shards and faults."""
    results = ranks.start(ranks.shards_and_faults, 2, str(folder), folder=folder)
    for rank, result in enumerate(results):
        assert isinstance(result, dict), f"rank {rank}: {result}"
    return results


@pytest.fixture(scope="module")
def whole():
    model, x, y = ranks.problem("mlp")
    size = sum(p.numel() for p in model.parameters())
    return model, [(x, y)], torch.linspace(-1, 1, size, dtype=torch.float64)


def expected(estimator, whole):
    model, batches, v = whole
    return estimator.fit(model, batches).transform(v)


def close(values, reference):
    return float((values - reference).norm() / reference.norm()) < 1e-10


@pytest.mark.parametrize("order", ["sampler", "shuffled"])
@pytest.mark.parametrize("method", [EKFAC, DataInf])
def test_a_distributed_sampler_counts_each_example_once(found, whole, order, method):
    reference = expected(method(0.1), whole)
    for result in found:
        n, ifvp = result[order, method.__name__]
        assert n == ranks.N
        assert close(ifvp, reference)


def test_what_drop_last_drops_is_dropped(found):
    assert [result["drop_last"] for result in found] == [ranks.N - 1] * 2


def test_sampled_labels_do_not_depend_on_the_number_of_ranks(found, whole):
    reference = expected(Diagonal(0.1, fisher="mc", random_state=5), whole)
    for result in found:
        assert close(result["mc, sampler"], reference)
        assert close(result["mc, ModelData"], reference)


def test_sampled_labels_of_separate_shards_do_not_coincide(found, whole):
    model, [(x, y)], v = whole
    diagonal = Diagonal(0.1, fisher="mc", random_state=5)
    coinciding = diagonal.fit(model, [(x[:4], y[:4])]).transform(v)
    assert torch.equal(found[0]["mc, lists"], found[1]["mc, lists"])
    assert not close(found[0]["mc, lists"], coinciding)


def test_without_a_seed_all_ranks_take_one(found):
    assert torch.equal(found[0]["mc, no seed"], found[1]["mc, no seed"])


def test_rows_that_stay_on_their_ranks_are_saved_as_one_file(found, folder, whole):
    _, _, v = whole
    datainf = fimkit.load(folder / "datainf.fimkit")
    dual = fimkit.load(folder / "dual.fimkit")
    assert close(datainf.transform(v), expected(DataInf(0.1, blocks="parameter"), whole))
    assert close(dual.transform(v), expected(Explicit(0.1, solver="dual", fisher="exact"), whole))
    for result in found:
        assert close(result["datainf"], datainf.transform(v))
        assert close(result["dual"], dual.transform(v))
        assert close(result["stored"], expected(DataInf(0.1), whole))


@pytest.mark.parametrize("method", ["other vectors", "other vectors, dual"])
@pytest.mark.parametrize(
    ("difference", "told"),
    [
        ("longer", "rank 1 gave another vector 0 of 1"),
        ("turned", "rank 1 gave another vector 0 of 1"),
        ("permuted", "rank 1 gave another vector 0 of 1"),
        ("one of three", "rank 1 gave another vector 0 of 3"),
        ("one number", "rank 1 gave another vector 0 of 1"),
        ("more", "rank 1 gave 2 vectors, rank 0 1"),
    ],
)
def test_ranks_must_give_the_same_vectors(found, method, difference, told):
    for result in found:
        assert told in result[method, difference]
        assert "fimkit.load(path)" in result[method, difference]


def test_ranks_must_give_the_same_data(found, whole):
    model, [(x, y)], _ = whole
    data = fimkit.ModelData(model, (x, y))
    reference = torch.from_numpy(DataInf(0.1, blocks="parameter").fit(data).transform(data))
    for result in found:
        assert close(torch.from_numpy(result["same data"]), reference)
        assert "rank 1 gave another vector 0 of 8" in result["other data"]
        assert "For what is a rank's own, call save(path)" in result["own data"]


def test_rounding_is_no_difference_and_sharded_rows_are_not_pickled(found):
    for result in found:
        assert close(result["rounded"], result["datainf"])
        assert "save(path) on all ranks" in result["pickled"]


def test_a_wrapped_model_is_fitted_and_its_gradients_left_alone(found, whole):
    for result in found:
        assert close(result["ddp"], expected(EKFAC(0.1), whole))
        fired, gradients = result["ddp, gradients"]
        assert fired == 0
        assert all(gradient is None for gradient in gradients)


def test_a_part_of_a_model_may_be_wrapped(found, whole):
    _, [(x, y)], _ = whole
    model = ranks.Inner().double().eval()
    reference = ranks.results(EKFAC(0.1).fit(model, [(x, y)]), model, x, y)
    del reference["coverage"]  # its names are without "module"
    for result in found:
        for key, values in reference.items():
            assert close(result["inner"][key], values)
            assert close(result["wrapped inside"][key], values)
        assert result["wrapped inside, unchanged"]
        assert result["wrapped inside, trains"]


@pytest.mark.parametrize("method", [EKFAC, Diagonal, lambda: Explicit(solver="primal")])
def test_ranks_choose_the_regularization_of_one_process(found, whole, method):
    model, [(x, y)], v = whole
    grid = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    data = fimkit.ModelData(model, (x, y))
    folds = [split(range(ranks.N)) for split in ranks.FOLDS]
    search = fimkit.RegularizationCV(method(), grid, cv=folds).fit(data)
    means = torch.from_numpy(search.cv_results_["mean_test_score"])
    for result in found:
        best, scores, ifvp = result["search", type(search.estimator).__name__]
        assert best == search.regularization_
        # Means over folds, of means over each fold's examples.
        assert close(scores, means)
        assert close(ifvp, search.transform(v))


@pytest.mark.parametrize(
    ("search", "cause"),
    [
        ("search, rows", "DataInf leaves its rows on the ranks that computed them"),
        ("search, folds", "ranks differ in the number of folds: 2 on rank 0, 3 on rank 1"),
        ("search, grid", "ranks differ in regularizations: [0.1] on rank 0, [1.1] on rank 1"),
        ("search, fault", "n_splits=9 greater than the number of samples"),
    ],
)
def test_a_search_that_ranks_cannot_make_together_is_refused(found, search, cause):
    for result in found:
        assert cause in result[search]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("empty", "no batches"),
        ("nan", "batch 0: NaN"),
        ("loader", "the disk is gone"),
        ("invalid", "'regularization' parameter"),
        ("swapped", "model must be a torch.nn.Module"),
    ],
)
def test_a_rank_that_fails_ends_the_others_naming_itself(found, fault, cause):
    assert cause in found[1][fault]
    assert "on rank 1 of 2" in found[1][fault]
    assert found[0][fault].startswith("RankError: rank 1 failed: ")
    assert cause in found[0][fault]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("settings", "ranks differ in fisher: empirical on rank 0, exact on rank 1"),
        ("weights", "ranks differ in the model's '0.bias'"),
        ("shapes", "ranks differ in the model's '0.weight'"),
        ("activation", "ranks differ in the model's layer '1': Tanh() on rank 0, ReLU() on rank 1"),
        (
            "slope",
            "LeakyReLU(negative_slope=0.1) on rank 0, LeakyReLU(negative_slope=0.2) on rank 1",
        ),
        ("function", "layer '1': Applied(, function=_VariableFunctionsClass.tanh) on rank 0"),
        ("buffer", "ranks differ in the model's '1.scale'"),
        ("loss option", "ranks differ in loss.label_smoothing: 0.0 on rank 0, 0.1 on rank 1"),
        ("loss weights", "ranks differ in loss.weight: absent on rank 0"),
        ("loss attribute", "ranks differ in loss.temperature: 1.0 on rank 0, 2.0 on rank 1"),
        ("loss argument", "ranks differ in the arguments of loss"),
        ("one shard", "ranks 0 and 1 both draw shard 0 of 2"),
        ("other seeds", "ranks 0 and 1 have different seed: 0 and 1"),
        ("other epochs", "ranks 0 and 1 have different epoch: 0 and 1"),
        ("other lengths", "ranks 0 and 1 have different len(dataset): 20 and 21"),
        ("more replicas", "shares its dataset out over 4 ranks, and 2 fit together"),
        ("one drops", "ranks 0 and 1 have different drop_last: True and False"),
        ("one samples", "rank 0 draws by a DistributedSampler, and rank 1 by none"),
    ],
)
def test_ranks_that_fit_different_things_are_refused(found, fault, cause):
    for result in found:
        assert cause in result[fault]


def test_a_seed_that_is_not_used_may_differ(found, whole):
    for result in found:
        assert "different shuffle: True and False" in result["one shuffles"]
        assert close(result["seed unused"], expected(EKFAC(0.1), whole))


def test_ranks_fit_again_after_faults(found, whole):
    for result in found:
        assert close(result["afterwards"], expected(EKFAC(0.1), whole))


def test_a_rank_that_failed_long_ago_is_named(tmp_path):
    late, failed = ranks.start(ranks.one_fails_early, 2, folder=tmp_path, timeout=2.0)
    assert "IFVPUsageError: batch 0: NaN" in failed
    assert late.startswith("RankError: rank 1 failed: IFVPUsageError: batch 0: NaN")


def test_a_rank_that_dies_ends_the_others(tmp_path):
    survivor, dead = ranks.start(ranks.one_dies, 2, folder=tmp_path)
    assert dead is None
    message, seconds = survivor
    assert "rank 0 lost the other ranks" in message
    assert seconds < 60


# -- models that are divided over the ranks --------------------------------------------------------


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """What two ranks find of divided models."""
    results = ranks.start(ranks.fully_sharded, 2, folder=tmp_path_factory.mktemp("divided"))
    for rank, result in enumerate(results):
        assert isinstance(result, dict), f"rank {rank}: {result}"
    return results


@pytest.mark.parametrize("name", ranks.SHARDED_CASES)
def test_a_divided_model_is_fitted_and_divided_again(divided, name):
    kind, make = ranks.SHARDED_CASES[name]
    model, x, y = ranks.problem(kind)
    step = 1 if kind == "branching" else 4
    estimator = make().fit(model, ranks.batches(x, y, range(ranks.N), step))
    reference = ranks.results(estimator, model, x, y)
    for result in divided:
        assert result[name]["coverage"] == reference["coverage"]
        for key, values in result[name].items():
            assert key == "coverage" or close(values, reference[key]), key
        assert result[name, "unchanged"]
        assert result[name, "trains"]


def test_gradients_of_a_divided_model(divided, whole):
    model, [(x, y)], v = whole
    ekfac = EKFAC(0.1).fit(model, [(x, y)])
    for rank, result in enumerate(divided):
        data = fimkit.ModelData(model, (x, y), indices=list(ranks.shard(rank, 2)))
        assert close(result["transform"], torch.from_numpy(ekfac.transform(data)))
        scores = fimkit.influence.pairwise_scores(ekfac, data, data)
        assert close(result["influence"], torch.from_numpy(scores))
        assert close(result["data, fitted"], expected(KFAC(0.1), (model, [(x, y)], v * 0 + 1)))
        assert result["held"] == [False] * 4
        assert result["rest"] == (len(data) - 3, True)


def test_a_model_that_its_user_gathered_stays_so(divided, whole):
    model, data, v = whole
    for result in divided:
        assert close(result["gathered"], expected(EKFAC(0.1), (model, data, v * 0 + 1)))
        assert result["stays"]


def test_a_fit_that_fails_divides_the_model_again(divided):
    assert divided[0]["nan"].startswith("RankError: rank 1 failed: ")
    assert "batch 0: NaN" in divided[1]["nan"]
    for result in divided:
        assert "mat1 and mat2" in result["raises"]
        assert "ranks differ in what fully_shard divides" in result["one divides"]
        assert result["as before"]


def test_other_divisions_are_refused_with_a_remedy_that_works(divided, whole):
    model, data, v = whole
    reference = expected(EKFAC(0.1), (model, data, v * 0 + 1))
    for result in divided:
        assert "'0.weight' is torch.float64, and fully_shard(mp_policy=...)" in result["mixed"]
        assert result["mixed, as before"]
        assert "the model is a FullyShardedDataParallel" in result["flattened"]
        assert "torch.distributed.fsdp.fully_shard" in result["flattened"]
        assert "parameter '0.weight' is a DTensor" in result["parallel"]
        for name in ("mixed", "parallel"):
            assert "get_model_state_dict" in result[name]
            assert close(result[name, "copied"], reference)
