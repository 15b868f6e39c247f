"""DistilBERT: BERT's block under other names."""

from . import Attention, Blocks, Family, FeedForward

FAMILY = Family(
    name="distilbert",
    source="Sanh et al. 2019, arXiv 1910.01108",
    model_types=("distilbert",),
    blocks=(
        Blocks(
            path="transformer.layer",
            attentions=(
                Attention(
                    module="attention",
                    query="attention.q_lin",
                    key="attention.k_lin",
                    value="attention.v_lin",
                    output="attention.out_lin",
                    head_dim="attention_head_size",
                    num_heads="n_heads",
                    width="dim",
                    sum_at="sa_layer_norm",
                ),
            ),
            ffn=FeedForward(inputs=("ffn.lin1",), output="ffn.lin2", sum_at="output_layer_norm"),
            config={"ffn": "hidden_dim", "block": "n_layers"},
        ),
    ),
)
