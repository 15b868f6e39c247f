"""A classifier on an encoder's mean-pooled last hidden state, as sentence encoders are trained to be used."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class PooledClassifier(nn.Module):
    """An encoder from a transformers configuration, the mean over its unmasked positions, and one linear layer.

    The encoder is held under the name that the library's own classifiers give it, so that ``AutoModel`` finds it in a
    saved folder.
    """

    def __init__(self, config: Any, num_labels: int) -> None:
        import transformers

        super().__init__()
        self.config = config
        encoder = transformers.AutoModel.from_config(config, add_pooling_layer=False)
        self.prefix = str(encoder.base_model_prefix)
        self.add_module(self.prefix, encoder)
        self.classifier = nn.Linear(config.hidden_size, num_labels)

    @property
    def encoder(self) -> nn.Module:
        return self.get_submodule(self.prefix)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean-pooled embeddings [batch, hidden] (Reimers & Gurevych 2019, arXiv 1908.10084)."""
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [batch, num_labels] for inputs of shape [batch, sequence]."""
        logits: Tensor = self.classifier(self.embed(input_ids, attention_mask))
        return logits
