"""A tiny random LLaVA as transformers saves it: it sees 28x28 pictures, and its words are bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for message in messages %}<user>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
SPECIAL = ["<pad>", "</s>", "<image>", "<user>", "<bot>"]


def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate([*SPECIAL, *letters])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )


def save(folder: Path, seed: int = 0, *, template: str | None = TEMPLATE, chats: bool = False) -> Path:
    """Save a random model with its processor; one that `chats` often ends, and says what it will by chance."""
    torch.manual_seed(seed)
    words = tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**size, image_size=28, patch_size=14)
    text = LlamaConfig(
        **size, num_key_value_heads=2, vocab_size=len(words), eos_token_id=1, pad_token_id=0, bos_token_id=None
    )
    net = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=4,
        )
    )
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = 1, 0
    for weight in net.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)  # so that what it says depends on what it sees
    if chats:
        net.lm_head.weight.data[1] *= 2
        net.generation_config.do_sample = True
    net.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        pictures,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder
