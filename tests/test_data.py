"""data.py: tokenizers against hand-made segmentations, readers against hand-made broken
files, padding by hand.

Nothing is downloaded. Tests on real files take them from the folder in DATA_DIR and skip without it.
"""

import gzip
import json
import os
import random
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when `datasets` is first imported
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import pytest
import torch
from reference import real

import data
from support import tokenizer

ODD = ["", " ", "plain words, twice  spaced\n\n", "naïve café 日本語", "🙂 family 👨‍👩‍👧 ok", "<|endoftext|>"]
ODD += ["tab\tnul\0end", "it's 42"]
NAMED = "a .jsonl, .jsonl.gz, .tsv, .tsv.gz, .csv or .csv.gz file"
FIELDS = {"text": (("text", "sentence"), str), "label": (("label",), int)}


def tokenizers():
    bpe = data.train_bpe(["the cat sat on the mat", "the naïve cat 🙂 🙂"] * 2, size=280)
    word = data.word_tokenizer(["the", "cat", "naïve"])
    return [data.byte_tokenizer(), bpe, word, bpe.compact(["the cat"]), word.compact(["cat"])]


def test_byte_tokenizer_by_hand():
    tok = data.byte_tokenizer()
    assert (tok.size, tok.eot, tok.name) == (257, 256, "byte")
    assert tok.encode("aé") == [97, 0xC3, 0xA9]
    assert tok.decode([97, 256, 98]) == "ab"  # end-of-text is silent


@pytest.mark.parametrize("i", range(5))
def test_any_text_survives(i):
    tok = tokenizers()[i]
    for text in ODD:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and "".join(tok.pieces(ids)) == text
        assert tok.eot not in ids and all(0 <= t < tok.eot for t in ids)


@pytest.mark.parametrize("i", range(5))
def test_any_ids_decode(i):
    tok = tokenizers()[i]
    everything = list(range(tok.size))
    assert len(tok.pieces(everything)) == tok.size and isinstance(tok.decode(everything), str)
    draw = random.Random(0)
    for _ in range(200):  # bytes in any order: the same replacement marks as python puts
        ids = [draw.randrange(tok.eot) for _ in range(6)]
        assert tok.decode(ids) == b"".join(tok.bytes_of[t] for t in ids).decode("utf-8", "replace")


def test_decode_takes_tensors():
    assert data.byte_tokenizer().decode(torch.tensor([104, 105, 256])) == "hi"


def test_pieces_put_a_character_on_its_last_token():
    tok = data.byte_tokenizer()
    assert tok.pieces(tok.encode("a🙂b") + [tok.eot]) == ["a", "", "", "", "🙂", "b", "<eot>"]
    assert tok.pieces([0xFF, 97]) == ["\ufffd", "a"]
    assert tok.pieces([97, 0xC3]) == ["a", "\ufffd"]  # an unfinished character is shown at its own place
    assert tok.pieces([0xC3, tok.eot, 0xA9]) == ["\ufffd", "<eot>", "\ufffd"]  # end-of-text joins nothing
    assert tok.pieces([]) == []


def test_bpe_by_hand():
    # Pieces: "ab" x3, " ab" x2, " c" x2. Pairs: ab 5; then " "+"ab" 2 and " c" 2, a tie,
    # and " ab" sorts before " c".
    tok = data.train_bpe(["ab ab c", "ab ab c", "ab"], size=300)
    assert tok.ranks[256:] == [b"ab", b" ab", b" c"]  # no pair is left: training ends before 300
    assert (tok.size, tok.eot) == (260, 259)
    assert tok.encode("ab ab c abc") == [256, 257, 258, 257, ord("c")]


def test_bpe_overlapping_pairs():
    # "aaaa" twice: pair "aa" counts 6; then "aa"+"aa" counts 2.
    tok = data.train_bpe(["aaaa", "aaaa"], size=300)
    assert tok.ranks[256:] == [b"aa", b"aaaa"]
    assert tok.encode("aaaaa") == [257, 97] and tok.encode("aaa") == [256, 97]


