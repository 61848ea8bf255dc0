from __future__ import annotations

import copy

import torch
from torch import nn

from lora_unitune.pocket.pretraining.muon import Muon, orthogonalise


def test_all_singular_values_come_near_one() -> None:
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    for batch in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(batch))
        assert values.shape == (3, 20)
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_the_singular_vectors_stay() -> None:
    matrix = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix)
    turned = left.mT @ orthogonalise(matrix, steps=10) @ right.mT
    sizes = turned.diagonal(dim1=-2, dim2=-1)
    assert (turned - torch.diag_embed(sizes)).abs().max() < 1e-4 and sizes.min() > 0.5
    assert (values > 0).all()


def test_it_fits_a_convolution() -> None:
    torch.manual_seed(0)
    wanted, trained = nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(4, 6, 3, bias=False)
    pictures = torch.randn(16, 4, 8, 8)
    optimizer, losses = Muon(trained.parameters(), lr=0.02), []
    for _ in range(150):
        loss = (trained(pictures) - wanted(pictures).detach()).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


def test_it_resumes_from_its_state() -> None:
    def run(steps: int, optimizer: Muon, weight: nn.Parameter) -> None:
        for step in range(steps):
            weight.grad = torch.full_like(weight, 0.5) + torch.eye(4) * (step + 1)
            optimizer.step()

    first = nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([first], lr=0.1)
    run(2, optimizer, first)
    second = nn.Parameter(first.detach().clone())
    resumed = Muon([second], lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = first.detach().clone()
    run(1, optimizer, first)
    run(1, resumed, second)
    assert torch.equal(first, second) and not torch.equal(first, before)
