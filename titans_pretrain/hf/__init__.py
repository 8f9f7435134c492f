"""Hugging Face transformers: export of a trained model, and the classes that an exported folder carries."""
