"""Foreign weights in and out. What a folder means is computed here once more, slowly, from its files alone;
where the library transformers is installed (with a torch that it takes) it has to agree too."""
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F

import sample
import train
import weights
from data import gpt2_tokenizer, train_bpe, word_tokenizer
from model import Config, Transformer, generate
from reference import real
from reward import bound
from stubs import small_worlds
from support.log import UserError
from support.tensors import read_tensors, write_safetensors
from support.tokenizer import folder_tokenizer
from tasks.worlds import embedded_world
from weights import export, from_pretrained

BOTH = pytest.mark.parametrize("rotary", [False, True], ids=["gpt2", "gpt_neox"])
BPE = train_bpe(["the cat sat on the mat " * 9 + "thermal mathematics " * 3, "naïve café 123 it's"], 290)


def random_model(tokenizer=BPE, rotary=False, seed=0, **sizes):
    """A small net whose every weight is random, biases and norms too."""
    torch.manual_seed(seed)
    small = dict(n_ctx=48, n_layer=2, n_head=4, n_embd=32)
    model = Transformer(Config(tokenizer.size, **small | sizes, rotary=rotary)).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids) @ model.head.t()


def ids(model, b=3, t=11):
    return torch.randint(model.config.vocab_size, (b, t), generator=torch.Generator().manual_seed(5))


def change(folder, **keys):
    """Other settings in a folder's config.json; None takes one out."""
    path = folder / "config.json"
    now = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({k: x for k, x in now.items() if x is not None}))


def rewrite(folder, **tensors):
    """Other tensors in a folder's file; None takes one out. Dots of names are double underlines here."""
    path = folder / "model.safetensors"
    now = read_tensors(path) | {k.replace("__", "."): x for k, x in tensors.items()}
    write_safetensors(path, {k: x for k, x in now.items() if x is not None})


# ------------------------------------------------------------------------------- what a folder says


def folder_logits(folder, tokens):
    """Tokens (T,) -> (T, V) from config.json and model.safetensors, one head at a time."""
    c, w = json.loads((folder / "config.json").read_text()), read_tensors(folder / "model.safetensors")
    gpt2 = c["model_type"] == "gpt2"
    w = {k.split(".", 1)[1]: x.double() for k, x in w.items()}
    turn = (lambda x: x.t()) if gpt2 else (lambda x: x)  # Conv1D
    linear = lambda x, name: F.linear(x, turn(w[name + ".weight"]), w[name + ".bias"])
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-5)
    h = c["n_head" if gpt2 else "num_attention_heads"]
    names = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj") if gpt2 else (
        "input_layernorm", "attention.query_key_value", "attention.dense", "post_attention_layernorm",
        "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    embedding = w["wte.weight" if gpt2 else "embed_in.weight"]
    t = len(tokens)
    x = embedding[tokens] + (w["wpe.weight"][:t] if gpt2 else 0)
    d = x.shape[1] // h
    for i in range(c["n_layer" if gpt2 else "num_hidden_layers"]):
        ln_1, qkv, proj, ln_2, fc, out = (f"{'h' if gpt2 else 'layers'}.{i}.{name}" for name in names)
        y, found = linear(norm(x, ln_1), qkv), []
        for j in range(h):
            if gpt2:  # all queries, then all keys, then all values
                q, k, v = (y[:, s * h * d + j * d:s * h * d + (j + 1) * d] for s in range(3))
            else:  # head by head
                q, k, v = y[:, 3 * j * d:3 * (j + 1) * d].split(d, 1)
                q, k = halves_turned(q), halves_turned(k)
            seen = (q @ k.t() / math.sqrt(d)).masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
            found.append(seen.softmax(1) @ v)
        x = x + linear(torch.cat(found, 1), proj)
        x = x + linear(F.gelu(linear(norm(x, ln_2), fc), approximate="tanh" if gpt2 else "none"), out)
    return norm(x, "ln_f" if gpt2 else "final_layer_norm") @ embedding.t()


