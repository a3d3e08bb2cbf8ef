"""Codes, templates, noise and decay, drawn from what the library computes."""

import math

import torch
from matplotlib import pyplot as plt
from style import BLUE, GREEN, GREY, ORANGE, RED, WIDTH, save

from torch_spe import (
    ConvSPE,
    Decay,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
)


def draw_codes(folder):
    """A code is noise; products of codes, averaged over realizations, are not."""
    length, lags = 129, 64
    spe = SineSPE(1, 1, num_sines=4)
    with torch.no_grad():
        spe.freqs.copy_(torch.tensor([0.012, 0.02, 0.031, 0.055]).mul(2).logit())
        spe.offsets.zero_()
        spe.gains.fill_(math.log(math.expm1(math.sqrt(2))))  # template of 1 at lag 0

    def codes(realizations):  # -> [N, R] twice
        with torch.no_grad():
            pair = spe((1, length), realizations, seed=5).materialize()
        # As in the paper: the library's are smaller by R^(1/4), which saves a division later.
        return [code[0, :, 0, 0] * realizations**0.25 for code in pair]

    figure, (above, below) = plt.subplots(2, figsize=(WIDTH, 5))
    for r, color in enumerate((BLUE, ORANGE, GREEN)):
        above.plot(codes(64)[0][:, r], color=color, linewidth=1.2, label=f"realization {r + 1}")
    above.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    above.set(title="Codes are random waves", xlabel="position n", xlim=(0, 128), ylim=(-4, 4))
    above.set_ylabel(r"$\bar Q_d(n)$")
    above.legend(loc="upper right", ncols=3)

    lag = torch.arange(-lags, lags + 1)
    for realizations, color in ((16, ORANGE), (256, GREEN), (4096, BLUE)):
        qbar, kbar = codes(realizations)
        label = f"R = {realizations}"
        below.plot(lag, (qbar * kbar[lags]).mean(-1), color=color, linewidth=1.2, label=label)
    exact = spe.template(lags)[0, 0].detach()
    below.plot(lag, exact, color="black", linestyle="--", linewidth=1.2, label="template")
    below.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    below.set(
        title="Averages of their products are a function of the lag",
        xlabel="lag m - n of query and key", xlim=(-lags, lags), ylim=(-0.75, 1.5),
    )  # fmt: skip
    below.set_ylabel(r"$\bar Q_d(m)\, \bar K_d(n)$")
    below.legend(loc="upper right", ncols=4)
    save(figure, folder, "method_codes")


def draw_templates(folder):
    """What positions of each kind can express: templates of three features."""
    torch.manual_seed(6)
    lags = 48
    sine = SineSPE(1, 3, num_sines=1, init="spread", noise="exact")
    with torch.no_grad():
        sine.freqs.copy_(torch.tensor([0.012, 0.03, 0.085]).mul(2).logit().view(1, 3, 1))
        sine.offsets.copy_(torch.tensor([0.0, 0.6, -0.5]).view(1, 3, 1))
    bounded = SineSPE(1, 3, num_sines=1, init="spread", noise="phase", bandwidth=True)
    bounded.load_state_dict({**sine.state_dict(), "bandwidths": torch.full((1, 3, 1), -4.6)})
    conv = ConvSPE(1, 1, 3, kernel_size=24)
    with torch.no_grad():
        tap = torch.arange(24.0)
        for kernel, shift in ((conv.query_kernel, 0), (conv.key_kernel, 2)):
            kernel.copy_(torch.stack([
                torch.exp(-(((tap - 11 - shift) / 3) ** 2)),
                torch.exp(-tap / 6) * torch.cos(tap),
                torch.where((tap > 4) & (tap < 15 + shift), 1.0, 0.0),
            ])[None])  # fmt: skip
        for kernel in (conv.query_kernel, conv.key_kernel):
            kernel.div_(kernel.norm(dim=-1, keepdim=True))
    decay = torch.exp(-torch.arange(-lags, lags + 1).abs() / 14.0)
    panels = {
        "sines, \"exact\"": sine.template(lags)[0],
        "sines and a decay, \"fading\"": sine.template(lags)[0] * decay,
        "bandwidths, \"sine\"": bounded.template(lags)[0],
        "any function up to a lag, \"conv\"": conv.template(lags)[0],
    }  # fmt: skip
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.2), sharex=True, sharey=True)
    for panel, (title, templates) in zip(axes.flat, panels.items(), strict=True):
        for template, color in zip(templates.detach(), (BLUE, ORANGE, GREEN), strict=True):
            panel.plot(torch.arange(-lags, lags + 1), template, color=color, linewidth=1.3)
        panel.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        panel.set_title(title)
    for panel in axes[1]:
        panel.set_xlabel("lag")
    for panel in axes[:, 0]:
        panel.set_ylabel(r"$P_d$")
    save(figure, folder, "method_templates")


