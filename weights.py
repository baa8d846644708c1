"""Foreign weights in and out: folders in the form of the Hugging Face hub, without a model library.

    model = from_pretrained("distilgpt2")          a hub id, or a folder
    export(model, tokenizer, "out/mine")           config.json, model.safetensors, tokenizer files

`model.Transformer` is two architectures of the hub, to the last digit but rounding: with learned positions it
is GPT-2's, and with rotary ones, the default here, a GPT-NeoX whose two halves of a block follow one another,
with a tied head. So what is exported loads in transformers with the same logits, and what is read is one of
the two or is refused: every setting of config.json that the two do not have, and every tensor that is
missing, unused, of another shape or not finite, is an error that names it.

The rest is bookkeeping. GPT-2's matrices are stored the other way round (Conv1D). GPT-NeoX stores queries,
keys and values head by head, and turns channel i together with channel i + d/2 where ours turns neighbours.
Rows of the embedding are those of the tokenizer in use: what others padded a vocabulary with is not read.
"""
import json
import os
import re
from dataclasses import asdict, dataclass, replace

import torch
from torch.overrides import TorchFunctionMode

from model import Config, Transformer
from support.files import read_json, write_whole
from support.hub import WEIGHTS, fetch
from support.log import UserError, visible
from support.tensors import read_tensors, write_safetensors
from support.tokenizer import folder_tokenizer, has_tokenizer, write_tokenizer

# What `export` writes beside them.
OTHERS = "config.json", "tokens.json", "tokenizer.json", "tokenizer_config.json"
MOST = {"n_layer": 1000}  # of a size that config.json asks for: a net is made before its tensors are seen
LARGEST = 2 ** 27  # of all other sizes
HUB_FORM = "a folder in the hub's form (config.json, model.safetensors)"
LONGEST = 10 ** 7  # bytes of a config.json


@dataclass(frozen=True)
class Family:
    """A model_type of the hub, and which of its forms `model.Transformer` is.

    sizes    {field of model.Config: key of config.json}
    fixed    {key: (what ours computes, what a config.json without the key means)}
    said     {key: value} of an exported config.json beyond that
    outer, inner  {ours: theirs} of modules outside of the blocks and of those in a block
    ignored  names that hold no weights
    """
    kind: str
    architecture: str
    rotary: bool
    prefix: str
    block: str
    sizes: dict
    fixed: dict
    said: dict
    outer: dict
    inner: dict
    ignored: str

    def names(self, n_layer):
        """{ours: theirs}: the name of every tensor."""
        modules = dict(self.outer)
        for i in range(n_layer):
            modules |= {f"blocks.{i}.{ours}": self.block.format(i) + x for ours, x in self.inner.items()}
        parts = lambda ours: ("weight",) if ours in ("wte", "wpe") else ("weight", "bias")
        return {f"{ours}.{part}": f"{x}.{part}" for ours, x in modules.items() for part in parts(ours)}


