"""Each CUDA kernel once, small, for compute-sanitizer."""

import torch

import swat_ext  # noqa: F401  (registers the operators)

ops = torch.ops.swat_ext


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for channels_last in (False, True):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            input = torch.randn(2, 36, 7, 9, device="cuda").to(dtype).contiguous(memory_format=layout)
            weight = torch.randn(70, 36, 3, 3, device="cuda").to(dtype)
            keep = input.numel() // 10
            # Nearly everything passes this threshold: the device selects again.
            stale = torch.full((), 0.1, dtype=dtype, device="cuda")
            packed_input = ops.compress(input, stale, keep=keep, capacity=keep + 64)
            packed_weight = ops.compress(weight, ops.kth_magnitude(weight, 2000), keep=2000, capacity=2500)
            geometry = ((2, 1), (1, 1, 1, 1), (1, 1), 1)
            output = ops.conv2d(input, weight, None, *packed_weight, *packed_input, *geometry, channels_last)
            ops.conv2d_input_grad(output, *packed_weight, weight.shape, input.shape, *geometry, channels_last)
            for tf32 in (False, True):
                ops.conv2d_weight_grad(
                    output, *packed_input, input.shape, weight.shape, *geometry, allow_tf32=tf32
                )  # fmt: skip
            ops.decompress(*packed_input, input.shape, channels_last)
        large = torch.randn(1, 20, 57, 64, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
        ops.compress(large, stale, keep=large.numel() // 10, capacity=large.numel() // 8)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
