"""Against torch: states, logits, gradients, greedy text and folders of four families.

Run as a program, it writes tests/models/golden/: small folders as transformers saves them, with
what torch computes from them, for the tests that run without torch.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.models import attention, folders

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
ROWS, LENGTH, MORE = 3, 9, 32
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DECODER = dict(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=14,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
SPECIAL = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=29, n_embd=12, n_layer=2, n_head=3, n_inner=20, n_positions=64, **SPECIAL
    ),
    "llama": lambda: transformers.LlamaConfig(
        **DECODER, rope_parameters=dict(LLAMA3), tie_word_embeddings=False, **SPECIAL
    ),
    "llama_tied": lambda: transformers.LlamaConfig(
        **DECODER, head_dim=10, tie_word_embeddings=True, **SPECIAL
    ),
    "qwen2": lambda: transformers.Qwen2Config(**DECODER, tie_word_embeddings=True, **SPECIAL),
    "qwen3": lambda: transformers.Qwen3Config(
        **DECODER, head_dim=8, tie_word_embeddings=False, **SPECIAL
    ),
}


@pytest.fixture(autouse=True)
def _strict():
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield


def randomised(net):
    """Every parameter away from its initial value, in numbers that 16 bits hold."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
        parameter.data = (parameter.data + (parameter.ndim == 1)).half().float()
    return net.eval()


@functools.cache
def theirs(name: str):
    return randomised(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """Torch's model, the folder that it saved, and ours from that folder."""
    path = tmp_path_factory.mktemp(request.param)
    theirs(request.param).save_pretrained(path)
    return theirs(request.param), path, *folders.load(path)


def inputs(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and a mask with padding on the left."""
    ids = np.random.RandomState(1).randint(1, vocabulary, size=(ROWS, LENGTH))
    mask = np.arange(LENGTH)[None] >= np.array([[0], [3], [6]])
    return np.where(mask, ids, 0).astype(np.int32), mask


def torch_states(net, ids: np.ndarray, mask: np.ndarray):
    """Torch's last hidden states; those of padding have no meaning."""
    return net.base_model(
        input_ids=torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask).long(),
        position_ids=torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0)),
    ).last_hidden_state


def torch_forward(net, ids: np.ndarray, mask: np.ndarray):
    """Torch's (hidden, logits)."""
    hidden = torch_states(net, ids, mask)
    return hidden, net.lm_head(hidden)


def test_states_and_logits(pair):
    net, _, model, params = pair
    ids, mask = inputs(model.vocabulary)
    hidden = model.hidden(params, ids, mask)
    expected = [a.detach().numpy()[mask] for a in torch_forward(net, ids, mask)]
    assert np.abs(np.asarray(hidden)[mask] - expected[0]).max() <= 1e-4
    assert (
        np.abs(np.asarray(model.logits(model.head(params), hidden))[mask] - expected[1]).max()
        <= 1e-4
    )
    assert np.abs(expected[1]).max() > 1


def test_gradient(pair):
    net, path, model, params = pair
    ids, mask = inputs(model.vocabulary)

    def loss(params):
        logits = model.logits(model.head(params), model.hidden(params, ids, mask))
        return -(jax.nn.log_softmax(logits)[:, -2, 5]).sum()

    ours = jax.jit(jax.grad(loss))(params)
    net.zero_grad()
    (-torch_forward(net, ids, mask)[1].log_softmax(-1)[:, -2, 5].sum()).backward()
    gradient = {name: p.grad.numpy() for name, p in net.named_parameters()}
    config = folders.read_config(path)
    table = folders.FAMILIES[net.config.model_type].checkpoint(config)
    assert {tensor.name for tensor in table} == set(gradient)
    for tensor in table:
        expected, (i, parts) = gradient[tensor.name], tensor.part
        step = expected.shape[-1] // parts
        expected = expected[..., i * step : (i + 1) * step]
        expected = expected.T if tensor.transposed else expected
        found = functools.reduce(lambda tree, key: tree[key], tensor.path.split("/"), ours)
        # The gradient of a key's bias is zero but for rounding.
        assert np.abs(found - expected).max() <= 1e-4 * max(np.abs(expected).max(), 0.1)


def greedy(model, params, ids, mask):
    """The most likely continuation, by the cache."""
    length = ids.shape[1] + MORE
    seen = np.zeros((ROWS, length), bool)
    seen[:, : ids.shape[1]] = mask
    cache, position = model.empty_cache(ROWS, length), attention.positions(jnp.asarray(mask))
    extend = jax.jit(model.extend)
    hidden, cache = extend(params, cache, ids, position, seen, np.int32(0))
    position, said = position[:, -1:], []
    for index in range(ids.shape[1], length):
        token = model.logits(model.head(params), hidden[:, -1]).argmax(-1).astype(jnp.int32)
        said.append(np.asarray(token))
        seen[:, index], position = True, position + 1
        new = token[:, None]
        # A copy, as the array changes while the step may still run.
        hidden, cache = extend(params, cache, new, position, seen.copy(), np.int32(index))
    return np.stack(said, axis=1)


