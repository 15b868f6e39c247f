"""BEiT: ViT's block with scaled branches and, where configured, a table of relative positions a block."""

from dataclasses import replace

from . import Blocks, Family, FeedForward
from .vit import ATTENTION, CONFIG

FAMILY = Family(
    name="beit",
    source="Bao et al. 2021, arXiv 2106.08254",
    model_types=("beit",),
    inputs=("pixel_values",),
    blocks=(
        Blocks(
            path="layers",
            attentions=(
                replace(
                    ATTENTION,
                    tables=("relative_position_bias.relative_position_bias_table",),
                    scaled_by="lambda_1",
                ),
            ),
            ffn=FeedForward(inputs=("mlp.fc1",), output="mlp.fc2", scaled_by="lambda_2"),
            config=CONFIG | {"ffn": "intermediate_size"},
        ),
    ),
)
