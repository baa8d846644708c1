"""model.py: one layout whichever way a sequence is read, and samples that obey seed and law."""
import io

import pytest
import torch
from reference import mask_of, seeded, tiny

from model import (ASK_EVERY, Cache, Config, Transformer, generate, load_state, read_candidates, sample,
                   save_state)

BOTH = pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
near = dict(rtol=0, atol=1e-5)


def ids(*shape, high=11, seed=0):
    return torch.randint(high, shape, generator=seeded(seed))


def decode_all(model, tokens, cache, k=1):
    """Hidden states of `tokens` (N, T) behind a cache of N / k prefixes, one decoded token after the
    other."""
    width, cache = cache.mask.shape[1], cache.repeat(k, tokens.shape[1])
    steps = range(tokens.shape[1])
    return torch.stack([model.decode(tokens[:, t:t + 1], cache, width + t) for t in steps], 1)


@BOTH
def test_decoding_with_the_cache_equals_the_full_forward(rotary):
    model, tokens = tiny(rotary=rotary), ids(3, 9)
    full = model(tokens) @ model.head.t()
    cache = model.prefill(tokens[:, :4], torch.ones(3, 4, dtype=torch.bool)).repeat(1, 5)
    for t in range(4, 9):
        logits = model.decode(tokens[:, t:t + 1], cache, t) @ model.head.t()
        torch.testing.assert_close(logits, full[:, t], **near)


@BOTH
def test_decoding_behind_ragged_prefixes_equals_each_row_alone(rotary):
    model, prefix, tokens, lengths = tiny(rotary=rotary), ids(3, 5), ids(3, 4, seed=1), (5, 2, 1)
    decoded = decode_all(model, tokens, model.prefill(prefix, mask_of(*lengths, width=5)))
    for row, n in enumerate(lengths):
        alone = model(torch.cat((prefix[row, :n], tokens[row]))[None])[0, n:]
        torch.testing.assert_close(decoded[row], alone, **near)


@BOTH
@pytest.mark.parametrize("column", [5, torch.tensor(5)], ids=["int", "tensor"])  # a tensor for CUDA graphs
def test_several_tokens_decoded_at_once_equal_one_by_one(rotary, column):
    model, prefix, tokens, lengths = tiny(rotary=rotary), ids(3, 5), ids(3, 4, seed=1), (5, 2, 1)
    cache = model.prefill(prefix, mask_of(*lengths, width=5)).repeat(1, 6)
    steps = [model.decode(tokens[:, t:t + 1], cache, column + t) for t in range(4)]
    for n in (4, 2):  # a shorter decode at the same place sees nothing of the longer one that was there
        torch.testing.assert_close(model.decode(tokens[:, :n], cache, column), steps[n - 1], **near)


@BOTH
def test_cached_and_packed_are_the_same_states(rotary):
    model, mask = tiny(rotary=rotary), mask_of(5, 2, 0, width=5)
    prefix, tokens = ids(3, 5), ids(3, 4, 6, seed=1)
    decoded = decode_all(model, tokens.flatten(0, 1), model.prefill(prefix, mask), 4)
    torch.testing.assert_close(model(tokens, (prefix, mask)).flatten(0, 1), decoded, **near)


def test_a_compiler_sees_one_whole_graph_and_the_same_states():
    model, prefix, tokens = tiny(n_layer=1), ids(3, 5), ids(3, 4, 6, seed=1)
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    behind = prefix, mask_of(5, 2, 0, width=5)
    for x, given in ((tokens, behind), (tokens, None), (tokens[0], None), (tokens[0, :, :1], None)):
        torch.testing.assert_close(compiled(x, given), model(x, given), **near)


@pytest.mark.parametrize("order", ["read in float", "read in half"])
def test_what_was_read_in_one_precision_decodes_in_another(order):
    model, prefix, mask = tiny(), ids(3, 5), mask_of(5, 2, 1, width=5)
    half = torch.autocast("cpu", torch.bfloat16)
    expected = generate(model, 0, 6, None, cache=model.prefill(prefix, mask), temperature=0)[0]
    if order == "read in half":
        with half:
            cache = model.prefill(prefix, mask)
        got = generate(model, 0, 6, None, cache=cache, temperature=0)[0]
    else:
        cache = model.prefill(prefix, mask)
        with half:
            got = generate(model, 0, 6, None, cache=cache, temperature=0)[0]
    assert got.shape == expected.shape and (got == expected).float().mean() > 0.5