def halves_turned(x):
    """Channel i with channel i + d/2, by position / 10000^(2i/d)."""
    t, d = x.shape
    angle = torch.arange(t)[:, None].double() / 10000 ** (torch.arange(0, d, 2).double() / d)
    a, b = x[:, :d // 2], x[:, d // 2:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), 1)


@BOTH
def test_what_is_exported_means_the_same_to_whoever_reads_the_files(rotary, tmp_path):
    model = random_model(rotary=rotary)
    export(model, BPE, tmp_path)
    tokens = ids(model)[0]
    torch.testing.assert_close(folder_logits(tmp_path, tokens).float(), logits(model, tokens[None])[0],
                               atol=1e-4, rtol=0)


@BOTH
def test_what_is_exported_reads_back_to_the_bit(rotary, tmp_path):
    model = random_model(rotary=rotary)
    export(model, BPE, tmp_path)
    found = from_pretrained(tmp_path)
    assert found.config == model.config and all(p.requires_grad for p in found.parameters())
    for name, x in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], x), name
    assert folder_tokenizer(tmp_path).state() == BPE.state()


def test_names_with_and_without_prefix_buffers_and_a_bin_are_all_the_same_weights(tmp_path):
    model = random_model()
    export(model, BPE, tmp_path)
    tensors = read_tensors(tmp_path / "model.safetensors")
    bare = {k.removeprefix("transformer."): x for k, x in tensors.items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.1.attn.masked_bias": torch.tensor(-1e4),
             "lm_head.weight": bare["wte.weight"].clone()}
    write_safetensors(tmp_path / "model.safetensors", bare)
    assert torch.equal(logits(from_pretrained(tmp_path), ids(model)), logits(model, ids(model)))
    os.remove(tmp_path / "model.safetensors")
    torch.save(bare, tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(from_pretrained(tmp_path), ids(model)), logits(model, ids(model)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_read_as_float32(dtype, tmp_path):
    model = random_model().to(dtype)
    export(model, BPE, tmp_path)
    found = from_pretrained(tmp_path)
    for name, x in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], x.float()), name


def test_rows_that_others_padded_the_vocabulary_with_are_not_read(tmp_path):
    model = random_model()
    export(model, BPE, tmp_path)
    wte = model.wte.weight.detach()
    rewrite(tmp_path, transformer__wte__weight=torch.cat((wte, torch.full((14, 32), 9.0))))
    change(tmp_path, vocab_size=BPE.size + 14)
    assert torch.equal(from_pretrained(tmp_path).head, wte)


def test_a_compact_tokenizer_takes_its_own_rows(tmp_path):
    model, compact = random_model(), BPE.compact([" the cat"])
    export(model, BPE, tmp_path)
    found = from_pretrained(tmp_path, compact)
    assert torch.equal(found.head, model.head[compact.kept]) and found.config.vocab_size == compact.size
    with pytest.raises(UserError, match="its tokens are not those of the tokenizer word"):
        from_pretrained(tmp_path, word_tokenizer(["the"]))


def test_a_compact_vocabulary_goes_out_and_in_as_it_is_and_has_no_form_of_the_hub(tmp_path):
    compact = BPE.compact([" the cat"])
    model = random_model(compact)
    export(model, compact, tmp_path)
    assert torch.equal(from_pretrained(tmp_path, compact).head, model.head)
    assert not (tmp_path / "tokenizer.json").exists()
    with pytest.raises(UserError, match="expected an embedding of the"):
        from_pretrained(tmp_path, BPE)  # its rows are not all there


@BOTH
def test_fewer_positions_are_taken_and_more_are_refused_with_the_number(rotary, tmp_path):
    model = random_model(rotary=rotary)
    export(model, BPE, tmp_path)
    short = from_pretrained(tmp_path, n_ctx=20)
    assert short.config.n_ctx == 20 and torch.equal(logits(short, ids(model)), logits(model, ids(model)))
    with pytest.raises(UserError, match="has 48 positions, and the run needs 49"):
        from_pretrained(tmp_path, n_ctx=49)


