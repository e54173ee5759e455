"""A causal language model of Hugging Face that goes on from vectors: its words as tokens, and our own writing loop.

What it reads begins with vectors that no token stands for, so all goes in as `inputs_embeds`. Around them stands what a
chat model expects of its user, where it has a template, and what is asked for in words.

Legend: B texts, L places, N places without padding, W width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from soratrain.errors import ConfigError, DataError
from soratrain.models.attention import Packing
from soratrain.models.hf_text import PROBE
from soratrain.models.hf_tower import Tower
from soratrain.models.writing import Writing, clean

HERE = "<<video>>"  # stands in a chat template where the vectors go
CIRCLING = 8  # tokens for which a text must repeat itself before it is given up


class LanguageTower(Tower):
    """Vectors and tokens in, the next token out.

    Args:
        chat: put what is asked for into the model's chat template, where it has one.
        options: those of `Tower`.

    Attributes:
        width: W.
        places: most that the model reads, or None where there is no bound.
        stop: the token that ends a text; V where the tokenizer has none, and `end` learns when that is.

    Raises:
        DataError: the tokenizer cannot be read, or is another model's.
    """

    def __init__(self, *, chat: bool, **options: Any) -> None:
        super().__init__(key="captioner.language", called="language model", **options)
        self.chat = chat
        with self.place.reading():
            self.tokenizer: Any = self.library.AutoTokenizer.from_pretrained(
                self.place.folder, trust_remote_code=False, **self.place.within
            )
        inner = self.config.get_text_config()
        self.width, self.vocabulary = int(inner.hidden_size), int(inner.vocab_size)
        self.places: int | None = getattr(inner, "max_position_embeddings", None)
        found = self.tokenizer.eos_token_id  # a config may name a number that is another token's
        own = found is None or found >= self.vocabulary
        self.stop = self.vocabulary if own else int(found)
        self.end = nn.Linear(self.width, 1) if own else None
        if self.end is not None:
            self.end.weight.no_muon = True  # type: ignore[attr-defined]
        self.special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id} | {self.stop}

    def form(self, stored: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the class that reads causal language models, and the config."""
        return self.library.AutoModelForCausalLM, self.library.AutoConfig.from_pretrained(self.place.folder)

    def counts(self, name: str) -> bool:
        """Return whether a tensor counts: some are saved by some versions and not by others."""
        tied = name == "lm_head.weight" and self.config.get_text_config().tie_word_embeddings
        return not tied and not name.endswith((".inv_freq", ".attn.bias", ".attn.masked_bias"))

    def marks(self) -> str:
        """Return how texts are cut up."""
        return f"{self.width} {self.stop} {self.ids(PROBE)}"

    def ids(self, text: str) -> list[int]:
        """Return a text's tokens; none of them is a special one, whatever the text holds."""
        return [token for token in self.told(clean(text)) if token not in self.special]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text that tokens stand for, cleaned."""
        return clean(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @lru_cache(maxsize=64)  # noqa: B019  a tower lives as long as its process
    def around(self, words: str) -> tuple[list[int], list[int]]:
        """Return the tokens before the vectors and those after them, where `words` say what is asked for.

        Raises:
            ConfigError: the chat template refuses.
        """
        opening = [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]
        if not (self.chat and words and getattr(self.tokenizer, "chat_template", None)):
            return opening, self.told(f"\n{words}\n" if words else "")
        messages = [{"role": "user", "content": f"{HERE}\n{words}"}]
        try:
            shown = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and says what it likes
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"captioner.chat=true: the chat template of {self.place.folder} refuses ({reason}); set"
                " captioner.chat=false"
            ) from error
        before, found, after = shown.partition(HERE)
        return (self.told(before), self.told(after)) if found else (opening, self.told(f"\n{words}\n"))

    def told(self, text: str) -> list[int]:
        """Return the tokens of a part of a prompt, special ones too.

        Raises:
            DataError: one of them is unknown to the model.
        """
        found = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        if max(found, default=0) >= self.vocabulary:
            raise DataError(
                f"captioner.language={self.place.folder}: its tokenizer makes tokens that the model's"
                f" {self.vocabulary} do not hold; put the tokenizer there that was saved with it"
            )
        return found

    def rows(self, vectors_BQW: Tensor, words: Sequence[str], texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return what the model reads of each text `[L, W]`: what is before the vectors, they, what is after, the text.

        All tokens are embedded in one call: under ZeRO-3 ranks must make equally many.
        """
        embed, around = self.here().get_input_embeddings(), [self.around(asked) for asked in words]
        parts = [part for (before, after), text in zip(around, texts, strict=True) for part in (before, after, text)]
        flat = torch.tensor([token for part in parts for token in part], dtype=torch.int64, device=vectors_BQW.device)
        split = embed(flat).split([len(part) for part in parts])
        return [
            torch.cat([split[3 * row], vectors.to(split[0].dtype), *split[3 * row + 1 : 3 * row + 3]])
            for row, vectors in enumerate(vectors_BQW)
        ]

    def losses(
        self, vectors_BQW: Tensor, words: Sequence[str], texts: Sequence[Sequence[int]], most: int
    ) -> tuple[Tensor, Packing]:
        """Return the loss of each token of the texts and of each end `[N]`, in nats, and how they are packed.

        Of a text of more than `most` tokens the rest is cut, and its end is not asked for. Texts stand to the left,
        padding to their right, which a causal model does not see.
        """
        read = [list(text[:most]) for text in texts]
        answers = [[*cut, self.stop] if len(cut) == len(text) else cut for cut, text in zip(read, texts, strict=True)]
        rows = self.rows(vectors_BQW, words, read)
        firsts = [
            len(row) - len(text) - 1 for row, text in zip(rows, read, strict=True)
        ]  # where it is to say the first
        packing = Packing.of([len(answer) for answer in answers])
        inputs = pad_sequence(rows, batch_first=True)
        kept = inputs.shape[1] - min(firsts)
        logits, states = self.logits(inputs_embeds=inputs, kept=kept, use_cache=False)
        start = inputs.shape[1] - logits.shape[1]
        places = [
            row * logits.shape[1] + first - start + place
            for row, (first, answer) in enumerate(zip(firsts, answers, strict=True))
            for place in range(len(answer))
        ]
        chosen = torch.tensor(places, device=logits.device)
        said_NV = self.with_end(logits.flatten(0, 1)[chosen], None if states is None else states.flatten(0, 1)[chosen])
        asked_N = torch.tensor([token for answer in answers for token in answer], device=logits.device)
        return nn.functional.cross_entropy(said_NV, asked_N, reduction="none"), packing

    def logits(self, *, kept: int, **inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the logits `[B, kept, V]` of the last places (of all, where the model cannot leave any out).

        And the states there `[B, kept, W]`, where the end is learned.
        """
        net = self.here()
        if "logits_to_keep" in _parameters(net):
            inputs["logits_to_keep"] = kept
        answer = net(**inputs, output_hidden_states=self.end is not None)
        logits = answer.logits
        return logits, None if self.end is None else answer.hidden_states[-1][:, -logits.shape[1] :]

    def with_end(self, logits: Tensor, states: Tensor | None) -> Tensor:
        """Return logits in fp32, with one more for the end where no token stands for it."""
        if self.end is None or states is None:
            return logits.float()
        return torch.cat([logits.float(), self.end(states.to(self.end.weight.dtype)).float()], dim=-1)

    @torch.inference_mode()
    def write(
        self,
        vectors_BQW: Tensor,
        words: Sequence[str],
        bounds: Sequence[int],
        *,
        top_p: float = 0.0,
        draws: Sequence[int] = (),
        cached: bool = True,
    ) -> tuple[list[list[int]], list[bool]]:
        """Write a text for each row of vectors, and say which came to their end; arguments as for `Writing`.

        Prompts of unequal length stand to the right, padding to their left, which is masked.
        """
        rows = self.rows(vectors_BQW, words, [[]] * len(words))
        writing = Writing(bounds, vectors_BQW.device, end=self.stop, span=CIRCLING, top_p=top_p, draws=draws)
        embed, parameters = self.here().get_input_embeddings(), _parameters(self.here())
        lengths = torch.tensor([len(row) for row in rows], device=vectors_BQW.device)
        inputs = pad_sequence(rows, batch_first=True, padding_side="left")
        known: dict[str, Any] = {"use_cache": False}
        if cached:
            cache = self.library.DynamicCache(config=self.config.get_text_config())
            known = {"use_cache": True, "cache" if "cache" in parameters else "past_key_values": cache}
        whole, over, coming = inputs, False, {"inputs_embeds": inputs}
        while not over:
            length = inputs.shape[1] + writing.count
            if int(lengths.min()) < inputs.shape[1]:
                places = torch.arange(length, device=lengths.device) - (inputs.shape[1] - lengths)[:, None]
                known["attention_mask"] = (places >= 0).long()
                if "position_ids" in parameters:
                    new = next(iter(coming.values())).shape[1]
                    known["position_ids"] = places[:, -new:].clamp(min=0)
            logits, states = self.logits(kept=1, **coming, **known)
            over = writing.take(self.with_end(logits[:, -1], None if states is None else states[:, -1]))
            newest = writing.newest.clamp(max=self.vocabulary - 1)[:, None]  # what is over may say anything
            if cached:
                coming = {"input_ids": newest}
            elif not over:
                whole = torch.cat([whole, embed(newest)], dim=1)
                coming = {"inputs_embeds": whole}
        return writing.texts(), writing.ended.tolist()


def _parameters(net: Any) -> frozenset[str]:
    """Return the names of what a model's `forward` takes."""
    kind: Any = type(net)
    return _names(kind)


@lru_cache(maxsize=16)
def _names(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)
