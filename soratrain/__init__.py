"""soratrain: train a text-to-video model, from raw video files to finished clips."""

__version__ = "0.1.0"
