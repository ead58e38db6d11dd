"""Against diffusers and PEFT: LoRA files both ways, exported pipelines, whole trajectories.

Run as a program, it writes tests/models/golden/stable_diffusion/trajectory.npz and vae_4.json: 20
steps of DDIM and the decoded pictures as torch computes them, for the test that runs without torch.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.core.state import paths
from jaxalign.models import diffusers_export, lora, lora_files, unet
from jaxalign.models import diffusers_folders as folders
from jaxalign.ops import diffusion
from jaxalign.rollout.diffusion import Context, denoise, guided
from tests.parity import test_stable_diffusion as reference

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

STEPS, GUIDANCE, SEED = 20, 5.0, 7
# As the released files have it, for DDIM; diffusers' own defaults are others.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.fixture(autouse=True)
def _strict():
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def fresh(name: str):
    """A network of torch's that may be changed."""
    net = reference.MODELS[name]()
    net.load_state_dict(reference.theirs(name).state_dict())
    return net.eval()


@torch.no_grad()
def their_output(net, given: dict[str, np.ndarray]) -> np.ndarray:
    added = None
    if "pooled" in given:
        pooled, sizes = torch.tensor(given["pooled"]), torch.tensor(given["sizes"])
        added = {"text_embeds": pooled, "time_ids": sizes}
    timestep, tokens = torch.tensor(given["timestep"]), torch.tensor(given["tokens"])
    out = net(reference.first(given["x"]), timestep, tokens, added_cond_kwargs=added)
    return reference.last(out.sample)


@functools.cache
def compiled(name: str):
    with tempfile.TemporaryDirectory() as path:
        reference.theirs(name).save_pretrained(Path(path) / "unet")
        model, params = folders.load_unet(path)
    return jax.jit(model.apply), params


def our_output(name: str, params) -> np.ndarray:
    given = reference.inputs(name)
    context = given["tokens"]
    if "pooled" in given:
        context = unet.Conditions(context, given["pooled"], given["sizes"])
    return compiled(name)[0](params, given["x"], given["timestep"], context)


def merged(name: str, adapters):
    return lora.effective({"model": compiled(name)[1], "lora": adapters})


# --- LoRA files -----------------------------------------------------------------------------------


def trained(params, rank: int = 3):
    """Adapters that change what the network puts out; larger ones make it amplify rounding."""
    adapters = lora.init_lora(jax.random.key(0), params, rank, lora_files.RULE)
    random = np.random.RandomState(3)
    for adapter in adapters.values():
        up = 0.1 * random.standard_normal(adapter["up"].shape)
        adapter["up"] = jnp.asarray(up, jnp.float32)
    return adapters


@pytest.mark.parametrize("dialect", ["peft", "processor"])
@pytest.mark.parametrize("name", reference.UNETS)
def test_our_files_in_torch(name, dialect, tmp_path, peft):
    """Kept apart, or fused into the weights; ours merged."""
    given, adapters = reference.inputs(name), trained(compiled(name)[1])
    lora_files.save(tmp_path, adapters, dialect=dialect)
    net = fresh(name)
    base = their_output(net, given)
    net.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
    apart = their_output(net, given)
    net.fuse_lora()
    found = our_output(name, merged(name, adapters))
    assert reference.error(apart, base) > 0.1
    assert reference.error(found, apart) < 1e-5
    assert reference.error(found, their_output(net, given)) < 1e-5


RELEASED = {name.split()[-1]: net for name, net in reference.RELEASED.items() if "unet" in name}


@pytest.mark.parametrize(("name", "count"), [("1.x", 128), ("2.x", 128), ("XL", 560)])
def test_the_released_networks_are_adapted_as_torchs(name, count, tmp_path):
    """A file names every projection of attention by what torch calls it; nothing is allocated."""
    with torch.device("meta"):
        net = RELEASED[name]()
    expected = {
        f"unet.{matrix}.{part}.weight": shape
        for matrix, module in net.named_modules()
        if ".attn" in matrix and isinstance(module, torch.nn.Linear)
        for part, shape in (
            ("lora_A", (1, module.in_features)),
            ("lora_B", (module.out_features, 1)),
        )
    }
    abstract = jax.eval_shape(unet.unet(unet.from_hub(dict(net.config))).init, jax.random.key(0))
    adapters = {
        path: {"down": np.zeros((leaf.shape[0], 1)), "up": np.zeros((1, leaf.shape[1]))}
        for path, leaf in zip(
            jax.tree.leaves(paths(abstract)), jax.tree.leaves(abstract), strict=True
        )
        if re.fullmatch(lora_files.RULE, path)
    }
    lora_files.save(tmp_path, adapters)
    written = load_file(tmp_path / lora_files.FILE)
    assert {key: array.shape for key, array in written.items()} == expected
    assert len(expected) == 2 * count


