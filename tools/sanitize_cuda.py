"""Each CUDA kernel once, small, for compute-sanitizer."""

from typing import Any

import torch

import swat_ext  # noqa: F401  (registers the operators)


def packing_and_convolutions(ops: Any, input: torch.Tensor, channels_last: bool) -> None:
    dtype = input.dtype
    keep = input.numel() // 10
    # Nearly everything passes the first threshold, and nothing the second: the device selects again.
    for stale in (0.1, 100.0):
        limit = torch.full((), stale, dtype=dtype, device=input.device)
        # Longer than what is kept last: a tail to clear. Before it shorter: bits to drop.
        for room in (None, keep // 2, 2 * keep):
            packed = ops.compress(input, limit, keep=keep, room=room)
    ops.compress(input, limit)
    ops.select(input, limit, torch.tensor([0, -1, 1, 1, 10]), 2 * keep)
    ops.bias_grad(input, 1)
    ops.decompress(*packed, input.shape, channels_last)
    ops.decompress_part(*packed, input.shape, 1, 2, channels_last)
    for size, stride in (((70, 36, 3, 3), (2, 1)), ((70, 36, 1, 1), (2, 2)), ((2, 36, 3, 3), (1, 1))):
        weight = torch.randn(size, device=input.device).to(dtype)
        keep = weight.numel() // 10
        kept = ops.compress(weight, ops.kth_magnitude(weight, keep), keep=keep, room=2 * keep)
        # So wide in the last case that no pixel's input fits in shared memory.
        dilation = (1, 1) if size[0] > 2 else (100, 100)
        pad = size[2] // 2 * dilation[0]
        geometry = (stride, (pad,) * 4, dilation, 1)
        output = ops.conv2d(input, *kept, size, None, *geometry, channels_last)
        ops.conv2d_input_grad(output, *kept, size, input.shape, *geometry, channels_last)
    rows = torch.randn(5, 3, 36, device=input.device).to(dtype)
    weight = torch.randn(70, 36, device=input.device).to(dtype)
    kept = ops.compress(weight, ops.kth_magnitude(weight, 200), keep=200, room=250)
    ops.linear_input_grad(ops.linear(rows, *kept, weight.shape, None), *kept, weight.shape)


def layers_around(ops: Any, input: torch.Tensor, channels_last: bool) -> None:
    output, mask = ops.relu(input)
    ops.relu_backward(output, mask)
    ops.relu_(input.clone(memory_format=torch.preserve_format))
    geometry = ((3, 3), (2, 2), (1, 1), (1, 1), False)
    output, positions = ops.max_pool2d(input, *geometry)
    ops.max_pool2d_backward(output, positions, input.shape, *geometry)
    weight = torch.ones(input.shape[1], device=input.device).to(torch.promote_types(input.dtype, torch.float32))
    steps = torch.zeros((), dtype=torch.int64, device=input.device)
    for saved in ("exact", "bf16", "int8"):
        output, mean, invstd, _, codes, scale = ops.batch_norm(input, weight, weight, 1e-5, saved, steps)
        kept, scales = (input if saved == "exact" else codes), (scale if saved == "int8" else None)
        ops.batch_norm_backward(output, kept, scales, mean, invstd, weight, saved)


def main(ops: Any = torch.ops.swat_ext, device: str = "cuda") -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for channels_last in (False, True):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            input = torch.randn(2, 36, 7, 9, device=device).to(dtype).contiguous(memory_format=layout)
            packing_and_convolutions(ops, input, channels_last)
            layers_around(ops, input, channels_last)
        # Planes of 32 bytes a pixel that take more than a block's tile: two passes.
        large = torch.randn(1, 20, 57, 64, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        limit = torch.full((), 0.1, dtype=dtype, device=device)
        ops.compress(large, limit, keep=large.numel() // 10, room=large.numel() // 8)


if __name__ == "__main__":
    main()
    torch.cuda.synchronize()
