"""`text_area`: the share of a picture that is covered by text, from a text detector in ONNX.

The detector gives each pixel's probability to lie in the shrunken middle of a text (Liao et al., 2020, Differentiable
Binarization), as PP-OCR's and OpenCV Zoo's do; what is read from that is here as in OpenCV's TextDetectionModel_DB,
which in OpenCV 5 takes no such network. It runs on the CPU: OpenCV's wheels bring no CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from soratrain.errors import ConfigError

SIDE = 736  # pixels; pictures are squeezed into a square, which changes no share
MEAN = np.array((0.485, 0.456, 0.406), np.float32)  # of blue, green and red: in this order, as PP-OCR learnt
STD = np.array((0.229, 0.224, 0.225), np.float32)
PIXEL, TEXT = 0.3, 0.5  # probability of a pixel, and of a whole text in the mean, from which they count
GROWTH = 2.0  # how far the middle of a text is grown, in its area by its circumference
SMALLEST = 3  # pixels; what is narrower is no text


class TextArea:
    """A text detector.

    Raises:
        ConfigError: the file is none.
    """

    def __init__(self, file: Path) -> None:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is wrong is said below, in one line
        try:
            self.net = cv2.dnn.readNetFromONNX(np.frombuffer(file.read_bytes(), np.uint8))
            shape = self._forward(np.zeros((SIDE, SIDE, 3), np.uint8)).shape
        except (OSError, cv2.error) as error:
            why = " ".join(str(error).split())[:200]
            raise ConfigError(f"score.text={file}: is no ONNX network that OpenCV can run ({why})") from error
        if shape != (1, 1, SIDE, SIDE):
            raise ConfigError(
                f"score.text={file}: is no text detector as PP-OCR's: of a picture of {SIDE}x{SIDE} it makes "
                f"{list(shape)}, not [1, 1, {SIDE}, {SIDE}]"
            )

    def prepare(self, picture: np.ndarray) -> np.ndarray:
        """Return RGB `[H, W, 3]` at the detector's size."""
        smaller = picture.shape[0] * picture.shape[1] > SIDE * SIDE
        return cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)

    def rate(self, prepared: Sequence[np.ndarray]) -> list[float]:
        """Return the share of each picture; one after another, since detectors come with a fixed batch of one."""
        return [covered(self._forward(picture)[0, 0]) for picture in prepared]

    def _forward(self, picture: np.ndarray) -> np.ndarray:
        normal = (picture[..., ::-1].astype(np.float32) / 255 - MEAN) / STD
        self.net.setInput(np.ascontiguousarray(normal.transpose(2, 0, 1)[None]))
        return np.asarray(self.net.forward())


def covered(probability: np.ndarray) -> float:
    """Return which share of a map `[H, W]` lies in boxes around texts."""
    contours, _ = cv2.findContours((probability > PIXEL).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    boxes = np.zeros(probability.shape, np.uint8)
    for contour in contours:
        middle, (width, height), angle = cv2.minAreaRect(contour)
        if min(width, height) < SMALLEST or within(probability, contour) < TEXT:
            continue
        growth = GROWTH * width * height / (width + height)  # both sides together
        corners = cv2.boxPoints((middle, (width + growth, height + growth), angle))
        cv2.fillConvexPoly(boxes, corners.round().astype(np.int32), 1)
    return float(boxes.mean())


def within(probability: np.ndarray, contour: np.ndarray) -> float:
    """Return the mean of a map inside a contour."""
    x, y, width, height = cv2.boundingRect(contour)
    inside = np.zeros((height, width), np.uint8)
    cv2.fillPoly(inside, [contour - (x, y)], 1)
    return float(probability[y : y + height, x : x + width][inside > 0].mean())