@BOTH
@pytest.mark.parametrize("given", ["nothing", "prefix"])
def test_the_last_states_alone_are_those_of_the_whole(rotary, given):
    model, mask = tiny(rotary=rotary), mask_of(5, 2, 0, width=5)
    prefix, tokens = ids(3, 5), ids(3, 4, 6, seed=1)
    prefix = {"nothing": None, "prefix": (prefix, mask)}[given]
    torch.testing.assert_close(model(tokens, prefix, last=True), model(tokens, prefix)[:, :, -1:], **near)
    one = tokens[:, 0]
    torch.testing.assert_close(model(one, prefix, last=True), model(one, prefix)[:, -1:], **near)


@BOTH
def test_packed_candidates_equal_separate_runs_behind_a_ragged_prefix_in_value_and_gradient(rotary):
    model, prefix, tokens, lengths = tiny(rotary=rotary).double(), ids(3, 5), ids(3, 4, 6, seed=1), (5, 2, 0)
    packed = model(tokens, (prefix, mask_of(*lengths, width=5)))
    read = lambda row, n, k: model(torch.cat((prefix[row, :n], tokens[row, k]))[None])[0, n:]
    alone = torch.stack([torch.stack([read(row, n, k) for k in range(4)]) for row, n in enumerate(lengths)])
    torch.testing.assert_close(packed, alone)
    weights = torch.randn(alone.shape, generator=seeded(), dtype=torch.float64)
    one, other = (torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (packed, alone))
    torch.testing.assert_close(one, other)


def test_candidates_without_a_prefix_are_just_rows():
    model, tokens = tiny(), ids(2, 3, 6)
    torch.testing.assert_close(model(tokens), model(tokens.flatten(0, 1)).view(2, 3, 6, -1))


@BOTH
def test_padding_of_a_prefix_changes_nothing(rotary):
    model, prefix, tokens = tiny(rotary=rotary), ids(2, 4), ids(2, 3, 5, seed=1)
    expected = model(tokens, (prefix, mask_of(4, 2, width=4)))
    garbage = torch.cat((prefix, ids(2, 3, seed=2)), 1)
    garbage[1, 2:] = 7
    torch.testing.assert_close(model(tokens, (garbage, mask_of(4, 2, width=7))), expected, **near)


@BOTH
def test_padding_of_candidates_changes_nothing_before_it(rotary):
    model, prefix, tokens = tiny(rotary=rotary), ids(2, 4), ids(2, 3, 5, seed=1)
    prefix = prefix, mask_of(4, 2, width=4)
    padded = model(torch.cat((tokens, ids(2, 3, 2, seed=2)), -1), prefix)
    torch.testing.assert_close(padded[..., :5, :], model(tokens, prefix), **near)


@BOTH
def test_the_future_changes_nothing(rotary):
    model, tokens = tiny(rotary=rotary), ids(1, 8)
    other = tokens.clone()
    other[0, 5] = (other[0, 5] + 1) % 11
    a, b = model(tokens)[0], model(other)[0]
    torch.testing.assert_close(a[:5], b[:5], **near)
    assert ((a - b)[5:].abs().amax(1) > 1e-3).all()  # and the past changes everything behind it


@BOTH
def test_order_matters(rotary):
    model, tokens = tiny(rotary=rotary), ids(1, 8)
    tokens[0, 0], tokens[0, 1] = 1, 2
    swapped = tokens[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    assert (model(tokens)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-3


def test_repeat_puts_copies_of_a_row_side_by_side():
    model, prefix = tiny(), ids(2, 4)
    cache = model.prefill(prefix, mask_of(4, 2, width=4))
    again = cache.repeat(3)
    for kept, copies in zip(cache.keys + cache.values, again.keys + again.values):
        assert torch.equal(copies, kept[[0, 0, 0, 1, 1, 1]])
    assert again.length.tolist() == [4, 4, 4, 2, 2, 2]


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), slice(1, 3)])
def test_select_takes_rows(rows):
    model, prefix, tokens = tiny(), ids(3, 4), ids(3, 5, seed=1)
    cache = model.prefill(prefix, mask_of(4, 2, 1, width=4))
    some = decode_all(model, tokens[rows], cache.select(rows))
    torch.testing.assert_close(some, decode_all(model, tokens, cache)[rows], **near)


def test_sampling_leaves_the_prefix_as_it_was():
    model = tiny()
    cache = model.prefill(ids(2, 4), mask_of(4, 2, width=4))
    copies = lambda xs: [x.clone() for x in xs]
    before = Cache(copies(cache.keys), copies(cache.values), cache.mask.clone(), cache.length.clone())
    generate(model, 0, 5, seeded(), rows=1, cache=cache)
    assert torch.equal(cache.mask, before.mask) and torch.equal(cache.length, before.length)
    assert all(torch.equal(a, b) for a, b in zip(cache.keys + cache.values, before.keys + before.values))


