"""Models of Hugging Face as users have them, tiny, built from their configs."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from fimkit import EKFAC, DataInf, Explicit, IFVPUsageError
from tests import dense, exactness, reference
from tests import kronecker_reference as kronecker
from tests.cases import split

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

N, T, V = 8, 5, 9
WIDTHS = {
    "vocab_size": V,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 5,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def _of_transformers(monkeypatch):
    """Let the reference know GPT-2's layer; nothing is looked for online."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    conv1d = transformers.pytorch_utils.Conv1D
    monkeypatch.setattr(kronecker, "Conv1D", conv1d)
    monkeypatch.setattr(kronecker, "KINDS", (*kronecker.KINDS, conv1d))


def shaken(model):
    """Return the model in float64, with no weight at one and no bias at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.double().parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.2 * noise)
    return model


def bert(**options):
    config = transformers.BertConfig(**WIDTHS, max_position_embeddings=12, num_labels=3, **options)
    return shaken(transformers.BertForSequenceClassification(config))


def roberta():
    config = transformers.RobertaConfig(
        **WIDTHS, max_position_embeddings=12, num_labels=3, pad_token_id=1
    )
    return shaken(transformers.RobertaForSequenceClassification(config))


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=4, n_layer=1, n_head=2, n_positions=6, bos_token_id=0, eos_token_id=2,
        **options,
    )  # fmt: skip
    return shaken(transformers.GPT2LMHeadModel(config))


LLAMA = {"num_key_value_heads": 1, "max_position_embeddings": 6, "head_dim": 2}


def llama(**options):
    config = transformers.LlamaConfig(**WIDTHS, **LLAMA, **options)
    return shaken(transformers.LlamaForCausalLM(config))


def mixtral():
    """Of four experts for each token."""
    config = transformers.MixtralConfig(
        **WIDTHS, **LLAMA, num_local_experts=4, num_experts_per_tok=1
    )
    config._experts_implementation = "eager"  # the grouped product takes no float64
    return shaken(transformers.MixtralForCausalLM(config))


def vit():
    config = transformers.ViTConfig(
        image_size=6, patch_size=3, num_channels=1, num_labels=3,
        **{k: v for k, v in WIDTHS.items() if not k.endswith("_id") and k != "vocab_size"},
    )  # fmt: skip
    return shaken(transformers.ViTForImageClassification(config))


def resnet():
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=3, hidden_sizes=[3, 4], depths=[1, 1], layer_type="basic",
        num_labels=3,
    )  # fmt: skip
    return shaken(transformers.ResNetForImageClassification(config))


def lora(base, targets, *, trained=True, **options):
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, **options))
    return shaken(model) if trained else model.double()


def checkpointed(model, *, reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the method has another name in newer versions
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


def tokens(n=N, length=T, padded=True):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, V, (n, length), generator=generator)
    lengths = torch.randint(2, length + 1, (n,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long() if padded else torch.ones_like(ids)
    return {"input_ids": ids * mask + 1 - mask, "attention_mask": mask}


def classified(n=N):
    labels = torch.randint(3, (n,), generator=torch.Generator().manual_seed(3))
    return {**tokens(n), "labels": labels}


def continued(n=N):
    batch = tokens(n)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1, :2] = -100  # a prompt
    return {**batch, "labels": labels}


def images(size):
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(N, 1, size, size, generator=generator, dtype=torch.float64),
        "labels": torch.randint(3, (N,), generator=generator),
    }


def of_next_tokens(model, example):
    logits = reference.outputs(model, example)[0, :-1].log_softmax(-1)
    labels = example["labels"][0, 1:]
    counted = labels != -100
    return -logits[counted].gather(1, labels[counted][:, None]).sum()


CLASSIFIERS = {
    "BERT": bert,
    "BERT, attention written out": partial(bert, attn_implementation="eager"),
    "RoBERTa": roberta,
    "BERT with LoRA": lambda: lora(bert(), ["query", "value"], task_type="SEQ_CLS"),
}
CAUSAL = {
    "GPT-2": gpt2,
    "GPT-2, attention written out": partial(gpt2, attn_implementation="eager"),
    "GPT-2, untied": partial(gpt2, tie_word_embeddings=False),
    "Llama": llama,
    "Llama, tied": partial(llama, tie_word_embeddings=True),
    "Mixtral": mixtral,
    "GPT-2 with LoRA, B zero": lambda: lora(gpt2(), ["c_attn"], trained=False, fan_in_fan_out=True),
    "GPT-2 with LoRA": lambda: lora(gpt2(), ["c_attn"], fan_in_fan_out=True),
    "Llama with LoRA": lambda: lora(llama(), ["q_proj", "v_proj"]),
    "Llama with DoRA": lambda: lora(llama(), ["q_proj"], use_dora=True),
    "GPT-2, checkpointed": lambda: checkpointed(gpt2(), reentrant=False),
    "GPT-2, checkpointed reentrantly": lambda: checkpointed(gpt2(), reentrant=True),
    "Llama with LoRA, checkpointed": lambda: checkpointed(
        lora(llama(), ["q_proj", "v_proj"]), reentrant=False
    ),
}
# What no rule covers, by parts of names.
SLOW = {"Mixtral": (".mlp.gate", ".mlp.experts"), "Llama with DoRA": ("magnitude",)}


def check_coverage(coverage, slow=()):
    """Check that all but ``slow`` is captured."""
    for name, how in coverage.items():
        captured = not any(part in name for part in slow)
        assert how.startswith("captured") == captured, (name, how)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_sequence_classification(name):
    """Masks select the positions of the factors in layers that see tokens."""
    model, loss = CLASSIFIERS[name](), reference.negative_log_likelihood
    check_coverage(exactness.check(model, classified(), loss))


@pytest.mark.parametrize("classes", [T, 3])
def test_token_classification(classes):
    """Also with as many classes as tokens."""
    config = transformers.BertConfig(**WIDTHS, max_position_embeddings=12, num_labels=classes)
    model = shaken(transformers.BertForTokenClassification(config))
    batch = tokens()
    labels = torch.randint(classes, (N, T), generator=torch.Generator().manual_seed(3))
    batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
    check_coverage(exactness.check(model, batch, reference.negative_log_likelihood))


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_language_models(name):
    coverage = exactness.check(CAUSAL[name](), continued(), of_next_tokens, loss="causal_lm")
    check_coverage(coverage, SLOW.get(name, ()))


@pytest.mark.parametrize(("build", "size"), [(vit, 6), (resnet, 16)], ids=["ViT", "ResNet"])
def test_images(build, size):
    check_coverage(exactness.check(build(), images(size), reference.negative_log_likelihood))


@pytest.mark.parametrize("method", [Explicit, DataInf, EKFAC])
@pytest.mark.parametrize("family", ["BERT", "GPT-2", "Llama"])
def test_padding_changes_nothing(family, method):
    """Sequences of one length, with and without padding behind them."""
    model = {**CLASSIFIERS, **CAUSAL}[family]()
    loss, build = ("cross_entropy", classified) if family == "BERT" else ("causal_lm", continued)
    batch = {key: value[:, :4] if value.ndim > 1 else value for key, value in build().items()}
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    fill = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    padded = {
        key: nn.functional.pad(value, (0, 2), value=fill[key]) if value.ndim > 1 else value
        for key, value in batch.items()
    }
    v = reference.gradients(
        model, of_next_tokens if family != "BERT" else reference.negative_log_likelihood, batch, N
    )
    one, other = (
        method(0.01, loss=loss).fit(model, split(data, N, 3)).transform(v)
        for data in (batch, padded)
    )
    assert dense.distance(other, one) <= 1e-9


# -- wrapped, in part, in less precision -----------------------------------------------------------


def test_compiled():
    model = gpt2()
    wrapped = torch.compile(model, backend="eager")
    exactness.check(model, continued(), of_next_tokens, loss="causal_lm", fitted_to=wrapped)
    torch.compiler.reset()


@pytest.mark.usefixtures("process_group")
def test_distributed():
    model = gpt2()
    wrapped = nn.parallel.DistributedDataParallel(model)
    exactness.check(model, continued(), of_next_tokens, loss="causal_lm", fitted_to=wrapped)


def test_frozen_parts():
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].attention.requires_grad_(False)
    coverage = exactness.check(model, classified(), reference.negative_log_likelihood)
    assert not any("embeddings" in name or "attention" in name for name in coverage)
    assert all(how.startswith("captured") for how in coverage.values())


@pytest.mark.parametrize("method", [Explicit, DataInf, EKFAC])
@pytest.mark.parametrize("build", [gpt2, llama], ids=["GPT-2", "Llama"])
def test_autocast(build, method):
    """The model runs in bfloat16, and all that follows does not."""
    model, batch = build(), continued()
    v = reference.gradients(model, of_next_tokens, batch, N)
    expected = method(1.0, loss="causal_lm").fit(model, split(batch, N, 3)).transform(v)
    with torch.autocast("cpu", torch.bfloat16):
        fitted = method(1.0, loss="causal_lm").fit(model.float(), split(batch, N, 3))
    found = fitted.transform(v.float())
    assert 1e-5 < dense.distance(found.double(), expected) < 0.1


def test_the_mean_that_models_compute_is_refused():
    """``out.loss`` is a mean over the batch, and over all of its tokens."""

    def loss(model, batch):
        return model(**batch).loss

    with pytest.raises(IFVPUsageError, match=r"shape \(\).*expected one loss per example"):
        Explicit(loss=loss).fit(gpt2(), [continued()])


def test_experts_of_which_a_batch_meets_none():
    """The first batches are of few tokens, so that not every expert is met from the start."""
    model, batch = mixtral(), continued()
    expected = reference.fisher(reference.gradients(model, of_next_tokens, batch, N))
    found = Explicit(loss="causal_lm").fit(model, split(batch, N, 1, 7)).fisher_.to_dense()
    assert dense.distance(found, expected) <= 1e-9
