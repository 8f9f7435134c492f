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
HYBRIDS = [
    ["mac", {"variant": "lmm", "memory": {"chunk_size": 8, "depth": 3}}, {"variant": "transformer", "window": None}],
    ["mag", "mal", {"variant": "transformer", "window": 4}],
]


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


@pytest.mark.slow
@pytest.mark.parametrize("layers", [*VARIANTS, *HYBRIDS], ids=[*VARIANTS, "hybrid-mac", "hybrid-mag"])
@torch.no_grad()
def test_long_decoding_with_and_without_a_cache_and_float32(layers, tmp_path):
    """200 tokens, many windows, segments and chunks; and float32 logits as the training model has them."""
    model = build(layers) if isinstance(layers, str) else build(pattern=layers, layers=3)
    out = model.generate(tokens(2, 7), **GREEDY | {"max_new_tokens": 200, "min_new_tokens": 200})
    core = native(model)
    for length in range(7, 207):
        assert torch.equal(out[:, length], core(out[:, :length]).logits[:, -1].argmax(-1))
    assert len(out.unique()) > 4
    model.float().save_pretrained(tmp_path)
    loaded = TitansForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    exact = core.float()(out).logits
    assert_close(loaded(out).logits, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


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


def test_a_cache_that_has_read_all_that_is_given_says_so():
    """generate() passes on what the cache has not read, which may be nothing."""
    model, ids = build(), tokens(1, 4)
    cache = model(ids, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="no token to read; to generate behind a cache, give the text"):
        model(ids[:, :0], **{CACHE_NAME: cache})


@torch.no_grad()
def test_what_the_library_adds_changes_nothing():
    model, ids = build(), tokens(1, 4)
    added = {"position_ids": torch.arange(9, 13)[None], "cache_position": torch.arange(4), "output_attentions": False}
    assert torch.equal(model(ids, **added, mems=None).logits, model(ids).logits)
    packed = {"cu_seq_lens_q": torch.tensor([0, 4]), "max_length_q": 4}  # beside position_ids, which say the same
    assert torch.equal(model(ids, **added, **packed).logits, model(ids).logits)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


def test_assisted_decoding_is_refused():
    model = build()
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(tokens(1, 4), assistant_model=build("transformer"), max_new_tokens=3)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_packed_documents_are_read_as_each_alone(variant):
    model, lengths = build(variant), (5, 8, 1, 13)
    rows = [tokens(1, n, seed=n) for n in lengths]
    ids = torch.cat((*rows, torch.full((1, 3), PAD)), 1)
    position_ids = torch.cat([torch.arange(n) for n in (*lengths, 3)])[None]
    mask = (torch.arange(ids.shape[1]) < sum(lengths)).long()[None]
    two = torch.cat((ids, ids.flip(1)))  # beside a row of one document
    both = torch.cat((position_ids, torch.arange(ids.shape[1])[None]))
    out = model(two, attention_mask=torch.cat((mask, torch.ones_like(mask))), position_ids=both, labels=two)
    alone = torch.cat([model(row).logits for row in rows], 1)
    assert_close(out.logits[:1, : sum(lengths)], alone, **EXACT)
    assert_close(out.logits[1:], model(two[1:]).logits, **EXACT)
    losses = [model(row, labels=row).loss * (row.shape[1] - 1) for row in (*rows, two[1:]) if row.shape[1] > 1]
    predicted = sum(n - 1 for n in (*lengths, two.shape[1]))
    assert_close(out.loss, sum(losses) / predicted, rtol=1e-5, atol=0)
    assert CACHE_NAME not in out  # there is no state of several documents


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_takes_few_calls(side, monkeypatch):
    """One without a cache; with one, as many as there are lengths, and then one for each token of all rows."""
    model, calls = build("mac"), []
    ids, mask = padded([tokens(n, seed=n) for n in (9, 5, 9, 12)], side)
    read = model.model.read
    monkeypatch.setattr(model.model, "read", lambda x, *rest: calls.append(tuple(x.shape[:2])) or read(x, *rest))
    plain = model(ids, attention_mask=mask, use_cache=False).logits
    assert calls == [(4, 12)]
    calls.clear()
    out = model(ids, attention_mask=mask)
    assert calls == [(4, 5), (3, 4), (1, 3)]
    assert_close(out.logits, plain, **EXACT)
    calls.clear()
    model(tokens(4, 1), cache=out[CACHE_NAME])
    assert calls == [(4, 1)]


@torch.no_grad()
def test_rows_padded_on_the_right_generate_as_well():
    model = build()
    ids, right = padded([tokens(n, seed=n) for n in (5, 11, 2)], "right")
    left_ids, left = padded([tokens(n, seed=n) for n in (5, 11, 2)])
    said = model.generate(ids, attention_mask=right, **GREEDY)[:, ids.shape[1] :]
    assert torch.equal(said, model.generate(left_ids, attention_mask=left, **GREEDY)[:, ids.shape[1] :])


@torch.no_grad()
def test_a_second_turn_behind_rows_of_unequal_length():
    model, (first, second) = build("mac"), ((9, 5, 12), (3, 6, 1))
    texts = [tokens(n + m, seed=n) for n, m in zip(first, second)]
    ids, mask = padded([text[:n] for text, n in zip(texts, first)])
    cache = TitansCache()
    model(ids, attention_mask=mask, cache=cache)
    more, also = padded([text[n:] for text, n in zip(texts, first)])
    logits = model(more, attention_mask=also, cache=cache).logits
    for i, (text, n) in enumerate(zip(texts, first)):
        assert_close(logits[i, also[i].bool()], model(text[None]).logits[0, n:], **EXACT)


@pytest.mark.parametrize("pad", [False, True], ids=["equal", "padded"])
@torch.no_grad()
def test_hidden_states_and_embeddings_instead_of_tokens(pad):
    model = build()
    ids, mask = padded([tokens(9, seed=1), tokens(6 if pad else 9, seed=2)])
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    expected = native(model)(ids[:1], output_hidden_states=True).hidden_states
    assert len(out.hidden_states) == len(expected) == 3
    for found, right in zip(out.hidden_states, expected):
        assert_close(found[:1], right, **EXACT)
    backbone = model.model(ids, attention_mask=mask).last_hidden_state
    assert_close(backbone, out.hidden_states[-1], **EXACT)
    assert_close(model.lm_head(backbone), out.logits, **EXACT)
    embeds = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, out.logits, **EXACT)


