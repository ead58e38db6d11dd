"""Hugging Face folders of language models: config.json, safetensors, tokenizer.

`weights` reads the tensors. Families: gpt2, llama, qwen2, qwen3.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxalign.core.state import paths
from jaxalign.core.types import LanguageModel, Params, PyTree, UserError
from jaxalign.models import gpt2, llama, scalar_head, weights
from jaxalign.models.hub import Tensor
from jaxalign.models.weights import Leaf, Rules, Shardings

Config = gpt2.Config | llama.Config

FAMILIES = {"gpt2": gpt2, "llama": llama, "qwen2": llama, "qwen3": llama}
CLASSES = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# Constants that older checkpoints hold beside the parameters.
CONSTANTS = re.compile(r"\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")
SCORE = (Tensor("head/kernel", "score.weight", transposed=True), Tensor("head/bias", "score.bias"))
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


# --- reading -------------------------------------------------------------------------------------


def read_config(path: Path | str) -> Config:
    """The sizes in a folder's config.json.

    Raises: UserError for a folder without it, an unknown family, or a variant that is not computed.
    """
    values = _values(Path(path))
    return FAMILIES[values["model_type"]].from_hub(values)


def load(
    path: Path | str,
    dtype: DTypeLike = jnp.float32,
    *,
    param_dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    remat: bool = False,
    rows: NamedSharding | None = None,
) -> tuple[LanguageModel, Params]:
    """The causal language model in a folder, with its parameters.

    dtype: of the products. param_dtype: of the parameters.
    shardings: places the parameters, for example
        `lambda params, rules: mesh.shardings(params, devices, rules)`; default: the first device.
    remat, rows: see `llama.llama`.
    Raises: UserError for what `read_config` refuses, pickle files, and one that lists every tensor
        that is missing, unknown or of another shape.
    """
    config = read_config(path)
    model = build(config, dtype, remat=remat, rows=rows)
    table = _family(config).checkpoint(config)
    place = _placing(jax.eval_shape(model.init, jax.random.key(0)), config, param_dtype, shardings)
    return model, _read(Path(path), table, place)


def load_reward(
    path: Path | str,
    dtype: DTypeLike = jnp.float32,
    *,
    param_dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    remat: bool = False,
    rows: NamedSharding | None = None,
) -> tuple[scalar_head.ScalarModel, Params]:
    """The same for a model with a scalar head, a sequence classifier with num_labels = 1.

    The head stays f32. A checkpoint without `score.bias`, as most are, has a bias of zero.
    """
    path, config = Path(path), read_config(path)
    model = scalar_head.with_scalar_head(build(config, dtype, remat=remat, rows=rows))
    table = _reward_table(config)
    if "score.bias" not in _sources(path):
        table = table[:-1]
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    place = _placing(abstract, config, param_dtype, shardings)
    params = _read(path, table, place)
    if "bias" not in params["head"]:
        leaf = place["head/bias"]
        params["head"]["bias"] = leaf(np.zeros(leaf.shape, np.float32))
    return model, params


def build(
    config: Config,
    dtype: DTypeLike = jnp.float32,
    *,
    remat: bool = False,
    rows: NamedSharding | None = None,
) -> LanguageModel:
    """The model of a configuration of any family."""
    make: Any = gpt2.gpt2 if isinstance(config, gpt2.Config) else llama.llama
    return make(config, dtype, remat=remat, rows=rows)


def rules(config: Config) -> Rules:
    """How the parameters of a configuration, with either head, are spread over a mesh."""
    return _family(config).RULES


def tokenizer(path: Path | str) -> Any:
    """The folder's own tokenizer (transformers), with its chat template.

    Raises: UserError when there is none, or when it has ids that the model's table lacks.
    """
    from transformers import AutoTokenizer

    path, vocabulary = Path(path), read_config(path).vocabulary
    # transformers makes an empty tokenizer of a GPT-2 folder without one.
    if not any((path / name).exists() for name in WORDS):
        raise UserError(f"{path}: no tokenizer ({' or '.join(WORDS)}); copy the model's own there")
    found: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    top = max(found.get_vocab().values(), default=0)
    if top >= vocabulary:
        raise UserError(
            f"{path}: the tokenizer has id {top}, the model only {vocabulary} rows (vocab_size); "
            "use the model's own tokenizer"
        )
    return found


def _family(config: Config) -> Any:
    """The module of a configuration."""
    return gpt2 if isinstance(config, gpt2.Config) else llama


def _reward_table(config: Config) -> list[Tensor]:
    """A scalar model's checkpoint: the body's tensors and, last, the head's."""
    body = [t for t in _family(config).checkpoint(config) if not t.path.startswith("lm_head/")]
    return [*(tensor._replace(path=f"model/{tensor.path}") for tensor in body), *SCORE]


