"""Under a million parameters on the embedded corpus: two to three minutes on two CPU cores."""

from jaxlm.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig

config = Config(
    model=ModelConfig(
        vocab_size=2048,
        num_layers=2,
        d_model=128,
        d_ff=352,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        qk_norm=True,
    ),
    data=DataConfig(eval_tokens=32_768),
    optim=OptimConfig(learning_rate=8e-3, warmup_steps=10, muon_beta=0.9),
    checkpoint=CheckpointConfig(save_interval=100),
    num_steps=500,
    batch_size=16,
    seq_len=128,
    eval_interval=100,
    sample_prompt="The people of the United States",
)
