"""High dynamic range (PQ and HLG, BT.2020) to the standard range that every other clip has (BT.709), as one 3D table.

Signal → light (SMPTE ST 2084, or ITU-R BT.2100's HLG on a display of 1,000 cd/m²) → tone mapping that leaves what is
darker than about 90 cd/m² alone and bends the rest below reference white (ITU-R BT.2390-10, 5.4.1, on the largest of
the three) → BT.709's primaries (ITU-R BT.2087) → signal (ITU-R BT.1886). Reference white is 203 cd/m² (ITU-R BT.2408).
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np

PQ, HLG = 16, 18  # H.273 codes of the transfer characteristic
NAMES = {PQ: "PQ", HLG: "HLG"}
WHITE, PEAK = 203.0, 1000.0  # cd/m²
M1, M2, C1, C2, C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128  # SMPTE ST 2084
A, B, C = 0.17883277, 0.28466892, 0.55991073  # BT.2100, HLG
LUMA = np.array([0.2627, 0.6780, 0.0593])  # BT.2020
TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])  # BT.2087
SIZE = 49  # entries along each side of the table
GAMMA = 2.4  # BT.1886


def pq_to_light(signal: np.ndarray) -> np.ndarray:
    """Return cd/m² of a PQ signal in [0, 1]."""
    root = np.power(np.clip(signal, 0, 1), 1 / M2)
    return 10_000 * np.power(np.maximum(root - C1, 0) / (C2 - C3 * root), 1 / M1)


def light_to_pq(light: np.ndarray) -> np.ndarray:
    """Return the PQ signal of cd/m²."""
    power = np.power(np.clip(light, 0, 10_000) / 10_000, M1)
    return np.power((C1 + C2 * power) / (1 + C3 * power), M2)


def hlg_to_light(signal: np.ndarray) -> np.ndarray:
    """Return cd/m² of HLG signals `[..., 3]` in [0, 1], on a display of PEAK cd/m² (system gamma 1.2)."""
    signal = np.clip(signal, 0, 1)
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - C) / A) + B) / 12)
    luma = (scene @ LUMA)[..., None]
    return PEAK * np.power(np.maximum(luma, 1e-9), 0.2) * scene


def tone_mapped(light: np.ndarray) -> np.ndarray:
    """Return cd/m² `[..., 3]`, at most WHITE, of light up to PEAK; hues stay, since all three are scaled alike."""
    largest = light.max(-1, keepdims=True)
    top = light_to_pq(np.array(PEAK))
    level, most = np.minimum(light_to_pq(largest) / top, 1), light_to_pq(np.array(WHITE)) / top
    knee = 1.5 * most - 0.5
    t = np.clip((level - knee) / (1 - knee), 0, 1)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    bent = pq_to_light(np.where(level > knee, spline, level) * top)
    return light * bent / np.maximum(largest, 1e-9)


def to_sdr(signal: np.ndarray, transfer: int) -> np.ndarray:
    """Return BT.709 signals in [0, 1] of BT.2020 ones `[..., 3]` in [0, 1] whose transfer is `transfer`."""
    light = pq_to_light(signal) if transfer == PQ else hlg_to_light(signal)
    linear = np.clip(tone_mapped(light) @ TO_709.T / WHITE, 0, 1)
    return np.power(linear, 1 / GAMMA)


@cache
def table_file(transfer: int) -> Path:
    """Return a .cube file with the table for FFmpeg's `lut3d`, written once a process."""
    steps = np.linspace(0, 1, SIZE)
    blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")  # red runs fastest in a .cube file
    table = to_sdr(np.stack([red, green, blue], -1).reshape(-1, 3), transfer)
    folder = Path(tempfile.mkdtemp(prefix="hdr-"))
    path = folder / f"{NAMES[transfer]}.cube"
    lines = "\n".join(f"{r:.6f} {g:.6f} {b:.6f}" for r, g, b in table.tolist())
    path.write_text(f"LUT_3D_SIZE {SIZE}\n{lines}\n", encoding="ascii")
    return path
