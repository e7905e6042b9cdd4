"""How a kernel is compared with its reference, and random tensors to do it on."""

import torch


def compare(ours, reference, inputs, tolerance):
    """Outputs and gradients of all floating inputs that want one, ours in the inputs' dtype, reference in float64."""

    def run(function, arguments):
        leaves = [x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in arguments]
        out = function(*leaves)
        torch.manual_seed(9)
        out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
        return [out.detach(), *(x.grad for x in leaves if torch.is_tensor(x) and x.requires_grad)]

    wide = [
        x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x
        for x in inputs
    ]
    for got, wanted in zip(run(ours, inputs), run(reference, wide), strict=True):
        assert got.shape == wanted.shape
        # A gradient that is zero by definition may be rounding here: some CPUs' products are not exact.
        size = max(float(wanted.abs().max()), 0.1)
        assert float((got.double() - wanted).abs().max()) <= tolerance * size


def random(*shape, dtype, grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)


def give_gradients(step: int, *sides) -> None:
    """The same to each: of wild sizes, some zero, as embeddings have them."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameters in zip(*sides, strict=True):
        grad = torch.randn(parameters[0].shape, generator=generator)
        grad *= 10 ** (3 * torch.randn(grad.shape[:1], generator=generator)).view(-1, *[1] * (grad.dim() - 1))
        grad[torch.rand(grad.shape, generator=generator) < 0.1] = 0
        for p in parameters:
            p.grad = grad.to(p.dtype)
