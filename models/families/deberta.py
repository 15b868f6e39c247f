"""DeBERTa-v2 and v3: BERT's block with attention to relative positions, projected per head."""

from . import Attention, Blocks, Family, FeedForward

FAMILY = Family(
    name="deberta",
    source="He et al. 2020, arXiv 2006.03654",
    model_types=("deberta-v2",),
    blocks=(
        Blocks(
            path="encoder.layer",
            attentions=(
                Attention(
                    module="attention.self",
                    query="attention.self.query_proj",
                    key="attention.self.key_proj",
                    value="attention.self.value_proj",
                    output="attention.output.dense",
                    head_dim="attention_head_size",
                    num_heads="num_attention_heads",
                    width="all_head_size",
                    more=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
                    sum_at="attention.output.LayerNorm",
                ),
            ),
            ffn=FeedForward(inputs=("intermediate.dense",), output="output.dense", sum_at="output.LayerNorm"),
            config={
                "ffn": "intermediate_size",
                "block": "num_hidden_layers",
            },
        ),
    ),
    hidden=False,
)
