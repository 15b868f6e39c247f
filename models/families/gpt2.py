"""GPT-2: pre-norm decoder blocks; queries, keys and values come out of one transposed layer."""

from . import Attention, Blocks, Family, FeedForward

FAMILY = Family(
    name="gpt2",
    source="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    model_types=("gpt2",),
    blocks=(
        Blocks(
            path="h",
            attentions=(
                Attention(
                    module="attn",
                    query="attn.c_attn",
                    key="attn.c_attn",
                    value="attn.c_attn",
                    output="attn.c_proj",
                    num_heads="num_heads",
                    width="split_size",
                    sum_at="ln_2",
                ),
            ),
            ffn=FeedForward(inputs=("mlp.c_fc",), output="mlp.c_proj"),
            config={"ffn": "n_inner", "block": "n_layer"},
        ),
    ),
)
