"""RoBERTa and the two judges that nobody taught here: against the library where it is installed, against a
plain forward pass everywhere, and in runs."""
import json
import os

import pytest
import torch

import sample
from data import train_bpe, word_tokenizer
from support.log import UserError
from support.tensors import read_tensors, write_safetensors
from support.tokenizer import byte_alphabet
from tasks.pretrained import MaskedJudge, Texts
from tasks.roberta import INNER, OUTER, Roberta, Sizes, numbers, read_roberta
from test_weights import export, go, here, library, random_model, rewrite, same  # noqa: F401

TEXT = "terrible great superb dull mood film was the World Sports Business Tech sat on mat cat . a b"
BPE = train_bpe([f" {word}" for word in TEXT.split() for _ in range(9)] + TEXT.split() * 9, 500)
SIZES = Sizes(vocab_size=BPE.size + 9, places=60, kinds=1, n_layer=2, n_head=4, n_embd=32, inner=48)


def vocabulary():
    """RoBERTa's numbering of BPE's tokens: four marks first, then an order of its own, <mask> last."""
    shown = {b: c for c, b in byte_alphabet().items()}
    order = torch.randperm(len(BPE.ranks), generator=torch.Generator().manual_seed(1)).tolist()
    found = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    for i, j in enumerate(order):
        found["".join(shown[b] for b in BPE.ranks[j])] = 4 + i
    return found | {"<mask>": SIZES.vocab_size - 1}


