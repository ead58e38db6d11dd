"""Where a language model's prompts, demonstrations and preferences come from.

`Source` is what the command line says; `make` turns it into a `Problem`: a world of our own with a
gold score and a small network, or a real preference set with a model from a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.core import mesh as meshes
from jaxalign.core.mesh import Rules
from jaxalign.core.types import Array, LanguageModel, Params, PyTree, UserError
from jaxalign.data import preferences
from jaxalign.data.preferences import Pairs, PreferenceWorld, Prompts, Responses
from jaxalign.methods.r3hf import Decoding, Gold, Scores
from jaxalign.models import folders, gpt2, llama
from jaxalign.models.scalar_head import ScalarModel
from jaxalign.models.weights import Shardings
from jaxalign.ops import redistribution as rd

Name = Literal["synthetic", "text", "nectar", "tldr", "saferlhf"]
REAL = ("nectar", "tldr", "saferlhf")


@dataclasses.dataclass(frozen=True)
class Network:
    """A small GPT-2, for the worlds of our own."""

    width: int = 64
    depth: int = 2
    heads: int = 4


@dataclasses.dataclass(frozen=True)
class Source:
    """Which data, which model, and how much of it."""

    name: Name = "synthetic"
    prompt: int = 4  # P, slots of the prompts
    response: int = 16  # T, tokens of a response at most
    vocabulary: int = 12  # synthetic: ids
    noise: float = 0.25  # temperature of the preference labels
    network: Network = Network()
    prompts: int = 4096
    demonstrations: int = 16384
    pairs: int = 65536
    data: str = ""  # real sets: the folder, in the Hub's layout
    demonstration_data: str = ""  # real sets: the folder for fine-tuning, if it is another
    model: str = ""  # real sets: a Hugging Face folder
    reward_model: str = ""  # real sets: a folder with a scalar head; without one it is trained
    cost_weight: float = -1.0  # saferlhf: alpha, of the safety model's score
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # real sets: of the products
    seed: int = 0  # of data and networks before RL

    def __post_init__(self) -> None:
        for name in ("prompts", "demonstrations", "pairs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")


class Problem(NamedTuple):
    """All that a run reads.

    model, init: the language model, and `key -> params` to start fine-tuning from.
    config: its sizes, as a folder is written from them. rules: how its parameters are sharded.
    reward_rules: how the reward model's are.
    prompts, heldout: `[N, P]`. demonstrations: None where the model is used as it is.
    pairs, test_pairs: to train the reward model and to test it. cost_pairs: of a second one.
    reward_model: one that is trained already, with its parameters.
    gold: `(gold_params, ids, mask) -> [B]`, the true score, 0 where nobody knows it.
    words: `ids -> str`.
    """

    name: str
    model: LanguageModel
    init: Callable[[Array], Params]
    config: gpt2.Config | llama.Config
    rules: Rules
    reward_rules: Rules
    decoding: Decoding
    prompts: Prompts
    heldout: Prompts
    demonstrations: Responses | None
    pairs: Pairs
    test_pairs: Pairs
    cost_pairs: Pairs | None
    reward_model: tuple[ScalarModel, Params] | None
    cost_weight: float
    gold: Gold
    gold_params: PyTree
    words: Callable[[np.ndarray], str]

    def __hash__(self) -> int:  # arrays have none; problems are told apart by identity
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def check(source: Source) -> None:
    """Raises UserError for what can be known to be wrong before anything is loaded."""
    if source.name in REAL and not (source.data and source.model):
        raise UserError(
            f"{source.name} needs data and a model on this machine: give --source.data, the "
            "folder of the set, and --source.model, a Hugging Face folder"
        )
    if source.name not in REAL:
        _world(source)


def make(source: Source, mesh: Mesh | None = None) -> Problem:
    """The problem that a source describes.

    mesh: where the parameters of a folder lie, by their rules; default: the first device.
    """
    return _real(source, mesh) if source.name in REAL else _ours(source)


def identity(source: Source) -> dict[str, Any]:
    """What the networks that are trained on a source depend on, to name them by."""
    values = dataclasses.asdict(source)
    if source.name not in REAL:
        del values["dtype"]  # always f32
    return values


def computing(source: Source, mesh: Mesh | None) -> dict[str, Any]:
    """How the networks of a real set compute, as keywords of `folders.build` and its like."""
    rows = None if mesh is None else meshes.batch_sharding(mesh)
    return {"dtype": jnp.dtype(source.dtype), "remat": True, "rows": rows}


def combine(problem: Problem, scores: Scores) -> Scores:
    """The scores that rewards are made of: those of one model, or half of two, weighted.

    Rewards of tokens are differences of scores, so two models' rewards add up as their scores do.
    """
    if problem.cost_pairs is None:
        return scores

    def both(params: Params, ids: Array, mask: Array) -> Array:
        reward, cost = (scores(params[name], ids, mask) for name in ("reward", "cost"))
        return rd.combined(reward, cost, problem.cost_weight)

    return both


# --- worlds of our own ----------------------------------------------------------------------------


def _world(source: Source) -> PreferenceWorld:
    if source.name == "synthetic":
        sizes = (source.vocabulary, source.prompt, source.response, source.noise)
        return preferences.synthetic(*sizes)
    from jaxalign.data import help_text

    return help_text.help_text(source.response, source.noise)


def _ours(source: Source) -> Problem:
    world, network = _world(source), source.network
    context = world.prompt_length + world.response_length
    sizes = gpt2.Config(
        world.vocabulary, network.width, network.depth, network.heads, 4 * network.width, context
    )
    model = gpt2.gpt2(sizes)
    keys = jax.random.split(jax.random.key(1000 + source.seed), 5)

    def gold(params: PyTree, ids: Array, mask: Array) -> Array:
        del params
        return world.gold(ids, mask)

    return Problem(
        world.name,
        model,
        model.init,
        sizes,
        gpt2.RULES,
        gpt2.RULES,
        Decoding(world.response_length, (world.stop,), world.pad),
        world.prompts(keys[0], source.prompts),
        world.heldout(keys[1], source.prompts),
        jax.tree.map(jnp.asarray, world.demonstrations(keys[2], source.demonstrations)),
        jax.tree.map(jnp.asarray, world.pairs(keys[3], source.pairs)),
        jax.tree.map(jnp.asarray, world.pairs(keys[4], 2048)),
        None,
        None,
        0.0,
        gold,
        (),
        world.words,
    )


# --- real preference sets -------------------------------------------------------------------------


def _real(source: Source, mesh: Mesh | None) -> Problem:
    from jaxalign.data import preference_sets

    config = folders.read_config(source.model)
    reward_config = folders.read_config(source.reward_model or source.model)
    loading: dict[str, Any] = {**computing(source, mesh), "shardings": _placing(mesh)}
    tokenizer = folders.tokenizer(source.model)
    read = functools.partial(
        preference_sets.load,
        path=source.data,
        tokenizer=tokenizer,
        prompt_length=source.prompt,
        response_length=source.response,
        limit=source.pairs,
    )
    name: Any = source.name  # one of REAL
    pairs = read(name)
    cost_pairs = read("saferlhf_safety") if source.name == "saferlhf" else None
    demonstrations = None
    if source.demonstration_data:
        if source.name == "saferlhf":
            raise UserError(
                "source.demonstration_data: saferlhf has no demonstrations; give a model that is "
                "fine-tuned already"
            )
        sizes = (source.prompt, source.response)
        given = (name, source.demonstration_data, tokenizer, *sizes)
        demonstrations = preference_sets.load_demonstrations(*given, limit=source.demonstrations)
    train, test = _cut(pairs)
    return outline(source, mesh, config, reward_config)._replace(
        init=lambda key: folders.load(source.model, **loading)[1],
        decoding=Decoding(source.response, (tokenizer.eos_token_id,), tokenizer.pad_token_id or 0),
        prompts=_prompts_of(train, source.prompt),
        heldout=_prompts_of(test, source.prompt),
        demonstrations=demonstrations,
        pairs=train,
        test_pairs=test,
        cost_pairs=cost_pairs,
        reward_model=_reward_model(source, tokenizer, loading),
        words=tokenizer.decode,
    )


def outline(
    source: Source,
    mesh: Mesh | None,
    config: folders.Config,
    reward_config: folders.Config | None = None,
) -> Problem:
    """The problem of a real set before anything is read: networks, rules, and shapes for data.

    mesh: that batches will be spread over. config, reward_config: sizes of the policy, and of the
        reward model where they are others.
    """
    length = source.prompt + source.response
    prompts = Prompts(*_shapes(source.pairs, source.prompt))
    responses = Responses(*_shapes(source.pairs, length))
    pairs = Pairs(responses, responses)
    model = folders.build(config, **computing(source, mesh))
    return Problem(
        name=source.name,
        model=model,
        init=model.init,
        config=config,
        rules=folders.rules(config),
        reward_rules=folders.rules(reward_config or config),
        decoding=Decoding(source.response, (0,), 0),
        prompts=prompts,
        heldout=prompts,
        demonstrations=None,
        pairs=pairs,
        test_pairs=pairs,
        cost_pairs=pairs if source.name == "saferlhf" else None,
        reward_model=None,
        cost_weight=source.cost_weight,
        gold=_unknown,
        gold_params=(),
        words=str,
    )


def _shapes(rows: int, slots: int) -> tuple[Any, Any]:
    """Of ids and their mask."""
    ids, mask = (jax.ShapeDtypeStruct((rows, slots), kind) for kind in (jnp.int32, jnp.bool_))
    return ids, mask


def _placing(mesh: Mesh | None) -> Shardings | None:
    """Where a folder's parameters go."""
    if mesh is None:
        return None
    return lambda abstract, rules: meshes.shardings(abstract, mesh, rules)


