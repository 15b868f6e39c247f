"""T5: pre-norm encoder and decoder; the first block of each makes the bias of relative positions for all others."""

from . import Attention, Blocks, Family, FeedForward


def _attention(module: str, sum_at: str, kind: str = "head", bias: str = "made") -> Attention:
    return Attention(
        module=module,
        query=f"{module}.q",
        key=f"{module}.k",
        value=f"{module}.v",
        output=f"{module}.o",
        head_dim="key_value_proj_dim",
        num_heads="n_heads",
        width="inner_dim",
        kind=kind,
        bias=bias,
        sum_at=sum_at,
    )


def _feed_forward(place: int) -> FeedForward:
    dense = f"layer.{place}.DenseReluDense"
    return FeedForward(inputs=(f"{dense}.wi", f"{dense}.wi_0", f"{dense}.wi_1"), output=f"{dense}.wo")


SELF, CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"
TABLE = (f"{SELF}.relative_attention_bias", f"{SELF}:has_relative_attention_bias")
FAMILY = Family(
    name="t5",
    source="Raffel et al. 2019, arXiv 1910.10683",
    model_types=("t5",),
    inputs=("input_ids", "attention_mask", "decoder_input_ids"),
    blocks=(
        Blocks(
            path="encoder.block",
            attentions=(_attention(SELF, "layer.1"),),
            ffn=_feed_forward(1),
            moves=TABLE,
            config={"ffn": "d_ff", "block": "num_layers"},
        ),
        Blocks(
            path="decoder.block",
            attentions=(_attention(SELF, "layer.1"), _attention(CROSS, "layer.2", "cross_head", bias="none")),
            ffn=_feed_forward(2),
            moves=TABLE,
            config={"ffn": "d_ff", "block": "num_decoder_layers"},
        ),
    ),
    notes=("the tables of relative positions are shared by all layers and keep a column for every head",),
)
