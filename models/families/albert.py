"""ALBERT: one block, or a few, run again and again. What is pruned in it is pruned in every run."""

from . import Attention, Blocks, Family, FeedForward

FAMILY = Family(
    name="albert",
    source="Lan et al. 2019, arXiv 1909.11942",
    model_types=("albert",),
    blocks=(
        Blocks(
            path="encoder.albert_layer_groups.*.albert_layers",
            attentions=(
                Attention(
                    module="attention",
                    query="attention.query",
                    key="attention.key",
                    value="attention.value",
                    output="attention.dense",
                    head_dim="attention_head_size",
                    num_heads="num_attention_heads",
                    width="all_head_size",
                    sum_at="attention.LayerNorm",
                ),
            ),
            ffn=FeedForward(inputs=("ffn",), output="ffn_output", sum_at="full_layer_layer_norm"),
            shared=True,
            config={"ffn": "intermediate_size"},
        ),
    ),
    notes=("the blocks are shared: each runs several times, a unit goes from all of its runs, and no block can go",),
)
