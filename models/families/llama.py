"""Llama and what has its shape: pre-norm decoder blocks, grouped-query attention, a gated feed-forward."""

from . import Attention, Blocks, Family, FeedForward

FAMILY = Family(
    name="llama",
    source="Touvron et al. 2023, arXiv 2302.13971; Mistral (2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388), "
    "Gemma (2403.08295); grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245",
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma"),
    blocks=(
        Blocks(
            path="layers",
            attentions=(
                Attention(
                    module="self_attn",
                    query="self_attn.q_proj",
                    key="self_attn.k_proj",
                    value="self_attn.v_proj",
                    output="self_attn.o_proj",
                    groups="num_key_value_groups",
                    sum_at="post_attention_layernorm",
                ),
            ),
            ffn=FeedForward(
                inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj", width="mlp:intermediate_size"
            ),
            config={
                "head": "num_attention_heads",
                "kv": "num_key_value_heads",
                "head_dim": "head_dim",
                "ffn": "intermediate_size",
                "block": "num_hidden_layers",
            },
        ),
    ),
)
