"""Tiny models of the kinds that task=score takes, with weights by chance or known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection

WIDTH = 8  # of CLIP's embedding
SIDE = 32  # of the picture that CLIP sees


def write_clip(folder: Path, *, vision: bool = False, seed: int = 0) -> Path:
    """Write a CLIP, or its image side alone, as transformers saves one."""
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=WIDTH,
        text_config=size | {"vocab_size": 20, "max_position_embeddings": 8},
        vision_config=size | {"image_size": SIDE, "patch_size": 8, "projection_dim": WIDTH},
    )
    model = CLIPVisionModelWithProjection(config.vision_config) if vision else CLIPModel(config)
    model.save_pretrained(folder)
    sides = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=sides).save_pretrained(folder)
    return folder


def write_head(file: Path, *, five: bool = False, width: int = WIDTH, seed: int = 0) -> Path:
    """Write a head of one linear layer, or of five, as a state dict."""
    torch.manual_seed(seed)
    widths = (width, 1024, 128, 64, 16, 1) if five else (width, 1)
    names = [f"layers.{number}." for number in (0, 2, 4, 6, 7)] if five else [""]
    state = {}
    for name, before, after in zip(names, widths[:-1], widths[1:], strict=True):
        state |= {f"{name}weight": torch.randn(after, before) / before**0.5 * 3, f"{name}bias": torch.randn(after)}
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    return file


def write_detector(file: Path, *, blue: float = 1.0, whole: bool = True) -> Path:
    """Write a network whose map of probabilities is a picture's blue, in [0, 1], times `blue`; or its mean alone."""
    initial = [
        tensor("weights", [1, 3, 1, 1], [0.229 * blue, 0, 0]),  # undoes the normalisation of the first channel
        tensor("offset", [1], [0.485 * blue]),
        tensor("low", [], [0]),
        tensor("high", [], [1]),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "weights", "offset"], ["linear"]),
        helper.make_node("Clip", ["linear", "low", "high"], ["map"]),
        helper.make_node("GlobalAveragePool", ["map"], ["mean"]),
    ]
    shape = ["n", 1, "h", "w"] if whole else ["n", 1, 1, 1]
    graph = helper.make_graph(
        nodes if not whole else nodes[:2],
        "detector",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("map" if whole else "mean", TensorProto.FLOAT, shape)],
        initial,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, file)
    return file


def tensor(name: str, shape: Sequence[int], values: Sequence[float]) -> onnx.TensorProto:
    """Return an initial value of a graph."""
    return helper.make_tensor(name, TensorProto.FLOAT, shape, values)
