"""CLIP and SigLIP: a tower for text and one for images, of the same blocks."""

from . import Attention, Blocks, Family, FeedForward

FAMILY = Family(
    name="clip",
    source="Radford et al. 2021, arXiv 2103.00020; SigLIP: Zhai et al. 2023, arXiv 2303.15343",
    model_types=(
        "clip",
        "clip_text_model",
        "clip_vision_model",
        "siglip",
        "siglip_text_model",
        "siglip_vision_model",
    ),
    inputs=("input_ids", "pixel_values", "attention_mask"),
    blocks=(
        Blocks(
            path="encoder.layers",
            attentions=(
                Attention(
                    module="self_attn",
                    query="self_attn.q_proj",
                    key="self_attn.k_proj",
                    value="self_attn.v_proj",
                    output="self_attn.out_proj",
                    num_heads="num_heads",
                    sum_at="layer_norm2",
                ),
            ),
            ffn=FeedForward(inputs=("mlp.fc1",), output="mlp.fc2"),
            config={"ffn": "intermediate_size", "block": "num_hidden_layers"},
        ),
    ),
    notes=("the pooling head that SigLIP has is left alone: its attention has one query for the whole image",),
    hidden=False,
)
