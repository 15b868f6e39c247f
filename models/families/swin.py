"""Swin: attention inside shifted windows, in stages of growing width; every block has its own relative positions."""

from dataclasses import replace

from . import Blocks, Family, FeedForward
from .vit import ATTENTION

FAMILY = Family(
    name="swin",
    source="Liu et al. 2021, arXiv 2103.14030",
    model_types=("swin",),
    inputs=("pixel_values",),
    blocks=(
        Blocks(
            path="layers.*.blocks",
            attentions=(replace(ATTENTION, tables=("attention.relative_position_bias.relative_position_bias_table",)),),
            ffn=FeedForward(inputs=("mlp.fc1",), output="mlp.fc2"),
        ),
    ),
    hidden=False,
)
