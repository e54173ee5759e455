"""A tiny causal language model as transformers saves it, whose words follow one another as a test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
REFUSING = "{{ raise_exception('no such roles') }}"


def save(folder: Path, follows: Mapping[str, Sequence[str]], *, template: str | None = None, places: int = 512) -> Path:
    """Save a model that says, after a word, one of those that follow it, each as likely; `</s>` ends.

    What its prompt says last is `Caption:`, or `assistant:` where there is a template. Its state is the last word
    alone, so attention and MLP are zero.
    """
    said = [word for some in follows.values() for word in some]
    words = list(dict.fromkeys(["<unk>", "</s>", "<pad>", *follows, *said]))
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    width = len(words) + len(words) % 2
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=places,
            eos_token_id=1,
            bos_token_id=None,
            pad_token_id=2,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        net.model.embed_tokens.weight.copy_(torch.eye(len(words), width))
        net.lm_head.weight.fill_(-20.0)
        for word, some in follows.items():
            for after in some:
                net.lm_head.weight[words.index(after), words.index(word)] = 20.0
    net.save_pretrained(folder)
    return folder


def chain(text: str, start: str = "Caption:") -> dict[str, list[str]]:
    """Return what follows what, so that a text of different words comes; `a|b` stands for either."""
    follows: dict[str, list[str]] = {}
    before = [start]
    for some in [*(word.split("|") for word in text.split(" ")), ["</s>"]]:
        for word in before:
            follows[word] = some
        before = some
    return follows
