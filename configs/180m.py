"""180 M parameters on FineWeb-Edu: about 3.9 billion tokens in 30,000 steps."""

from jaxlm.config import Config, DataConfig, ModelConfig, OptimConfig

config = Config(
    model=ModelConfig(
        vocab_size=49152,
        num_layers=20,
        d_model=768,
        d_ff=2048,
        num_heads=6,
        num_kv_heads=6,
        head_dim=128,
        qk_norm=True,
        tie_embeddings=True,
    ),
    data=DataConfig(
        source="hf:HuggingFaceFW/fineweb-edu:sample-10BT",
        tokenizer="HuggingFaceTB/SmolLM2-135M",
    ),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=1000),
    num_steps=30_000,
    batch_size=128,
    seq_len=1024,
)
