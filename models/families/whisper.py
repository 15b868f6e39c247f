"""Whisper: BART's blocks with the norms before each branch, over log-mel frames."""

from . import Blocks, Family, FeedForward
from .bart import attention

FAMILY = Family(
    name="whisper",
    source="Radford et al. 2022, arXiv 2212.04356",
    model_types=("whisper",),
    inputs=("input_features", "decoder_input_ids"),
    blocks=(
        Blocks(
            path="encoder.layers",
            attentions=(attention("self_attn", "final_layer_norm"),),
            ffn=FeedForward(inputs=("fc1",), output="fc2"),
            config={"ffn": "encoder_ffn_dim", "block": "encoder_layers"},
        ),
        Blocks(
            path="decoder.layers",
            attentions=(
                attention("self_attn", "encoder_attn_layer_norm"),
                attention("encoder_attn", "final_layer_norm", "cross_head"),
            ),
            ffn=FeedForward(inputs=("fc1",), output="fc2"),
            config={"ffn": "decoder_ffn_dim", "block": "decoder_layers"},
        ),
    ),
)
