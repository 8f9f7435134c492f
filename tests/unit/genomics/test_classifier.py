"""The classifier: what it pools, and that what fills up a batch has no effect."""

import pytest
import torch

from titans_pretrain.config import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.genomics.config import ClassifyConfig, HeadConfig, LabelledConfig
from titans_pretrain.genomics.model import Classifier
from titans_pretrain.models import build_model


def classifier(variant: str = "lmm", **head) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(
        variant=variant, dim=16, layers=2, heads=2, vocab_size=8, window=6, persistent_tokens=2, ffn_dim=32,
        memory=MemoryConfig(heads=2, expansion=1, chunk_size=4), mac=MacConfig(segment=8),
    )  # fmt: skip
    return Classifier(build_model(config), 3, HeadConfig(**head)).eval()


SLOW = [
    pytest.param(*case, marks=pytest.mark.slow) for case in (("mag", "last"), ("mal", "mean"), ("transformer", "last"))
]


@pytest.mark.parametrize(("variant", "pooling"), [("lmm", "mean"), ("lmm", "last"), ("mac", "mean"), *SLOW])
def test_a_sequence_in_a_batch_is_classified_as_alone(variant, pooling):
    model = classifier(variant, pooling=pooling)
    tokens, lengths = torch.randint(5, (4, 13)), torch.tensor([13, 1, 7, 8])
    for i, n in enumerate(lengths):
        tokens[i, n:] = 7
    together = model(tokens, lengths)
    for i, n in enumerate(lengths):
        hidden = model.backbone(tokens[i : i + 1, :n], output_hidden_states=True).hidden_states[-1][0]
        pooled = sum(hidden) / len(hidden) if pooling == "mean" else hidden[-1]
        expected = pooled @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(together[i], expected, rtol=1e-4, atol=1e-5)


def test_a_head_alone_leaves_the_model_as_it_is():
    model = classifier(init_from="run", trained="head")
    model(torch.randint(5, (2, 9)), torch.tensor([9, 4])).sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.head.weight.grad is not None
    whole = classifier()
    whole(torch.randint(5, (2, 9)), torch.tensor([9, 4])).square().sum().backward()
    assert all(p.grad is not None for p in whole.parameters())


def test_dropout_is_of_training_alone():
    model, given = classifier(dropout=0.5), (torch.randint(5, (2, 9)), torch.tensor([9, 4]))
    assert torch.equal(model(*given), model(*given))
    model.train()
    assert not torch.equal(model(*given), model(*given))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LabelledConfig(validation=0.0), r"data\.validation must lie in \(0, 1\)"),
        (lambda: LabelledConfig(max_length=0), r"data\.max_length must be 1 or more"),
        (lambda: HeadConfig(trained="head"), r"head\.trained=head needs a pretrained model"),
        (lambda: HeadConfig(dropout=1.0), r"head\.dropout must lie in \[0, 1\)"),
        (lambda: HeadConfig(pooling="max"), r"head\.pooling = 'max': must be mean or last"),
        (lambda: ClassifyConfig(train=3), r"train = 3"),
    ],
)
def test_settings_that_do_not_fit(make, told):
    with pytest.raises(ValueError, match=told):
        make()
