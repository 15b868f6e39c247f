"""BERT: post-norm encoder blocks, one key and value per query head, a feed-forward of two linear layers."""

from . import Family

FAMILY = Family(
    name="bert",
    source="Devlin et al. 2018, arXiv 1810.04805; MiniLM (arXiv 2002.10957) has the same shape",
    model_types=("bert",),
    architectures=("BertForSequenceClassification",),
    blocks="encoder.layer",
    attention="attention.self",
    num_heads="num_attention_heads",
    head_dim="attention_head_size",
    all_heads="all_head_size",
    query_key_value=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_output="attention.output.dense",
    attention_sum="attention.output.LayerNorm",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    ffn_sum="output.LayerNorm",
)
