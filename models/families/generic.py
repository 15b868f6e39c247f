"""Any other model, for instance a convolutional network: what its dependency graph says, proven by trial."""

from . import Family

FAMILY = Family(
    name="generic",
    source="Fang et al. 2023, DepGraph: Towards Any Structural Pruning, arXiv 2301.12900",
    model_types=(),
    blocks=(),
    inputs=("input_ids", "attention_mask", "pixel_values"),
)
