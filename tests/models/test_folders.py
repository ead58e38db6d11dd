"""Folders of Hugging Face: what is written is read, what does not fit is one clear line."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from jaxalign.core import mesh
from jaxalign.core.types import UserError
from jaxalign.models import folders, gpt2, llama, scalar_head

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")
SINGLE = "model.safetensors"


@pytest.fixture
def copy(tmp_path):
    """A writable copy of a golden folder: its path, and a way to change its config.json."""

    def make(family: str, **changes) -> Path:
        path = tmp_path / family
        shutil.copytree(GOLDEN / family, path)
        values = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(values))
        return path

    return make


def same(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def refused(call, *args, **kwargs) -> str:
    """The one line that the user reads."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 3_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, shard_bytes, tmp_path):
    config = folders.read_config(GOLDEN / family)
    _, params = folders.load(GOLDEN / family)
    folders.save(tmp_path / "out", config, params, shard_bytes=shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 3_000)
    assert folders.read_config(tmp_path / "out") == config
    same(folders.load(tmp_path / "out")[1], params)
    written = {name: array for file in files for name, array in load_file(file).items()}
    original = load_file(GOLDEN / family / SINGLE)
    assert set(written) == set(original)  # a tied head is not there twice
    for name, array in original.items():
        np.testing.assert_array_equal(written[name], array.astype(np.float32), strict=True)


def test_an_index_names_every_tensor(tmp_path):
    config = folders.read_config(GOLDEN / "qwen2")
    _, params = folders.load(GOLDEN / "qwen2")
    folders.save(tmp_path, config, params, shard_bytes=3_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == total
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert sorted(sizes)[-2] < 3_000 + 2_000  # headers apart; one tensor may be larger alone


def test_parameters_of_16_bits(tmp_path):
    config = folders.read_config(GOLDEN / "qwen3")
    _, params = folders.load(GOLDEN / "qwen3", param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    folders.save(tmp_path / "out", config, params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    same(folders.load(tmp_path / "out", param_dtype=jnp.bfloat16)[1], params)


@pytest.mark.parametrize("bias", [0.0, 0.5])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_reward_models(family, bias, tmp_path):
    config = folders.read_config(GOLDEN / family)
    model, body = folders.load(GOLDEN / family)
    params = scalar_head.attach_head(body, model.width, jax.random.key(0))
    params["head"]["bias"] = jnp.full(1, bias)
    folders.save_reward(tmp_path / "out", config, params, source=GOLDEN / family)
    names = load_file(tmp_path / "out" / SINGLE)
    assert names["score.weight"].shape == (1, model.width)
    assert ("score.bias" in names) == (bias != 0) and "lm_head.weight" not in names
    same(folders.load_reward(tmp_path / "out")[1], params)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(values["id2label"]) == 1 and values["pad_token_id"] == 0


def test_a_reward_head_stays_f32(tmp_path):
    model, body = folders.load(GOLDEN / "qwen2")
    params = scalar_head.attach_head(body, model.width, jax.random.key(0))
    folders.save_reward(tmp_path, folders.read_config(GOLDEN / "qwen2"), params)
    _, again = folders.load_reward(tmp_path, param_dtype=jnp.bfloat16)
    assert again["head"]["kernel"].dtype == jnp.float32
    assert again["model"]["token"]["embedding"].dtype == jnp.bfloat16


def test_parameters_go_to_their_places():
    devices = mesh.make_mesh({"fsdp": 4, "tensor": 2})
    # The golden vocabulary, 31, has no divisor.
    fitting = [("token|lm_head", P()), *llama.RULES]
    _, params = folders.load(
        GOLDEN / "qwen3", shardings=lambda tree, _: mesh.shardings(tree, devices, fitting)
    )
    assert params["block_0"]["gate"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert len(params["norm"]["scale"].sharding.device_set) == 8
    same(jax.device_get(params), jax.device_get(folders.load(GOLDEN / "qwen3")[1]))


def test_the_familys_rules_are_handed_over():
    seen = []

    def whole(tree, rules):
        seen.append(rules)
        return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[3]), tree)

    _, params = folders.load(GOLDEN / "gpt2", shardings=whole)
    assert seen == [gpt2.RULES]
    assert params["norm"]["bias"].devices() == {jax.devices()[3]}


# --- other layouts -------------------------------------------------------------------------------


def rewrite(path: Path, change) -> None:
    """The tensors of a folder, changed."""
    arrays = load_file(path / SINGLE)
    save_file(change(arrays), path / SINGLE, metadata={"format": "pt"})


def test_names_without_prefix_and_with_constants(copy):
    """As the released GPT-2: a bare model, causal masks among the tensors."""
    path = copy("gpt2")

    def bare(arrays):
        arrays = {name.removeprefix("transformer."): a for name, a in arrays.items()}
        return arrays | {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32)}

    rewrite(path, bare)
    same(folders.load(path)[1], folders.load(GOLDEN / "gpt2")[1])


def test_a_tied_head_that_is_written_twice(copy):
    path = copy("qwen2")
    rewrite(path, lambda a: a | {"lm_head.weight": a["model.embed_tokens.weight"]})
    same(folders.load(path)[1], folders.load(GOLDEN / "qwen2")[1])


def test_rotary_values_in_the_older_form(copy):
    values = json.loads((GOLDEN / "llama" / "config.json").read_text())["rope_parameters"]
    theta = values.pop("rope_theta")
    path = copy("llama", rope_parameters=None, rope_theta=theta, rope_scaling=values)
    config = folders.read_config(path)
    assert config == folders.read_config(GOLDEN / "llama")
    assert config.theta == 500 and config.scaling.factor == 4


def test_sizes_of_a_released_config(copy):
    """GPT-2's config.json has few of today's names; Qwen3's head is 128 wide unless it says so."""
    path = copy("gpt2", n_inner=None)
    assert folders.read_config(path).inner == 4 * 12
    values = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
    del values["head_dim"]
    assert llama.from_hub(values).head_dim == 128
    assert llama.from_hub(values | {"model_type": "llama"}).head_dim == 6


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt2", {"model_type": "bloom"}, "model_type 'bloom' is unknown; known: gpt2, llama"),
        ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu'"),
        ("gpt2", {"n_layer": None}, "n_layer = None: must be a positive whole number"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "only False is supported"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "lacks factor, low_freq_factor"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu' is supported"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
    ],
)
def test_variants_that_are_not_computed(copy, family, changes, said):
    assert said in refused(folders.load, copy(family, **changes))


