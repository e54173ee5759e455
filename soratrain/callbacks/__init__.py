"""What happens around a training step: progress, metrics, exports."""
