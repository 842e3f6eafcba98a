"""Float32 products by another library: as exact, and only while it was asked for."""

import torch

from edgekd.matmul import _onednn_is_exact, fast_float32


def test_products_keep_their_digits_and_the_setting_goes_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 500, generator=generator), torch.randn(500, 200, generator=generator)
    exact = a.double() @ b.double()
    with fast_float32():
        product = a @ b
        assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == _onednn_is_exact()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert (product - exact).abs().max() < 1e-5 * exact.abs().max()


def test_what_would_round_is_not_taken(monkeypatch) -> None:
    monkeypatch.setattr("edgekd.matmul._onednn_is_exact", lambda: False)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with fast_float32():
        assert torch.backends.mkldnn.matmul.fp32_precision == before
