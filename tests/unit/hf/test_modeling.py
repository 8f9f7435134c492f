"""The Hugging Face wrapper: cached decoding, padding, beams, kept caches, loss; against the model itself."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from titans_pretrain.config.model import VARIANTS
from titans_pretrain.hf import modeling_titans
from titans_pretrain.hf.cache_titans import TitansCache
from titans_pretrain.hf.configuration_titans import CACHE_NAMES, TitansConfig
from titans_pretrain.hf.modeling_titans import CACHE_NAME, TitansForCausalLM
from titans_pretrain.models import build_model

# What the library says of its own arguments: this model must give no cause. A user who says past_key_values to generate() does.
pytestmark = [
    pytest.mark.filterwarnings("error::FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
VOCAB, PAD = 40, 3
EXACT = {"rtol": 1e-10, "atol": 1e-10}
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
DECODING = {
    "padded": (True, {}),
    "sampling": (False, {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2}),
    "beams": (False, {"num_beams": 3}),
    "padded-beams": (True, {"num_beams": 3}),
}


def build(variant="mag", **changes):
    """A tiny float64 model: chunks of 4, segments of 8, a window of 6; its weights large enough for peaked logits."""
    torch.manual_seed(0)
    config = TitansConfig(
        **{
            "variant": variant, "dim": 16, "layers": 2, "heads": 2, "vocab_size": VOCAB, "window": 6, "persistent_tokens": 2,
            "memory": {"heads": 2, "chunk_size": 4}, "mac": {"segment": 8}, **changes,
        }
    )  # fmt: skip
    model = TitansForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model


def native(model):
    """The model as this package trains it, with the same parameters."""
    core = build_model(model.config.model_config()).double().eval()
    state = {name.removeprefix("model."): x for name, x in model.state_dict().items()}
    core.load_state_dict({name: state[name] for name in core.state_dict()})
    return core


def tokens(*shape, seed=1):
    return torch.randint(PAD + 1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows, side="left"):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", [1, 3, 4, 6, 7, 8, 9, 16, 21])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(variant, prompt):
    model, ids = build(variant), tokens(2, 26)
    cache = TitansCache()
    logits = [model(ids[:, :prompt], past_key_values=cache).logits]
    for t in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    assert cache.get_seq_length() == ids.shape[1]
    assert_close(torch.cat(logits, 1), native(model)(ids).logits, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_is_greedy_search_over_full_forwards(variant):
    model, ids = build(variant), tokens(2, 7)
    out = model.generate(ids, **GREEDY)
    core = native(model)
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            ids = torch.cat((ids, core(ids).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(out, ids)
    assert len(out.unique()) > 4  # a model that repeats one token would hide much


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_left_padded_batch_generates_as_single_rows(variant):
    model = build(variant)
    rows = [tokens(n, seed=n) for n in (5, 11, 2, 16)]
    ids, mask = padded(rows)
    out = model.generate(ids, attention_mask=mask, **GREEDY)
    for i, row in enumerate(rows):
        assert torch.equal(out[i, ids.shape[1] :], model.generate(row[None], **GREEDY)[0, len(row) :])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_not_read(side):
    model = build()
    rows = [tokens(n, seed=n) for n in (5, 11, 2)]
    ids, mask = padded(rows, side)
    out = model(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        assert_close(out.logits[i, mask[i].bool()], alone, **EXACT)
        # padding is not read: before it nothing, behind the tokens what the last of them said
        assert_close(
            out.logits[i, ~mask[i].bool()], (alone[-1] * (side == "right")).expand(ids.shape[1] - len(row), -1), **EXACT
        )
    other = ids.masked_fill(mask == 0, 17)
    assert torch.equal(model(other, attention_mask=mask).logits, out.logits)
    last = model(ids, attention_mask=mask, logits_to_keep=1).logits
    assert_close(last, out.logits[:, -1:], **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("decoding", DECODING)
def test_generate_with_the_cache_equals_without(variant, decoding):
    pad, changes = DECODING[decoding]
    model = build(variant)
    ids, mask = padded([tokens(9, seed=1), tokens(6 if pad else 9, seed=2)])
    options = {**GREEDY, "max_new_tokens": 8, "min_new_tokens": 8, "attention_mask": mask}
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outs.append(model.generate(ids, use_cache=use_cache, **{**options, **changes}))
    assert torch.equal(*outs)
    if changes and variant == "mag":  # elsewhere the beams may end where greedy search does
        assert not torch.equal(outs[0][:2], model.generate(ids, **options))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_by_either_of_its_names(name):
    model, ids = build(), tokens(2, 9)
    cache = TitansCache()
    with torch.no_grad():
        first = model(ids[:, :5], **{name: cache})
        assert first[CACHE_NAME] is cache  # what generate() hands to the next call
        assert_close(model(ids[:, 5:], **{name: cache}).logits, model(ids).logits[:, 5:], **EXACT)
    assert set(first) - set(model.config.keys_to_ignore_at_inference) == {"logits"}  # what a Trainer gathers
    cache = TitansCache()
    said = model.generate(ids, **{name: cache}, **GREEDY)
    assert torch.equal(said, model.generate(ids, **GREEDY))
    assert cache.get_seq_length() == said.shape[1] - 1
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=TitansCache(), past_key_values=cache)


@pytest.mark.parametrize(
    "new_name, message", [("context", "takes no context; if transformers"), (None, "after 0 that the cache")]
)
def test_a_cache_that_a_later_library_renames_or_loses_is_missed(new_name, message, monkeypatch):
    model = build()
    prepare = model.prepare_inputs_for_generation

    def otherwise(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        cache = inputs.pop(CACHE_NAME)
        return inputs | ({new_name: cache} if new_name else {})

    monkeypatch.setattr(model, "prepare_inputs_for_generation", otherwise)
    with pytest.raises(ValueError, match=message):
        ids, mask = padded([tokens(9), tokens(6)])
        model.generate(ids, attention_mask=mask, **GREEDY)


@pytest.mark.parametrize("pad", [False, True], ids=["equal", "padded"])
def test_prefill_in_chunks_equals_one_prefill(pad):
    model = build("mac")
    ids, mask = padded([tokens(17, seed=1), tokens(6 if pad else 17, seed=2)])
    whole = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(whole, model.generate(ids, attention_mask=mask, prefill_chunk_size=5, **GREEDY))


def test_a_kept_cache_goes_on_with_the_conversation():
    model, first, second = build("mal"), tokens(1, 9, seed=1), tokens(1, 5, seed=2)
    cache = TitansCache()
    said = model.generate(first, **{CACHE_NAME: cache}, **GREEDY)
    assert cache.get_seq_length() == said.shape[1] - 1  # the last token has not been read yet
    asked = torch.cat((said, second), 1)
    options = {**GREEDY, "attention_mask": torch.ones_like(asked)}
    assert torch.equal(model.generate(asked, **{CACHE_NAME: cache}, **options), model.generate(asked, **options))


@torch.no_grad()
def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    model, ids = build("mac"), tokens(2, 23)
    whole = model(ids)
    monkeypatch.setattr(modeling_titans, "PIECE", 5)
    last = model(ids, logits_to_keep=1)
    assert_close(last.logits, whole.logits[:, -1:], **EXACT)
    after = tokens(2, 4, seed=5)
    onwards = [model(after, past_key_values=out[CACHE_NAME]).logits for out in (last, whole)]
    assert_close(*onwards, **EXACT)


@torch.no_grad()
def test_logits_to_keep():
    model, ids = build(), tokens(2, 9)
    logits = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])


def test_loss_shifts_the_labels_and_leaves_padding_out():
    model = build()
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[:, 5] = -100
    targets = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), 1)
    loss = model(ids, labels=labels).loss
    expected = native(model)(ids, labels=targets).loss
    # the library takes the cross-entropy in float32
    assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_close(
        model(ids, labels=labels, num_items_in_batch=7).loss.double(), expected * 21 / 7 * 20 / 21, rtol=1e-5, atol=0
    )
    rows = [ids[0], ids[1, :4]]
    for side in ("left", "right"):
        batch, mask = padded(rows, side)
        padded_labels = batch.masked_fill(mask == 0, -100)
        each = torch.stack([model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows])
        assert_close(
            model(batch, attention_mask=mask, labels=padded_labels).loss, each.sum() / (11 + 3), rtol=1e-5, atol=0
        )


def test_every_parameter_learns():
    model = build("mac").train()
    ids, mask = padded([tokens(17, seed=1), tokens(10, seed=2)])
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    assert CACHE_NAME not in out
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_bfloat16_keeps_the_memory_in_float32():
    out = build().bfloat16()(tokens(2, 9))
    memory = out[CACHE_NAME].content.states.layers[0].memory.memory
    assert out.logits.dtype == torch.bfloat16
    assert {x.dtype for x in (*memory.weights, *memory.surprise)} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_more_tokens(tied):
    model, ids = build(tie_embeddings=tied), tokens(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    assert_close(model(ids).logits[..., :VOCAB], before, **EXACT)
    assert model(torch.tensor([[VOCAB + 4]])).logits.shape[-1] == model.config.vocab_size == VOCAB + 5


class TestCache:
    @torch.no_grad()
    def read(self, pad, batch=3):
        model = build("mac")
        rows = [tokens(9 - (i if pad else 0), seed=i) for i in range(batch)]
        ids, mask = padded(rows)
        cache = TitansCache()
        model(ids, attention_mask=mask, past_key_values=cache)
        return model, cache

    @pytest.mark.parametrize("pad", [False, True], ids=["equal", "padded"])
    @torch.no_grad()
    def test_rows_can_be_reordered_selected_and_repeated(self, pad):
        model, cache = self.read(pad)
        after = tokens(3, 6, seed=7)
        onwards = model(after, past_key_values=self.read(pad)[1]).logits
        assert cache.layers[0].batch_size == 3
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.batch_repeat_interleave(2)
        assert cache.layers[0].batch_size == 4
        rows = [2, 2, 1, 1]
        assert_close(model(after[rows], past_key_values=cache).logits, onwards[rows], **EXACT)

    @pytest.mark.parametrize("pad", [False, True], ids=["equal", "padded"])
    @torch.no_grad()
    def test_reset_starts_over(self, pad):
        model, cache = self.read(pad)
        cache.reset()
        ids = tokens(2, 5)
        assert cache.get_seq_length() == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)

    def test_it_cannot_be_cropped(self):
        with pytest.raises(ValueError, match="a Titans cache cannot be cropped"):
            self.read(False)[1].crop(2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"inputs_embeds": torch.zeros(1, 4, 16)}, "reads input_ids or inputs_embeds; give one"),
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
        ({"cache": DynamicCache()}, "cache is a DynamicCache"),
        ({"cache_params": TitansCache()}, "takes no cache_params"),
        ({"state": ()}, "takes no state"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "takes no cu_seq_lens_q"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"attention_mask is \(1, 1, 4, 4\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \(1, 3\)"),
        (
            {"attention_mask": torch.ones(1, 6)},
            r"attention_mask is \(1, 6\); for 4 tokens after 0 that the cache has read",
        ),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"position_ids": torch.tensor([[0, 1, 3, 4]])}, "position_ids must count the tokens of each document"),
        ({"position_ids": torch.tensor([[0, 1]])}, r"position_ids is \(1, 2\)"),
        (
            {"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": True},
            "several documents in a row leave no state",
        ),
        ({"attention_mask": torch.zeros(1, 4)}, "there is no token to read"),
    ],
)
def test_what_is_not_supported_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build()(tokens(1, 4), **arguments)


@torch.no_grad()
def test_what_the_library_adds_changes_nothing():
    model, ids = build(), tokens(1, 4)
    added = {"position_ids": torch.arange(9, 13)[None], "cache_position": torch.arange(4), "output_attentions": False}
    assert torch.equal(model(ids, **added, mems=None).logits, model(ids).logits)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


def test_assisted_decoding_is_refused():
    model = build()
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(tokens(1, 4), assistant_model=build("transformer"), max_new_tokens=3)
