"""LLaMA-like decoders for the bench: one step, a token and a cache in, and the reading of a prompt before all steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DecodeStep(nn.Module):
    """`LlamaForCausalLM` of transformers, random weights; 255 tokens were read before. 32 million weights by default.

    head    width of a head
    shared  heads that read the same keys
    """

    def __init__(self, layers: int = 8, width: int = 512, inner: int = 1408, head: int = 64, shared: int = 2) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.config = LlamaConfig(
            vocab_size=8192, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, head_dim=head,
            num_attention_heads=width // head, num_key_value_heads=width // head // shared, max_position_embeddings=256,
        )  # fmt: skip
        self.decoder = LlamaForCausalLM(self.config)
        self.past = (layers, width // head // shared, 255, head)

    def example_inputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [batch, 1], keys and values [batch, layers, key heads, past, head width]."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(8192, (batch, 1), generator=generator)
        keys, values = (torch.randn(batch, *self.past, generator=generator) for _ in range(2))
        return tokens, keys, values

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [batch, vocabulary], the step's own keys and values [batch, layers, key heads, 1, head width]."""
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(keys.unbind(1), values.unbind(1), strict=True)), config=self.config)
        logits = self.decoder(tokens, past_key_values=cache).logits[:, -1]
        new_keys, new_values = (
            torch.stack([getattr(layer, kind)[:, :, -1:] for layer in cache.layers], 1) for kind in ("keys", "values")
        )
        return logits, new_keys, new_values


class Prefill(nn.Module):
    """Two layers as wide as an 8-billion-parameter LLaMA's, random weights, and a small vocabulary."""

    tokens = 2048

    def __init__(self, width: int = 4096, inner: int = 14336, layers: int = 2) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=8192, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=width // 128, num_key_value_heads=width // 512, max_position_embeddings=self.tokens,
        )  # fmt: skip
        self.decoder = LlamaForCausalLM(config)

    def example_inputs(self, batch: int) -> tuple[Tensor]:
        """Tokens [batch, 2048]."""
        return (torch.randint(8192, (batch, self.tokens), generator=torch.Generator().manual_seed(0)),)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the last token [batch, vocabulary]."""
        logits: Tensor = self.decoder(tokens, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]
