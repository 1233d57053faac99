"""The kernel of `layer_norms`, in Triton, which comes with torch where there are GPUs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["layer_norm"]

_ELEMENTS = 2048  # that a block of two warps holds: the fastest of 1,024 to 8,192 and 2 to 16 on an H200


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x, added, weight, bias, y, n_rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    mask = (rows < n_rows)[:, None] & inside[None, :]
    places = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    value = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    if added is not None:
        value += tl.load(added + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(value, axis=1) / WIDTH
    value = tl.where(mask, value - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / WIDTH + eps)
    value = value * scale[:, None]
    if weight is not None:
        value *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + places, value.to(y.dtype.element_ty), mask=mask)


def layer_norm(x: Tensor, added: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise ``x + added`` over the last dimension of a contiguous x; sums are in float32."""
    y = torch.empty_like(x)
    width = x.shape[-1]
    n_rows = x.numel() // width
    block = triton.next_power_of_2(width)
    rows = max(1, _ELEMENTS // block)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # where Triton starts kernels
        _kernel[(triton.cdiv(n_rows, rows),)](
            x, added, weight, bias, y, n_rows, eps, width, block, rows, num_warps=max(2, block // 1024)
        )
    return y