def test_bpe_min_count_and_size():
    assert data.train_bpe(["ab"], size=300).size == 257  # one occurrence is below min_count
    assert data.train_bpe(["ab"], size=300, min_count=1).ranks[256:] == [b"ab"]
    assert data.train_bpe(["ab cd ef"] * 9, size=259).size == 259
    assert data.train_bpe([], size=300).size == 257
    with pytest.raises(data.UserError, match="at least 257.*got 256"):
        data.train_bpe(["ab"], size=256)


def test_count_words_caps():
    # a tie: the bytes decide
    assert tokenizer.count_words(["b", "a", "c", "c"], most=2) == [(b"c", 2), (b"a", 1)]
    assert tokenizer.count_words(["-" * 500]) == [(b"-" * 64, 1)]


def random_texts(seed, n=300):
    draw = random.Random(seed)
    return [" ".join("".join(draw.choices("abc", k=draw.randint(1, 9))) for _ in range(8)) for _ in range(n)]


def test_bpe_counts_match_a_recount_from_scratch():
    """Every merge must be the most frequent pair of the texts as tiktoken segments them with
    the merges before it."""
    texts = random_texts(0)
    words, ranks = tokenizer.count_words(texts), {b: i for i, b in enumerate(tokenizer.BYTES)}
    for learned in data.train_bpe(texts, size=330).ranks[256:]:
        counts = tokenizer.Counter()
        for word, n in words:
            parts = tokenizer.join([bytes([b]) for b in word], ranks)
            for a, b in zip(parts, parts[1:]):
                counts[a + b] += n
        assert learned == min(counts, key=lambda pair: (-counts[pair], pair))
        ranks[learned] = len(ranks)


def test_bpe_segments_as_tiktoken():
    tok = data.train_bpe(random_texts(1), size=400)
    ranks = {r: i for i, r in enumerate(tok.ranks)}
    for word in {w for text in random_texts(2) for w in text.split()}:
        parts = tokenizer.join([bytes([b]) for b in word.encode()], ranks)
        assert [tok.bytes_of[t] for t in tok.encode(word)] == parts


def test_bpe_is_deterministic():
    texts = random_texts(3)
    first = data.train_bpe(texts, size=350)
    # the order of the texts does not matter
    assert first.ranks == data.train_bpe(texts[::-1], size=350).ranks
    assert first.ranks != data.train_bpe(random_texts(4), size=350).ranks


def test_word_tokenizer():
    tok = data.word_tokenizer(["good", "a", "naïve", "sci-fi", "good"])
    for word in ("good", "naïve"):
        assert len(tok.encode(word)) == len(tok.encode(" " + word)) == 1
        assert tok.encode(word) != tok.encode(" " + word)
    assert len(tok.encode("a")) == len(tok.encode(" a")) == 1
    assert len(tok.encode(" sci-fi")) == 3  # cut by the pattern, each part one id
    assert len(tok.encode(" bad")) >= 3 and tok.decode(tok.encode(" bad apple")) == " bad apple"
    assert tok.size == (257 + len({"good", " good", " a", "naïve", " naïve", "sci", " sci", "fi", "-"})
                        - len({"-"}))


def test_compact_keeps_what_is_used_and_spells_the_rest():
    full = data.train_bpe(["ab ab c", "ab ab c", "ab"], size=300)
    tok = full.compact(["ab", "c"])
    assert (tok.size, tok.eot) == (258, 257) and tok.kept == [*range(256), 256, 259]
    assert tok.encode("ab") == [256]
    assert tok.encode("ab ab c") == [256, *b" ab", *b" c"]  # " ab" and " c" are gone: spelled in bytes
    assert tok.decode(tok.encode("ab ab c")) == "ab ab c"
    assert tok.compact(["c"]).kept == [*range(256), 259]  # compact again: only ever smaller
    assert tok.compact(["ab ab c"]).kept == tok.kept
    weight = torch.arange(full.size)
    assert weight[tok.kept][tok.eot] == full.eot


