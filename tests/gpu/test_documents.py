"""Attention within documents by torch's kernel for packed sequences, against a mask."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ltd.model.attention.documents import attend_in_documents, find_documents, has_kernel, most_documents
from megatron_ltd.train.process.launch import Runtime


@pytest.mark.parametrize("causal", [True, False], ids=["GPT", "BERT"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_document_attends_to_itself(gpu: Runtime, dtype: torch.dtype, causal: bool) -> None:
    if not has_kernel(gpu.device, dtype, 64):
        pytest.skip("needs a GPU of compute capability 8.0")
    ids = torch.randint(0, 6, (3, 200), generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    inputs = [torch.randn(3, 4, 200, 64, device=gpu.device, dtype=dtype, requires_grad=True) for _ in range(3)]
    weight = torch.randn(3, 4, 200, 64, device=gpu.device, dtype=dtype)
    earlier = torch.ones(200, 200, dtype=torch.bool).tril()
    mask = ((ids[:, :, None] == ids[:, None]) & (earlier | (not causal)))[:, None].to(gpu.device)
    found = attend_in_documents(*inputs, find_documents(ids.to(gpu.device), most_documents(ids), causal=causal))
    expected = F.scaled_dot_product_attention(*(x.float() for x in inputs), attn_mask=mask)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    ours, theirs = (torch.autograd.grad((out.float() * weight).sum(), inputs) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
