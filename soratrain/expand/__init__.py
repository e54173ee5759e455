"""Prompts made as long as the captions that the DiT was trained on, by a language model (Betker et al., 2023)."""