def _reward_model(
    source: Source, tokenizer: Any, loading: dict[str, Any]
) -> tuple[ScalarModel, Params] | None:
    """The reward model of the source's folder, if there is one."""
    if not source.reward_model:
        return None
    if source.name == "saferlhf":
        raise UserError(
            "source.reward_model: saferlhf has two reward models, a given one is single; leave it "
            "out and both are trained"
        )
    if folders.tokenizer(source.reward_model).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"source.reward_model {source.reward_model}: its tokenizer is not that of "
            f"{source.model}, so the policy's tokens are not prefixes to it; give one with the "
            "same tokenizer, or none and one is trained"
        )
    return folders.load_reward(source.reward_model, **loading)


def _unknown(params: PyTree, ids: Array, mask: Array) -> Array:
    """Nobody knows the true score of a real response."""
    del params, mask
    return jnp.zeros(ids.shape[0])


def _cut(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """One pair in twenty, at least one, is held back."""
    count = pairs.chosen.ids.shape[0]
    if count < 2:
        raise UserError(f"{count} pairs: too few to train on some and test on others; give more")
    test = max(count // 20, 1)
    parts = (slice(test, None), slice(test))
    return tuple(jax.tree.map(lambda a, part=part: a[part], pairs) for part in parts)


def _prompts_of(pairs: Pairs, length: int) -> Prompts:
    return Prompts(pairs.chosen.ids[:, :length], pairs.chosen.mask[:, :length])