@pytest.mark.parametrize("i", range(5))
def test_state_round_trip(i, tmp_path):
    tok = tokenizers()[i]
    torch.save(tok.state(), tmp_path / "state.pt")
    copies = [json.loads(json.dumps(tok.state())), torch.load(tmp_path / "state.pt", weights_only=True)]
    for copy in map(data.Tokenizer.from_state, copies):
        assert (copy.state() == tok.state()
                and (copy.size, copy.eot, copy.name) == (tok.size, tok.eot, tok.name))
        assert all(copy.encode(text) == tok.encode(text) for text in ODD + ["the cat sat"])


def test_load_tokenizer(tmp_path):
    assert data.load_tokenizer("byte", []).size == 257
    # an iterator, read twice
    tok = data.load_tokenizer("bpe", (t for t in ["ab ab", "ab ab"]), size=258, compact=True)
    assert tok.ranks[256:] == [b"ab"] and tok.encode("ab") == [256]
    with pytest.raises(data.UserError, match='expected byte, bpe, gpt2 or a folder, got "bite"'):
        data.load_tokenizer("bite", [])
    with pytest.raises(data.UserError, match="encoder.json and vocab.bpe"):
        data.load_tokenizer(str(tmp_path), [])


def write_gpt2(folder, merges, names=("encoder.json", "vocab.bpe"), swap=False):
    """A miniature in GPT-2's format: 256 byte characters, the merges, end-of-text."""
    printable = [chr(b) for b in range(256) if chr(b).isprintable() and b != 32]
    order = (printable + [chr(256 + i) for i in range(256 - len(printable))]
             + ["".join(m.split()) for m in merges])
    if swap:
        order[-1], order[-2] = order[-2], order[-1]
    ids = {token: i for i, token in enumerate(order + ["<|endoftext|>"])}
    (folder / names[0]).write_text(json.dumps(ids))
    (folder / names[1]).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


@pytest.mark.parametrize("names", tokenizer.GPT2_FILES)
def test_gpt2_folder_miniature(tmp_path, names):
    write_gpt2(tmp_path, ["h i", "Ġ hi"], names)  # the letter U+0120 stands for the space
    tok = data.load_tokenizer(str(tmp_path), [])
    assert tok.encode("hi hi") == [256, 257] and tok.eot == 258 and tok.encode("!") == [0]
    write_gpt2(tmp_path, ["h i", "Ġ h"], names)
    # an edited file is not served from a cache
    assert len(data.gpt2_tokenizer(str(tmp_path)).encode(" hi")) == 2


def test_gpt2_folder_broken(tmp_path):
    write_gpt2(tmp_path, ["h i", "Ġ hi"], swap=True)
    with pytest.raises(data.UserError, match="order of the merges"):
        data.gpt2_tokenizer(tmp_path)
    (tmp_path / "encoder.json").write_text("{")
    with pytest.raises(data.UserError, match="vocabulary, got JSONDecodeError"):
        data.gpt2_tokenizer(tmp_path)


def test_gpt2_unreachable(monkeypatch):
    def offline(name):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", offline)
    with pytest.raises(data.UserError) as error:
        data.gpt2_tokenizer()
    for part in ("encoder.json", "vocab.bpe", "TIKTOKEN_CACHE_DIR", "folder"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_gpt2_real():
    tok = data.gpt2_tokenizer(real("gpt2_bpe"))
    assert tok.encode("hello world") == [31373, 995] and (tok.size, tok.eot) == (50257, 50256)
    small = tok.compact(["hello world"])
    assert small.size == 259 and small.kept[256:] == [995, 31373, 50256]
    assert all(t.decode(t.encode(text)) == text for text in ODD for t in (tok, small))


# Readers


def put(folder, name, content):
    path = folder / name
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)


