"""Promises of other people's VAEs: the numbers of diffusers, the face of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import published
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from soratrain.errors import ConfigError, DataError
from soratrain.models import autoencoders, weights
from soratrain.models import published as adapters
from soratrain.models.autoencoders import check, load_vae

FORMS = {"wan": (4, 8, 8), "wan22": (4, 16, 16), "cogvideox": (4, 8, 8)}
ASKED = {
    "wan": {"_target_": "soratrain.models.published.Wan", "latent_channels": 4},
    "wan22": {"_target_": "soratrain.models.published.Wan", "latent_channels": 6},
    "cogvideox": {"_target_": "soratrain.models.published.CogVideoX", "latent_channels": 4},
}


def clip(frames: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, 32, 48, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def normalised(form: str, net: object, latent: Tensor) -> Tensor:
    """Return a latent as diffusers' own pipelines hand it to a transformer."""
    config = net.config  # type: ignore[attr-defined]
    if form == "cogvideox":
        return latent * config.scaling_factor
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (latent - mean) / std


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_a_latent_is_the_mode_that_diffusers_gives_normalised_by_its_config(
    form: str, frames: int, tmp_path: Path
) -> None:
    net, x = published.save(form, tmp_path), clip(frames, batch=2)
    vae = load_vae(tmp_path)
    assert vae.stride == FORMS[form] and vae.latent_channels == ASKED[form]["latent_channels"]
    expected = normalised(form, net, net.encode(x).latent_dist.mode())
    latent = vae.encode(x)
    assert latent.shape[2:] == (1 + (frames - 1) // 4, 32 // vae.stride[1], 48 // vae.stride[2])
    torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.encode(x), latent, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frames", [1, 9, 17])
def test_pixels_are_those_that_diffusers_decodes(form: str, frames: int, tmp_path: Path) -> None:
    net = published.save(form, tmp_path)
    vae = load_vae(tmp_path)
    latent = net.encode(clip(frames)).latent_dist.mode()
    torch.testing.assert_close(
        vae.decode(normalised(form, net, latent)), net.decode(latent).sample, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_latent_frames_gives_its_frames(form: str, tmp_path: Path) -> None:
    published.save(form, tmp_path)
    vae = load_vae(tmp_path)
    for frames in (1, 5, 9, 13, 17):
        assert vae.decode(vae.encode(clip(frames))).shape == (1, 3, frames, 32, 48)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [4, 8])
def test_a_stream_gives_the_numbers_of_the_whole(form: str, step: int, tmp_path: Path) -> None:
    published.save(form, tmp_path)
    vae, x = load_vae(tmp_path), clip(21)
    latent = vae.encode(x)
    streamed = torch.cat(list(vae.encode_stream(x.split(3, dim=2), step)), dim=2)
    torch.testing.assert_close(streamed, latent, rtol=1e-5, atol=1e-5)
    decoded = torch.cat(list(vae.decode_stream(latent.split(2, dim=2), step // 4)), dim=2)
    torch.testing.assert_close(decoded, vae.decode(latent), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_budget_of_pixels_shortens_the_steps_of_a_stream_and_changes_no_number(form: str, tmp_path: Path) -> None:
    published.save(form, tmp_path)
    vae, x = load_vae(tmp_path), clip(21)
    latent, budget = vae.encode(x), 4 * 32 * 48
    pieces = list(vae.encode_stream(x.split(3, dim=2), 16, budget))
    torch.testing.assert_close(torch.cat(pieces, dim=2), latent, rtol=1e-5, atol=1e-5)
    assert len(pieces) == (1 if form == "cogvideox" else 6)
    decoded = torch.cat(list(vae.decode_stream([latent], 4, budget)), dim=2)
    torch.testing.assert_close(decoded, vae.decode(latent), rtol=1e-5, atol=1e-5)


def test_a_stream_through_wan_holds_no_more_than_a_step(tmp_path: Path) -> None:
    published.save("wan", tmp_path)
    vae = load_vae(tmp_path)
    pieces = (clip(1) if number == 0 else clip(4) for number in range(40))
    assert sum(piece.shape[2] for piece in vae.encode_stream(pieces, 4)) == 40


def test_a_clip_too_large_for_a_vae_that_cannot_stream_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.save("cogvideox", tmp_path)
    vae = load_vae(tmp_path)
    monkeypatch.setattr(adapters, "WHOLE_VALUES", 3 * 32 * 48 * 9)
    assert len(list(vae.encode_stream([clip(9)]))) == 1
    with pytest.raises(ConfigError, match="max_frames"):
        list(vae.encode_stream([clip(9), clip(4)]))
    with pytest.raises(ConfigError, match="vae=wan"):
        list(vae.decode_stream([torch.zeros(1, 4, 5, 4, 6)]))


@pytest.mark.parametrize("frames", [4, 6])
def test_a_size_off_the_stride_is_refused_by_other_people_s_vaes_too(frames: int, tmp_path: Path) -> None:
    published.save("wan22", tmp_path)
    vae = load_vae(tmp_path)
    with pytest.raises(ConfigError, match="1 \\+ 4k"):
        vae.encode(clip(frames))
    with pytest.raises(ConfigError, match="multiple of 16"):
        vae.encode(clip(5)[..., :24, :])


@torch.no_grad()
def test_a_pipeline_s_folder_and_bf16_weights_are_read(tmp_path: Path) -> None:
    net = published.make("cogvideox")
    net.to(torch.bfloat16).save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path)
    expected = net.float().encode(clip(9)).latent_dist.mode() * 0.7
    assert vae.encode(clip(9)).dtype == torch.float32
    torch.testing.assert_close(vae.encode(clip(9)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("form", "other"), [("wan", "cogvideox"), ("cogvideox", "wan")])
def test_weights_of_another_class_than_asked_for_are_an_error_that_names_both(
    form: str, other: str, tmp_path: Path
) -> None:
    published.save(form, tmp_path)
    check(str(tmp_path), ASKED[form])
    with pytest.raises(DataError) as caught:
        check(str(tmp_path), ASKED[other])
    names = {kind.option: kind.class_name for kind in adapters.KINDS}
    assert names[form] in str(caught.value) and names[other] in str(caught.value)
    with pytest.raises(DataError, match=f"say vae={form}"):
        check(str(tmp_path), {"_target_": "soratrain.models.vae.VAE", "latent_channels": 16})


def test_another_number_of_channels_is_an_error_that_says_which(tmp_path: Path) -> None:
    published.save("wan22", tmp_path)
    with pytest.raises(DataError, match="say vae.latent_channels=6"):
        check(str(tmp_path), ASKED["wan"])


def test_a_class_that_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(DataError, match="AutoencoderTiny; known are AutoencoderKLWan and"):
        load_vae(tmp_path)


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    published.save("wan", tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = next(iter(state))
    save_file({key: value for key, value in state.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=name.split(".")[0]):
        load_vae(tmp_path)
    save_file({**state, "surplus": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="surplus"):
        load_vae(tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot load"):
        load_vae(tmp_path)


def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    script = (
        "from soratrain.errors import UserError\n"
        "from soratrain.models.autoencoders import load_vae\n"
        "try:\n    load_vae('nobody/nothing')\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("inputs.vae=nobody/nothing: is no folder here") and done.stdout.count("\n") == 1


def test_a_missing_package_is_one_line_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.save("wan", tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match="pip install 'soratrain\\[hf\\]'"):
        load_vae(tmp_path)


def test_what_is_not_there_is_still_an_error_about_our_own_weights(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no weights of 'vae'"):
        load_vae(tmp_path)
    assert autoencoders.find(tmp_path) is None


def test_a_digest_tells_weights_apart_and_not_where_they_lie(tmp_path: Path) -> None:
    published.save("wan", tmp_path / "a")
    published.save("wan", tmp_path / "b" / "vae")
    published.save("wan", tmp_path / "c", seed=1)
    first, second, third = (weights.digest(load_vae(tmp_path / name)) for name in "abc")
    assert first == second != third
