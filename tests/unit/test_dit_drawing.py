"""What a trained DiT draws: each clip by its own seed, in the precision asked for, by the objective of its training."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_stage_tiny import (
    DDPMS,
    DIT_FACTORY,
    FLOW,
    TEXT_FACTORY,
    THREE,
    TOKYO,
    batch,
    stage,
)
from tiny_dit import VAE_FACTORY
from torch import Tensor

from soratrain.batch import to_uint8
from soratrain.diffusion import generator
from soratrain.diffusion.conditioning import Conditioning
from soratrain.diffusion.ddpm import DDPM
from soratrain.diffusion.flow import Flow
from soratrain.diffusion.generator import Generator
from soratrain.diffusion.objective import Objective
from soratrain.diffusion.sampler import Sampler
from soratrain.diffusion.ways import Layout
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.dit import DiT
from soratrain.models.tokens import Tokens
from soratrain.stages.dit import DiTStage
from soratrain.stages.sample import Sample, parse_size, slug
from soratrain.stages.sample_tasks import T2V


def export(folder: Path, module: DiTStage) -> Path:
    """Write weights of an untrained chain that draws something else for every prompt."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, (net, factory, extra) in module.exported().items():
        weights.save(folder / "weights", name, net, factory, extra)
    weights.save(folder / "weights", "vae", VAE_FACTORY(), VAE_FACTORY, {})
    return folder


def test_that_no_clip_has_a_caption_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    module, one = stage(), batch([0])
    silent = replace(one, captions=("",))
    for shown in [silent] * 15 + [one] + [silent] * 40:
        module.training_step(shown, 0)
    assert caplog.text.count("16 batches in a row, such as that of clip") == 1


@pytest.fixture()
def trained(tmp_path: Path) -> Path:
    return export(tmp_path, stage())


def draw(trained: Path, prompts: list[str], batch: int = 16, **kwargs: object) -> list[np.ndarray]:
    settings = {"height": 16, "width": 32, "frames": 5, "seed": 3, "sampler": THREE} | kwargs
    return Generator.load(trained, trained, batch=batch)(prompts, **settings)  # type: ignore[arg-type]


def test_decoding_holds_a_piece_of_a_clip_at_once_and_gives_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae, seen = VAE_FACTORY().eval(), []
    latent = torch.randn(4, 9, 4, 6)
    with torch.no_grad():
        whole = to_uint8(vae.decode(latent[None]))[0].numpy()
    denormalise = vae.denormalise
    monkeypatch.setattr(vae, "denormalise", lambda z: seen.append(z.shape[2]) or denormalise(z))
    monkeypatch.setattr(generator, "DECODED", 2 * 4 * 32 * 48)  # two latent frames
    drawn = Generator(vae, DIT_FACTORY(), TEXT_FACTORY()).decode(latent)
    assert drawn.shape == (33, 32, 48, 3) and np.abs(drawn.astype(int) - whole).max() <= 1
    assert seen == [1, 2, 2, 2, 2]


def test_a_clip_depends_on_seed_and_prompt_and_not_on_its_batch(trained: Path) -> None:
    prompts = ["a cat", TOKYO, "café", "三只猫"]
    together = draw(trained, prompts)
    assert all(clip.shape == (5, 16, 32, 3) and clip.dtype == np.uint8 for clip in together)
    for clip, alone in zip(together, draw(trained, prompts, batch=1), strict=True):
        assert np.abs(clip.astype(int) - alone).max() <= 1
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(together[0], draw(trained, prompts[:1], seed=4)[0])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_nets_run_in_the_precision_asked_for_and_levels_steps_and_latents_in_fp32(
    trained: Path, precision: str
) -> None:
    net_dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    generate, dtypes, steps = Generator.load(trained, trained, precision=precision), {}, []
    for name in ("dit", "text", "vae"):
        for place, module in getattr(generate, name).named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv3d | torch.nn.Conv2d):
                note = partial(dtypes.__setitem__, f"{name}.{place}")
                module.register_forward_hook(lambda module, inputs, out, note=note: note(out.dtype))
    for block in generate.dit.blocks:
        attend = block.attention.attend
        block.attention.attend = lambda q, *rest, attend=attend: dtypes.__setitem__("q", q.dtype) or attend(q, *rest)
    layouts = [Layout(generate.shape(16, 32, 5), 8.0)] * 2
    noised = Flow.to_velocity

    def watched(self: Flow, x: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        steps.append({x.dtype, prediction.dtype, sigma.dtype})
        return noised(self, x, prediction, sigma)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flow, "to_velocity", watched)
        drawn = generate.draw(layouts, ["a cat", TOKYO], [1, 2], THREE)
    assert drawn.dtype == torch.float32 and steps and all(step == {torch.float32} for step in steps)
    for latent in generate.encode(generate.decode(drawn[0])):
        assert latent.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    for _ in generate.decode_stream(drawn[:1]):
        assert not torch.is_autocast_enabled("cpu")  # for it is the caller's turn
    wide = {name for name in dtypes if "embed_sigma" in name or name == "dit.condition"}
    assert len(wide) == 3 and all(dtypes[name] == torch.float32 for name in wide)
    assert {dtypes[name] for name in dtypes.keys() - wide} == {net_dtype}
    assert {name.split(".")[0] for name in dtypes} == {"dit", "text", "vae", "q"}


