"""Files of the Hugging Face hub: a folder, or a hub id whose files are found in the cache of huggingface_hub
first and by the network second. The package comes with datasets and is imported where it is needed."""
import os
import re

from support.flags import nearest
from support.log import UserError, visible
from support.rows import first_line

WEIGHTS = "model.safetensors", "pytorch_model.bin"  # in the order in which they are looked for
# Values of flags that need no file.
WITHOUT = {"init_from": "scratch resume", "reward_init": "scratch", "judge": "world"}


def fetch(source, flag):
    """The folder of a source: itself, or that of a hub id in the cache of huggingface_hub, its files found
    there first and by the network second."""
    if os.path.isdir(source):
        return source
    words = [word for word in WITHOUT.get(flag, "").split() if nearest(source, [word])]
    if words:  # before the network is asked for it
        raise UserError(f"--{flag}: expected {WITHOUT[flag].replace(' ', ', ')}, a folder or a hub id, got "
                        f"{visible(source)} (did you mean {words[0]}?)")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) or os.path.exists(source):
        raise UserError(f"--{flag} {source}: expected a folder in the hub's form or a hub id, got neither")
    folder = os.path.dirname(hub_file(source, ["config.json"], flag))
    hub_file(source, WEIGHTS, flag)
    for name in ("vocab.json", "merges.txt"):
        hub_file(source, [name], flag)
    return folder


def hub_file(source, names, flag):
    """The path of the first of these files of a hub id that is in the cache, or else comes by the network.
    UserError's one line names the file, where it may be put by hand, and what works without it."""
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise UserError(f"--{flag} {source}: needs the package huggingface_hub, which `pip install datasets` "
                        f"brings") from error
    kept = [x for x in (try_to_load_from_cache(source, name) for name in names) if isinstance(x, str)]
    errors = []
    for name in [] if kept else names:
        try:
            kept.append(hf_hub_download(source, name))
            break
        except Exception as error:  # no network, no such file, no such model: a type for each of them
            errors.append(error)
    if kept:
        return kept[0]
    beside = try_to_load_from_cache(source, "config.json")
    place = os.path.join(constants.HF_HUB_CACHE, "models--" + source.replace("/", "--"), "snapshots", "main")
    place = os.path.dirname(beside) if isinstance(beside, str) else place
    why = WITHOUT.get(flag, "scratch").split()[0]
    raise UserError(f"--{flag} {source}: {' or '.join(names)}: neither in the cache nor to be had "
                    f"({first_line(errors[0])[:80]}); put it into {place}, or leave --{flag} at {why}, which "
                    f"needs no file")