GPT2 = Family(
    kind="gpt2", architecture="GPT2LMHeadModel", rotary=False, prefix="transformer.", block="h.{}.",
    sizes={"vocab_size": "vocab_size", "n_ctx": "n_positions", "n_layer": "n_layer", "n_head": "n_head",
           "n_embd": "n_embd"},
    fixed={"activation_function": ("gelu_new", "gelu_new"), "layer_norm_epsilon": (1e-5, 1e-5),
           "scale_attn_weights": (True, True), "scale_attn_by_inverse_layer_idx": (False, False),
           "add_cross_attention": (False, False), "tie_word_embeddings": (True, True)},
    said={"attn_pdrop": 0.0, "embd_pdrop": 0.0},
    outer={"wte": "wte", "wpe": "wpe", "ln_f": "ln_f"},
    inner={"ln_1": "ln_1", "ln_2": "ln_2", "qkv": "attn.c_attn", "proj": "attn.c_proj", "fc": "mlp.c_fc",
           "out": "mlp.c_proj"},
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)")
NEOX = Family(
    kind="gpt_neox", architecture="GPTNeoXForCausalLM", rotary=True, prefix="gpt_neox.", block="layers.{}.",
    sizes={"vocab_size": "vocab_size", "n_ctx": "max_position_embeddings", "n_layer": "num_hidden_layers",
           "n_head": "num_attention_heads", "n_embd": "hidden_size"},
    fixed={"hidden_act": ("gelu", "gelu"), "layer_norm_eps": (1e-5, 1e-5), "attention_bias": (True, True),
           "use_parallel_residual": (False, True), "tie_word_embeddings": (True, False),
           "rotary_pct": (1.0, 0.25), "rotary_emb_base": (10000, 10000), "rope_scaling": (None, None)},
    # the rotation once more, as later versions of transformers ask for it
    said={"attention_dropout": 0.0,
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 1.0}},
    outer={"wte": "embed_in", "ln_f": "final_layer_norm"},
    inner={"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "qkv": "attention.query_key_value",
           "proj": "attention.dense", "fc": "mlp.dense_h_to_4h", "out": "mlp.dense_4h_to_h"},
    ignored=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|rotary_emb\.inv_freq")
FAMILIES = {family.kind: family for family in (GPT2, NEOX)}
HEADS = "lm_head.weight", "embed_out.weight"  # where a file holds the tied head once more

# -------------------------------------------------------------------------------------- tensors, name by name


def stored(family, name, x, n_head):
    """A tensor of ours as the family stores it."""
    if family is GPT2 and re.fullmatch(r"blocks\.\d+\.(qkv|proj|fc|out)\.weight", name):
        return x.t()
    if family is not NEOX or ".qkv." not in name:
        return x
    q, k, v = x.unflatten(0, (3, n_head, -1))  # (H, d) and the input's D, of a bias nothing, each
    apart = lambda y: y.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)  # neighbours -> halves
    return torch.stack((apart(q), apart(k), v), 1).flatten(0, 2)


def loaded(family, name, x, n_head):
    """The inverse of `stored`."""
    if family is not NEOX or ".qkv." not in name:
        return stored(family, name, x, n_head)  # a transpose is its own inverse
    q, k, v = x.unflatten(0, (n_head, 3, -1)).unbind(1)
    together = lambda y: y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # halves -> neighbours
    return torch.stack((together(q), together(k), v)).flatten(0, 2)


def plain_names(tensors, family, path):
    """{name without the family's prefix: tensor}, without what holds no weights."""
    found = {}
    for name, x in tensors.items():
        short = name.removeprefix(family.prefix)
        if short in found:
            raise UserError(f"{path}: {visible(name)}: comes twice, with and without {family.prefix}")
        if not re.fullmatch(family.ignored, short):
            found[short] = x
    return found


def taken(found, names, shapes, path):
    """The tensors of `names` out of `found` {their name: tensor}, in float32; UserError unless all are there,
    of their shapes and finite, and nothing is left.
    shapes  {our name: shape as it is stored}
    """
    state = {}
    for name, theirs in names.items():
        x = found.pop(theirs, None)
        if x is None:
            raise UserError(f"{path}: {theirs}: missing, so this is not the model of its config.json")
        if x.shape != shapes[name]:
            raise UserError(f"{path}: {theirs}: expected shape {tuple(shapes[name])}, got {tuple(x.shape)}")
        if not (x.is_floating_point() and x.isfinite().all()):
            raise UserError(f"{path}: {theirs}: expected finite numbers, got others")
        state[name] = x.float()
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(f"{path}: {visible(next(iter(found)))}: a tensor that this model has no use for"
                        f"{more}")
    return state


# ------------------------------------------------------------------------------------------------------ in


