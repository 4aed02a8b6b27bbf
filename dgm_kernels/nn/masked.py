"""Masked layers of autoregressive networks, with the parameters of the PyTorch modules that they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..masked_conv import causal_conv1d, horizontal_conv2d, masked_conv2d, masked_linear, vertical_conv2d
from ..masked_conv.checks import check_groups, is_strict, pair, positive_int
from ..masked_conv.linear import degree_mask
from ..masked_conv.taps import Kernel, Layout


class _MaskedConv(nn.modules.conv._ConvNd):
    """What the convolutions share: settings, initialisation, ``repr``. Goes before nn.Conv2d or nn.Conv1d."""

    layout: ClassVar[Layout]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        mask_type: str,
        channel_groups: int,
        gated: bool,
        **settings: Any,
    ) -> None:
        is_strict(mask_type)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            positive_int(name, value)
        check_groups(channel_groups, out_channels, in_channels, "out_channels", "in_channels")
        if gated and out_channels % (2 * channel_groups):
            raise ValueError(
                f"out_channels of a gated layer must be divisible by 2 * channel_groups, {2 * channel_groups}, "
                f"got {out_channels}"
            )
        # Before PyTorch's constructor, which initialises the parameters: that depends on the mask.
        self.mask_type, self.channel_groups, self.gated = mask_type, channel_groups, gated
        super().__init__(in_channels, out_channels, kernel_size, **settings)

    def reset_parameters(self) -> None:
        """nn.Conv2d's rule, uniform in +-1 / sqrt(fan-in), with the inputs that each output sees as its fan-in."""
        *_, width = self.kernel_size
        height = self.kernel_size[0] if len(self.kernel_size) == 2 else 1
        kernel = Kernel(self.layout, self.mask_type == "A", self.channel_groups, height, width, (1, 1))
        live = kernel.mask(self.out_channels, self.in_channels, self.weight.device).flatten(1).sum(1)
        bound = live.clamp(min=1).to(self.weight.dtype).rsqrt()
        with torch.no_grad():
            self.weight.uniform_(-1.0, 1.0).mul_(bound.view(-1, *[1] * (self.weight.dim() - 1)))
            if self.bias is not None:
                self.bias.uniform_(-1.0, 1.0).mul_(bound)

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        shown = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, mask_type={self.mask_type!r}"
        if self.channel_groups > 1:
            shown += f", channel_groups={self.channel_groups}"
        if set(self.dilation) != {1}:
            shown += f", dilation={self.dilation}"
        return shown + (", bias=False" if self.bias is None else "") + (", gated=True" if self.gated else "")


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """:func:`dgm_kernels.masked_conv2d` with the parameters of an ``nn.Conv2d``, whose state dict it loads and writes.

    Args:
        in_channels, out_channels: of the weight; a gated layer returns ``out_channels / 2`` channels.
        kernel_size: odd, for rows and columns.
        mask_type: ``"A"`` for the first layer of a model, ``"B"`` for the others.
        channel_groups: number of colour groups; divides both numbers of channels.
        dilation: distance of the taps, for rows and columns.
        bias: whether there is one.
        gated: with :func:`dgm_kernels.gated_activation` behind it.
        device, dtype: of the parameters.

    Shape:
        x ``[batch, in_channels, height, width]`` and a condition, ``[batch, out_channels]`` or like the convolution's
        result, to ``[batch, out_channels, height, width]``; half the channels if gated.

    Source: van den Oord et al., "Pixel Recurrent Neural Networks", 2016.
    """

    layout = Layout.RASTER

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        mask_type: str,
        channel_groups: int = 1,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        gated: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = pair("kernel_size", kernel_size)
        if size[0] % 2 == 0 or size[1] % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size!r}")
        settings = {"padding": "same", "dilation": pair("dilation", dilation), "bias": bias}
        settings |= {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, size, mask_type, channel_groups, gated, **settings)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``[batch, out_channels, height, width]``, half the channels if gated."""
        return masked_conv2d(
            x,
            self.weight,
            self.bias,
            mask_type=self.mask_type,
            channel_groups=self.channel_groups,
            dilation=self.dilation,  # type: ignore[arg-type]
            gated=self.gated,
            condition=condition,
        )


class VerticalConv2d(_MaskedConv, nn.Conv2d):
    """:func:`dgm_kernels.vertical_conv2d` with the parameters of an ``nn.Conv2d`` of the same kernel size.

    Args:
        kernel_size: rows, the pixel's among them, and columns, odd; an int k stands for ``(k // 2 + 1, k)``, the upper
            half of a k x k kernel.
        mask_type: ``"A"`` hides the pixel's row, for the first layer of a vertical stack.
        in_channels, out_channels, dilation, bias, gated, device, dtype: as in :class:`MaskedConv2d`.

    Shape:
        As :class:`MaskedConv2d`.

    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016.
    """

    layout = Layout.VERTICAL

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        mask_type: str = "B",
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        gated: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = pair("kernel_size", kernel_size)
        if size[1] % 2 == 0:
            raise ValueError(f"kernel_size must have an odd number of columns, got {kernel_size!r}")
        if not isinstance(kernel_size, (tuple, list)):
            size = (size[0] // 2 + 1, size[1])
        settings = {"dilation": pair("dilation", dilation), "bias": bias, "device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, size, mask_type, 1, gated, **settings)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``[batch, out_channels, height, width]``, half the channels if gated."""
        return vertical_conv2d(
            x,
            self.weight,
            self.bias,
            mask_type=self.mask_type,
            dilation=self.dilation,  # type: ignore[arg-type]
            gated=self.gated,
            condition=condition,
        )


