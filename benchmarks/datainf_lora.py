"""DataInf against the exact damped inverse for LoRA's parameters, at ranks 1, 2, 4 and 8.

The setting of the paper (Kwon et al., "DataInf", ICLR 2024, section 4) made small, and offline. A
text is 12 to 24 tokens out of 300, padded. Its class says which of two families of 20 tokens
occurs more, by one to six tokens; the rest are neither's. A fifth of the 400 training labels are
flipped; the 200 test labels are true. The model is a classifier of RoBERTa's shape
(``transformers``: 2 layers, 4 heads, width 64), first trained whole on other texts and another
question, whether the first family makes up more than a quarter of the text. Then, with a new head,
it is fine-tuned to the task through ``peft``, which adds LoRA to every query and value. As in the
paper, alpha is the rank, dropout 0.05, and peft trains the head beside the adapters. The learning
rate and the epochs are, of six pairs, those whose worst training came highest in accuracy on the
given training labels, with seeds that take no part below.

Gradients are of the fine-tuned model in evaluation mode, for what the paper's code takes: every A
and B, and of the head the weight of its last layer only (``parameters=``). Each of them is a block;
its lambda is 0.1 * trace(F_b) / p_b, as "auto" of ``Explicit(blocks="layer")`` has it, and all
methods solve with the same lambdas.

Printed per rank, as means and standard deviations over ``--seeds`` runs, each with its own texts,
flipped labels, head and adapters, on one backbone:

Pearson, Spearman   correlation, over training examples, of the influence on the mean test loss
                    with that of ``Explicit``, the paper's exact influence
harm                area under the ROC curve by which minus that influence tells flipped labels
self                the same by the self-influence g' M g of each training example

``gradient`` is the plain product of gradients, M = I; its self-influence is the squared norm. The
paper's Pearson correlation on GLUE-MRPC at rank 1, with RoBERTa-large, is 0.64, and falls with
rank; it is printed for context only, since model, data and scale are others.

Run from the repository root, with the extra ``hf`` installed::

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.datainf_lora --seeds 5
"""

import argparse
import copy
import math
import statistics
import time
import warnings
from typing import NamedTuple

import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from benchmarks.common import installed, machine
from fimkit import EKFAC, DataInf, Diagonal, Explicit, ModelData

PACKAGES = ("transformers", "peft")
BOS, PAD, EOS, FIRST = 0, 1, 2, 4  # RoBERTa's special tokens, and the first that is none
FAMILY, VOCABULARY = 20, 300
SHORTEST, LONGEST = 12, 24
PARAMETERS = ["*lora_A*", "*lora_B*", "*modules_to_save*out_proj.weight"]
BASE_SEED = 10**6  # of the one backbone; runs are seeded from 0 upwards
PAPER = {1: 0.64}  # Pearson correlation on GLUE-MRPC, by rank


class Task(NamedTuple):
    """Training and test texts as lists of examples, and which training labels are flipped."""

    train: list
    test: list
    flipped: torch.Tensor


class Measures(NamedTuple):
    """What is printed of a method."""

    pearson: float
    spearman: float
    harm: float
    own: float


def make_text(generator):
    """Return one example, with its true label."""

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    length, label, margin = draw(SHORTEST, LONGEST + 1), draw(0, 2), draw(1, 7)
    fewer = draw(0, (length - margin) // 2 + 1)
    counts = [fewer, fewer]
    counts[label] += margin
    families = [torch.randint(FAMILY, (count,), generator=generator) for count in counts]
    first_neutral = FIRST + 2 * FAMILY
    rest = torch.randint(first_neutral, VOCABULARY, (length - sum(counts),), generator=generator)
    words = torch.cat([FIRST + families[0], FIRST + FAMILY + families[1], rest])
    words = words[torch.randperm(length, generator=generator)]
    ids = torch.full((LONGEST + 2,), PAD)
    ids[: length + 2] = torch.cat([torch.tensor([BOS]), words, torch.tensor([EOS])])
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": torch.tensor(label),
    }


