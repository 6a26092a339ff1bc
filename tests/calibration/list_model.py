"""A model with code of its own, as such code was written before transformers fused its experts.

Experts are a list of modules, a block also returns its router logits, a layer returns a tuple.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast


class ListConfig(PretrainedConfig):
    model_type = "list_of_experts"

    def __init__(
        self, vocab_size: int = 1024, hidden_size: int = 32, num_experts: int = 6, **more: Any
    ):
        self.vocab_size, self.hidden_size, self.num_experts = vocab_size, hidden_size, num_experts
        self.num_hidden_layers = 2
        super().__init__(**more)


class Expert(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.w1 = nn.Linear(size, 2 * size, bias=False)
        self.w2 = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(torch.relu(self.w1(x)))


class Block(nn.Module):
    def __init__(self, config: ListConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config.hidden_size) for _ in range(config.num_experts))
        self.shared_expert = Expert(config.hidden_size)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden_states.flatten(0, 1)
        logits = self.gate(flat)
        weights, ids = logits.softmax(dim=1).topk(2, dim=1)
        output = self.shared_expert(flat)
        for expert, module in enumerate(self.experts):
            token, slot = torch.where(ids == expert)
            output.index_add_(0, token, module(flat[token]) * weights[token, slot, None])
        return output.view_as(hidden_states), logits


class Layer(nn.Module):
    def __init__(self, config: ListConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mlp = Block(config)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> tuple[Tensor, None]:
        mixed = hidden_states + hidden_states.cumsum(dim=1) / hidden_states.shape[1]
        return mixed + self.mlp(self.norm(mixed))[0], None


class ListModel(PreTrainedModel, GenerationMixin):
    config_class = ListConfig

    def __init__(self, config: ListConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **more: Any
    ) -> CausalLMOutputWithPast:
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)[0]
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


AutoConfig.register(ListConfig.model_type, ListConfig)
AutoModelForCausalLM.register(ListConfig, ListModel)