@pytest.mark.parametrize("kind", ["greedy", "beams"])
@pytest.mark.parametrize("pad", [False, True], ids=["equal", "padded"])
@torch.no_grad()
def test_generate_against_a_plain_loop(kind, pad):
    """Scores of the best continuations, row by row over full forwards of the model itself."""
    model, beams, new = build(), 1 if kind == "greedy" else 3, 5
    core = native(model)
    rows = [tokens(9, seed=1), tokens(6 if pad else 9, seed=2)]
    ids, mask = padded(rows)
    options = {**GREEDY, "max_new_tokens": new, "min_new_tokens": new, "attention_mask": mask}
    out = model.generate(ids, num_beams=beams, **options)
    for i, row in enumerate(rows):
        found = [(0.0, row)]
        for _ in range(new):
            scores = [(s + core(x[None]).logits[0, -1].log_softmax(0), x) for s, x in found]
            longer = [(float(v), torch.cat((x, t[None]))) for s, x in scores for v, t in zip(*s.topk(beams))]
            found = sorted(longer, key=lambda pair: -pair[0])[:beams]
        assert torch.equal(out[i, ids.shape[1] :], found[0][1][len(row) :])


def test_checkpointing_gives_the_same_gradients():
    ids, mask = padded([tokens(9, seed=1), tokens(6, seed=2)])
    gradients = []
    for enable in (False, True):
        model = build("mac").train()
        if enable:
            later = getattr(model, "activation_checkpointing_enable", None)  # the name from transformers 5.24 on
            (later or model.gradient_checkpointing_enable)({"use_reentrant": True})
            assert model.model.recompute == "block" and model.eval().model.recompute == "none"
        model.train()(ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert_close(*gradients, **EXACT)


def test_missing_weights_start_as_in_pretraining(tmp_path):
    model = build(persistent_tokens=3).float()
    model.save_pretrained(tmp_path)
    missing = {
        "model.layers.0.memory.weights.0",
        "model.layers.0.memory.q_conv",
        "model.layers.1.persistent",
        "model.layers.1.mlp.down_proj.weight",
    }
    from safetensors.torch import load_file, save_file

    weights = {n: x.clone() for n, x in load_file(tmp_path / "model.safetensors").items()}  # the file is written over
    save_file({n: x for n, x in weights.items() if n not in missing}, tmp_path / "model.safetensors", {"format": "pt"})
    read, info = TitansForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False, output_loading_info=True)
    assert set(info["missing_keys"]) == missing | {"lm_head.weight"}
    found = dict(read.named_parameters())
    assert all(torch.equal(found[n], x) for n, x in weights.items() if n not in missing)
    std, layers = model.config.init_std, model.config.layers
    expected = {
        "model.layers.0.memory.weights.0": 1.0, "model.layers.0.memory.q_conv": 0.5, "model.layers.1.persistent": 1.0,
        "model.layers.1.mlp.down_proj.weight": std / (2 * layers) ** 0.5, "lm_head.weight": std,
    }  # fmt: skip
    for name, right in expected.items():
        assert 0.6 * right < found[name].std() < 1.5 * right, name
    read = TitansForCausalLM.from_pretrained(tmp_path, vocab_size=VOCAB + 9, ignore_mismatched_sizes=True)
    assert 0.8 * std < read.get_input_embeddings().weight.std() < 1.2 * std
    assert read.get_input_embeddings().weight.data_ptr() == read.get_output_embeddings().weight.data_ptr()


