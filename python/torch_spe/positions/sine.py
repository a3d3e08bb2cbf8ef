"""Stochastic positional encoding with sines: periodic relative positions, at any distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from torch_spe import functional
from torch_spe.autocast import without_autocast
from torch_spe.checks import (
    check_choice,
    check_dtype,
    check_flags,
    check_noise,
    check_not_nan,
    check_positions,
    check_positive,
    check_source,
)
from torch_spe.codes import ExactCode, PhaseCode, SineCode, SinusoidCode
from torch_spe.codes.base import code_scale, code_type
from torch_spe.codes.sinusoids import kernel_amplitudes
from torch_spe.flat_parameters import flat_parameter
from torch_spe.initialization import assign
from torch_spe.noise import STREAMS, PhaseNoise, draw_normal, orthogonal_noise, phase_noise
from torch_spe.positions.spe import SPE
from torch_spe.precision import parameter_type

INITS = ("published", "spread")
NOISES = ("gaussian", "phase", "orthogonal", "exact")


class SineParameters(NamedTuple):
    """The parameters of a `SineSPE` in their shapes; every attribute read is a view made anew."""

    freqs: Tensor  # [H, D, K] or [H, D, K, ndim]
    offsets: Tensor  # [H, D, K]
    gains: Tensor  # [H, D, K]
    bandwidths: Tensor | None  # [H, D, K]

    @property
    def dtype(self) -> torch.dtype:
        """Type of a code's elements."""
        return code_type(self.gains)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.gains.device

    def wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return frequencies' logits, offsets and gains in the type of a code's elements."""
        freqs, offsets, gains = (p.to(code_type(p)) for p in self[:3])
        return freqs, offsets, gains


class SineSPE(SPE):
    r"""Stochastic positional encoding with sines: periodic relative positions, at any distance.

    .. math::
        P_d(m - n) = \sum_{k=1}^{K} \frac{\lambda_{dk}^2}{2K} \cos(2 \pi f_{dk} (m - n) +
        \theta_{dk})

    (the sineSPE of Liutkus et al. 2021), with m the position of a query and n that of a key,
    :math:`\lambda` = softplus(gains), :math:`\theta` = offsets, in radians, and f = sigmoid(freqs)
    / 2, in cycles per position. With ndim > 1 the phase is the sum over the dimensions; the first
    frequency lies in [0, 1/2] as above, the others, sigmoid(freqs) - 1/2, in [-1/2, 1/2]: without
    their sign a wave could not run along every direction.

    The kernel is the same for every kind of noise; what differs are cost and error:

    - ``"gaussian"``: the paper's. A realization is a sum of all K sines with normal coefficients.
    - ``"phase"``: a pair of realizations is one of the sines, with a random phase
      (`torch_spe.noise.phase_noise`). The error is that of ``"gaussian"``, and the cost does not
      grow with K. R must be even.
    - ``"orthogonal"``: normal noise made orthogonal over sines and features
      (`torch_spe.noise.orthogonal_noise`). Costs as ``"gaussian"``, errs less the closer R comes to
      2KD, and not at all from there on (from (2K + 1)D on with a gate).
    - ``"exact"``: no noise and no error; the features of an encoded query or key are the sines
      themselves, R = 2KD of them, or (2K + 1)D with a gate.

    With ``bandwidth=True`` a sine of phase noise has another frequency in every pair, normally
    distributed about f with deviation :math:`\sigma` = exp(bandwidths), in cycles per position. Its
    part of the kernel is then multiplied by :math:`\exp(-2 \pi^2 \sigma_{dk}^2 |m - n|^2)`: a
    relative attention that fades with the lag.

    Same arguments, parameters and call as the class of this name in the paper's code, whose
    checkpoints load.

    Args:
        num_heads: attention heads H.
        in_features: query and key features D of a head.
        num_realizations: realizations R of the noise, the features of an encoded query or key. The
            error of an attention logit falls with sqrt(R). Without a meaning for ``"exact"``.
        num_sines: sines K of a feature.
        ndim: dimensions of the positions: 1 for sequences, 2 for images.
        init: ``"published"``: freqs N(-4, 1), very slow sines; offsets N(0, 1); gains as published.
            ``"spread"``: freqs N(-1.5, 1.5), periods from two positions to some hundred; offsets
            N(0, 1); all gains equal, so that the codes have variance 1, ``sum_k softplus(gain)^2 /
            (2K) = 1``. Bandwidths, in both, so that the kernel falls to 1/e at a lag of 150.
        noise: the kind of noise.
        bandwidth: whether there are bandwidths, with phase noise.
        device: of the parameters.
        dtype: of the parameters, at least float32.

    Parameters ``freqs``, ``offsets``, ``gains``, each ``[H, D, K]`` (freqs ``[H, D, K, ndim]`` for
    ndim > 1), and ``bandwidths``, ``[H, D, K]``, if asked for. ``parameters()`` has them flat, see
    `torch_spe.flat_parameters.FlatParameterModule`.

    Raises:
        ValueError: an argument is not what it must be; the message names it.

    Example:
        >>> from torch_spe import SPEFilter
        >>> spe = SineSPE(4, 16, num_realizations=32, num_sines=3, noise="phase")
        >>> filt = SPEFilter(code_shape=spe.code_shape)
        >>> q, k = torch.randn(2, 100, 4, 16), torch.randn(2, 100, 4, 16)
        >>> qhat, khat = filt(q, k, spe(q.shape[:2]))
        >>> qhat.shape
        torch.Size([2, 100, 4, 32])
    """

    freqs = flat_parameter("freqs")
    offsets = flat_parameter("offsets")
    gains = flat_parameter("gains")
    bandwidths = flat_parameter("bandwidths")

    def __init__(
        self,
        num_heads: int = 8,
        in_features: int = 64,
        num_realizations: int = 256,
        num_sines: int = 1,
        *,
        ndim: int = 1,
        init: Literal["published", "spread"] = "published",
        noise: Literal["gaussian", "phase", "orthogonal", "exact"] = "gaussian",
        bandwidth: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        (num_sines,) = check_positive("SineSPE", num_sines=num_sines)
        check_choice("SineSPE", "init", init, INITS)
        check_choice("SineSPE", "noise", noise, NOISES)
        check_flags("SineSPE", bandwidth=bandwidth)
        check_dtype("SineSPE", dtype)
        if bandwidth and noise != "phase":
            raise ValueError(f"SineSPE: bandwidth=True needs noise='phase', got noise={noise!r}")
        if noise == "exact":
            (in_features,) = check_positive("SineSPE", in_features=in_features)
            num_realizations = 2 * num_sines * in_features
        super().__init__(num_heads, in_features, num_realizations, ndim)
        self.noise = noise
        self.keeps_features = noise == "exact"
        self.check_realizations(num_realizations)
        self.num_sines = num_sines
        self.init = init
        shape = (*self.code_shape, num_sines)
        factory: dict[str, Any] = {"device": device, "dtype": parameter_type(dtype)}
        axes = () if self.ndim == 1 else (self.ndim,)
        self.register_flat_parameter("freqs", (*shape, *axes), **factory)
        self.register_flat_parameter("offsets", shape, **factory)
        self.register_flat_parameter("gains", shape, **factory)
        if bandwidth:
            self.register_flat_parameter("bandwidths", shape, **factory)
        else:
            self.register_parameter("bandwidths", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters as `init` says, from PyTorch's generator."""
        mean, std = (-4, 1) if self.init == "published" else (-1.5, 1.5)
        freqs = self._whole("freqs").normal_().mul_(std).add_(mean)
        if self.ndim > 1:
            # The other dimensions: the same distribution of the frequency, with a random sign.
            other = freqs[..., 1:]
            sign = torch.randint_like(other, 2) * 2 - 1
            other.copy_((0.5 + sign * other.sigmoid() / 2).logit())
        assign(self.freqs, freqs)
        assign(self.offsets, self._whole("offsets").normal_())
        if self.init == "published":
            gains = self._whole("gains").normal_()
            assign(self.gains, gains / (gains.norm(dim=-1, keepdim=True).sqrt() / 2))
        else:
            self.gains.fill_(math.log(math.expm1(math.sqrt(2))))
        if self.bandwidths is not None:
            lag = 150
            self.bandwidths.fill_(-math.log(math.sqrt(2) * math.pi * lag))

    def _cycles(
        self,
        freqs: Tensor,  # [H, D, K] or [H, D, K, ndim]
    ) -> Tensor:  # [H, D, K] or [H, D, K, ndim]
        """Return the frequencies in cycles per position, from their logits."""
        freqs = freqs.double().sigmoid()  # float32 would lose the phase at far positions
        if self.ndim == 1:
            return freqs / 2
        return torch.cat((freqs[..., :1] / 2, freqs[..., 1:] - 0.5), dim=-1)

    def _read_parameters(self) -> SineParameters:
        """Return the parameters, each of them read once, after a check for NaN."""
        read = SineParameters(self.freqs, self.offsets, self.gains, self.bandwidths)
        named = read._asdict().items()
        check_not_nan("SineSPE", **{n: value for n, value in named if value is not None})
        return read

    def check_realizations(
        self, num_realizations: int, owner: str = "SineSPE", name: str = "num_realizations"
    ) -> None:
        """Raise ValueError for a number of realizations that the kind of noise does not have."""
        if self.noise == "phase" and num_realizations % 2 == 1:
            raise ValueError(
                f"{owner}: {name} must be even with noise='phase', whose realizations come in "
                f"pairs, got {num_realizations}"
            )
        if self.noise == "exact" and num_realizations != self.num_realizations:
            raise ValueError(
                f"{owner}: {name} must not be given with noise='exact' (position='fading' or "
                "'exact' of a layer; 'sine' takes it), which has 2 * num_sines * in_features = "
                f"{self.num_realizations}, got {num_realizations}"
            )

    def forward(
        self,
        shape: Sequence[int],
        num_realizations: int | None = None,
        *,
        noise: Tensor | PhaseNoise | None = None,  # [H, D, 2K, R]
        generator: torch.Generator | None = None,
        seed: int | None = None,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,  # [N] or [N, ndim]
    ) -> SinusoidCode:
        """Draw a code: new noise at every call, unless noise, a generator or a seed say otherwise.

        Args:
            shape: ``(batch, *size)`` of the queries and keys, their heads and features left out:
                the batch shares a code, and each size is the largest length in that dimension.
            num_realizations: overrides the module's.
            noise: unit normal values ``[H, D, 2K, R]`` (or ``[1, H, D, 2K, R]``), cosines' in the
                even and sines' in the odd rows; for phase noise a `torch_spe.noise.PhaseNoise`;
                drawn if not given.
            generator: for the noise, instead of PyTorch's own. Checkpointing does not replay it.
            seed: makes the noise a function of this integer, the same at every call and on every
                device.
            start: first position (one for each dimension), for a part of a longer sequence.
            positions: integer or floating-point, ``[N]`` or ``[N, ndim]`` with N the product of the
                sizes (row-major), instead of consecutive ones. A flattened grid, shape ``(batch,
                N)``, is welcome with them.

        Returns:
            The code, for `SPEFilter`.

        Raises:
            ValueError, TypeError: an argument or a parameter is not what it must be; the message
                names it.

        Example:
            >>> code = SineSPE(4, 16, num_realizations=32)((1, 100))
            >>> [tuple(bar.shape) for bar in code.materialize()]
            [(1, 100, 4, 16, 32), (1, 100, 4, 16, 32)]
        """
        size = self._size(shape)
        self.warn_of_half_precision()
        parameters = self._read_parameters()
        check_source("SineSPE", generator, seed)
        start = check_positions("SineSPE", size, self.ndim, parameters.device, start, positions)
        if self.noise == "exact":
            if noise is not None:
                raise ValueError("SineSPE: noise must be None with noise='exact', got a noise")
            self.check_realizations(self._realizations(num_realizations, None))
            freqs, offsets, gains = parameters.wide()
            cycles, amplitudes = functional.exact_code(
                freqs, gains, 1 / math.sqrt(2 * self.num_sines)
            )
            return ExactCode(cycles, amplitudes, offsets, size, start, positions)
        if self.noise == "phase":
            if noise is None:
                num_realizations = self._realizations(num_realizations, None)
                self.check_realizations(num_realizations)
                noise = phase_noise(
                    *self.code_shape, self.num_sines, num_realizations // 2, generator, seed=seed,
                    stream=STREAMS["code"], ndim=self.ndim,
                    deviates=parameters.bandwidths is not None, dtype=parameters.dtype,
                    device=parameters.device,
                )  # fmt: skip
            elif num_realizations is not None or not isinstance(noise, PhaseNoise):
                raise TypeError(
                    "SineSPE: noise must be a PhaseNoise, and num_realizations left to it, with "
                    f"noise='phase', got {type(noise).__name__} and {num_realizations}"
                )
            elif parameters.bandwidths is not None and noise.deviate is None:
                raise ValueError(
                    "SineSPE: noise must be a PhaseNoise with deviates when bandwidth=True, got "
                    "deviate None"
                )
            fields = self._phase_fields(parameters, noise)
            return PhaseCode(*fields, size, start, positions, parameters.gains)
        fields, gate_noise = self._dense_fields(
            parameters, num_realizations, cast(Any, noise), generator, seed
        )
        return SineCode(*fields, size, start, positions, parameters.gains, gate_noise)

    def _phase_fields(
        self, parameters: SineParameters, noise: PhaseNoise
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = parameters.dtype
        bandwidths = deviates = None
        if parameters.bandwidths is not None:
            assert noise.deviate is not None
            bandwidths, deviates = parameters.bandwidths.to(dtype), noise.deviate.to(dtype)
        # A pair has the mean of squares of its amplitude's, and stands for all K sines.
        return functional.phase_code(
            *parameters.wide(), bandwidths, noise.sine, noise.cycles.to(dtype), deviates,
            code_scale(self.code_shape, 2 * noise.sine.shape[-1]),
        )  # fmt: skip

    def _dense_fields(
        self,
        parameters: SineParameters,
        num_realizations: int | None,
        noise: Tensor | None,
        generator: torch.Generator | None,
        seed: int | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        rows, gate_noise = 2 * self.num_sines, None
        shape = (*self.code_shape, rows)
        if noise is not None:
            if isinstance(noise, Tensor) and noise.dim() == 5 and noise.shape[0] == 1:
                noise = noise[0]
            check_noise("SineSPE", noise, (*shape, None), "[H, D, 2K, R]")
        num_realizations = self._realizations(num_realizations, noise)
        if noise is None and self.noise == "gaussian":
            noise = draw_normal(
                (*shape, num_realizations), generator, seed, STREAMS["code"],
                dtype=parameters.dtype, device=parameters.device,
            )  # fmt: skip
        elif noise is None:
            # The gate's noise is one more row of each feature, orthogonal to the others unless
            # these alone are exact.
            joint = not rows * self.in_features <= num_realizations < (rows + 1) * self.in_features

            def draw(count: int, stream: int) -> Tensor:
                return orthogonal_noise(
                    *self.code_shape, count, num_realizations, generator, seed=seed,
                    stream=stream, dtype=parameters.dtype, device=parameters.device,
                )  # fmt: skip

            if joint:
                noise, gate_noise = draw(rows + 1, STREAMS["code"]).split((rows, 1), dim=2)
            else:
                noise, gate_noise = draw(rows, STREAMS["code"]), draw(1, STREAMS["gate"])
            gate_noise = gate_noise.squeeze(2)
        noise = noise.to(parameters.dtype)
        scale = code_scale(self.code_shape, num_realizations) / math.sqrt(2 * self.num_sines)
        fields = functional.sine_code(*parameters.wide(), noise, scale)
        return fields, gate_noise

    @without_autocast
    def template(self, max_lag: int | Sequence[int]) -> Tensor:
        """Return the exact position kernels ``P_d(lag)``, differentiable in the parameters.

        Args:
            max_lag: largest lag, position of the query minus position of the key, in positions; one
                for all dimensions, or one each.

        Returns:
            ``[H, D, 2 * max_lag + 1]`` (a size for each dimension), lags ``-max_lag ... max_lag``.

        Raises:
            ValueError: max_lag is negative, or there are not as many as dimensions.

        Example:
            >>> SineSPE(4, 16).template(10).shape
            torch.Size([4, 16, 21])
        """
        lags = self._lags(max_lag)
        parameters = self._read_parameters()
        axes = [
            torch.arange(-lag, lag + 1, dtype=torch.float64, device=parameters.device)
            for lag in lags
        ]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
        freqs, offsets = self._cycles(parameters.freqs), parameters.wide()[1]
        # Phases in float64, reduced to one cycle: exact at any lag.
        dtype, cycles = offsets.dtype, freqs if self.ndim > 1 else freqs.unsqueeze(-1)
        cycles = torch.einsum("ni,hdki->nhdk", grid, cycles)
        phases = 2 * math.pi * (cycles - cycles.detach().round())
        basis = torch.stack((phases.cos(), phases.sin()), dim=-1).to(dtype)  # [n, H, D, K, 2]
        if parameters.bandwidths is not None:
            square = grid.square().sum(-1).to(dtype)[:, None, None, None]
            deviation = parameters.bandwidths.to(dtype).exp()
            fading = torch.exp(-2 * math.pi**2 * deviation.square() * square)  # [n, H, D, K]
            basis = basis * fading.unsqueeze(-1)
        power = kernel_amplitudes(parameters.gains) ** 2
        template = torch.einsum(
            "nhdkc,hdkc->hdn",
            basis,
            torch.stack((power * offsets.cos(), -power * offsets.sin()), dim=-1),
        )
        return template.unflatten(-1, [2 * lag + 1 for lag in lags])

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        ndim = f", ndim={self.ndim}" if self.ndim > 1 else ""
        noise = f", noise={self.noise!r}" if self.noise != "gaussian" else ""
        bandwidth = ", bandwidth=True" if self.bandwidths is not None else ""
        return (
            f"num_heads={self.num_heads}, in_features={self.in_features}, "
            f"num_realizations={self.num_realizations}, num_sines={self.num_sines}{ndim}, "
            f"init={self.init!r}{noise}{bandwidth}"
        )
