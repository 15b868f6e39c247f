"""DINOv2: ViT's block with scaled branches, its feed-forward gated in the largest size only."""

from dataclasses import replace

from . import Blocks, Family, FeedForward
from .vit import ATTENTION, CONFIG

FAMILY = Family(
    name="dinov2",
    source="Oquab et al. 2023, arXiv 2304.07193",
    model_types=("dinov2",),
    inputs=("pixel_values",),
    blocks=(
        Blocks(
            path="encoder.layer",
            attentions=(replace(ATTENTION, sum_at="norm2", scaled_by="layer_scale1.lambda1"),),
            ffn=FeedForward(inputs=("mlp.fc1",), output="mlp.fc2", scaled_by="layer_scale2.lambda1"),
            config=CONFIG | {"ffn": "mlp_ratio"},
        ),
    ),
)
