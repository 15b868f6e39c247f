"""ViT and DeiT: pre-norm encoder blocks over image patches."""

from . import Attention, Blocks, Family, FeedForward

ATTENTION = Attention(
    module="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    num_heads="num_attention_heads",
    sum_at="layernorm_after",
)

CONFIG = {"head": "num_attention_heads", "head_dim": "head_dim", "block": "num_hidden_layers"}

FAMILY = Family(
    name="vit",
    source="Dosovitskiy et al. 2020, arXiv 2010.11929; DeiT: Touvron et al. 2020, arXiv 2012.12877",
    model_types=("vit", "deit"),
    inputs=("pixel_values",),
    blocks=(
        Blocks(
            path="layers",
            attentions=(ATTENTION,),
            ffn=FeedForward(inputs=("mlp.fc1",), output="mlp.fc2"),
            branches=(("layernorm_before", "attention", "dropout"), ("layernorm_after", "mlp", "dropout")),
            config=CONFIG | {"ffn": "intermediate_size"},
        ),
    ),
)
