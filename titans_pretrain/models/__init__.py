"""Titans models: single-device code that reads alone. Start with causal_lm.py, then blocks.py."""

from titans_pretrain.models.causal_lm import CausalLMOutput, TitansForCausalLM, build_model
from titans_pretrain.models.state import LayerState, ModelState

__all__ = ["CausalLMOutput", "LayerState", "ModelState", "TitansForCausalLM", "build_model"]
