"""expand=hf: prompts made longer by a causal language model of Hugging Face, in this process.

It is asked through its chat template, or, where it has none, shown the examples as a text that it goes on with. Prompts
are written one by one, so that none depends on the others. The model is gone from memory before anything is drawn.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import torch

from soratrain.chat import ChatRequest, Messages, Reply
from soratrain.chat_messages import spoken
from soratrain.errors import ChatError, ConfigError, DataError
from soratrain.expand.expansion import Expansion, Write
from soratrain.models.hf_files import Place, samples, transformers

DTYPES: dict[str, Any] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class HFExpansion(Expansion):
    """Prompts made longer by a model in this process; see `Expansion`.

    Args:
        folder: of the model, as `save_pretrained` wrote it, or its id on the hub (OWNER/NAME).
        dtype: of its weights: `auto` (as they are stored), `fp32`, `bf16` or `fp16`.
        device: `auto` takes CUDA where there is one.

    Raises:
        ConfigError: a value that cannot work.
    """

    name: ClassVar[str] = "hf"

    folder: str
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ConfigError(f"expand.dtype={self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")

    @property
    def place(self) -> Place:
        """Where the model's files are."""
        return Place(self.folder, key="expand.folder", what="causal language model")

    def model_name(self) -> str:
        """Return the model's name, and a hash of rows of its weights.

        Raises:
            DataError: it cannot be read.
        """
        transformers("expand=hf")
        found = blake2b(digest_size=8)
        with self.place.reading():
            for name, shape, rows in samples(self.place, lambda name: True):
                found.update(f"{name} {shape}".encode())
                found.update(rows.numpy().tobytes())
        name = Path(self.folder).resolve().name if self.place.local else self.folder
        return f"{name} {found.hexdigest()}"

    @contextmanager
    def writing(self) -> Iterator[Write]:
        """Read the model, let it write, and let go of it.

        Raises:
            ConfigError: transformers is not installed, or memory does not hold the model.
            DataError: it cannot be read.
        """
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        model: Model | None = None
        try:
            model = Model(self, torch.device(device))
            yield model.write
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"expand.folder={self.folder}: {device} has not the memory for it; use expand.dtype=bf16, a smaller"
                " model, expand.device=cpu, or a server (expand=openai)"
            ) from error
        finally:
            if model is not None:
                model.net = None
            gc.collect()
            if device.startswith("cuda"):
                torch.cuda.empty_cache()


class Model:
    """A language model in memory.

    Args:
        options: which, and how it writes.
        device: where.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, options: HFExpansion, device: torch.device) -> None:
        library, place = transformers("expand=hf"), options.place
        within = {**place.within, "trust_remote_code": False}
        with place.reading(), torch.inference_mode(False):
            self.tokenizer: Any = library.AutoTokenizer.from_pretrained(place.folder, **within)
            net, said = library.AutoModelForCausalLM.from_pretrained(
                place.folder,
                dtype=DTYPES[options.dtype],
                use_safetensors=place.safe,
                weights_only=True,
                output_loading_info=True,
                **within,
            )
        if wrong := said["missing_keys"] or said["mismatched_keys"]:
            raise DataError(f"expand.folder={place.folder}: its weights do not fit ({sorted(map(str, wrong))[:3]})")
        self.net: Any = net.eval().requires_grad_(False).to(device)
        self.device, self.top_p = device, options.top_p
        self.template = bool(getattr(self.tokenizer, "chat_template", None))
        inner = self.net.config.get_text_config()
        self.places: int | None = getattr(inner, "max_position_embeddings", None)
        ends = [self.tokenizer.eos_token_id, self.net.generation_config.eos_token_id]
        self.ends = {end for some in ends for end in (some if isinstance(some, list) else [some]) if end is not None}

    def write(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, Reply | ChatError]]:
        """Yield the place of each request and its reply, or what is wrong, in order."""
        for place, request in enumerate(requests):
            found: Reply | ChatError
            try:
                found = self.reply(request)
            except ChatError as error:
                found = error
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError) as error:  # numbers that are none, or its own code's
                found = ChatError(f"the model cannot go on ({str(error).strip().partition(chr(10))[0][:200]})")
            yield place, found

    def reply(self, request: ChatRequest) -> Reply:
        """Return what the model writes.

        Raises:
            ChatError: what is asked is too long for it.
        """
        messages = list(request.messages)
        while self.places and len(self.ids(messages)) + request.max_tokens > self.places:
            if len(messages) < 3:
                raise ChatError(f"more than the model's {self.places} tokens would be read and written")
            task, short = messages[0]["content"].rsplit("\n\n", 1)
            messages = messages[2:]  # one example less
            messages[0] = {**messages[0], "content": f"{task}\n\n{messages[0]['content']}"}
        ids = torch.tensor([self.ids(messages)], device=self.device)
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if request.temperature:
            options = {"do_sample": True, "temperature": request.temperature, "top_p": self.top_p, "top_k": 0}
        if not self.template:  # what goes on with a text, goes on with another pair
            options["stopping_criteria"] = [lambda read, _: self.at_an_end(read, ids.shape[1])]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(request.seed or 0)
            written = self.net.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.max_tokens,
                pad_token_id=min(self.ends, default=0),
                **options,
            )[0, ids.shape[1] :].tolist()
        text, ended = self.text(written), len(written) < request.max_tokens or written[-1] in self.ends
        if not self.template:
            text, newline, _ = text.lstrip().partition("\n")
            ended = ended or bool(newline)
        return Reply(spoken(text), "stop" if ended else "length")

    def text(self, written: Sequence[int]) -> str:
        """Return what tokens say."""
        return self.tokenizer.decode(written, skip_special_tokens=True)

    def at_an_end(self, read: torch.Tensor, start: int) -> torch.Tensor:
        """Return whether what is written after place `start` `[B, L]` has come to the end of a line, bool `[B]`."""
        ended = ["\n" in self.text(row[start:]).lstrip() for row in read.tolist()]
        return torch.tensor(ended, device=read.device)

    def ids(self, messages: Messages) -> list[int]:
        """Return the tokens that the model goes on from."""
        if self.template:
            try:
                told = self.tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, tokenize=False, enable_thinking=False
                )
                return self.tokenizer(told, add_special_tokens=False, verbose=False)["input_ids"]
            except Exception:  # noqa: BLE001 - a template is a program, and refuses in its own way
                self.template = False
        ids = list(self.tokenizer(plain(messages), verbose=False)["input_ids"])
        while ids and ids[-1] in self.ends:  # some tokenizers end whatever they read
            ids.pop()
        return ids


def plain(messages: Messages) -> str:
    """Return a talk as a text that goes on with what is asked for."""
    task, first = messages[0]["content"].rsplit("\n\n", 1)
    turns = [first, *(message["content"] for message in messages[1:])]
    lines = [f"{('Text', 'Caption')[place % 2]}: {' '.join(turn.split())}" for place, turn in enumerate(turns)]
    pairs = ["\n".join(lines[place : place + 2]) for place in range(0, len(lines), 2)]
    return f"{task}\n\n" + "\n\n".join(pairs) + "\nCaption:"
