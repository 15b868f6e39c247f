"""``torch.nn.TransformerEncoder`` inside any model, the norms after each branch; heads are cut once its attention's
projections are apart."""

from . import Attention, Blocks, Family, FeedForward

ATTENTION = Attention(
    module="self_attn",
    query="self_attn.query",
    key="self_attn.key",
    value="self_attn.value",
    output="self_attn.output",
    num_heads="num_heads",
    sum_at="norm1",
)

FAMILY = Family(
    name="torch_encoder",
    source="Vaswani et al. 2017, arXiv 1706.03762; torch.nn.TransformerEncoder",
    model_types=(),
    blocks=(
        Blocks(
            path="layers",
            attentions=(ATTENTION,),
            ffn=FeedForward(inputs=("linear1",), output="linear2", sum_at="norm2"),
        ),
    ),
    notes=("layers outside the encoder are left alone",),
    hidden=False,
)
