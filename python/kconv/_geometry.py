"""The order of interleaved channels and "same" padding: each is computed here alone.

TorchScript compiles these functions with the modules that call them. It takes annotations as they
are evaluated, so this module does not postpone that, and knows no more of Python than stands here.
"""

__all__ = ["interleave_order", "same_padding"]


def interleave_order(channels: int, step: int) -> list[int]:
    """The source channel of each channel that an interleave by ``step`` puts out.

    Raises:
        ValueError: if ``step`` is below 1.
    """
    if step < 1:
        raise ValueError(f"step={step}, expected at least 1")
    order: list[int] = []
    for start in range(min(step, channels)):
        for channel in range(start, channels, step):
            order.append(channel)
    return order


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """The pixels before and after, for size / stride outputs, rounded up: TensorFlow's "same".

    Args:
        size: pixels of the input.
        kernel: those that the kernel covers.
        stride: at least 1.
    """
    # Not -(-size // stride): in ONNX the quotient of a negative number is cut off, not rounded
    # down.
    total = ((size + stride - 1) // stride - 1) * stride + kernel - size
    # Only then can it be negative; and exporters would bind themselves to sizes as they are.
    total = max(total, 0) if kernel < stride else total
    return total // 2, total - total // 2