GOOD = [{"text": "fine", "label": 1}, {"text": "bad \u2028 day", "label": 0}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl(tmp_path, name):
    lines = '{"sentence": "fine", "label": 1, "extra": [1]}\n\n{"text": "bad \u2028 day", "label": 0}'
    assert data.read_rows(put(tmp_path, name, lines), FIELDS) == GOOD


def test_tsv_header_aliases_and_quotes(tmp_path):
    a = put(tmp_path, "a.tsv", "sentence\tlabel\nfine\t1\nbad \u2028 day\t0\n")
    b = put(tmp_path, "b.tsv", "\ufefflabel\tmore\ttext\r\n1\tx\tfine\r\n0\tx\tbad \u2028 day\r\n")
    assert data.read_rows(a, FIELDS) == data.read_rows(b, FIELDS) == GOOD
    c = put(tmp_path, "c.tsv", 'text\tlabel\n"fine\t-3\n')
    assert data.read_rows(c, FIELDS) == [{"text": '"fine', "label": -3}]


def test_types_and_defaults(tmp_path):
    path = put(tmp_path, "a.jsonl", '{"s": 2, "c": ["x"], "d": {"k": 1}}')
    fields = {"s": (("s",), float), "c": (("c",), list), "d": (("d",), dict), "id": (("id",), str, None)}
    rows = data.read_rows(path, fields)
    assert rows == [{"s": 2.0, "c": ["x"], "d": {"k": 1}, "id": None}] and type(rows[0]["s"]) is float


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"}', "2: label: expected int, got nothing"),
        ("a.jsonl", '{"label": 1}', "1: text: expected str, got nothing"),
        ("a.jsonl", '{"text": "x", "label": "1"}', '1: label: expected int, got "1"'),
        ("a.jsonl", '{"text": "x", "label": true}', "1: label: expected int, got true"),
        ("a.jsonl", '{"text": "x", "label": 1.0}', "1: label: expected int, got 1.0"),
        ("a.jsonl", '{"text": null, "label": 1}', "1: text: expected str, got null"),
        ("a.jsonl", '{"text": 5, "label": 1}', "1: text: expected str, got 5"),
        ("a.jsonl", '{"text": " ", "label": 1}', " expected at least one row, got 1 with an empty text"),
        ("a.jsonl", '{"text": " ", "label": true}', "1: label: expected int, got true"),
        ("a.jsonl", '{"text": ["\x9b31m\u202e\u2028"]}',
         '1: text: expected str, got ["\\x9b31m\\u202e\\u2028"]'),
        ("a.jsonl", '\n{"text": "x", ', '2: json: expected one object a line, got "{\\"text\\": \\"x\\", "'),
        ("a.jsonl", "[1, 2]", '1: json: expected one object a line, got "[1, 2]"'),
        ("a.jsonl", "[" * 100_000, '1: json: expected one object a line, got "' + "[" * 56 + "..."),
        ("a.jsonl.gz", '{"text": "x", "label": 1}\n{', '2: json: expected one object a line, got "{"'),
        ("a.tsv", "text\tlabel\nx\t1\nx\tone\n", '3: label: expected int, got "one"'),
        ("a.tsv", "text\tlabel\n\t1\n", " expected at least one row, got 1 with an empty text"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}', '1: text: expected str, got "\\ud800"'),
        ("a.tsv", "text\tlabel\nx\t1\n\t\n", '3: label: expected int, got ""'),
        ("a.tsv", "text\tlable\nx\t1\n", "1: label: expected a column named label, got columns text, lable"),
        ("a.tsv", "text\tlabel\nx\t1\ty\n", "2: columns: expected 2, got 3"),
        ("a.jsonl", b'{"text": "x", "label": 1}\n\xff', "2: expected UTF-8 text, got byte 0xff"),
        ("a.jsonl", "", " expected at least one row, got nothing"),
        ("a.jsonl.gz", "\n", " expected at least one row, got nothing"),
        ("a.tsv", "text\tlabel\n", " expected at least one row, got nothing"),
        ("a.xlsx", "text,label\nx,1\n", f' expected {NAMED}, got "a.xlsx"'),
    ],
)
def test_reader_errors(tmp_path, name, content, message):
    path = put(tmp_path, name, content)
    with pytest.raises(data.UserError) as error:
        data.read_rows(path, FIELDS)
    assert str(error.value) in (f"{path}:{message}", f'{path}:{message}"')