def test_tensors_that_do_not_fit_are_all_named(copy):
    path = copy("qwen2")

    def broken(arrays):
        del arrays["model.norm.weight"]
        arrays["model.layers.0.self_attn.o_proj.bias"] = np.zeros(24, np.float32)
        arrays["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 24), np.float32)
        return arrays

    rewrite(path, broken)
    line = refused(folders.load, path)
    assert "model.norm.weight (24,) is missing" in line
    assert "model.layers.0.self_attn.o_proj.bias (24,) is unknown" in line
    assert "model.layers.1.mlp.up_proj.weight is (3, 24), must be (14, 24)" in line


def test_a_language_model_is_no_reward_model(tmp_path):
    assert "score.weight (1, 24) is missing" in refused(folders.load_reward, GOLDEN / "llama")
    model, body = folders.load(GOLDEN / "gpt2")
    config = folders.read_config(GOLDEN / "gpt2")
    folders.save_reward(tmp_path, config, scalar_head.attach_head(body, model.width))
    assert "score.weight (1, 12) is unknown" in refused(folders.load, tmp_path)


def test_several_labels_are_refused(copy):
    path = copy("gpt2")
    rewrite(path, lambda a: a | {"score.weight": np.zeros((2, 12), np.float32)})
    assert "score.weight is (2, 12), must be (1, 12)" in refused(folders.load_reward, path)


def test_pickle_files_are_refused(copy):
    path = copy("gpt2")
    (path / SINGLE).unlink()
    assert "neither model.safetensors nor" in refused(folders.load, path)
    (path / "pytorch_model.bin").write_bytes(b"anything")
    assert "only pickle files" in refused(folders.load, path)


def test_folders_that_cannot_be_read(copy, tmp_path):
    assert "no config.json can be read" in refused(folders.load, tmp_path / "nowhere")
    path = copy("gpt2")
    (path / SINGLE).write_bytes(b"cut")
    assert "cannot be read" in refused(folders.load, path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent"}}')
    assert "absent: cannot be read" in refused(folders.load, path)


def test_an_index_that_promises_too_much(copy):
    path = copy("gpt2")
    names = dict.fromkeys([*load_file(path / SINGLE), "transformer.more"], SINGLE)
    del names["transformer.ln_f.bias"]
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "transformer.ln_f.bias (12,) is missing" in refused(folders.load, path)


def test_nothing_is_overwritten_or_half_described(tmp_path):
    config = folders.read_config(GOLDEN / "gpt2")
    _, params = folders.load(GOLDEN / "gpt2")
    deeper = dataclasses.replace(config, depth=3)
    line = refused(folders.save, tmp_path / "out", deeper, params)
    assert "block_2/attention/key/bias" in line and not (tmp_path / "out").exists()
    folders.save(tmp_path / "out", config, params)
    assert "not overwritten" in refused(folders.save, tmp_path / "out", config, params)
    both = llama.Config(24, 16, 32, 1, 2, 2, 8, 32, qkv_bias=True, qk_norm=True)
    assert "no Hugging Face family has both" in refused(llama.to_hub, both)


# --- tokenizer -----------------------------------------------------------------------------------


CHAT = "{% for m in messages %}{{ m.content }} w9{% endfor %}"


def add_tokenizer(path: Path, words: int) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<unk>", *(f"w{i}" for i in range(1, words))]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(path / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "chat_template": CHAT,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(values))


def test_the_tokenizer_comes_along(copy, tmp_path):
    path = copy("gpt2", eos_token_id=5)
    add_tokenizer(path, 29)
    tokenizer = folders.tokenizer(path)
    assert tokenizer("w3 w7 what")["input_ids"] == [3, 7, 0]
    config, (_, params) = folders.read_config(path), folders.load(path)
    folders.save(tmp_path / "out", config, params, source=path)
    again = folders.tokenizer(tmp_path / "out")
    assert again("w3 w28")["input_ids"] == [3, 28]
    assert again.chat_template == tokenizer.chat_template == CHAT
    said = again.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False)
    assert "w3" in said
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["eos_token_id"] == 5 and values["pad_token_id"] == 0


def test_a_tokenizer_beyond_the_vocabulary(copy):
    path = copy("gpt2")
    assert "no tokenizer (tokenizer.json or" in refused(folders.tokenizer, path)
    add_tokenizer(path, 30)
    assert "has id 29, the model only 29 rows" in refused(folders.tokenizer, path)