def from_pretrained(source, tokenizer=None, n_ctx=None, dropout=0.0, flag="init_from"):
    """The Transformer of a hub id or folder, in float32.

    tokenizer  whose ids the rows of the embedding are to be; default: those of the folder's own tokenizer, or
               all rows where it has none
    n_ctx      positions that are needed, at most those of the folder (the default)
    flag       who asks, for the messages. UserError's one line for whatever is wrong
    """
    folder = fetch(source, flag)
    family, config = read_config(folder)
    check_positions(config, n_ctx, source, flag)
    path = weights_file(folder)
    shapes = {name: stored(family, name, x, config.n_head).shape
              for name, x in undrawn(lambda: Transformer(config)).state_dict().items()}
    found = plain_names(read_tensors(path), family, path)
    head = {name: x for name in HEADS if (x := found.pop(name, None)) is not None}
    state = taken(found, family.names(config.n_layer), shapes, path)
    for name, x in head.items():
        if not torch.equal(x.float(), state["wte.weight"]):
            raise UserError(f"{path}: {name}: expected a head tied to the embedding, got other weights")
    state = {name: loaded(family, name, x, config.n_head).contiguous() for name, x in state.items()}
    state["wte.weight"] = state["wte.weight"][rows_of(folder, tokenizer, config.vocab_size)]
    if not config.rotary:
        state["wpe.weight"] = state["wpe.weight"][:n_ctx].clone()
    config = replace(config, vocab_size=len(state["wte.weight"]), n_ctx=n_ctx or config.n_ctx,
                     dropout=dropout)
    model = undrawn(lambda: Transformer(config))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def undrawn(make):
    """The net that `make()` makes, as shapes alone: nothing is drawn, and nothing takes memory."""
    with torch.device("meta"), Undrawn():
        return make()


class Undrawn(TorchFunctionMode):
    """Inside of it torch.nn.init leaves tensors as they are: on the device "meta" its normal_ would import
    the compiler, for seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def read_config(folder):
    """(Family, model.Config) of a folder's config.json. UserError for a model that ours is not."""
    path = os.path.join(folder, "config.json")
    given = read_json(path, HUB_FORM, LONGEST)
    family = FAMILIES.get(str(given.get("model_type")))
    if family is None:
        raise UserError(f"{path}: model_type: expected one of {', '.join(FAMILIES)}, got "
                        f"{visible(str(given.get('model_type'))[:40])}")
    sizes = {field: whole(path, key, given.get(key), MOST.get(field, LARGEST))
             for field, key in family.sizes.items()}
    rope = given.get("rope_parameters")
    if isinstance(rope, dict):  # where later versions of transformers keep it
        said = {"rotary_pct": rope.get("partial_rotary_factor"), "rotary_emb_base": rope.get("rope_theta")}
        given = given | {key: x for key, x in said.items() if x is not None}
        if rope.get("rope_type", "default") != "default":
            given["rope_scaling"] = rope["rope_type"]
    for key, (have, usual) in family.fixed.items():
        if (got := given.get(key, usual)) != have:
            raise UserError(f"{path}: {key}: expected {have}, got {visible(str(got)[:40])}")
    for key in ("n_inner", "intermediate_size"):
        if given.get(key) not in (None, 4 * sizes["n_embd"]):
            raise UserError(f"{path}: {key}: expected 4 x the width = {4 * sizes['n_embd']}, got "
                            f"{visible(str(given[key])[:40])}")
    if sizes["n_embd"] % (2 * sizes["n_head"]):
        raise UserError(f"{path}: a width of {sizes['n_embd']} is no even multiple of {sizes['n_head']} "
                        f"heads")
    return family, Config(**sizes, rotary=family.rotary)


def whole(path, key, x, most):
    """A size of config.json, checked."""
    if type(x) is not int or not 1 <= x <= most:
        raise UserError(f"{path}: {key}: expected a whole number from 1 to {most}, got "
                        f"{visible(str(x)[:40])}")
    return x