class HorizontalConv2d(_MaskedConv, nn.Conv2d):
    """:func:`dgm_kernels.horizontal_conv2d` with the parameters of an ``nn.Conv2d`` of kernel size ``(1, k)``.

    Args:
        kernel_size: number of columns k, the pixel's among them.
        mask_type: ``"A"`` hides the pixel itself, for the first layer of a horizontal stack.
        dilation: distance of the columns.
        in_channels, out_channels, channel_groups, bias, gated, device, dtype: as in :class:`MaskedConv2d`.

    Shape:
        As :class:`MaskedConv2d`.

    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016.
    """

    layout = Layout.HORIZONTAL

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        mask_type: str = "B",
        channel_groups: int = 1,
        dilation: int = 1,
        bias: bool = True,
        gated: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = (1, positive_int("kernel_size", kernel_size))
        settings = {"dilation": (1, positive_int("dilation", dilation)), "bias": bias, "device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, size, mask_type, channel_groups, gated, **settings)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``[batch, out_channels, height, width]``, half the channels if gated."""
        return horizontal_conv2d(
            x,
            self.weight,
            self.bias,
            mask_type=self.mask_type,
            channel_groups=self.channel_groups,
            dilation=self.dilation[1],
            gated=self.gated,
            condition=condition,
        )


class CausalConv1d(_MaskedConv, nn.Conv1d):
    """:func:`dgm_kernels.causal_conv1d` with the parameters of an ``nn.Conv1d``.

    Args:
        kernel_size: number of steps k, the present one among them.
        mask_type: ``"A"`` hides the present step, for the first layer of a model.
        dilation: distance of the taps in steps.
        in_channels, out_channels, bias, gated, device, dtype: as in :class:`MaskedConv2d`.

    Shape:
        x ``[batch, in_channels, length]`` and a condition, ``[batch, out_channels]`` or like the convolution's result,
        to ``[batch, out_channels, length]``; half the channels if gated.

    Source: van den Oord et al., "WaveNet: A Generative Model for Raw Audio", 2016.
    """

    layout = Layout.HORIZONTAL

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        mask_type: str = "B",
        dilation: int = 1,
        bias: bool = True,
        gated: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = positive_int("kernel_size", kernel_size)
        settings = {"dilation": positive_int("dilation", dilation), "bias": bias, "device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, size, mask_type, 1, gated, **settings)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``[batch, out_channels, length]``, half the channels if gated."""
        return causal_conv1d(
            x,
            self.weight,
            self.bias,
            mask_type=self.mask_type,
            dilation=self.dilation[0],
            gated=self.gated,
            condition=condition,
        )


class MaskedLinear(nn.Linear):
    """:func:`dgm_kernels.masked_linear` with the parameters of an ``nn.Linear``, whose state dict it loads and writes.

    Args:
        in_degrees, out_degrees: int64, one number for each input and each output: a weight counts if its output's
            degree is at least its input's. They are no parameters, and keep their values through the meta device.
        strict: it must be greater.
        bias: whether there is one.
        device, dtype: of the parameters.

    Shape:
        ``[..., inputs]`` to ``[..., outputs]``.

    Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation", 2015.
    """

    in_degrees: Tensor
    out_degrees: Tensor

    def __init__(
        self,
        in_degrees: Tensor,
        out_degrees: Tensor,
        *,
        strict: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, degrees in (("in_degrees", in_degrees), ("out_degrees", out_degrees)):
            if not isinstance(degrees, Tensor) or degrees.dtype != torch.int64:
                found = getattr(degrees, "dtype", type(degrees).__name__)
                raise TypeError(f"{name} must be an int64 tensor, got {found}")
            if degrees.dim() != 1 or degrees.numel() == 0:
                raise ValueError(f"{name} must have one dimension and an entry, got shape {tuple(degrees.shape)}")
            if degrees.is_meta:
                raise ValueError(f"{name} must hold values, got a tensor on the meta device; make it on the CPU")
        self.strict = bool(strict)
        super().__init__(len(in_degrees), len(out_degrees), bias=bias, device=device, dtype=dtype)
        for name, degrees in (("in_degrees", in_degrees), ("out_degrees", out_degrees)):
            self.register_buffer(name, degrees.detach().to(self.weight.device, copy=True), persistent=False)
        self._values = [degrees.detach().to("cpu", copy=True) for degrees in (in_degrees, out_degrees)]
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLinear:
        """What ``to`` and ``to_empty`` call. The latter leaves buffers without values: the degrees keep theirs."""
        before = self.in_degrees, self.out_degrees
        if not self.in_degrees.is_meta:
            self._values = [degrees.to("cpu", copy=True) for degrees in before]
        super()._apply(fn, recurse)
        for old, new, values in zip(before, (self.in_degrees, self.out_degrees), self._values, strict=True):
            if new is not old and not new.is_meta:
                new.copy_(values)
        return self

    def reset_parameters(self) -> None:
        """nn.Linear's rule, uniform in +-1 / sqrt(fan-in), with the inputs that each output sees as its fan-in."""
        if "in_degrees" not in self._buffers:  # PyTorch's constructor calls this before they are there
            return
        live = degree_mask(self.in_degrees, self.out_degrees, self.weight, self.strict).sum(1)
        bound = live.clamp(min=1).to(self.weight.dtype).rsqrt()
        with torch.no_grad():
            self.weight.uniform_(-1.0, 1.0).mul_(bound[:, None])
            if self.bias is not None:
                self.bias.uniform_(-1.0, 1.0).mul_(bound)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., outputs]``."""
        return masked_linear(x, self.weight, self.bias, self.in_degrees, self.out_degrees, strict=self.strict)

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        return super().extra_repr() + (", strict=True" if self.strict else "")