def test_bf16_draws_near_what_fp32_draws_whatever_the_batch(trained: Path) -> None:
    found = {}
    for precision, count in (("32-true", 2), ("bf16-mixed", 2), ("bf16-mixed", 1)):
        generate = Generator.load(trained, trained, precision=precision)
        layouts = [Layout(generate.shape(16, 32, 5), 8.0)] * count
        found[precision, count] = generate.draw(layouts, ["a cat", TOKYO][:count], [1, 2][:count], THREE)[0]
    fp32 = found["32-true", 2]
    for precision, count in (("bf16-mixed", 2), ("bf16-mixed", 1)):
        gap = (found[precision, count] - fp32).abs().mean() / fp32.abs().mean()
        assert 0 < gap < 0.05, (precision, count, gap)


@pytest.mark.parametrize("objective", [FLOW, *DDPMS])
def test_the_objective_is_kept_beside_the_weights_and_they_draw_by_it(tmp_path: Path, objective: Objective) -> None:
    export(tmp_path, stage(objective))
    assert Generator.load(tmp_path, tmp_path).objective == objective
    for name in ("auto", "dpmpp", *(["ancestral"] if isinstance(objective, DDPM) else ["heun"])):
        sampler = replace(THREE, name=name)
        together = draw(tmp_path, ["a cat", "a dog"], sampler=sampler)
        alone = draw(tmp_path, ["a dog"], sampler=sampler)
        assert not np.array_equal(*together) and np.abs(together[1].astype(int) - alone[0]).max() <= 1
        assert json.loads(Path(job(tmp_path, sampler=sampler)()["files"][0]).with_suffix(".json").read_text())[
            "sampler"
        ]["name"] == (name if name != "auto" else "ddim" if isinstance(objective, DDPM) else "euler")


def test_weights_of_an_objective_that_the_sampler_does_not_fit_are_refused(tmp_path: Path) -> None:
    export(tmp_path, stage(DDPMS[0]))
    with pytest.raises(ConfigError, match="sampler=euler does not fit objective=ddpm; use sampler=auto, or one of"):
        job(tmp_path, sampler=replace(THREE, name="euler"))()
    file = tmp_path / "weights" / "dit.yaml"
    file.write_text(file.read_text().replace("name: ddpm", "name: edm"))
    with pytest.raises(DataError, match="objective 'edm'; this version knows"):
        Generator.load(tmp_path, tmp_path)


def test_guidance_costs_a_second_clip_only_where_it_acts(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, int]] = []
    forward = DiT.forward

    def spy(net: DiT, tokens: Tokens, *rest: object) -> Tensor:
        seen.append((tokens.sigma[0].item(), len(tokens.packing)))
        return forward(net, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DiT, "forward", spy)
    draw(trained, ["a cat"], sampler=Sampler(steps=4, guidance_scale=1.0))
    assert [clips for _, clips in seen] == [1, 1, 1, 1]
    seen.clear()
    draw(trained, ["a cat"], sampler=Sampler(steps=8, guidance_scale=3.0, guidance_interval=[0.3, 0.9]))
    assert len(seen) == 8 and {clips for _, clips in seen} == {1, 2}
    assert all((clips == 2) == (0.3 < sigma <= 0.9) for sigma, clips in seen)


