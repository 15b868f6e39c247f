"""BERT and what has its shape: post-norm encoder blocks, a feed-forward of two linear layers."""

from . import Attention, Blocks, Family, FeedForward

FAMILY = Family(
    name="bert",
    source="Devlin et al. 2018, arXiv 1810.04805; RoBERTa (1907.11692), ELECTRA (2003.10555), MiniLM (2002.10957)",
    model_types=("bert", "roberta", "xlm-roberta", "electra"),
    blocks=(
        Blocks(
            path="encoder.layer",
            attentions=(
                Attention(
                    module="attention.self",
                    query="attention.self.query",
                    key="attention.self.key",
                    value="attention.self.value",
                    output="attention.output.dense",
                    head_dim="attention_head_size",
                    num_heads="num_attention_heads",
                    width="all_head_size",
                    sum_at="attention.output.LayerNorm",
                ),
            ),
            ffn=FeedForward(inputs=("intermediate.dense",), output="output.dense", sum_at="output.LayerNorm"),
            config={"ffn": "intermediate_size", "block": "num_hidden_layers"},
        ),
    ),
)
