"""``torch.nn.TransformerEncoder`` with ``norm_first=True``: the norms before each branch."""

from dataclasses import replace

from . import FeedForward
from .torch_encoder import ATTENTION
from .torch_encoder import FAMILY as POST_NORM

FAMILY = replace(
    POST_NORM,
    name="torch_encoder_prenorm",
    source="Xiong et al. 2020, arXiv 2002.04745; torch.nn.TransformerEncoder",
    blocks=(
        replace(
            POST_NORM.blocks[0],
            attentions=(replace(ATTENTION, sum_at="norm2"),),
            ffn=FeedForward(inputs=("linear1",), output="linear2"),
        ),
    ),
    hidden=False,
)
