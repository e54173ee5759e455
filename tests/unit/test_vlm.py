"""Promises of the captioner made of others' nets: any size and duration, cached equals uncached, a base left alone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from vlm_parts_tiny import ENCODERS, MODELS, TEMPLATE, factory, save_encoder, save_language

from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.hf_tower import layer_widths
from soratrain.models.hf_vision import grid
from soratrain.models.text import ByteTextEncoder
from soratrain.models.vlm import VLM

WORDS = {"short": "Say little.", "long": "Say all that there is to be said about it."}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for kind in ENCODERS:
        save_encoder(folder / kind, kind)
    for kind in MODELS:
        save_language(folder / kind, kind)
    return folder


def vlm(parts: Path, vision: str = "clip", language: str = "llama", **changes) -> VLM:
    torch.manual_seed(0)
    net = factory(parts / vision, parts / language, **changes)()
    net.read_stored()
    return net.eval()


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def losses(net: VLM, captions: list[str], styles: list[str], seed: int = 0) -> torch.Tensor:
    text = torch.randn(len(captions), 16, generator=torch.Generator().manual_seed(1))
    pixels = clips(len(captions), 3, 5, 16, 24, seed=seed)
    return torch.stack(net(pixels, torch.full((len(captions),), 8.0), captions, styles, text))


@pytest.mark.parametrize("vision", ENCODERS)
def test_any_size_duration_and_image_has_a_vector_and_vectors_for_words(parts, vision):
    net = vlm(parts, vision)
    for shape in ((2, 3, 17, 64, 64), (1, 3, 9, 48, 80), (3, 3, 1, 30, 21), (1, 3, 5, 8, 8), (1, 3, 3, 8, 500)):
        pixels, fps = clips(*shape), torch.full((shape[0],), 8.0)
        vectors, words = net.embed_video(pixels, fps), net.look(pixels, fps)[0]
        assert vectors.shape == (shape[0], 8) and words.shape == (shape[0], 3, 16)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(shape[0]))


@pytest.mark.parametrize(("tuning", "dtype"), [("frozen", "fp32"), ("frozen", "bf16"), ("lora", "bf16")])
def test_what_is_frozen_is_counted_to_the_byte_before_it_is_read(parts, tuning, dtype):
    for vision, language in zip(ENCODERS, MODELS, strict=True):
        net = factory(parts / vision, parts / language, vision_tuning=tuning, language_tuning=tuning, dtype=dtype)()
        for tower in (net.vision, net.language):
            counted = tower.frozen_bytes()
            assert not tower._held and counted > 0
            held = tower.here()
            assert counted == sum(tensor.nbytes for tensor in (*held.parameters(), *held.buffers()))
    net = factory(parts / "clip", parts / "llama", vision_tuning="full", language_tuning="full")()
    assert net.vision.frozen_bytes() == net.language.frozen_bytes() == 0


def test_a_frame_keeps_its_aspect_ratio():
    assert grid(224, 224, 196) == (14, 14) and grid(360, 640, 196) == (10, 19) and grid(640, 360, 196) == (19, 10)
    assert grid(1, 1000, 16) == (1, 16) and grid(5, 4, 1) == (1, 1)
    for size in ((48, 64), (100, 700), (333, 90)):
        rows, columns = grid(*size, 196)
        assert rows * columns <= 196 and abs(rows / columns / (size[0] / size[1]) - 1) < 0.2


def test_the_same_motion_at_twice_the_frame_rate_looks_the_same(parts):
    net = vlm(parts)
    slow = clips(1, 3, 9, 16, 16)
    fast = slow.repeat_interleave(2, dim=2)[:, :, :17]
    seen = [net.embed_video(video, torch.tensor([rate])) for video, rate in ((slow, 4.0), (fast, 8.0))]
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[0], net.embed_video(slow, torch.tensor([2.0])), atol=1e-4)
    assert not torch.allclose(seen[0], net.embed_video(slow.flip(2), torch.tensor([4.0])), atol=1e-4)


def test_a_batch_changes_no_clip_even_where_frame_rates_differ(parts):
    net = vlm(parts)
    pixels, fps = clips(3, 3, 17, 16, 24), torch.tensor([4.0, 16.0, 30.0])
    together = net.look(pixels, fps)
    for row in range(3):
        for whole, single in zip(together, net.look(pixels[row : row + 1], fps[row : row + 1]), strict=True):
            torch.testing.assert_close(whole[row : row + 1], single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.0, 0.9])
@pytest.mark.parametrize("language", MODELS)
def test_cached_equals_uncached_and_a_batch_changes_no_text(parts, language, top_p):
    net = vlm(parts, language=language, instructions=WORDS)
    pooled, styles, draws = torch.randn(4, 3, 16), ["short", "long", "camera", "short"], [3, 5, 7, 11]
    vectors, words = net.asked(pooled, styles)
    bounds = [20, 24, 7, 20]
    cached = net.language.write(vectors, words, bounds, top_p=top_p, draws=draws)
    assert cached == net.language.write(vectors, words, bounds, top_p=top_p, draws=draws, cached=False)
    for row in range(4):
        alone = net.language.write(
            vectors[row : row + 1], words[row : row + 1], bounds[row : row + 1], top_p=top_p, draws=draws[row : row + 1]
        )
        assert alone == ([cached[0][row]], [cached[1][row]])
    assert len({tuple(text) for text in cached[0]}) > 2 and all(map(len, cached[0]))


def test_captions_of_unequal_length_do_not_disturb_each_other(parts):
    net = vlm(parts, language="gpt2", instructions=WORDS)
    captions, styles = ["a red circle", "", "x" * 60, "moves left"], ["short", "long", "camera", "long"]
    vectors, words = net.asked(torch.randn(4, 3, 16), styles)
    texts = [net.language.ids(caption) for caption in captions]
    together, packing = net.language.losses(vectors, words, texts, 24)
    assert packing.lengths == (len(texts[0]) + 1, 1, 24, len(texts[3]) + 1)
    for row, part in enumerate(together.split(packing.lengths)):
        one = slice(row, row + 1)
        torch.testing.assert_close(part, net.language.losses(vectors[one], words[one], texts[one], 24)[0])


def test_what_is_written_is_what_the_loss_teaches(parts):
    net = vlm(parts)
    vectors, words = net.asked(torch.randn(1, 3, 16), ["short"])
    (text,), _ = net.language.write(vectors, words, [12])
    likeliest, _ = net.language.losses(vectors, words, [text], 24)
    for place in range(len(text)):
        other = [*text[:place], (text[place] + 1) % 200, *text[place + 1 :]]
        assert net.language.losses(vectors, words, [other], 24)[0][place] > likeliest[place]


@pytest.mark.parametrize("language", MODELS)
@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_step_0_is_the_base_and_the_loss_reaches_all_that_is_trained(parts, tuning, language):
    vision = dict(zip(MODELS, ENCODERS, strict=True))[language]
    base = vlm(parts, vision, language, vision_tuning="frozen", language_tuning="frozen")
    net = vlm(parts, vision, language, vision_tuning=tuning, language_tuning=tuning)
    own = {name: value for name, value in net.state_dict().items() if name not in base.state_dict()}
    weights.load_into(net, base.state_dict() | own, "the base")
    captions, styles = ["a red circle", "a blue box moves left"], ["short", "long"]
    expected, found = losses(base, captions, styles), losses(net, captions, styles)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    for name, param in net.named_parameters():
        assert name.endswith("mask_token") or (param.grad is not None and torch.isfinite(param.grad).all()), name
    towers = [name for name, _ in net.named_parameters() if name.startswith(("vision.", "language."))]
    assert bool(towers) == (tuning != "frozen")
    assert all(("adapters" in name) == (tuning == "lora") for name in towers)
    if tuning == "lora":
        held = {name: param.clone() for name, param in net.language.here().named_parameters()}
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            losses(net, captions, styles).sum().backward()
            optimizer.step()
        assert not torch.allclose(losses(net, captions, styles), losses(base, captions, styles))
        assert all(torch.equal(param, held[name]) for name, param in net.language.here().named_parameters())


@pytest.mark.parametrize(("vision", "language"), list(zip(ENCODERS, MODELS, strict=True)))
def test_muon_turns_the_matrices_of_others_nets_and_no_table_nor_head(parts, vision, language):
    net = factory(parts / vision, parts / language, vision_tuning="full", language_tuning="full")()
    found = {name for name, param in net.named_parameters() if param.ndim > 1 and not getattr(param, "no_muon", False)}
    towers = {name for name in found if name.startswith(("vision.net.", "language.net."))}
    table = ("wte.", "wpe.", "embed_tokens.", "position_embedding", "class_embedding", "cls_token", "mask_token")
    assert not [name for name in towers if any(word in name for word in table) or "lm_head" in name]
    for tower in (net.vision, net.language):
        inner = [layer for layer in tower.net.modules() if layer_widths(layer)]
        assert sum(not hasattr(layer.weight, "no_muon") for layer in inner) >= 8


def test_muon_leaves_a_learned_end_to_adamw(tmp_path):
    save_encoder(tmp_path / "eye"), save_language(tmp_path / "tongue", ends=False)
    net = factory(tmp_path / "eye", tmp_path / "tongue")()
    assert net.language.end.weight.no_muon


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_weights_are_saved_without_what_is_frozen_and_say_the_same_again(parts, tuning, tmp_path):
    make = factory(parts / "siglip", parts / "qwen2", vision_tuning=tuning, language_tuning=tuning)
    torch.manual_seed(0)
    net = make()
    net.read_stored()
    net.teach(["a red circle", "moves"], ["short", "camera"])
    for param in net.parameters():
        param.data += 0.01
    before = losses(net, ["a red circle"], ["short"])
    net.confirm()
    weights.save(tmp_path, "captioner", net, make, net.record())
    again, extra = weights.load(tmp_path, "captioner")
    torch.testing.assert_close(losses(again, ["a red circle"], ["short"]), before)
    assert again.known_styles == ("short", "camera") and extra["language"]["tuning"] == tuning
    assert extra["language"]["folder"] == str(parts / "qwen2") and set(extra["vision"]["digest"]) != {"0"}
    names = weights.load_state(tmp_path, "captioner")[0]
    assert any(name.startswith("language.net.") for name in names) == (tuning == "full")


def test_a_folder_that_has_moved_or_holds_another_net_is_one_line(parts, tmp_path):
    for kind, save in (("eye", save_encoder), ("tongue", save_language)):
        save(tmp_path / kind)
    make = factory(tmp_path / "eye", tmp_path / "tongue")
    net = make()
    net.confirm()
    weights.save(tmp_path / "weights", "captioner", net, make, net.record())
    save_language(tmp_path / "tongue", seed=1)
    with pytest.raises(DataError, match="captioner.language=.*trained with another language model.*captioner.yaml"):
        losses(weights.load(tmp_path / "weights", "captioner")[0], ["a"], ["short"])
    shutil.move(tmp_path / "eye", tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"captioner.vision=.*eye: is no folder.*captioner.yaml names it") as caught:
        weights.load(tmp_path / "weights", "captioner")
    assert "\n" not in str(caught.value)


def test_a_model_without_a_template_and_without_special_tokens_learns_its_own_end(tmp_path):
    save_encoder(tmp_path / "eye")
    save_language(tmp_path / "tongue", ends=False, std=0.1)
    torch.manual_seed(0)
    net = factory(tmp_path / "eye", tmp_path / "tongue", instructions=WORDS, language_tuning="full")()
    assert net.language.tokenizer.eos_token_id is None and net.language.stop == net.language.vocabulary
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        losses(net, ["a", "bc"], ["short", "long"])[0].sum().backward()
        optimizer.step()
    pooled, _ = net.look(clips(2, 3, 5, 16, 24), torch.full((2,), 8.0))
    net.teach(["a", "bc"], ["short", "long"])
    styles = ["short", "long"]
    assert net.say(pooled, styles) == net.say(pooled, styles, cached=False) == ["a", "bc"]
    with pytest.raises(ConfigError, match="caption style 'poem' is unknown"):
        net.say(pooled, "poem")


def test_what_is_asked_goes_into_the_models_chat_template(tmp_path):
    save_encoder(tmp_path / "eye")
    save_language(tmp_path / "tongue", template=TEMPLATE)
    with_chat, plain = (
        factory(tmp_path / "eye", tmp_path / "tongue", instructions=WORDS, chat=chat)() for chat in (1, 0)
    )
    decoded = [with_chat.language.tokenizer.decode(part) for part in with_chat.language.around(WORDS["short"])]
    assert decoded == ["<|user|>", "\nSay little.<|bot|>"]
    assert [plain.language.tokenizer.decode(part) for part in plain.language.around(WORDS["short"])] == [
        "",
        "\nSay little.\n",
    ]
    save_language(tmp_path / "tongue", template="{{ raise_exception('no') }}")
    with pytest.raises(ConfigError, match=r"chat template of .* refuses .*captioner.chat=false"):
        factory(tmp_path / "eye", tmp_path / "tongue", instructions=WORDS)()


def test_captions_of_ten_thousand_tokens_and_of_special_ones_are_cut_and_counted(parts):
    net = vlm(parts)
    long, odd = "a red circle " * 5000, "a\0red</s>circle<pad>\u202e\ud800 \r\n"
    assert net.teach([long, odd, ""], ["long", "short", "short"]) == 1
    assert net.bound("long") == 24 and net.known_styles == ("short", "long")
    assert not {net.language.stop, *net.language.special} & set(net.language.ids(odd))
    assert net.language.text(net.language.ids(odd)) == "a redcircle?"
    assert torch.isfinite(losses(net, [long, odd, ""], ["long", "short", "tags"])).all()


def test_a_clip_without_frames_is_refused(parts):
    with pytest.raises(DataError, match="no frames"):
        vlm(parts).embed_video(torch.zeros(1, 3, 0, 8, 8), torch.tensor([8.0]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision": "nowhere"}, "captioner.vision=nowhere: is no folder"),
        ({"language": "llama", "vision": "llama"}, "captioner.vision=.*does not cut frames into patches"),
        ({"language_tuning": "half"}, "captioner.language_tuning='half' is unknown; use frozen, lora, full"),
        ({"lora_targets": ["nothing"]}, r"lora_targets=\['nothing'\]: .*called .*q_proj"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"skip_layers": 2}, "captioner.skip_layers=2: .* has 2 layers"),
        ({"max_tokens": 300}, "captioner.max_tokens=300 .* reads 256"),
        ({"dtype": "fp16"}, "captioner.dtype='fp16' is unknown"),
        ({"instructions": {"poem": "Sing."}}, "captioner.instructions.poem: no such style"),
        ({"queries": 0}, "queries=0"),
        ({"dim": 18}, "width 18"),
    ],
)
def test_a_captioner_that_cannot_be_built_says_why(parts, changes, said):
    given = {key: str(parts / value) if (parts / str(value)).is_dir() else value for key, value in changes.items()}
    with pytest.raises((ConfigError, DataError), match=said) as caught:
        factory(parts / "clip", parts / "llama", **given)()
    assert "\n" not in str(caught.value)


def test_without_transformers_one_line_says_what_to_install(parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"captioner=vlm needs transformers .*pip install 'soratrain\[hf\]'"):
        factory(parts / "clip", parts / "llama")()


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_it_builds_without_memory_and_reads_nothing(parts, tuning):
    with torch.device("meta"):
        net = factory(parts / "clip", parts / "gpt2", vision_tuning=tuning, language_tuning=tuning)()
    assert all(param.is_meta for param in net.parameters())


def test_it_learns_to_tell_two_clips_apart_in_both_styles(parts, tmp_path):
    save_language(tmp_path / "tongue", "gpt2", std=0.1)
    net = vlm(parts, language=tmp_path / "tongue", language_tuning="full", vision_tuning="lora", queries=2).train()
    text = ByteTextEncoder(dim=16, depth=0, num_heads=2, table=64)
    pixels = torch.stack([torch.full((3, 3, 16, 16), 0.8), torch.full((3, 3, 16, 16), -0.8)]).repeat(2, 1, 1, 1, 1)
    fps, captions = torch.full((4,), 8.0), ["white", "black", "it is white", "it is black"]
    styles = ["short", "short", "long", "long"]
    net.teach(captions, styles)
    optimizer = torch.optim.AdamW([*net.parameters(), *text.parameters()], lr=2e-2)
    for _ in range(50):
        features, packing = text(text.tokenize(captions))
        language, contrast = net(pixels, fps, captions, styles, packing.mean(features))
        optimizer.zero_grad()
        (language.mean() + 0.2 * contrast.mean()).backward()
        optimizer.step()
    net.eval()
    assert net.generate(pixels[:2], fps[:2], "short") == captions[:2]
    assert net.generate(pixels[:2], fps[:2], ["long", "short"]) == [captions[2], captions[1]]
