"""The patch embedding as a product, against the convolution that it stands for."""
import pytest
import torch
from torch import nn

from sophiavl_fast.compat.patch_embedding import PatchProduct, use_products


@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_the_convolution_in_value_and_gradients(bias):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv3d(3, 40, (2, 14, 14), stride=(2, 14, 14), bias=bias)).double()
    product = nn.Sequential(nn.Conv3d(3, 40, (2, 14, 14), stride=(2, 14, 14), bias=bias)).double()
    product.load_state_dict(plain.state_dict())
    use_products(product)
    assert type(product[0]) is PatchProduct and type(plain[0]) is nn.Conv3d
    patches = torch.randn(7, 3, 2, 14, 14, dtype=torch.float64)
    found = []
    for model in (plain, product):
        x = patches.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)


def test_another_convolution_stays_one():
    """More than a kernel of input, or padding: nothing that a product could do."""
    torch.manual_seed(0)
    for options, shape in (({"stride": 2}, (1, 3, 4, 4, 4)), ({"stride": 2, "padding": 1}, (2, 3, 2, 2, 2))):
        plain = nn.Conv3d(3, 5, 2, **options)
        product = nn.Sequential(nn.Conv3d(3, 5, 2, **options))
        product[0].load_state_dict(plain.state_dict())
        use_products(product)
        x = torch.randn(shape)
        assert torch.equal(product(x), plain(x))
