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
            branches=(
                ("norm1", "attention", "layer_scale1", "drop_path"),
                ("norm2", "mlp", "layer_scale2", "drop_path"),
            ),
            config=CONFIG | {"ffn": "mlp_ratio"},
        ),
    ),
)