def test_reading_weights_draws_nothing(tmp_path):
    export(random_model(), BPE, tmp_path)
    before = torch.get_rng_state()
    from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("tensors, says", [
    (dict(transformer__h__1__ln_2__bias=None), "h.1.ln_2.bias: missing"),
    (dict(transformer__wpe__weight=None), "wpe.weight: missing"),
    (dict(transformer__h__2__ln_1__bias=torch.ones(32)), "h.2.ln_1.bias: a tensor that"),
    (dict(score__weight=torch.ones(2, 32)), "score.weight"),
    (dict(transformer__ln_f__bias=torch.ones(31)), r"ln_f.bias: expected shape \(32,\), got \(31,\)"),
    (dict(transformer__h__0__mlp__c_fc__weight=torch.ones(128, 32)), r"weight: expected shape \(32, 128\)"),
    (dict(transformer__ln_f__bias=torch.full((32,), math.nan)), "ln_f.bias: expected finite"),
    (dict(transformer__ln_f__bias=torch.ones(32, dtype=torch.int64)), "ln_f.bias: expected finite"),
    (dict(lm_head__weight=torch.ones(BPE.size, 32)), "lm_head.weight: expected a head tied"),
    (dict(ln_f__bias=torch.ones(32)), "ln_f.bias: comes twice"),
])
def test_every_tensor_that_is_missing_unused_or_misshapen_is_named(tensors, says, tmp_path):
    export(random_model(), BPE, tmp_path)
    rewrite(tmp_path, **tensors)
    with pytest.raises(UserError, match=says):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("rotary, keys, says", [
    (False, dict(model_type="bert"), "model_type: expected one of gpt2, gpt_neox, got bert"),
    (False, dict(activation_function="relu"), "activation_function: expected gelu_new, got relu"),
    (False, dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    (False, dict(n_inner=64), "n_inner: expected 4 x the width = 128, got 64"),
    (False, dict(n_layer=10 ** 9), "n_layer: expected a whole number from 1 to 1000"),
    (False, dict(n_embd="32"), "n_embd: expected a whole number"),
    (False, dict(n_embd=2 ** 27), "model.safetensors: wte.weight: expected shape"),
    (False, dict(n_head=5), "no even multiple of 5 heads"),
    (False, dict(n_positions=None), "n_positions: expected a whole number"),
    (True, dict(use_parallel_residual=True), "use_parallel_residual: expected False, got True"),
    (True, dict(use_parallel_residual=None), "use_parallel_residual: expected False, got True"),
    (True, dict(rope_parameters={"partial_rotary_factor": 0.25}), "rotary_pct: expected 1.0, got 0.25"),
    (True, dict(rope_parameters={"rope_type": "yarn"}), "rope_scaling: expected None, got yarn"),
    (True, dict(tie_word_embeddings=False), "tie_word_embeddings: expected True"),
])
def test_a_model_that_ours_is_not_is_refused_by_the_setting(rotary, keys, says, tmp_path):
    export(random_model(rotary=rotary), BPE, tmp_path)
    change(tmp_path, **keys)
    with pytest.raises(UserError, match=says):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\udcff"])
def test_a_config_that_is_no_json_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="config.json: expected"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("state", [
    [], {}, {"pattern": "(a+)+b"}, BPE.state() | {"ranks": ["ab"]}, BPE.state() | {"kept": [10 ** 6]},
    {"name": "x", "pattern": BPE.pattern, "ranks": ["a", "b"], "kept": [0, 1, 2]},
    BPE.state() | {"pattern": "(x+x+)+y"}])
def test_a_tokenizer_that_is_none_is_one_line(state, tmp_path):
    (tmp_path / "tokens.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="tokens.json: expected a tokenizer"):
        folder_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of huggingface_hub in an empty folder, and no network."""
    hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")

    def nothing(*_, **__):
        raise ConnectionError("no network\nhere")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "hf_hub_download", nothing)
    return tmp_path / "cache"


def test_without_a_network_one_line_says_which_file_goes_where_and_what_works_without(hub):
    place = hub / "models--me--tiny" / "snapshots" / "main"
    for name, flag, without in (("config.json", "init_from", "scratch"), ("config.json", "judge", "world")):
        with pytest.raises(UserError) as error:
            from_pretrained("me/tiny", flag=flag)
        said = str(error.value)
        assert name in said and str(place) in said and f"--{flag} at {without}" in said and "\n" not in said


def test_a_file_that_was_put_there_by_hand_is_found(hub, tmp_path):
    model, place = random_model(), hub / "models--me--tiny" / "snapshots" / "main"
    export(model, BPE, place)
    with pytest.raises(UserError, match="vocab.json"):
        from_pretrained("me/tiny")
    for name in ("vocab.json", "merges.txt"):  # tokens.json goes before them
        (place / name).write_text("")
    assert torch.equal(from_pretrained("me/tiny").head, model.head)


@pytest.mark.parametrize("source, says", [
    ("resum", "did you mean resume?"), ("scrach", "did you mean scratch?"),
    ("a/b/c", "expected a folder"), ("../nothing", "expected a folder")])
def test_a_source_that_is_neither_is_one_line(source, says, hub):
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        from_pretrained(source)


# ------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def library():
    """transformers, where it is installed and takes this torch."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = pytest.importorskip("transformers")
    if not found.utils.is_torch_available():
        pytest.skip(f"this transformers ({found.__version__}) takes no torch {torch.__version__}")
    found.logging.set_verbosity_error()
    return found


def theirs(library, rotary, **more):
    """A random model of the library, every weight of it random."""
    torch.manual_seed(3)
    if rotary:
        sizes = dict(vocab_size=BPE.size, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                     intermediate_size=128, max_position_embeddings=40, bos_token_id=0, eos_token_id=0)
        form = dict(rotary_pct=1.0, use_parallel_residual=False, tie_word_embeddings=True)
        model = library.GPTNeoXForCausalLM(library.GPTNeoXConfig(**sizes, **form, **more))
    else:
        sizes = dict(vocab_size=BPE.size, n_embd=32, n_layer=3, n_head=2, n_positions=40, bos_token_id=0,
                     eos_token_id=0)
        model = library.GPT2LMHeadModel(library.GPT2Config(**sizes, **more))
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return model.eval()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_of_the_library_has_the_same_logits_here(library, rotary, dtype, tmp_path):
    theirs(library, rotary).to(dtype).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path).eval()
    other = library.AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
    if rotary:  # its angles, no weights, were rounded with the rest
        other = library.GPTNeoXForCausalLM(other.config).eval()
        other.load_state_dict(read_tensors(tmp_path / "model.safetensors"), strict=False)
    with torch.no_grad():
        want = other(ids(model)).logits
    torch.testing.assert_close(logits(model, ids(model)), want, atol=1e-4, rtol=0)


@BOTH
def test_half_precision_agrees_with_the_library_to_its_own_rounding(library, rotary, tmp_path):
    other = theirs(library, rotary)
    other.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path).eval()
    exact, tokens = logits(model, ids(model)), ids(model)
    with torch.no_grad():
        want = other.bfloat16()(tokens).logits.float()
    got = logits(model.bfloat16(), tokens).float()
    ours, theirs_ = (got - exact).abs().max(), (want - exact).abs().max()
    assert ours < 2 * theirs_ and ours < 0.1 * exact.std() * 5  # both are bfloat16's error, not another model


