"""5 M parameters on the embedded corpus: what several tables of this folder were measured with."""

from jaxlm.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig

config = Config(
    model=ModelConfig(
        vocab_size=4096,
        num_layers=4,
        d_model=256,
        d_ff=704,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        qk_norm=True,
    ),
    data=DataConfig(eval_tokens=65_536),
    optim=OptimConfig(learning_rate=8e-3, warmup_steps=10, muon_beta=0.9),
    checkpoint=CheckpointConfig(save_interval=100),
    num_steps=500,
    batch_size=8,
    seq_len=256,
    eval_interval=100,
    sample_prompt="The people of the United States",
)