def draw_noise(folder):
    """The estimate of one attention matrix with more and more realizations, and its error."""
    torch.manual_seed(3)
    length, features = 64, 16
    q, k = (torch.rand(1, length, 1, features) for _ in range(2))  # features that are positive
    sines = {"num_sines": 4, "init": "spread"}
    exact = SineSPE(1, features, noise="exact", **sines)
    with torch.no_grad():  # one template for all features, so that a structure is seen
        exact.freqs.copy_(torch.tensor([0.003, 0.0625, 0.125, 0.1875]).mul(2).logit())
        exact.offsets.zero_()
    noisy = SineSPE(1, features, noise="phase", **sines)
    noisy.load_state_dict(exact.state_dict())
    filt = SPEFilter(gated=False)

    def weights(spe, realizations, seed):
        with torch.no_grad():
            code = spe((1, length), realizations, seed=seed)
            qhat, khat = (encoded[0, :, 0] for encoded in filt(q, k, code))  # [N, R]
            return qhat @ khat.T / math.sqrt(qhat.shape[1])

    truth = weights(exact, None, 0)
    figure = plt.figure(figsize=(WIDTH, 4.4))
    rows = figure.subfigures(2, height_ratios=(1, 1.6))
    counts = (16, 64, 256, 4096)
    images = [weights(noisy, realizations, 0) for realizations in counts]
    limit = truth.abs().max().item()
    panels = rows[0].subplots(1, 5)
    for panel, image, title in zip(
        panels, [*images, truth], [*(f"R = {n}" for n in counts), "exact"], strict=True
    ):
        panel.imshow(image, vmin=-limit, vmax=limit, cmap="RdBu_r")
        panel.set(title=title, xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    panels[0].set_ylabel("queries")
    panels[2].set_xlabel("keys")

    axes = rows[1].subplots()
    counts = [2**n for n in range(4, 14)]
    root = truth.square().mean().sqrt()
    errors = []
    for realizations in counts:
        squares = [
            (weights(noisy, realizations, seed) - truth).square().mean() for seed in range(8)
        ]
        errors.append((torch.stack(squares).mean().sqrt() / root).item())
    expected = [errors[-1] * math.sqrt(counts[-1] / n) for n in counts]
    axes.loglog(counts, expected, color=GREY, linestyle="--", label=r"$1/\sqrt{R}$")
    axes.loglog(counts, errors, "o", color=RED, markersize=5, label="measured")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_yticks([1, 0.3, 0.1, 0.03], ["100 %", "30 %", "10 %", "3 %"])
    axes.yaxis.minorticks_off()
    axes.set(
        title="Error of an entry, relative to the size of the matrix",
        xlabel="realizations R, which are features of queries and keys",
    )
    axes.legend()
    save(figure, folder, "method_noise")


def draw_decay(folder):
    """Heads fade at their own rates; the same layer with and without a decay."""
    figure = plt.figure(figsize=(WIDTH, 4.9))
    rows = figure.subfigures(2, height_ratios=(1, 1.25))
    axes = rows[0].subplots()
    lag = torch.logspace(0, 6, 200)
    for step, color in zip(Decay(4)().detach(), (ORANGE, GREEN, BLUE, RED), strict=True):
        tau = -1 / step.item()
        axes.semilogx(lag, torch.exp(step * lag), color=color)
        text = f"{float(f'{tau:.2g}'):,.0f}".replace(",", " ")
        axes.text(tau * 1.15, 0.4, rf"$\tau$ = {text}", color=color, fontsize=9)
    axes.set(
        title="What four heads still see of a token, at the start of training",
        xlabel="lag", ylabel=r"$e^{-\mathrm{lag}/\tau}$", xlim=(1, 2e6), ylim=(0, 1.05),
    )  # fmt: skip

    torch.manual_seed(1)
    x = torch.randn(1, 96, 32)
    panels = rows[1].subplots(1, 3)
    images = []
    for position, options in (("exact", {}), ("fading", {"decay_range": (8, 48)})):
        torch.manual_seed(2)
        layer = SPEMultiheadAttention(32, 2, batch_first=True, position=position, **options).eval()
        with torch.no_grad():
            weights = layer.attention_weights(x, is_causal=True)[0]
        images.append(weights / weights.norm(dim=-1, keepdim=True))  # rows of one size
    fading = images.pop()
    titles = ("no decay", r"$\tau$ = 48", r"$\tau$ = 8")
    for panel, image, title in zip(
        panels, (images[0][1], fading[1], fading[0]), titles, strict=True
    ):
        panel.imshow(image, vmin=-0.5, vmax=0.5, cmap="RdBu_r")
        panel.set(title=title, xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    panels[0].set_ylabel("queries")
    panels[1].set_xlabel("keys")
    save(figure, folder, "method_decay")


def draw(folder):
    draw_codes(folder)
    draw_templates(folder)
    draw_noise(folder)
    draw_decay(folder)