@BOTH
def test_what_is_exported_has_the_same_logits_and_greedy_text_in_the_library(library, rotary, tmp_path):
    model = random_model(rotary=rotary)
    export(model, BPE, tmp_path)
    other = library.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = ids(model, 2, 7)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens), other(tokens).logits, atol=1e-4, rtol=0)
    plain = dict(attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=9, pad_token_id=0,
                 eos_token_id=None)
    want = other.generate(tokens, **plain)[:, 7:]
    cache = model.prefill(tokens[:, :-1], torch.ones(2, 6, dtype=torch.bool))
    for row in range(2):  # their last token opens what we write
        mine = cache.select(slice(row, row + 1))
        own = generate(model, int(tokens[row, -1]), 9, None, 1, mine, temperature=0)[0][0]
        assert own.tolist() == want[row].tolist()


TEXTS = ("the cat sat on the mat", " naïve café, 'tis 123 it's\n\n  mathematics ", "日本語 ~~ a\tb")


@pytest.mark.parametrize("tokenizer", [BPE, word_tokenizer(["the", "cat", "sat", "mathematics"])],
                         ids=["bpe", "word"])
def test_the_exported_tokenizer_has_the_same_ids_in_the_library(library, tokenizer, tmp_path):
    export(random_model(tokenizer), tokenizer, tmp_path)
    other = library.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert other(text).input_ids == tokenizer.encode(text)
        assert other.decode(tokenizer.encode(text)) == text
    assert other.eos_token_id == tokenizer.eot


def test_ids_with_gpt2s_own_files_are_the_librarys(library, tmp_path):
    folder, tokenizer = real("gpt2_bpe"), gpt2_tokenizer(real("gpt2_bpe"))
    for name, theirs_ in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / theirs_).symlink_to(os.path.join(folder, name))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    other = library.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert other(text).input_ids == tokenizer.encode(text)


# --------------------------------------------------------------------------------------------------- runs

SMALL = ("--threads 1 --device cpu --dtype float32 --policy_steps 2 --reward_first 2 --reward_steps 1 "
         "--curve_size 8 --candidates 8 --batch_size 4 --cache_dir cache")