def torch_made(name: str):
    """A network with PEFT's own adapters: ranks and scales differ, feed-forward layers too."""
    from peft import LoraConfig

    net = fresh(name)
    torch.manual_seed(0)
    net.add_adapter(
        LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=["to_q", "to_v", "to_out.0", "ff.net.0.proj"],
            rank_pattern={"attn2.to_v": 4},
            alpha_pattern={"attn1.to_q": 7},
            init_lora_weights=False,
        )
    )
    return net.eval()


@pytest.mark.parametrize("name", reference.UNETS)
def test_files_of_torch_here(name, tmp_path, peft):
    """With the scales in the header, of the U-Net alone and as a part of a pipeline's."""
    net = torch_made(name)
    expected = their_output(net, reference.inputs(name))
    assert reference.error(their_output(fresh(name), reference.inputs(name)), expected) > 0.1
    net.save_lora_adapter(tmp_path / "alone")
    layers = peft.get_peft_model_state_dict(net)
    settings = net.peft_config["default"].to_dict()
    settings["target_modules"] = list(settings["target_modules"])
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "part", unet_lora_layers=layers, unet_lora_adapter_metadata=settings
    )
    for path in (tmp_path / "alone", tmp_path / "part"):
        adapters = lora_files.load(path, compiled(name)[1])
        assert len({adapter["down"].shape[1] for adapter in adapters.values()}) == 2
        assert reference.error(our_output(name, merged(name, adapters)), expected) < 1e-5


def test_files_of_training_scripts_here(tmp_path, peft):
    """diffusers' scripts convert PEFT's names, and leave scales out, which must be 1."""
    from diffusers.utils import convert_state_dict_to_diffusers

    net = fresh("unet_1")
    torch.manual_seed(0)
    net.add_adapter(
        peft.LoraConfig(
            r=2,
            lora_alpha=2,
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
            init_lora_weights=False,
        )
    )
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(net))
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    assert any(".to_q.lora.down" in name for name in load_file(tmp_path / lora_files.FILE))
    expected = their_output(net, reference.inputs("unet_1"))
    adapters = lora_files.load(tmp_path, compiled("unet_1")[1])
    assert reference.error(our_output("unet_1", merged("unet_1", adapters)), expected) < 1e-5


# XL's, with one residual block and one sampler a level; the first has no attention.
ORIGINAL = {
    "down_blocks_1_attentions_0": "input_blocks_3_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
}


@pytest.mark.parametrize("name", ["unet_1", "unet_xl"])
def test_kohyas_files_in_both(name, tmp_path, peft):
    """Names of one line with alpha; XL's have the blocks of the network as first released.

    One alpha for all: of several, diffusers 0.42 applies the commonest to every matrix.
    """
    _, params = compiled(name)
    arrays = {}
    for matrix, adapter in trained(params).items():
        stem = "lora_unet_" + matrix.removesuffix("/kernel").replace("/", "_")
        for ours, theirs in ORIGINAL.items() if name == "unet_xl" else ():
            stem = stem.replace(ours, theirs)
        down, up = (np.ascontiguousarray(adapter[part].T) for part in ("down", "up"))
        arrays |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        arrays[f"{stem}.alpha"] = np.full((), 1.5, np.float32)
    save_file(arrays, tmp_path / lora_files.FILE)
    net = fresh(name)
    xl = name == "unet_xl"
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    state, alphas = kind.lora_state_dict(tmp_path, unet_config=net.config)[:2]
    kind.load_lora_into_unet(state, alphas, net)
    expected = their_output(net, reference.inputs(name))
    adapters = lora_files.load(tmp_path, params)
    assert len(adapters) == len(arrays) // 3
    assert reference.error(our_output(name, merged(name, adapters)), expected) < 1e-5


# --- pipelines ------------------------------------------------------------------------------------


@functools.cache
def autoencoder():
    """One for four latent channels, which the U-Nets have."""
    net = diffusers.AutoencoderKL(
        sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(6, 10),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
    )
    values = reference.filled(reference.shapes(net))
    net.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    return net.eval()