@BOTH
def test_longer_than_the_context_is_an_error(rotary):
    model = tiny(rotary=rotary, n_ctx=8)
    model(ids(1, 8))
    with pytest.raises(ValueError, match="9 positions .* context of 8"):
        model(ids(1, 9))
    with pytest.raises(ValueError, match="context of 8"):
        model(ids(1, 2, 5), (ids(1, 4), mask_of(4, width=4)))


@BOTH
def test_sampling_or_reading_beyond_the_context_is_an_error(rotary):
    model = tiny(rotary=rotary, n_ctx=8)
    assert generate(model, 0, 8, seeded())[0].shape == (1, 8)
    with pytest.raises(ValueError, match="context of 8"):
        generate(model, 0, 9, seeded())
    with pytest.raises(ValueError, match="context of 8"):
        model.prefill(ids(1, 9), mask_of(9, width=9))


def test_odd_head_width_is_an_error():
    with pytest.raises(ValueError, match="n_head"):
        Transformer(Config(n_embd=12, n_head=4))


def test_head_is_tied_to_the_embedding():
    model = tiny()
    assert model.head is model.wte.weight
    assert sum(p.numel() for p in model.parameters() if p.shape == model.head.shape) == model.head.numel()


def test_two_states_a_token_one_slot_apart():
    # `predict` has not read a_t yet, `read` has
    model, tokens = tiny(), ids(1, 1, 5)
    other = tokens.clone()
    other[0, 0, 2] = (other[0, 0, 2] + 1) % 11
    (predict, read), (predict2, read2) = read_candidates(model, tokens, 0), read_candidates(model, other, 0)
    moved = lambda a, b: (a - b).abs().amax(-1)[0, 0] > 1e-4
    assert moved(predict, predict2).tolist() == [False, False, False, True, True]
    assert moved(read, read2).tolist() == [False, False, True, True, True]


@BOTH
def test_greedy_samples_are_the_best_continuation_in_the_layout_of_training(rotary):
    model, prefix, mask = tiny(rotary=rotary), ids(3, 5), mask_of(5, 2, 1, width=5)
    tokens, _, _ = generate(model, 4, 6, None, cache=model.prefill(prefix, mask), temperature=0)
    predict, _ = read_candidates(model, tokens[:, None], 4, (prefix, mask))
    assert torch.equal((predict[:, 0] @ model.head.t()).argmax(-1), tokens)


# -------------------------------------------------------------------------------------- sampling

def test_seed_fixes_the_samples():
    model = tiny()
    draw = lambda seed: generate(model, 0, 10, seeded(seed), rows=8)[0]
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_sampling_neither_reads_nor_moves_the_global_seed():
    model = tiny()
    torch.manual_seed(5)
    first = generate(model, 0, 10, seeded(), rows=8)[0]
    after = torch.rand(3)
    torch.manual_seed(6)
    assert torch.equal(generate(model, 0, 10, seeded(), rows=8)[0], first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


def frequencies(logits, n=200_000, **how):
    drawn = sample(logits.expand(n, -1), seeded(), **how)
    return torch.bincount(drawn, minlength=logits.shape[-1]).double()


def chi_square(counts, p):
    expected = p.double() * counts.sum()
    return ((counts - expected).square() / expected)[p > 0].sum().item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("never", [0, 2, 4])
def test_frequencies_are_the_softmax(temperature, never):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1]).index_fill(0, torch.tensor([never]), float("-inf"))
    counts = frequencies(logits, temperature=temperature)
    assert counts[never] == 0
    assert chi_square(counts, (logits / temperature).softmax(0)) < 21  # 3 degrees of freedom: 1 in 10,000


def test_top_k_is_the_softmax_of_the_k_best():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    counts, p = frequencies(logits, top_k=3), logits.masked_fill(logits < 0.3, float("-inf")).softmax(0)
    assert counts[1] == 0 and counts[3] == 0 and chi_square(counts, p) < 19  # 2 degrees of freedom


def test_top_k_of_everything_changes_nothing():
    logits = torch.randn(50, 5, generator=seeded())
    assert torch.equal(sample(logits, seeded(), top_k=5), sample(logits, seeded()))


def test_temperature_zero_takes_the_best_and_draws_nothing():
    logits, g = torch.randn(50, 5, generator=seeded()), seeded(3)
    assert torch.equal(sample(logits, g, temperature=0), logits.argmax(1))
    assert torch.equal(g.get_state(), seeded(3).get_state())


def test_a_uniform_number_at_either_end_picks_an_id_that_can_be(monkeypatch):
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    for u, expected in ((0.0, 1), (1.0, 2)):
        monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, u))
        assert sample(logits, None).item() == expected


