"""1.1 billion parameters on FineWeb-Edu: 21 billion tokens in 20,000 steps. Not tuned."""

from jaxlm.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig

config = Config(
    model=ModelConfig(
        vocab_size=49152,
        num_layers=20,
        d_model=2048,
        d_ff=6144,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        qk_norm=True,
        tie_embeddings=True,
        remat="full",
    ),
    data=DataConfig(
        source="hf:HuggingFaceFW/fineweb-edu:sample-100BT",
        tokenizer="HuggingFaceTB/SmolLM2-135M",
    ),
    optim=OptimConfig(learning_rate=2e-3, warmup_steps=1000),
    mesh=MeshConfig(data=1, fsdp=-1),
    num_steps=20_000,
    batch_size=512,
    seq_len=2048,
)
