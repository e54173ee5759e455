"""Clips described by any image-text-to-text model of transformers, from a folder or the hub.

It is shown frames as pictures, and asked through its own chat template; a model that has none gets the bare words after
its picture tokens. transformers is imported when the model is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from soratrain.batch import draw_of
from soratrain.captions.engine import Answer, Member, Question, Seen, by_style, chunks
from soratrain.captions.frames import Frames, checked, told
from soratrain.errors import ConfigError, DataError
from soratrain.models.hf_files import Place, samples, transformers

DTYPES: dict[str, Any] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What decides, beside the weights, what is seen and said: how pictures are cut up, what may not be repeated.
SETTINGS = ("preprocessor_config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json")


class HFEngine:
    """A model of Hugging Face, in this process.

    Args:
        folder: as `save_pretrained` wrote it, or OWNER/NAME on the hub.
        dtype: of its weights, `auto` (as they are stored), `fp32`, `bf16` or `fp16`.
        offline: take from the hub only what has been downloaded before.
        batch_size: captions written at once, at most.
        frames_per_second, max_frames, max_side: which frames are shown, see `Frames`.
        max_tokens: of a caption; a longer one is cut off, and rejected.
        temperature, top_p: of a second attempt; the first takes the likeliest words.

    Raises:
        ConfigError: a value out of range.
    """

    name, prompted = "hf", True
    gone = ""

    def __init__(
        self,
        *,
        folder: str,
        dtype: str = "auto",
        offline: bool = False,
        batch_size: int = 8,
        frames_per_second: float = 2.0,
        max_frames: int = 8,
        max_side: int = 512,
        max_tokens: int = 300,
        temperature: float = 0.7,
        top_p: float = 0.9,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"engine.dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value < 1:
                raise ConfigError(f"engine.{name}={value} must be at least 1")
        if not 0 < top_p <= 1:
            raise ConfigError(f"engine.top_p={top_p} must lie in (0, 1]")
        if temperature <= 0:
            raise ConfigError(f"engine.temperature={temperature} must be above 0: a second attempt goes by chance")
        self.place = Place(str(folder), None, offline, "engine.folder", "image-text-to-text model")
        self.model = Path(folder).resolve().name if self.place.local else str(folder)
        self.load = Frames(frames_per_second, max_frames, max_side)
        self.dtype, self.batch_size, self.max_tokens = dtype, batch_size, max_tokens
        self.chance = {"do_sample": True, "temperature": temperature, "top_p": top_p}

    def open(self, device: torch.device, autocast: bool, prompts: Mapping[str, str]) -> None:
        """Load the model and what prepares its input.

        Raises:
            ConfigError: transformers is not installed, or the model sees one picture only.
            DataError: it cannot be read.
        """
        library = transformers("engine=hf")
        self.prompts, self.device = dict(prompts), device
        within = {**self.place.within, "trust_remote_code": False}
        with self.place.reading():
            self.processor: Any = library.AutoProcessor.from_pretrained(self.place.folder, **within)
            self.net, said = library.AutoModelForImageTextToText.from_pretrained(
                self.place.folder, dtype=DTYPES[self.dtype], output_loading_info=True, **within
            )
        if wrong := said["missing_keys"] or said["mismatched_keys"]:
            named = sorted(map(str, wrong))[:3]
            raise DataError(f"engine.folder={self.place.folder}: its weights do not fit its config (missing {named})")
        if not (hasattr(self.processor, "tokenizer") and hasattr(self.processor, "image_processor")):
            raise DataError(
                f"engine.folder={self.place.folder}: has no processor of pictures and text; save it there with"
                " processor.save_pretrained"
            )
        self.net = self.net.eval().requires_grad_(False).to(device)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # what is written goes on from the last word of every prompt
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        mark = getattr(self.processor, "image_token", None) or getattr(self.tokenizer, "image_token", None)
        self.mark = "" if mark is None else str(mark)
        ends = [self.tokenizer.eos_token_id, self.net.generation_config.eos_token_id]
        self.ends = {end for some in ends for end in (some if isinstance(some, list) else [some]) if end is not None}
        if not self.mark and not self._template() and self.load.most > 1:
            raise ConfigError(
                f"engine.max_frames={self.load.most}: {self.model} has neither a chat template nor a token for"
                " pictures, and sees one at a time; use engine.max_frames=1"
            )

    def _template(self) -> str:
        """Return which chat template there is: the processor's, the tokenizer's (for words alone), or none."""
        if getattr(self.processor, "chat_template", None):
            return "processor"
        return "tokenizer" if getattr(self.tokenizer, "chat_template", None) else ""

    def _words(self, prompt: str, pictures: int) -> str:
        """Return what the model reads of a question about so many pictures."""
        template, plain = self._template(), f"{self.mark * pictures}\n{prompt}" if self.mark else prompt
        if not template:
            return plain
        content: Any = plain
        if template == "processor":
            content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": prompt}]
        asked = [{"role": "user", "content": content}]
        speaker = getattr(self, template)
        return speaker.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)

    def try_out(self) -> None:
        """Ask about grey pictures, and read one token.

        Raises:
            ConfigError: the model does not take them, with its own words.
        """
        from PIL import Image

        pictures = [Image.new("RGB", (64, 64), (128, 128, 128))] * self.load.most
        prompt = told(next(iter(self.prompts.values()), "Describe it."), len(pictures), 1.0)
        try:
            self._write([pictures], [prompt], 1, {"do_sample": False})
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"engine.folder={self.place.folder}: does not take {len(pictures)} pictures and a prompt ({reason});"
                " try engine.max_frames=1, or another model"
            ) from error

    def identity(self) -> str:
        """Return a hash of the model's weights, of its settings, and of how it is asked."""
        digest = hashlib.sha256()
        with self.place.reading():
            for name, shape, numbers in samples(self.place, lambda name: True):
                digest.update(f"{name} {shape}".encode())
                digest.update(numbers.contiguous().numpy().tobytes())
            for name in SETTINGS:
                file = self.place.file(name)
                digest.update(file.read_bytes() if file else b"")
        asked: dict[str, Any] = {
            "prompts": self.prompts,
            "told": [told("", 1, 0), told("", 2, 1)],
            "frames": repr(self.load),
        }
        asked |= {"words": self._words("?", 2), "max_tokens": self.max_tokens, "dtype": self.dtype, **self.chance}
        digest.update(json.dumps(asked, sort_keys=True).encode())
        return digest.hexdigest()

    def styles(self, wanted: Sequence[str] | None) -> list[str]:
        """Return the styles to write: those that have a prompt."""
        return checked(self.prompts, wanted)

    def groups(self, members: Sequence[Member]) -> list[list[Member]]:
        """Return clips of any size, as many together as are described at once."""
        return chunks(members, self.batch_size)

    def look(self, clips: Sequence[Seen]) -> list[tuple[list[Any], float]]:
        """Return the pictures of each clip, and how long it lasts."""
        from PIL import Image

        return [([Image.fromarray(frame) for frame in clip.video], clip.seconds) for clip in clips]

    def ask(self, looked: Sequence[tuple[list[Any], float]], questions: Sequence[Question]) -> list[Answer]:
        """Return the captions.

        Raises:
            ConfigError: the device's memory does not hold as many at once.
        """
        found: dict[int, Answer] = {}
        for (style, again), places in by_style(questions).items():
            for some in chunks(places, self.batch_size):
                shown = [looked[questions[place].place] for place in some]
                prompts = [told(self.prompts[style], len(frames), seconds) for frames, seconds in shown]
                said = self._say(
                    [frames for frames, _ in shown],
                    prompts,
                    self.chance if again else {"do_sample": False},
                    draw_of(*(questions[place].draw for place in some)),
                )
                found |= dict(zip(some, said, strict=True))
        return [found[place] for place in range(len(questions))]

    def _say(
        self, pictures: Sequence[list[Any]], prompts: Sequence[str], options: Mapping[str, Any], seed: int
    ) -> list[Answer]:
        """Return what the model says to each prompt; of a clip that its processor does not take, why."""
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed)
                return self._write(pictures, prompts, self.max_tokens, options)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"engine.batch_size={self.batch_size}: {self.device} has not the memory for as many captions at"
                " once; use a smaller one, with which the same command goes on, or show it less (engine.max_side,"
                " engine.max_frames)"
            ) from error
        except (ValueError, TypeError, KeyError, IndexError, ArithmeticError) as error:
            if len(prompts) > 1:  # one of them is to blame, and the others are not
                alone = zip(pictures, prompts, strict=True)
                return [self._say([some], [prompt], options, seed)[0] for some, prompt in alone]
            return [Answer("", failure=f"{self.model}: {' '.join(str(error).split())[:300]}", final=True)]

    @torch.inference_mode()
    def _write(
        self, pictures: Sequence[list[Any]], prompts: Sequence[str], most: int, options: Mapping[str, Any]
    ) -> list[Answer]:
        """Return what the model says to each prompt, after its pictures."""
        words = [self._words(prompt, len(some)) for prompt, some in zip(prompts, pictures, strict=True)]
        alone = not self.mark and not self._template()  # such a processor takes a flat list
        images = [picture for some in pictures for picture in some] if alone else list(pictures)
        given = self.processor(images=images, text=words, padding=True, return_tensors="pt")
        given = given.to(self.device, self.net.dtype)
        written = self.net.generate(**given, max_new_tokens=most, pad_token_id=self.tokenizer.pad_token_id, **options)
        read = given["input_ids"]
        if written.shape[1] >= read.shape[1] and torch.equal(written[:, : read.shape[1]], read):
            written = written[:, read.shape[1] :]  # some models give back what they have read, others do not
        return [self._answer(row, most) for row in written.tolist()]

    def _answer(self, row: list[int], most: int) -> Answer:
        if self.net.config.is_encoder_decoder:
            row = row[1:]  # its decoder begins with a token of its own, often the one that ends
        end = next((place for place, token in enumerate(row) if token in self.ends), None)
        text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
        return Answer(text, cut=end is None and len(row) >= most)
