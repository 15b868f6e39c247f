"""BART: post-norm encoder and decoder with cross-attention."""

from . import Attention, Blocks, Family, FeedForward


def attention(module: str, sum_at: str, kind: str = "head") -> Attention:
    return Attention(
        module=module,
        query=f"{module}.q_proj",
        key=f"{module}.k_proj",
        value=f"{module}.v_proj",
        output=f"{module}.out_proj",
        num_heads="num_heads",
        kind=kind,
        sum_at=sum_at,
    )


FAMILY = Family(
    name="bart",
    source="Lewis et al. 2019, arXiv 1910.13461",
    model_types=("bart",),
    inputs=("input_ids", "attention_mask", "decoder_input_ids"),
    blocks=(
        Blocks(
            path="encoder.layers",
            attentions=(attention("self_attn", "self_attn_layer_norm"),),
            ffn=FeedForward(inputs=("fc1",), output="fc2", sum_at="final_layer_norm"),
            config={"ffn": "encoder_ffn_dim", "block": "encoder_layers"},
        ),
        Blocks(
            path="decoder.layers",
            attentions=(
                attention("self_attn", "self_attn_layer_norm"),
                attention("encoder_attn", "encoder_attn_layer_norm", "cross_head"),
            ),
            ffn=FeedForward(inputs=("fc1",), output="fc2", sum_at="final_layer_norm"),
            config={"ffn": "decoder_ffn_dim", "block": "decoder_layers"},
        ),
    ),
)