@pytest.mark.parametrize(("dropout", "scale", "warned"), [(0.0, 3.0, True), (0.0, 1.0, False), (0.1, 3.0, False)])
def test_guidance_by_a_net_that_never_saw_an_empty_prompt_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dropout: float, scale: float, warned: bool
) -> None:
    export(tmp_path, stage(conditioning=Conditioning(caption_dropout=dropout)))
    with caplog.at_level(logging.WARNING):
        draw(tmp_path, ["a cat"], sampler=replace(THREE, guidance_scale=scale))
    assert ["caption_dropout=0" in record.message for record in caplog.records] == [True] * warned


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"width": 24}, "size=24x16: width 24 is no multiple of 16; the nearest are 16 and 32"),
        ({"height": 8}, "size=32x8: height 8 is no multiple of 16; the nearest are 16 and 32"),
        ({"frames": 16}, "frames=16 is not 1 . a multiple of 4; the nearest are 13 and 17"),
        ({"frames": 0}, "the nearest are 1 and 5"),
    ],
)
def test_sizes_off_the_stride_are_refused_with_the_nearest_ones(
    trained: Path, wrong: dict[str, int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        draw(trained, ["a cat"], **wrong)


def test_empty_prompts_are_refused_unless_guidance_is_0_and_endless_ones_always(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for empty in ("", "  \n"):
        with pytest.raises(ConfigError, match="sampler.guidance_scale=0"):
            draw(trained, [empty])
    assert len(draw(trained, [""], sampler=replace(THREE, guidance_scale=0.0))) == 1
    with pytest.raises(ConfigError, match="more than 10000"):
        draw(trained, ["x" * 10_001])
    with caplog.at_level(logging.WARNING):
        draw(trained, ["word " * 100, "short"])
    assert [record.message.split(";")[0] for record in caplog.records] == ["1 of 2 prompts are longer than 12 tokens"]


def job(trained: Path, **kwargs: object) -> Sample:
    settings: dict[str, object] = dict(
        out=str(trained / "out"), vae=str(trained), dit=str(trained), prompt=TOKYO, size="32x16", frames=5, fps=8.0
    )
    settings |= {"seed": 0, "sampler": Sampler(steps=2, guidance_scale=2.0), "task": T2V()}
    return Sample(**(settings | kwargs))  # type: ignore[arg-type]


def test_the_job_writes_a_clip_a_picture_and_how_to_repeat_it(trained: Path) -> None:
    result = job(trained, prompt=[TOKYO, "三只猫"])()
    assert result["samples"] == result["drawn"] == 2
    for file, prompt in zip(result["files"], (TOKYO, "三只猫"), strict=True):
        path = Path(file)
        assert path.suffix == ".mp4" and path.stat().st_size > 0 and path.with_suffix(".png").stat().st_size > 0
        notes = json.loads(path.with_suffix(".json").read_text())
        assert notes["prompt"] == prompt and notes["seed"] == 0 and set(notes["weights"]) == {"vae", "dit", "text"}
        assert notes["precision"] == "32-true"
    assert job(trained, prompt=[TOKYO, "三只猫"])()["drawn"] == 0
    assert job(trained, prompt=TOKYO, seed=1)()["drawn"] == 1
    half = job(trained, prompt=TOKYO, precision="bf16-mixed")()  # is another sample, beside the first
    notes = json.loads(Path(half["files"][0]).with_suffix(".json").read_text())
    assert half["drawn"] == 1 and half["files"][0] != result["files"][0] and notes["precision"] == "bf16-mixed"
    assert Path(job(trained, frames=1)()["files"][0]).suffix == ".png"


def test_a_refused_prompt_leaves_nothing_behind(trained: Path) -> None:
    for wrong in ({"prompt": ["fine", ""]}, {"size": "30x16"}, {"frames": 4}):
        with pytest.raises(ConfigError):
            job(trained, **wrong)()
    with pytest.raises(ConfigError, match="prompt is not set"):
        job(trained, prompt=None)
    assert not (trained / "out").exists()


def test_nets_that_do_not_belong_together_are_refused(trained: Path) -> None:
    other = partial(VAE_FACTORY, latent_channels=8)
    weights.save(trained / "other", "vae", other(), other, {})
    with pytest.raises(DataError, match="4 latent channels.*has 8"):
        Generator.load(trained / "other", trained)


def test_sizes_are_width_by_height_and_file_names_tell_prompts_of_any_script_apart() -> None:
    assert parse_size("832x480") == (480, 832)
    with pytest.raises(ConfigError, match="WIDTHxHEIGHT"):
        parse_size("832")
    names = [slug(prompt) for prompt in ("三只猫", "三只狗", "café", "cafe", TOKYO, "../../etc")]
    assert len(set(names)) == len(names) and all(name.replace("-", "").isalnum() for name in names)
    assert names[0].startswith("三只猫-") and names[2].startswith("café-")