def check_positions(config, n_ctx, source, flag):
    """UserError where more positions are needed than the weights were trained with."""
    if n_ctx is not None and n_ctx > config.n_ctx:
        fewer = "--judge_context" if flag == "judge" else "--max_document or --max_summary"
        raise UserError(f"--{flag} {source}: has {config.n_ctx} positions, and the run needs {n_ctx} (fewer "
                        f"by {fewer})")


def rows_of(folder, tokenizer, vocab):
    """Which rows of an embedding of `vocab` rows are the ids of a tokenizer: an index. UserError where its
    tokens are others than the folder's."""
    own = folder_tokenizer(folder) if has_tokenizer(folder) else None
    if own is None and tokenizer is None:
        return slice(None)
    tokenizer = own if tokenizer is None else tokenizer
    if own is not None and own.ranks != tokenizer.ranks:
        raise UserError(f"{folder}: its tokens are not those of the tokenizer {tokenizer.name} in use (leave "
                        f"--tokenizer out, and the folder's own is taken)")
    full = range(len(tokenizer.ranks) + 1) if own is None else own.kept
    row = {number: i for i, number in enumerate(full)}
    if not set(tokenizer.kept) <= row.keys() or len(full) > vocab:
        raise UserError(f"{folder}: expected an embedding of the {len(full):,} tokens in use, got {vocab:,} "
                        f"rows, or others")
    return torch.tensor([row[number] for number in tokenizer.kept])


def weights_file(folder):
    """The file of a folder's weights."""
    found = [path for name in WEIGHTS if os.path.isfile(path := os.path.join(folder, name))]
    if not found:
        raise UserError(f"{folder}: expected {' or '.join(WEIGHTS)}, got neither")
    return found[0]


# ------------------------------------------------------------------------------------------------------ out


def check_free(folder, overwrite):
    """UserError for a folder that an export would not be alone in, or another export with `overwrite` not
    given: before anything is trained."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--export {folder}: expected a folder, got a file")
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if there - {*WEIGHTS, *OTHERS}:
        raise UserError(f"--export {folder}: holds files that are no weights "
                        f"({', '.join(sorted(there - {*WEIGHTS, *OTHERS})[:3])}): choose another folder")
    if there and not overwrite:
        raise UserError(f"--export {folder}: holds weights already (replace them with --overwrite)")


def export(model, tokenizer, folder):
    """A Transformer and its tokenizer as a folder that transformers loads with the same logits, and that
    --init_from, --reward_init and --judge take.

    config.json, model.safetensors, tokens.json (the tokenizer as this project reads it) and, where every
    token has its own id, tokenizer.json and tokenizer_config.json as transformers reads it. What is there
    under these names is replaced; config.json comes last, so that its presence means the whole.
    """
    c, family = model.config, NEOX if model.config.rotary else GPT2
    if c.adapter:
        raise UserError(f"{folder}: a model with an adapter before its head is none of the hub's")
    if tokenizer.size != c.vocab_size:
        raise UserError(f"{folder}: a tokenizer of {tokenizer.size} ids and a model of {c.vocab_size}")
    os.makedirs(folder, exist_ok=True)
    names = family.names(c.n_layer)
    outside = {name: family.prefix + theirs for name, theirs in names.items()}
    write_safetensors(os.path.join(folder, WEIGHTS[0]),
                      {outside[name]: stored(family, name, x, c.n_head)
                       for name, x in model.state_dict().items()})
    write_tokenizer(tokenizer, folder)
    sizes = asdict(c)
    given = {"architectures": [family.architecture], "model_type": family.kind,
             "torch_dtype": str(model.head.dtype)[6:],
             **{key: sizes[field] for field, key in family.sizes.items()},
             **{key: have for key, (have, _) in family.fixed.items()}, **family.said,
             "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    if family is NEOX:
        given["intermediate_size"] = 4 * c.n_embd  # else transformers takes 24,576
    write_whole(os.path.join(folder, "config.json"), (json.dumps(given, indent=1) + "\n").encode())
