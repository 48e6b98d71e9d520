"""The model of tiny.py on two sources: the embedded corpus, and the Markdown of this repository."""

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
    data=DataConfig(
        sources={"speeches": "embedded", "docs": "text:docs/*.md"},
        weights={"speeches": 0.9, "docs": 0.1},
        eval_tokens=16_384,
    ),
    optim=OptimConfig(learning_rate=8e-3, warmup_steps=10, muon_beta=0.9),
    checkpoint=CheckpointConfig(save_interval=100),
    num_steps=300,
    batch_size=16,
    seq_len=128,
    eval_interval=100,
    sample_prompt="The people of the United States",
)