@pytest.mark.parametrize("value", ["NaN", "1e999", '"2"', "false"])
def test_float_fields_are_finite_numbers(tmp_path, value):
    path = put(tmp_path, "a.jsonl", '{"score": %s}' % value)
    with pytest.raises(data.UserError, match=":1: score: expected float, got"):
        data.read_rows(path, {"score": (("score",), float)})


def test_missing_and_unzippable_files(tmp_path):
    with pytest.raises(data.UserError) as error:
        data.read_rows(tmp_path / "no.tsv", FIELDS)
    assert str(error.value) == f"{tmp_path}/no.tsv: expected {NAMED}, got nothing"
    whole = gzip.compress(b'{"text": "x", "label": 1}' * 50)
    for content in (b"plain text", whole[:-9], whole[:12] + b"\xff" * 20):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(data.UserError) as error:
            data.read_rows(tmp_path / "a.jsonl.gz", FIELDS)
        assert str(error.value).startswith(f"{tmp_path}/a.jsonl.gz: expected gzip data, got ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, text", [
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "", "label": 1}\n\n{"text": " \\n", "label": 0}\n'),
    ("a.tsv", "text\tlabel\na\t1\n\t1\n  \t0\n")])
def test_rows_with_an_empty_text_are_left_out_counted_and_said(tmp_path, name, text):
    path, said, checked = put(tmp_path, name, text), [], []
    check = lambda where, row: checked.append(where)
    assert data.read_rows(path, FIELDS, check, said.append) == [{"text": "a", "label": 1}]
    assert said == [f"{path}: 2 of 3 rows had an empty text and were left out"]
    # what is left out is not checked further
    assert checked == [f"{path}:{2 if name.endswith('tsv') else 1}"]
    rows = [json.dumps({"text": "a" if i % 2 else "", "label": 1}) for i in range(2000)]
    data.read_rows(put(tmp_path, "b.jsonl", "\n".join(rows)), FIELDS, say=said.append)
    assert said[1:] == [f"{tmp_path}/b.jsonl: 1,000 of 2,000 rows had an empty text and were left out"]


def test_empty_rows_shift_no_line_and_nothing_is_said_where_none_is_empty(tmp_path):
    said = []
    data.read_rows(put(tmp_path, "a.jsonl", '{"text": "a", "label": 1}\n'), FIELDS, say=said.append)
    assert said == []
    path = put(tmp_path, "b.jsonl", '{"text": "", "label": 1}\n\n{"text": "a", "label": "x"}\n')
    with pytest.raises(data.UserError, match=r"b.jsonl:3: label: expected int, got \"x\""):
        data.read_rows(path, FIELDS)


def test_what_may_be_missing_may_be_empty(tmp_path):
    fields = {"a": (("a",), str, None), "b": (("b",), list, []), "c": (("c",), float, 0.5)}
    rows = data.read_rows(put(tmp_path, "a.jsonl", '{"a": " ", "b": "", "c": null}\n{"a": null}\n'), fields)
    # an empty text is there, and empty
    assert rows == [{"a": "", "b": [], "c": 0.5}, {"a": None, "b": [], "c": 0.5}]


def test_find_file(tmp_path):
    with pytest.raises(data.UserError, match="train.jsonl, train.jsonl.gz, train.tsv"):
        data.find_file(tmp_path, "train")
    # each goes before the one written earlier
    for name in ("train.csv.gz", "train.csv", "train.tsv.gz", "train.tsv", "train.jsonl.gz", "train.jsonl"):
        (tmp_path / name).write_text("x")
        assert data.find_file(tmp_path, "train") == str(tmp_path / name)


def test_hub_offline_is_one_line():
    with pytest.raises(data.UserError) as error:
        data.read_hub("hub:nobody/nothing-here:plain", "train", FIELDS)
    text = str(error.value)
    assert text.startswith("hub:nobody/nothing-here:plain: train: expected a data set") and "\n" not in text


