"""8 billion parameters, in the shape of Llama 3: 105 billion tokens in 50,000 steps. Not tuned."""

from jaxlm.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig

config = Config(
    model=ModelConfig(
        vocab_size=128256,
        num_layers=32,
        d_model=4096,
        d_ff=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500_000.0,
        remat="full",
    ),
    data=DataConfig(
        source="hf:HuggingFaceFW/fineweb-edu:sample-350BT",
        tokenizer="meta-llama/Meta-Llama-3-8B",
    ),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=2000),
    mesh=MeshConfig(data=1, fsdp=-1),
    num_steps=50_000,
    batch_size=512,
    seq_len=4096,
)
