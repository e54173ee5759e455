"""Tiny random vision encoders and language models as transformers saves them, with a small byte-level tokenizer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from soratrain.models.vlm import VLM

ENCODERS, MODELS = ("clip", "siglip", "dinov2"), ("llama", "qwen2", "gpt2")
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_encoder(folder: Path, kind: str = "clip", seed: int = 0) -> Path:
    """Save a vision encoder of width 16 that cuts 8x8 patches; CLIP's comes with its other half."""
    torch.manual_seed(seed)
    seen = {**SIZE, "image_size": 32, "patch_size": 8}
    if kind == "clip":
        CLIPModel(CLIPConfig(text_config={**SIZE, "vocab_size": 32}, vision_config=seen)).save_pretrained(folder)
    elif kind == "siglip":
        SiglipVisionModel(SiglipVisionConfig(**seen)).save_pretrained(folder)
    else:
        seen = {key: value for key, value in seen.items() if key != "intermediate_size"}
        Dinov2Model(Dinov2Config(**seen, mlp_ratio=2)).save_pretrained(folder)
    pictures = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


def tokenizer(ends: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    special = ["</s>", "<pad>", "<|user|>", "<|bot|>"] if ends else ["<|user|>", "<|bot|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, special_tokens=special, show_progress=False)
    raw.train_from_iterator(["a red circle moves left on a black background"] * 4, trainer)
    named: dict[str, Any] = {"eos_token": "</s>", "pad_token": "<pad>"} if ends else {}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **named)


def save_language(
    folder: Path,
    kind: str = "llama",
    seed: int = 0,
    *,
    ends: bool = True,
    template: str | None = None,
    std: float = 0.4,
) -> Path:
    """Save a language model of width 16; without `ends` no token ends a text, and none pads."""
    torch.manual_seed(seed)
    words = tokenizer(ends, template)
    known = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "bos_token_id": None}
    if kind == "gpt2":
        net = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=256, **known))
    else:
        config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
        tied = {"tie_word_embeddings": kind == "qwen2"}
        net = model(config(**SIZE, num_key_value_heads=1, max_position_embeddings=256, **tied, **known))
    for param in net.parameters():  # small initial weights say the same whatever they read
        if param.ndim > 1:
            torch.nn.init.normal_(param, std=std)
    net.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def factory(eye: Path, tongue: Path, **changes: Any) -> partial:
    sizes = {"dim": 16, "depth": 1, "num_heads": 2, "queries": 3, "patches": 16, "max_frames": 16, "frame_rate": 4.0}
    small = {"max_tokens": 24, "text_dim": 16, "vector_dim": 8, "lora_rank": 2, "lora_alpha": 4.0}
    return partial(VLM, **{"vision": str(eye), "language": str(tongue), **sizes, **small, **changes})