def write_folder(folder, model):
    """A masked language model as the hub has it."""
    c, names = model.config, dict(OUTER)
    for i in range(c.n_layer):
        names |= {f"layers.{i}.{own}.{part}": f"encoder.layer.{i}.{x}.{part}"
                  for own, x in INNER.items() for part in ("weight", "bias")}
    plain = lambda name: name if name.startswith("lm_head") else "roberta." + name
    os.makedirs(folder, exist_ok=True)
    write_safetensors(os.path.join(folder, "model.safetensors"),
                      {plain(names[name]): x for name, x in model.state_dict().items()})
    sizes = {"vocab_size": c.vocab_size, "max_position_embeddings": c.places, "type_vocab_size": c.kinds,
             "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "hidden_size": c.n_embd,
             "intermediate_size": c.inner}
    fixed = {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "hidden_act": "gelu",
             "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        json.dump(sizes | fixed, f)
    with open(os.path.join(folder, "vocab.json"), "w", encoding="utf-8") as f:
        json.dump(vocabulary(), f)


def random_roberta(seed=0):
    torch.manual_seed(seed)
    model = Roberta(SIZES).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A folder of random weights."""
    path = tmp_path_factory.mktemp("roberta")
    write_folder(path, random_roberta())
    return path


@pytest.fixture
def copy(roberta, tmp_path):
    """The same, to be changed."""
    write_folder(tmp_path / "copy", random_roberta())
    return tmp_path / "copy"


def tokens_of(*lengths):
    ids = torch.randint(4, SIZES.vocab_size, (len(lengths), max(lengths)),
                        generator=torch.Generator().manual_seed(2))
    return ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# ------------------------------------------------------------------------------------------------- the net


def test_a_folder_is_read_to_the_bit(roberta):
    assert same(read_roberta(str(roberta)).state_dict(), random_roberta().state_dict())


def test_padding_changes_nothing_and_both_sides_are_read():
    model, (tokens, mask) = random_roberta(), tokens_of(9, 5)
    both = model(tokens, mask, torch.tensor([3, 3]))
    torch.testing.assert_close(both[1:], model(tokens[1:, :5], mask[1:, :5], torch.tensor([3])))
    other = tokens.clone()
    other[0, 8] = 4 + (tokens[0, 8] + 1) % 90  # behind the gap
    assert not torch.allclose(model(other, mask, torch.tensor([3, 3]))[0], both[0])
    some = torch.tensor([7, 4])
    torch.testing.assert_close(model(tokens, mask, torch.tensor([3, 3]), some), both[:, some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_of_the_library_has_the_same_logits_here(library, dtype, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    config = library.RobertaConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=30, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        layer_norm_eps=1e-5)
    other = library.RobertaForMaskedLM(config)
    for p in other.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    other.to(dtype).save_pretrained(tmp_path)
    model, other = read_roberta(str(tmp_path)), other.float().eval()
    tokens = torch.randint(4, 90, (2, 11))
    mask = torch.arange(11) < torch.tensor([11, 6])[:, None]
    with torch.no_grad():
        want = other(tokens.where(mask, torch.tensor(1)), attention_mask=mask.long()).logits
    for gap in (0, 4):
        got = model(tokens, mask, torch.full((2,), gap))
        torch.testing.assert_close(got, want[:, gap], atol=1e-4, rtol=0)
        assert got.argmax(1).tolist() == want[:, gap].argmax(1).tolist()


@pytest.mark.parametrize("name, x, says", [
    ("lm_head.dense.weight", None, "lm_head.dense.weight: missing"),
    ("lm_head.bias", None, "lm_head.bias: missing"),
    ("roberta.embeddings.position_embeddings.weight", torch.ones(59, 32), "expected shape"),
    ("classifier.weight", torch.ones(2, 32), "classifier.weight: a tensor that this model has no use for"),
    ("lm_head.decoder.weight", torch.ones(SIZES.vocab_size, 32), "expected a head tied"),
])
def test_a_file_that_is_no_masked_language_model_does_not_load(name, x, says, copy):
    rewrite(copy, **{name.replace(".", "__"): x})
    with pytest.raises(UserError, match=says):
        read_roberta(str(copy))


def test_what_a_masked_language_model_does_not_need_is_passed_over(copy):
    tensors = read_tensors(copy / "model.safetensors")
    rewrite(copy, roberta__pooler__dense__weight=torch.ones(32, 32),
            lm_head__decoder__bias=tensors["lm_head.bias"],
            roberta__embeddings__position_ids=torch.arange(60)[None])
    assert same(read_roberta(str(copy)).state_dict(), random_roberta().state_dict())


def test_other_settings_and_too_many_positions_are_one_line(copy):
    assert read_roberta(str(copy), 58).config == SIZES
    with pytest.raises(UserError, match="has 58 positions, and the run needs 59"):
        read_roberta(str(copy), 59)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match="hidden_act: expected gelu"):
        read_roberta(str(copy))


# ----------------------------------------------------------------------------------------------- the judge


def masked(attribute_words, space):
    table, marks = numbers_of()
    marks = {k: torch.tensor(i) for k, i in marks.items()} | {"stop": table[BPE.encode(" .")[0]]}
    ids = torch.tensor([BPE.encode(space + w)[0] for w in attribute_words])
    return MaskedJudge(random_roberta(), table, marks, {"sentiment": table[ids], "topic": table[ids]})


def numbers_of():
    vocab = vocabulary()
    shown = {b: c for c, b in byte_alphabet().items()}
    name = lambda token: "".join(shown[b] for b in token)
    return (torch.tensor([vocab[name(r)] for r in BPE.ranks] + [2]),
            {"open": 0, "close": 2, "gap": SIZES.vocab_size - 1})


def test_every_token_has_its_number_by_name(roberta):
    table, marks = numbers(str(roberta), BPE, SIZES.vocab_size)
    want, those = numbers_of()
    assert torch.equal(table, want) and marks == those
    with pytest.raises(UserError, match="has no number for"):
        numbers(str(roberta), word_tokenizer(["elsewhere"]), SIZES.vocab_size)
    with pytest.raises(UserError, match="has no number for"):
        numbers(str(roberta), BPE, 50)  # numbers beyond its embedding


@pytest.mark.parametrize("attribute", ["sentiment", "topic"])
def test_the_template_is_the_papers_token_by_token(attribute):
    """"{text} {prompt} <mask> ." and "<mask> {prompt} {text}", each between <s> and </s>, row by row."""
    judge = masked(["great", "terrible"], " ")
    table, marks = numbers_of()
    texts = [BPE.encode(" the film was dull"), BPE.encode(" cat"), []]
    prompts = torch.tensor([BPE.encode(" mood film"), BPE.encode(" a b")])
    width = max(map(len, texts))
    tokens = torch.tensor([x + [0] * (width - len(x)) for x in texts])
    mask = torch.arange(width) < torch.tensor([len(x) for x in texts])[:, None]
    got = judge.probabilities(judge.read(tokens, mask), prompts, attribute, at_once=1)
    assert got.shape == (3, 2, 2)
    for i, text in enumerate(texts):
        for j, prompt in enumerate(prompts.tolist()):
            said, read = [int(table[x]) for x in prompt], [int(table[x]) for x in text]
            gap, stop = [marks["gap"]], [int(table[BPE.encode(" .")[0]])]
            row = [0, *gap, *said, *read, 2] if attribute == "topic" else [0, *read, *said, *gap, *stop, 2]
            row = torch.tensor([row])
            where = torch.tensor([row[0].tolist().index(*gap)])
            z = random_roberta()(row, torch.ones_like(row, dtype=torch.bool), where)
            want = z[0, judge.answers[attribute]].softmax(0)
            torch.testing.assert_close(got[i, j], want, atol=1e-5, rtol=1e-4)


def test_texts_are_read_in_parts_without_the_padding_of_others():
    tokens, mask = tokens_of(9, 2, 5)
    parts = list(Texts(tokens, mask).parts(2))
    assert [x.shape for x, _ in parts] == [(2, 9), (1, 5)]
    assert Texts(tokens, mask).select(slice(1, 3)).tokens.shape == (2, 9)


@pytest.mark.parametrize("attribute", ["sentiment", "topic"])
def test_a_run_with_a_masked_judge_is_used_without_the_judges_folder(attribute, roberta, here):  # noqa: F811
    if attribute == "topic":
        for name in ("train", "dev", "test"):
            rows = [f"{name} film {i} was\t{i % 4}" for i in range(8)]
            (here / "texts" / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    export(random_model(BPE, n_ctx=64, n_layer=1, n_head=2, n_embd=16), BPE, "policy")
    go("--threads 1 --device cpu --dtype float32 --policy_steps 1 --reward_first 1 --reward_steps 1",
       "--candidates 4 --batch_size 4 --K 2 --cache_dir cache --data texts --init_from policy --out_dir run",
       f"--judge {roberta} --judge_context 20 --prompt_length 2 --attribute {attribute}")
    found = sample.load("run", "cpu", lambda line: None).classify(["the film was dull"])[0]
    answers = "World Sports Business Tech" if attribute == "topic" else "terrible great"
    judge = masked(answers.split(), "" if attribute == "topic" else " ")
    prompt = torch.tensor([json.loads((here / "run" / "summary.json").read_text())["best_prompt_ids"]])
    text = torch.tensor([BPE.encode(" the film was dull")])
    want = judge.probabilities(Texts(text, torch.ones_like(text, dtype=torch.bool)), prompt, attribute)[0, 0]
    assert found["probabilities"] == pytest.approx(want.tolist(), abs=1e-5)