def test_hub_rows_and_columns(monkeypatch):
    import datasets

    asked = []

    def load_dataset(id, config, split):
        asked.append((id, config, split))
        return datasets.Dataset.from_list([{"sentence": "fine", "label": 1, "idx": 7}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.read_hub("hub:a/b:c", "test", FIELDS) == [{"text": "fine", "label": 1}]
    data.read_hub("hub:a/b", "test", FIELDS)
    assert asked == [("a/b", "c", "test"), ("a/b", None, "test")]
    with pytest.raises(data.UserError) as error:
        data.read_hub("hub:a/b", "test", {"document": (("document", "article"), str)})
    expected = "expected a column named document or article, got columns sentence, label, idx"
    assert str(error.value) == f"hub:a/b: document: {expected}"


def test_hub_rows_with_an_empty_text_are_left_out_too(monkeypatch):
    import datasets

    texts, said = ["a", " ", "b", ""], []
    monkeypatch.setattr(datasets, "load_dataset", lambda id, config, split: datasets.Dataset.from_list(
        [{"sentence": text, "label": 1, "\x9bbell": 0} for text in texts]))
    assert [row["text"] for row in data.read_hub("hub:a/b", "test", FIELDS, say=said.append)] == ["a", "b"]
    assert said == ["hub:a/b:test: 2 of 4 rows had an empty text and were left out"]
    texts[:] = [""]
    with pytest.raises(data.UserError,
                       match="hub:a/b:test: expected at least one row, got 1 with an empty text"):
        data.read_hub("hub:a/b", "test", FIELDS)
    with pytest.raises(data.UserError) as error:  # names of columns are data as well
        data.read_hub("hub:a/b", "test", {"document": (("document",), str)})
    assert str(error.value).isprintable() and "\\x9bbell" in str(error.value)


def test_whatever_a_message_quotes_is_one_printable_line():
    for value in ("a\nb", "\x1b[31m", "\x9b31m", "\u202egnp", "\u2028", "\ud800", {"\x85": ["\x7f"]},
                  ["\u202e"] * 99):
        assert data.show(value).isprintable() and len(data.show(value)) <= 60
        assert data.first_line(ValueError(value)).isprintable()
    assert data.show("naïve 日本 🙂") == '"naïve 日本 🙂"' and data.show("x" * 58) == '"' + "x" * 58 + '"'
    assert data.show("x" * 59) == '"' + "x" * 56 + "..."
    # python 3.10 writes it, later ones refuse
    assert data.show(10**5000) == "int" or len(data.show(10**5000)) == 60


REAL_TSV = [("agnews/test.tsv", 7600), ("sst-2/16-13/train.tsv", 32), ("sst-2/test.tsv", 1821)]


@pytest.mark.parametrize("path, rows", REAL_TSV)
def test_real_tsv(path, rows):
    assert len(data.read_rows(real("fewshot", "16-shot", *path.split("/")), FIELDS)) == rows


def test_real_jsonl_and_bpe():
    path = data.find_file(real("summarization", "acl_titles"), "validation")
    texts = [row["text"] for row in data.read_rows(path, {"text": (("document",), str)})]
    tok = data.train_bpe(texts, size=1000)
    assert len(texts) == 1000 and tok.size == 1000
    assert [tok.decode(tok.encode(text)) for text in texts] == texts
    # more than two characters a token
    assert sum(len(tok.encode(t)) for t in texts) < 0.5 * sum(map(len, texts))


# Rectangles


def test_pad_by_hand():
    tokens, mask = data.pad([[5, 0, 7], [], [9]])
    assert tokens.dtype == torch.int64 and tokens.tolist() == [[5, 0, 7], [0, 0, 0], [9, 0, 0]]
    # id 0 counts inside
    assert mask.dtype == torch.bool and mask.int().tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]


def test_pad_to_a_length():
    tokens, mask = data.pad([[1, 2, 3], [4]], length=2)
    assert tokens.tolist() == [[1, 2], [4, 0]] and mask.int().tolist() == [[1, 1], [1, 0]]
    tokens, mask = data.pad([[1]], length=3)
    assert tokens.tolist() == [[1, 0, 0]] and mask.int().tolist() == [[1, 0, 0]]


def test_pad_of_nothing():
    assert data.pad([])[0].shape == data.pad([])[1].shape == (0, 0)
    assert data.pad([], length=4)[0].shape == data.pad([], length=4)[1].shape == (0, 4)
    assert data.pad([[], []])[0].shape == data.pad([[], []])[1].shape == (2, 0)


def test_lengths_to_mask_of_any_shape():
    mask = data.lengths_to_mask(torch.tensor([[0, 2], [3, 1]]), 3)  # (B, K) -> (B, K, T)
    assert mask.int().tolist() == [[[0, 0, 0], [1, 1, 0]], [[1, 1, 1], [1, 0, 0]]]
    assert data.lengths_to_mask([1], 2).tolist() == [[True, False]]


# What goes into a task's tensors


def test_cuts_at_either_side_are_counted_and_said():
    rows, said = [[1, 2, 3], [4], [5, 6]], []
    assert data.cut(rows, 2, "end", "train", "documents", said.append) == [[1, 2], [4], [5, 6]]
    assert data.cut(rows, 2, "start", "test", "prompts", said.append) == [[2, 3], [4], [5, 6]]
    assert data.cut(rows, 3, "start", "test", "prompts", said.append) == rows
    assert said == ["train: 1 of 3 documents are longer than 2 tokens and were cut at their end",
                    "test: 1 of 3 prompts are longer than 2 tokens and were cut at their start"]


# Texts that may not be read


@pytest.mark.parametrize("text, private, taken", [
    # equal but for case and spaces
    ("a fine film", "a fine film", True), ("A  Fine\tfilm", " a fine FILM ", True),
    # a part, at any place, however short
    ("fine film", "a fine film indeed", True), ("film", "a fine film", True),
    # not contiguous; not whole words
    ("a fine film", "a fine day , a film", False), ("in film", "a fine film", False),
    # whoever reads it has read the private text
    ("so this is a fine film indeed", "this is a fine film", True),
    # four words, not two
    ("this is a fine film", "this is a fine", True), ("a fine film", "fine film", False),
    ("this is a fine film", "this is a film", False)])
def test_texts_that_a_private_text_gives_away(text, private, taken):
    assert data.overlapping([text, "something else"], [private, "another one"]) == [taken, False]


def test_parts_are_found_as_by_comparing_all_with_all():
    draw = random.Random(0)
    some = lambda n, most: [tuple(draw.choices("abc", k=draw.randint(1, most))) for _ in range(n)]
    wholes, parts = some(150, 9), set(some(150, 9))
    holds = lambda whole, part: any(whole[i:i + len(part)] == part for i in range(len(whole) - len(part) + 1))
    assert data.parts_of(wholes, parts) == [{part for part in parts if holds(whole, part)}
                                            for whole in wholes]
    own, private = [" ".join(x) for x in wholes], [" ".join(x) for x in parts]
    assert data.overlapping(own, private) == [
        any(holds(p, w) or len(p) >= 4 and holds(w, p) for p in parts) for w in wholes]


def test_real_world_and_few_shot_sets_share_little():
    read = lambda *parts: [
        row["text"] for row in data.read_rows(real(*parts), {"text": (("text", "sentence"), str)})]
    texts = read("worlds", "sst2_agnews", "texts.jsonl.gz")
    for name, most in (("sst-2", 30), ("agnews", 40)):
        few = "fewshot", "16-shot", name
        private = read(*few, "16-13", "train.tsv") + read(*few, "16-13", "dev.tsv") + read(*few, "test.tsv")
        assert 0 < sum(data.overlapping(texts, private)) < most
    assert sum(data.overlapping(texts, private + texts[:50])) > 50