def test_rows_draw_their_own_numbers():
    assert len(set(sample(torch.zeros(1000, 50), seeded()).tolist())) == 50


def test_ids_beyond_the_tokenizer_are_never_sampled():
    model = tiny()
    assert generate(model, 0, 20, seeded(), rows=50)[0].max() == 10
    assert generate(model, 0, 20, seeded(), rows=50, n_ids=4)[0].max() == 3
    assert generate(model, 0, 20, seeded(), rows=50, n_ids=4, top_k=7)[0].max() == 3


def test_end_of_text_is_counted_and_silent_behind():
    tokens, length, ended = generate(tiny(), 0, 6, seeded(), rows=60, eot=2)
    mask = torch.arange(6) < length[:, None]
    last = tokens.gather(1, length[:, None] - 1).squeeze(1)
    assert 0 < ended.sum() < 60
    assert torch.equal(last == 2, ended)  # the last counted token is end-of-text exactly where the row ended
    assert (tokens.masked_fill(~mask, 0) == tokens).all() and ((tokens == 2).sum(1) == ended).all()
    assert length[~ended].eq(6).all() and length.min() >= 1


def test_without_end_of_text_every_row_is_full():
    _, length, ended = generate(tiny(), 0, 6, seeded(), rows=30)
    assert length.eq(6).all() and not ended.any()


def test_a_row_does_not_feel_other_rows_end():
    # the same numbers are drawn, so up to its own end a row is what it is when nothing ends
    free, _, _ = generate(tiny(), 0, 6, seeded(), rows=60)
    tokens, length, _ = generate(tiny(), 0, 6, seeded(), rows=60, eot=2)
    mask = torch.arange(6) < length[:, None]
    assert torch.equal(tokens, free.masked_fill(~mask, 0))


@pytest.mark.parametrize("every, steps", [(1, 5), (16, 16), (7, 7)])
def test_asking_now_and_then_whether_all_have_ended_changes_no_sample(every, steps, monkeypatch):
    net, asked = tiny(), []
    width = net.wte.weight.shape[1]
    net.wte.weight.data = torch.eye(11, width)

    def decode(tokens, cache, column):
        """The next id is 3, and from the fifth token on 4, which ends a row."""
        asked.append(column)
        return torch.eye(width)[[3 if len(asked) < 5 else 4]].expand(len(tokens), -1)
    monkeypatch.setattr(net, "decode", decode)
    monkeypatch.setitem(ASK_EVERY, "cpu", every)
    tokens, length, ended = generate(net, 0, 40, None, rows=2, eot=4, temperature=0)
    assert tokens.tolist() == [[3] * 4 + [4] + [0] * 35] * 2 and length.tolist() == [5, 5] and ended.all()
    assert len(asked) == steps


def test_all_rows_ended_stops_early_with_the_full_width():
    tokens, length, ended = generate(tiny(n_ctx=600), 0, 500, seeded(), rows=3, eot=2)
    assert tokens.shape == (3, 500) and ended.all() and length.max() < 500


def test_rows_of_a_prefix_lie_side_by_side():
    model, prefix, mask = tiny(), ids(2, 4), mask_of(4, 2, width=4)
    tokens, _, _ = generate(model, 0, 5, None, rows=3, cache=model.prefill(prefix, mask), temperature=0)
    one, _, _ = generate(model, 0, 5, None, cache=model.prefill(prefix, mask), temperature=0)
    assert torch.equal(tokens, one.repeat_interleave(3, 0))


# -------------------------------------------------------------------------------------- save and load

def test_weights_survive_a_file():
    file = io.BytesIO()
    torch.save(save_state(tiny(seed=1)), file)
    file.seek(0)
    loaded = load_state(tiny(seed=2), torch.load(file, weights_only=True))
    assert torch.equal(loaded(ids(2, 5)), tiny(seed=1)(ids(2, 5)))


def test_saved_weights_are_a_copy():
    model = tiny()
    saved = save_state(model)
    model.head.data.zero_()
    assert saved["weights"]["wte.weight"].abs().max() > 0


def test_weights_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="n_layer"):
        load_state(tiny(n_layer=1), save_state(tiny(n_layer=2)))


def test_an_adapter_begins_so_small_that_all_words_are_equally_likely():
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=50, n_ctx=16, n_layer=1, n_head=2, n_embd=16, adapter=64))
    plain = Transformer(Config(vocab_size=50, n_ctx=16, n_layer=1, n_head=2, n_embd=16))
    spread = lambda net: (net(torch.arange(9)[None]) @ net.head.t()).std(-1).max().item()
    assert spread(model) < 1e-3 < spread(plain)