PROMPT = SMALL + " --ask_again 2 --data texts"  # a random judge: no answer stands out
SUMMARIES = SMALL + " --task summarize --K 2 --sft_steps 0 --data pairs"
WORDS = word_tokenizer(embedded_world(n=300).words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of random weights that know the embedded world's words."""
    path = tmp_path_factory.mktemp("weights")
    export(random_model(WORDS, n_ctx=96, n_layer=1, n_head=2, n_embd=16), WORDS, path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with small data to run in."""
    small_worlds(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "pairs").mkdir()
    for name in ("train", "dev", "test"):
        rows = [f"{name} film {i} was {'superb' if i % 2 else 'dull'}\t{i % 2}" for i in range(8)]
        (tmp_path / "texts" / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
        pairs = [{"document": f"{name} the cat {i} sat on the mat", "summary": f"cat {i}"} for i in range(9)]
        (tmp_path / "pairs" / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in pairs))
    return tmp_path


def go(*words):
    assert train.main(" ".join(map(str, words)).split()) == 0


def refused(capsys, *words):
    with pytest.raises(SystemExit) as leave:
        train.main(" ".join(map(str, words)).split())
    assert leave.value.code == 2
    return capsys.readouterr().err


def checkpoint(run):
    return torch.load(f"{run}/ckpt.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_prompt_run_starts_from_weights_with_a_judge_of_weights_goes_out_and_on(folder, here):
    """Policy, reward and judge out of a folder; resumed to the bit; used; exported; and begun again from
    there."""
    start = f"{PROMPT} --candidates 4 --K 2 --init_from {folder} --judge {folder}"
    go(start, "--out_dir whole --policy_steps 3 --reward_every 1 --export out")
    go(start, "--out_dir parts --policy_steps 1 --reward_every 1")
    go("--init_from resume --out_dir parts --policy_steps 3")
    whole, parts = checkpoint("whole"), checkpoint("parts")
    for name in ("policy", "reward", "start_policy"):
        assert same(whole["nets"][name], parts["nets"][name]), name
    own = from_pretrained(folder).state_dict()
    assert same(whole["nets"]["start_policy"], own | {"wpe.weight": own["wpe.weight"][:64]})
    assert whole["sizes"]["policy"]["rotary"] is False and whole["sizes"]["policy"]["n_layer"] == 1
    config = json.loads((here / "parts" / "config.json").read_text())
    assert config["init_from"] == str(folder) and config["positions"] == "learned"
    assert same(from_pretrained("out").state_dict(), whole["nets"]["policy"])
    run = sample.load("whole", "cpu", lambda line: None)
    found = run.classify(["a lovely film", "a dull book"])
    prompt = run.prompt[None]
    model = from_pretrained(folder, WORDS).eval()
    for row, text in zip(found, ["a lovely film", "a dull book"]):  # "{text} {prompt}", and nothing between
        read = torch.cat((torch.tensor([WORDS.encode(" " + text)]), prompt), 1)
        answers = [WORDS.encode(" " + word)[0] for word in ("terrible", "great")]
        want = logits(model, read)[0, -1, answers].softmax(0)
        assert row["probabilities"] == pytest.approx(want.tolist(), abs=1e-5)
    go(f"{PROMPT} --candidates 4 --K 2 --init_from out --judge {folder} --policy_steps 1 --out_dir next")
    assert same(checkpoint("next")["nets"]["start_policy"], whole["nets"]["policy"])


def test_the_rewards_body_begins_as_the_policy_elsewhere_or_from_scratch(folder, here):
    small = random_model(WORDS, seed=1, n_ctx=96, n_layer=2, n_head=2, n_embd=8)
    export(small, WORDS, "small")
    still = f"{SUMMARIES} --init_from {folder} --reward_lr 0"
    body = lambda run: {k.removeprefix("body."): x for k, x in checkpoint(run)["nets"]["reward"].items()
                        if k.startswith("body.")}
    go(still, "--out_dir same")
    size = checkpoint("same")["sizes"]["policy"]
    tokenizer = sample.load("same", "cpu", lambda line: None).tokenizer
    own = from_pretrained(folder, tokenizer, size["n_ctx"]).state_dict()
    assert same(body("same"), own)
    go(still, "--out_dir other --reward_init small")
    assert same(body("other"), from_pretrained("small", tokenizer, size["n_ctx"]).state_dict())
    assert sample.load("other", "cpu", lambda line: None).reward.body.config.n_layer == 2
    go(still, "--out_dir fresh --reward_init scratch")
    assert body("fresh").keys() == own.keys() and not same(body("fresh"), own)


def test_the_default_net_goes_out_and_a_run_goes_on_from_it(here):
    """A compact tokenizer and rotary positions, as in every run without weights of others."""
    small = "--n_layer 1 --n_embd 16 --n_head 2"
    go(SUMMARIES, small, "--out_dir a --export out")
    go(SUMMARIES, "--init_from out --out_dir b")
    a, b = checkpoint("a"), checkpoint("b")
    assert same(a["nets"]["policy"], b["nets"]["start_policy"])
    assert {k: x for k, x in a["sizes"]["policy"].items()} == b["sizes"]["policy"]


def test_what_cannot_be_is_one_line_and_nothing_is_left(folder, here, capsys):
    start = f"{PROMPT} --init_from {folder} --judge {folder} --out_dir run"
    assert "--n_layer 3: the weights of" in refused(capsys, start, "--n_layer 3")
    assert "--positions rotary: the weights of" in refused(capsys, start, "--positions rotary")
    assert "--judge" in (said := refused(capsys, start, "--judge_context 200")) and "96 positions" in said
    rows = [{"document": f"the cat {i} " + "sat on the mat " * 30, "summary": f"cat {i}"} for i in range(40)]
    (here / "pairs" / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    long = f"{SUMMARIES} --init_from {folder} --out_dir run --max_document 90"
    assert "has 96 positions, and the run needs" in refused(capsys, long)
    assert "--judge" in refused(capsys, SUMMARIES, f"--judge {folder} --out_dir run")
    (here / "mine").mkdir()
    (here / "mine" / "letter.txt").write_text("dear")
    assert "holds files that are no weights (letter.txt)" in refused(capsys, start, "--export mine")
    assert "holds weights already" in refused(capsys, start, f"--export {folder}")
    assert sorted(os.listdir(here)) == ["cache", "mine", "pairs", "texts"]  # rows are kept, good as they are


def test_policy_mlp_trains_a_net_before_the_frozen_head_and_nothing_else(folder, here, capsys):
    go(f"{SUMMARIES} --init_from {folder} --policy mlp --objective mle --out_dir run")
    nets, size = checkpoint("run")["nets"], checkpoint("run")["sizes"]
    for name, x in nets["policy"].items():
        assert torch.equal(x, nets["start_policy"][name]) != name.startswith("adapter"), name
    assert nets["policy"]["adapter.0.weight"].shape == (2048, 16) and not size["reward"]["adapter"]
    run = sample.load("run", "cpu", lambda line: None)
    tokens = torch.tensor([[3, 1, 2]])
    plain = Transformer(Config(**size["policy"] | {"adapter": 0})).eval()
    plain.load_state_dict({k: x for k, x in nets["policy"].items() if not k.startswith("adapter")})
    w = {k: x for k, x in nets["policy"].items() if k.startswith("adapter")}
    with torch.no_grad():
        inner = F.relu(F.linear(plain(tokens), w["adapter.0.weight"], w["adapter.0.bias"]))
        want = F.linear(inner, w["adapter.2.weight"], w["adapter.2.bias"])
        torch.testing.assert_close(run.policy(tokens), want)
    go(f"{SUMMARIES} --init_from {folder} --policy mlp --objective mle --out_dir half --policy_steps 1")
    go("--init_from resume --out_dir half --policy_steps 2")
    assert same(checkpoint("half")["nets"]["policy"], nets["policy"])
    assert "--policy mlp" in refused(capsys, f"{SUMMARIES} --policy mlp --export out")


def test_ask_stands_between_document_and_summary_in_training_and_in_use(folder, here):
    """"{document} TL;DR: {summary}": the policy's and the reward's input, token by token."""
    # no blanks in what is asked: `go` cuts at them
    go(f"{SUMMARIES} --init_from {folder} --ask the:was:a --no-foreseen --out_dir run")
    run = sample.load("run", "cpu", lambda line: None)
    encode = run.tokenizer.encode
    asked = encode(" the:was:a")
    assert len(asked) > 2 and run.reward.start == run.task.start == asked[-1]
    text = "train the cat 0 sat on the mat"
    written = run.write([text], max_new_tokens=1)[0]["outputs"][0]
    read = torch.tensor([encode(" " + text) + asked])
    with torch.no_grad():
        best = int((run.policy(read)[0, -1] @ run.policy.head.t()).argmax())
        want = run.reward.mlp(run.reward.body(torch.tensor([[*read[0].tolist(), best]])))[0, -1, 0]
    assert written["tokens"] == run.tokenizer.pieces([best])
    assert written["rewards"][0] == pytest.approx(bound(want).item(), abs=1e-4)