def _placing(
    abstract: PyTree, config: Config, dtype: DTypeLike, shardings: Shardings | None
) -> dict[str, Leaf]:
    """Path to its leaf's shape, dtype and place; a scalar head stays f32."""
    place = weights.places(abstract, rules(config), dtype, shardings)
    heads = {name: leaf for name, leaf in place.items() if name.startswith("head/")}
    return place | {name: leaf._replace(dtype=jnp.float32) for name, leaf in heads.items()}


def _read(path: Path, table: Sequence[Tensor], place: Mapping[str, Leaf]) -> Params:
    """The parameters of `table`."""
    copies = _copies({tensor.name for tensor in table})
    return weights.read(
        path,
        _sources(path),
        lambda names: _with_their_prefix(table, names),
        place,
        lambda name: name in copies or CONSTANTS.search(name) is not None,
    )


def _copies(wanted: set[str]) -> set[str]:
    """A tied head may be written a second time; it is the embedding."""
    return set() if {"lm_head.weight", "score.weight"} & wanted else {"lm_head.weight"}


def _with_their_prefix(table: Sequence[Tensor], names: Mapping[str, Any]) -> list[Tensor]:
    """The table for a checkpoint of the bare model too, such as the released GPT-2's."""
    prefix = next(t.name for t in table if t.path.endswith("token/embedding")).split(".")[0] + "."
    if any(name.startswith(prefix) for name in names):
        return list(table)
    return [tensor._replace(name=tensor.name.removeprefix(prefix)) for tensor in table]


def _values(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: no config.json can be read; give a Hugging Face model folder"
        ) from error
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{file}: model_type {kind!r} is unknown; known: {', '.join(FAMILIES)}")
    return values


def _sources(path: Path) -> dict[str, Path]:
    """Tensor name to the file that holds it."""
    return weights.find(path, ["model"], "transformers")


# --- writing -------------------------------------------------------------------------------------


def save(
    path: Path | str,
    config: Config,
    params: Params,
    *,
    source: Path | str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` and `load` open.

    params: the language model's; every array must be addressable by this process.
    source: the folder that the model came from; its tokenizer and special tokens are kept.
    shard_bytes: files above this size are split, between tensors, with an index.
    Raises: UserError for a folder that has a model already, or parameters of another config.
    """
    task = "LMHeadModel" if isinstance(config, gpt2.Config) else "ForCausalLM"
    table = _family(config).checkpoint(config)
    _save(Path(path), _described(config, task), table, params, source, shard_bytes)


def save_reward(
    path: Path | str,
    config: Config,
    params: Params,
    *,
    source: Path | str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """The same for a scalar model: a sequence classifier with num_labels = 1.

    The format's head has no bias: one that is not zero is written as `score.bias`, which `load`
    reads and transformers leaves out with a warning; preferences and differences do not change.
    """
    values = _described(config, "ForSequenceClassification")
    values |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    table = _reward_table(config)
    if not np.any(params["head"]["bias"]):
        params = {"model": params["model"], "head": {"kernel": params["head"]["kernel"]}}
        table = table[:-1]
    _save(Path(path), values, table, params, source, shard_bytes)


def _described(config: Config, task: str) -> dict[str, Any]:
    """config.json's values, with the class of transformers that computes `task`."""
    values = _family(config).to_hub(config)
    return {"architectures": [f"{CLASSES[values['model_type']]}{task}"], **values}


def _save(
    path: Path,
    values: dict[str, Any],
    table: Sequence[Tensor],
    params: Params,
    source: Path | str | None,
    shard_bytes: int,
) -> None:
    if any(path.glob("*.safetensors")) or (path / "config.json").exists():
        raise UserError(f"{path}: has a model already, which is not overwritten; choose another")
    leaves = dict(zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params), strict=True))
    odd = sorted({tensor.path for tensor in table} ^ set(leaves))
    if odd:
        raise UserError(f"{path}: {', '.join(odd)}: not in both config and params; use its config")
    path.mkdir(parents=True, exist_ok=True)
    values |= dict.fromkeys(SPECIAL)
    if source is not None:
        values |= _copied(Path(source), path)
    values["dtype"] = values["torch_dtype"] = str(leaves[table[0].path].dtype)
    (path / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    weights.write(path, "model", table, leaves, shard_bytes)


def _copied(source: Path, path: Path) -> dict[str, Any]:
    """Copies the tokenizer; the special ids of the source's config.json."""
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, path / name)
    values = _values(source)
    return {name: values.get(name) for name in SPECIAL}