def make_task(n_train, n_test, seed):
    """Return texts of which a fifth of the training labels are flipped."""
    generator = torch.Generator().manual_seed(seed)
    train = [make_text(generator) for _ in range(n_train)]
    test = [make_text(generator) for _ in range(n_test)]
    flipped = torch.zeros(n_train, dtype=torch.bool)
    flipped[torch.randperm(n_train, generator=generator)[: n_train // 5]] = True
    for example, flip in zip(train, flipped, strict=True):
        example["labels"] = example["labels"] ^ flip.long()
    return Task(train, test, flipped)


def pretrained(n=2000, epochs=10):
    """Return a classifier of RoBERTa's shape, trained on other texts and another question."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LONGEST + 2 + PAD + 1,
        num_labels=2,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    generator = torch.Generator().manual_seed(BASE_SEED)
    texts = [make_text(generator) for _ in range(n)]
    for text in texts:
        words = text["input_ids"][text["input_ids"] >= FIRST]
        text["labels"] = (4 * (words < FIRST + FAMILY).sum() > len(words)).long()
    torch.manual_seed(BASE_SEED)
    model = RobertaForSequenceClassification(config)
    train(model, texts, epochs, 1e-3)
    return model


def adapted(model, rank):
    """Return a copy of a model with a new head, and LoRA in its queries and values."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query", "value"],
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.05,
    )
    model = copy.deepcopy(model)
    model.classifier = type(model)(model.config).classifier
    with warnings.catch_warnings():  # peft asks transformers by a name that is to go
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, lora)


def train(model, examples, epochs, rate):
    """Train what requires grad."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(epochs):
        for batch in DataLoader(examples, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    model.eval()


def accuracy(model, examples):
    """Return the share of examples that are predicted as labelled."""
    batch = next(iter(DataLoader(examples, batch_size=len(examples))))
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(1)
    return (predicted == batch["labels"]).double().mean().item()


def scores_of(model, task):
    """Return each method's influence on the mean test loss and self-influence, both ``(n,)``."""
    train = ModelData(model, task.train)
    explicit = Explicit(blocks="layer", parameters=PARAMETERS).fit(train)
    lambdas = explicit.regularization_
    datainf = DataInf(lambdas, parameters=PARAMETERS).fit(train)
    ekfac = EKFAC(lambdas, parameters=PARAMETERS).fit(train)
    sizes = torch.tensor([math.prod(shape) for shape in explicit.parameter_shapes_.values()])
    diagonal = Diagonal(parameters=PARAMETERS).fit(train).fisher_.diagonal().double()
    diagonal += torch.tensor(list(lambdas.values())).double().repeat_interleave(sizes)
    methods = {
        "explicit": explicit.transform,
        "datainf": datainf.transform,
        "ekfac": ekfac.transform,
        "diagonal": lambda vectors: vectors / diagonal,
        "gradient": lambda vectors: vectors,
    }
    gradients, queries = (
        torch.cat([rows.dense(slice(None), torch.float64) for rows in explicit.gradients(data)])
        for data in (train, ModelData(model, task.test))
    )
    return {
        name: (
            (gradients @ apply(queries.mean(0))).numpy(),
            (gradients * apply(gradients)).sum(1).numpy(),
        )
        for name, apply in methods.items()
    }


def measure(base, rank, seed, args):
    """Return the fine-tuned model's accuracies and every method's measures."""
    task = make_task(args.train, args.test, seed)
    torch.manual_seed(seed)
    model = adapted(base, rank)
    train(model, task.train, args.epochs, args.rate)
    scores = scores_of(model, task)
    exact, _ = scores["explicit"]
    measures = {
        method: Measures(
            pearsonr(total, exact).statistic,
            spearmanr(total, exact).statistic,
            roc_auc_score(task.flipped, -total),
            roc_auc_score(task.flipped, own),
        )
        for method, (total, own) in scores.items()
    }
    return accuracy(model, task.train), accuracy(model, task.test), measures


def spread(values):
    """Return mean and standard deviation as text."""
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):8.3f}{deviation}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=2e-3, help="of learning")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    if len(installed(PACKAGES)) < len(PACKAGES):
        return
    print(f"n = {args.train} with a fifth of labels flipped, {args.test} test texts")
    print(f"means (standard deviations) over {args.seeds} seeds")
    base = pretrained()
    for rank in args.ranks:
        start = time.perf_counter()
        runs = [measure(base, rank, seed, args) for seed in range(args.seeds)]
        seconds = time.perf_counter() - start
        given, test, measures = zip(*runs, strict=True)
        print(
            f"\nrank {rank}: accuracy on given training labels {spread(given).strip()}, on test "
            f"labels {spread(test).strip()}; {seconds:.0f} s"
        )
        print(f"{'':12}{'Pearson':>16}{'Spearman':>16}{'harm':>16}{'self':>16}")
        for method in measures[0]:
            columns = zip(*(run[method] for run in measures), strict=True)
            print(f"{method:12}" + "".join(f"{spread(column):>16}" for column in columns))
        if rank in PAPER:
            print(f"{'paper':12}{PAPER[rank]:8.2f}          DataInf on GLUE-MRPC, RoBERTa-large")


if __name__ == "__main__":
    main()
