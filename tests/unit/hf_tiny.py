"""Tiny random text encoders as transformers saves them, with tokenizers in which a word is a token."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

KINDS = ("t5", "umt5", "clip")
WORDS = ["<pad>", "</s>", "<unk>", "clip", *map(str, range(10))]


def save(kind: str, folder: Path, seed: int = 0, *, shard: str = "1GB", words: int = 512, dim: int = 16) -> Path:
    """Save a random encoder of width 16 and its tokenizer; `</s>` ends a text; CLIP's pads with what ends it."""
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    pad = "</s>" if kind == "clip" else "<pad>"
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=pad, eos_token="</s>", unk_token="<unk>", model_max_length=words
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"vocab_size": 16, "d_model": dim, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    if kind == "t5":
        net = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    elif kind == "umt5":
        net = UMT5EncoderModel(UMT5Config(**sizes))
    else:
        sizes = {"hidden_size": dim, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        special = {"vocab_size": 16, "eos_token_id": 1, "pad_token_id": 1, "bos_token_id": 2}
        net = CLIPTextModel(CLIPTextConfig(**sizes, **special, max_position_embeddings=words))
    net.save_pretrained(folder, max_shard_size=shard)
    return folder
