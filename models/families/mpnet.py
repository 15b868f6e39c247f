"""MPNet: BERT's block with one table of relative positions for all layers, a column a head."""

from . import Attention, Blocks, Family, FeedForward

FAMILY = Family(
    name="mpnet",
    source="Song et al. 2020, arXiv 2004.09297",
    model_types=("mpnet",),
    blocks=(
        Blocks(
            path="encoder.layer",
            attentions=(
                Attention(
                    module="attention.attn",
                    query="attention.attn.q",
                    key="attention.attn.k",
                    value="attention.attn.v",
                    output="attention.attn.o",
                    head_dim="attention_head_size",
                    num_heads="num_attention_heads",
                    width="all_head_size",
                    bias="given",
                    sum_at="attention.LayerNorm",
                ),
            ),
            ffn=FeedForward(inputs=("intermediate.dense",), output="output.dense", sum_at="output.LayerNorm"),
            config={"ffn": "intermediate_size", "block": "num_hidden_layers"},
        ),
    ),
    notes=("the table of relative positions is shared by all layers and keeps a column for every head",),
)
