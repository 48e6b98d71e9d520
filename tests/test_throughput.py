import pytest
from tiny_model import MODEL

from jaxlm.config import ModelConfig
from jaxlm.tracking.throughput import DEVICES, flops_per_token, peak_flops


def test_flops_per_token_by_hand():
    # Weights of products, per layer: q 16x24, k and v 16x12, o 24x16, three of 16x24 in the mlp.
    layer = 16 * 24 + 2 * 16 * 12 + 24 * 16 + 3 * 16 * 24
    weights = 2 * layer + 16 * 32
    # Scores and their weighted sum: 2 products of 2 x 10 x 6 a head and token, three passes.
    attention = 2 * 4 * (2 * 2 * 10 * 6) * 3
    assert flops_per_token(MODEL, seq_len=10) == 6 * weights + attention


def test_tied_embeddings_are_multiplied_all_the_same():
    tied = ModelConfig(tie_embeddings=True)
    assert flops_per_token(tied, 128) == flops_per_token(ModelConfig(), 128)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(kind, expected):
    assert peak_flops(kind) == expected
    assert all(peak_flops(name) == device.flops for name, device in DEVICES.items())