@pytest.mark.parametrize("kind", ["static", "quantized"])
def test_another_kind_of_cache_is_refused(kind):
    with pytest.raises(ValueError, match=f"cache_implementation='{kind}' is a kind of key/value cache"):
        build().generate(tokens(1, 4), cache_implementation=kind, max_new_tokens=3)


@torch.no_grad()
def test_a_text_is_read_once_and_asked_about_later(tmp_path):
    model, book, questions = build("mac"), tokens(1, 21), [tokens(n, seed=n) for n in (4, 7, 2)]
    cache = TitansCache()
    model(book, cache=cache)
    cache.save(tmp_path / "book.state", model)
    ids, mask = padded(questions)
    loaded = TitansCache.load(tmp_path / "book.state", build("mac"), rows=3)
    said = model.generate(ids, attention_mask=mask, **{CACHE_NAME: loaded}, **GREEDY)
    for row, question in zip(said, questions):
        whole = torch.cat((book[0], question))[None]
        assert torch.equal(row[ids.shape[1] :], model.generate(whole, **GREEDY)[0, whole.shape[1] :])
    with pytest.raises(ValueError, match="was read by another model"):
        TitansCache.load(tmp_path / "book.state", build("mac", rope_theta=5.0))
    with pytest.raises(ValueError, match="there is no state to save"):
        TitansCache().save(tmp_path / "none.state", model)


@torch.no_grad()
def test_autocast_reads_padding_too():
    model = build().float()
    ids, mask = padded([tokens(9, seed=1), tokens(6, seed=2)])
    exact = model(ids, attention_mask=mask, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        for use_cache in (False, True):
            assert_close(
                model(ids, attention_mask=mask, labels=ids, use_cache=use_cache).loss, exact, rtol=0.05, atol=0
            )