def tokenizer(path: Path):
    path.mkdir()
    special = ["<|startoftext|>", "<|endoftext|>"]
    words = ["a", "b", "a</w>", "b</w>", "ab</w>", *special]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return transformers.CLIPTokenizer.from_pretrained(str(path), model_max_length=9)


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline as torch writes it."""
    encoder = reference.theirs_clip(
        "CLIPTextModel",
        hidden_size=7,
        intermediate_size=9,
        num_attention_heads=1,
        hidden_act="quick_gelu",
        eos_token_id=2,
    )
    diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer(tmp_path / "words"),
        unet=fresh("unet_1"),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
def test_an_exported_pipeline_in_torch(shard_bytes, pipeline, tmp_path):
    """A LoRA merged and written: the whole pipeline opens, draws, and its U-Net is ours."""
    adapters = trained(compiled("unet_1")[1])
    params, out = merged("unet_1", adapters), tmp_path / "ours"
    diffusers_export.save_folder(pipeline, out, params, shard_bytes=shard_bytes)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    expected = their_output(pipe.unet, reference.inputs("unet_1"))
    assert reference.error(our_output("unet_1", params), expected) < 1e-5
    given = diffusers.StableDiffusionPipeline.from_pretrained(pipeline, local_files_only=True)
    for part in ("vae", "text_encoder"):
        before, after = getattr(given, part).state_dict(), getattr(pipe, part).state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before | after)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("ab a", height=16, width=16, num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 16, 16, 3) and np.isfinite(drawn).all()


def test_a_lora_in_a_whole_pipeline_of_torch(pipeline, tmp_path, peft):
    """As users open it; without `unet.` in the names nothing would be loaded."""
    adapters = trained(compiled("unet_1")[1])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline, local_files_only=True)
    for dialect in ("peft", "processor"):
        lora_files.save(tmp_path / dialect, adapters, dialect=dialect)
        pipe.load_lora_weights(tmp_path / dialect)
        expected = their_output(pipe.unet, reference.inputs("unet_1"))
        assert reference.error(our_output("unet_1", merged("unet_1", adapters)), expected) < 1e-5
        pipe.unload_lora_weights()


# --- trajectories ---------------------------------------------------------------------------------


def start() -> dict[str, np.ndarray]:
    """Initial noise, states of two prompts and of the empty one."""
    random = np.random.RandomState(5)
    draw = {"x": (2, 4, 6, 4), "prompt": (2, 5, 7), "null": (5, 7)}
    return {key: random.standard_normal(s).astype(np.float32) for key, s in draw.items()}


def noises(shape: tuple[int, ...]) -> np.ndarray:
    """What `denoise` draws at its steps `[STEPS, ...]`."""
    key = jax.random.key(SEED)
    return np.stack([jax.random.normal(jax.random.fold_in(key, i), shape) for i in range(STEPS)])


@torch.no_grad()
def their_trajectory(
    given, noise, alphas=None, *, scale: float = GUIDANCE, kind=torch.float32
) -> np.ndarray:
    """Latents `[STEPS + 1, B, H, W, C]`; alphas: in place of the scheduler's own, of f32."""
    net, scheduler = fresh("unet_1").to(kind), diffusers.DDIMScheduler(**SCHEDULER)
    if alphas is not None:
        scheduler.alphas_cumprod = torch.tensor(alphas)
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(STEPS)
    null = np.broadcast_to(given["null"], given["prompt"].shape)
    tokens = torch.tensor(np.concatenate([null, given["prompt"]])).to(kind)
    x = reference.first(given["x"]).to(kind)
    path = [given["x"]]
    for t, z in zip(scheduler.timesteps, noise, strict=True):
        plain, prompted = net(torch.cat([x, x]), t, tokens).sample.chunk(2)
        out = plain + scale * (prompted - plain)
        z = reference.first(z).to(kind)
        x = scheduler.step(out, t, x, eta=1.0, variance_noise=z).prev_sample
        path.append(reference.last(x))
    return np.stack(path)


@torch.no_grad()
def their_pictures(latents) -> np.ndarray:
    net = autoencoder()
    return reference.last(net.decode(reference.first(latents) / net.config.scaling_factor).sample)


def our_trajectory(path: Path, given):
    """The path of `denoise`, and the decoded pictures."""
    (net, params), (coder, weights) = folders.load_unet(path), folders.load_vae(path)
    schedule = folders.read_schedule(path)
    sampler = diffusion.ddim_sampler(schedule.alphas, STEPS, prediction=schedule.prediction)
    context = Context(jnp.asarray(given["prompt"]), jnp.asarray(given["null"]))
    run = jax.jit(denoise, static_argnums=0)
    predict, key = guided(net.apply, GUIDANCE), jax.random.key(SEED)
    last, latents, _ = run(predict, params, sampler, jnp.asarray(given["x"]), context, key)
    return np.asarray(latents), np.asarray(jax.jit(coder.decode)(weights, last))


def test_twenty_steps_of_ddim(pipeline):
    """At every step; ours is as near to what f64 gives as torch's f32 is."""
    given, alphas = start(), folders.read_schedule(pipeline).alphas
    noise = noises(given["x"].shape)
    expected = their_trajectory(given, noise)
    exact = their_trajectory(given, noise, alphas, kind=torch.float64)
    without = their_trajectory(given, noise, scale=1.0)
    assert reference.error(without[-1], expected[-1]) > 0.1  # the network and its guidance matter
    latents, pictures = our_trajectory(pipeline, given)
    for i in range(STEPS + 1):
        assert reference.error(latents[i], expected[i]) < 5e-6
        assert reference.error(latents[i], exact[i]) < 2e-6
    assert reference.error(pictures, their_pictures(expected[-1])) < 5e-6


def write_golden() -> None:
    given = start()
    latents = their_trajectory(given, noises(given["x"].shape))
    with tempfile.TemporaryDirectory() as folder:
        autoencoder().save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    described = {"config": config, "tensors": reference.shapes(autoencoder())}
    (reference.GOLDEN / "vae_4.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    np.savez_compressed(
        reference.GOLDEN / "trajectory.npz",
        **given,
        last=latents[-1],
        pictures=their_pictures(latents[-1]),
    )


if __name__ == "__main__":
    write_golden()