def test_greedy_text(pair):
    net, _, model, params = pair
    ids, mask = inputs(model.vocabulary)
    with torch.no_grad():
        out = net.generate(
            torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask).long(),
            max_new_tokens=MORE,
            do_sample=False,
        )
    np.testing.assert_array_equal(greedy(model, params, ids, mask), out.numpy()[:, LENGTH:])


@pytest.mark.parametrize("shard_bytes", [10**9, 4_000])
def test_a_saved_folder_is_torchs_own(pair, tmp_path, shard_bytes):
    """Every tensor bit for bit, and transformers opens the folder with the same logits."""
    net, path, model, params = pair
    ours = tmp_path / "ours"
    config = folders.read_config(path)
    folders.save(ours, config, params, source=path, shard_bytes=shard_bytes)
    files = sorted(ours.glob("*.safetensors"))
    assert (len(files) > 1) == (ours / "model.safetensors.index.json").exists()
    assert (len(files) > 1) == (shard_bytes < 10**9)
    written = {name: array for file in files for name, array in load_file(file).items()}
    original = load_file(path / "model.safetensors")
    assert set(written) == set(original)
    for name, array in original.items():
        np.testing.assert_array_equal(written[name], array, strict=True)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        ours, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids, mask = inputs(model.vocabulary)
    with torch.no_grad():
        expected, found = torch_forward(net, ids, mask)[1], torch_forward(again, ids, mask)[1]
    np.testing.assert_array_equal(found.numpy()[mask], expected.numpy()[mask])


@pytest.mark.parametrize("name", CONFIGS)
def test_reward_models_both_ways(name, tmp_path):
    config = CONFIGS[name]()
    config.num_labels = 1
    net = randomised(transformers.AutoModelForSequenceClassification.from_config(config))
    net.save_pretrained(tmp_path / "theirs")
    model, params = folders.load_reward(tmp_path / "theirs")
    ids, mask = inputs(config.vocab_size)
    with torch.no_grad():
        hidden = torch_states(net, ids, mask)
        expected = net.score(hidden)[..., 0].numpy()
    found = np.asarray(model.scores(params, ids, mask))
    assert np.abs(found[mask] - expected[mask]).max() <= 1e-4
    sizes = folders.read_config(tmp_path / "theirs")
    folders.save_reward(tmp_path / "ours", sizes, params, source=tmp_path / "theirs")
    again, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.config.num_labels == 1
    with torch.no_grad():
        last = again(
            torch.tensor(ids[:1]).long(), attention_mask=torch.tensor(mask[:1]).long()
        ).logits
    np.testing.assert_allclose(last[0, 0], expected[0, -1], rtol=1e-5, atol=1e-5)


def test_a_body_saved_alone_is_read(tmp_path):
    """The released GPT-2 has no `transformer.` in its names."""
    net = theirs("gpt2")
    net.transformer.save_pretrained(tmp_path / "body")
    assert "wte.weight" in load_file(tmp_path / "body" / "model.safetensors")
    model, params = folders.load(tmp_path / "body")
    net.save_pretrained(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, params, folders.load(tmp_path / "whole")[1])
    assert model.vocabulary == 29


def test_bf16_weights_from_torch(tmp_path):
    net = transformers.AutoModelForCausalLM.from_config(CONFIGS["qwen2"]()).bfloat16()
    net.save_pretrained(tmp_path)
    _, params = folders.load(tmp_path, param_dtype=jnp.bfloat16)
    expected = net.model.embed_tokens.weight.float().detach().numpy()
    np.testing.assert_array_equal(params["token"]["embedding"].astype(jnp.float32), expected)


def write_golden() -> None:
    """Folders in 16 bits, and `expected.npz` beside them."""
    for name in ("gpt2", "llama", "qwen2", "qwen3"):
        net, path = theirs(name), GOLDEN / name
        ids, mask = inputs(net.config.vocab_size)
        with torch.no_grad():
            hidden, logits = (a.numpy() for a in torch_forward(net, ids, mask))
        net.half().save_pretrained(path)
        (path / "generation_config.json").unlink()
        np.savez_compressed(path / "expected.npz", ids=ids, mask=mask, hidden=hidden, logits=logits)


if __name__ == "__main__":
    write_golden()
